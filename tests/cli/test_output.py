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
    step_notes,
    table,
    to_json,
)
from dynacomm_async.errors import ConfigError
from dynacomm_async.schedule import Costs, LayerCosts, make_plan
from dynacomm_async.schedule.account import account_for, expect


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


def test_a_log_has_a_line_after_every_tenth_of_the_way(monkeypatch, capsys):
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    progress = Progress("step", 30, log=True)
    for done in range(1, 31):
        progress.update(done, loss=0.5, notes=["step 7.00 ms"])
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"step {done}/30  loss 0.5000  step 7.00 ms" for done in range(3, 31, 3)]


def test_a_log_has_a_line_whenever_ten_seconds_have_passed(monkeypatch, capsys):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = Progress("step", 10_000, log=True)
    for done in range(1, 8):
        progress.update(done)
        now += 4.0
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["step 4/10000", "step 7/10000"]


def test_a_line_of_progress_leaves_out_what_does_not_fit_the_terminal(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "30")
    progress = Progress("step", 2)
    progress.update(2, loss=1.25, notes=["hidden 50%", "1.08 x bound"])
    assert stream.getvalue() == "\rstep 2/2  loss 1.2500"


def test_a_step_is_noted_with_what_is_known_of_it():
    costs = Costs((LayerCosts("a", 1, 10**7, 10**7, 10**7, 10**7),), 0, 0)
    expectation = expect(make_plan("sequential", costs), costs)
    times = {"step_ns": 44_000_000, "compute_ns": 20_000_000, "stalled_ns": 0}
    known = account_for(1, **times, expectation=expectation)

    assert step_notes(None) == []
    assert step_notes(0.05, account_for(1, **times)) == ["step 50.00 ms"]
    assert step_notes(0.05, known) == ["step 50.00 ms", "hidden 0%", "1.47 x bound"]
