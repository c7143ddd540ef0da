"""What commands print."""

from __future__ import annotations

import io
import json
import sys
import time
from math import inf, nan

import pytest

from dynacomm_async.cli.output import (
    Progress,
    check_writable,
    decimal,
    emit,
    print_json,
    say,
    seconds,
    table,
    to_json,
)
from dynacomm_async.errors import ConfigError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_silent_where_there_is_no_terminal(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    progress = Progress("step", 2)
    progress.update(2, loss=1.0, images=8)
    progress.close()
    assert stream.getvalue() == ""


def test_progress_at_a_terminal_is_one_line_that_is_wiped_at_the_end(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    progress = Progress("step", 2)
    progress.update(1, loss=1.25, images=8)
    progress.update(2, loss=0.5, images=8)
    progress.close()
    text = stream.getvalue()
    assert "step 2/2  loss 0.5000  " in text
    assert "images/s" in text
    assert "\n" not in text
    assert text.endswith("\r")


def test_progress_keeps_to_ten_lines_a_second(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    progress = Progress("step", 10_000)
    for done in range(1, 1000):
        progress.update(done)
    assert stream.getvalue().count("step") <= 3


def test_an_event_is_one_line_of_json(capsys):
    emit("step", index=1, loss=None)
    assert capsys.readouterr().out == '{"event": "step", "index": 1, "loss": null}\n'


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.0123, "12.30 ms"), (1.0, "1.000 s"), (0.0, "0.00 ms")]
)
def test_durations_have_a_unit_that_suits_them(value, text):
    assert seconds(value) == text


def test_tables_are_aligned():
    text = table(["name", "n"], [["a", "1"], ["long name", "20"]])
    assert text.splitlines() == [
        "name        n",
        "---------  --",
        "a           1",
        "long name  20",
    ]


def test_a_place_that_can_be_written_is_accepted_and_left_alone(tmp_path):
    check_writable(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["no/file", "."])
def test_a_place_that_cannot_be_written_is_refused(tmp_path, where):
    with pytest.raises(ConfigError, match="cannot write"):
        check_writable(tmp_path / where)


def test_progress_counts_time_and_images_from_the_first_update_on(monkeypatch):
    stream, now = Terminal(), 100.0
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = Progress("step", 9)
    now = 1000.0  # waiting for workers
    progress.update(1, images=8)
    assert "images/s" not in stream.getvalue()
    now += 2.0
    progress.update(2, images=10)
    assert stream.getvalue().endswith("5 images/s")


def test_what_is_said_meanwhile_gets_a_line_of_its_own(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    progress = Progress("step", 9)
    progress.update(1)
    say("one")
    say("two")
    assert stream.getvalue().endswith("\r" + " " * len("step 1/9") + "\rone\ntwo\n")


def refuse_constant(text):
    raise AssertionError(f"{text} is not JSON")


def test_json_has_null_for_what_json_cannot_say(capsys):
    value = {"loss": [1.5, nan, inf, -inf, None], "n": (1, {"x": nan}), "text": "NaN", "yes": True}
    print_json(value)
    emit("step", loss=nan)
    printed, emitted = capsys.readouterr().out.splitlines()
    assert printed == to_json(value)
    assert json.loads(printed, parse_constant=refuse_constant) == {
        "loss": [1.5, None, None, None, None],
        "n": [1, {"x": None}],
        "text": "NaN",
        "yes": True,
    }
    assert json.loads(emitted, parse_constant=refuse_constant) == {"event": "step", "loss": None}


@pytest.mark.parametrize(
    ("value", "text"), [(1.0, "1.0000"), (None, "-"), (nan, "-"), (inf, "-"), (0.00005, "0.0001")]
)
def test_a_loss_that_is_no_number_is_a_dash(value, text):
    assert decimal(value) == text
