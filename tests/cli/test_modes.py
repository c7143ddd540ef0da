"""``--on-leave``, ``--quorum``, ``--staleness``, ``--max-gradient`` from the command line."""

from __future__ import annotations

import pytest

QUICK = ("--model", "mlp", "--data", "synthetic:640:64", "--batch", "8", "--workers", "2")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--on-leave", "stop"), "on_leave is 'stop', expected end, shrink, wait"),
        (("--quorum", "3", "--strategy", "dynacomm"), "a quorum of 3 among 2 workers"),
        (("--quorum", "1"), "joint sends parameters before a step is over, but a quorum"),
        (("--staleness", "0"), "joint sends parameters before a step is over, but staleness 0"),
        (("--on-leave", "wait"), "joint sends parameters before a step is over, but a replacement"),
        (("--quorum", "1", "--staleness", "1"), "choose one of them"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "train"])
def test_what_does_not_go_together_is_one_line_that_says_what_does(call, command, options, words):
    where = ("--listen", "127.0.0.1:0") if command == "serve" else ()
    outcome = call(command, *QUICK, "--steps", "2", *where, *options)
    assert outcome.code == 1
    assert words in outcome.complaint


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--quorum", "0"), "'0' is not a whole number from 1"),
        (("--staleness", "-1"), "'-1' is not a whole number from 0, or inf"),
        (("--staleness", "1.5"), "'1.5' is not a whole number from 0, or inf"),
        (("--max-gradient", "much"), "'much' is not a number from 0"),
        (("--refusals", "none"), "'none' is not a whole number from 1"),
    ],
)
def test_what_is_no_number_is_refused_by_name(call, options, words):
    outcome = call("serve", *QUICK, f"{options[0]}={options[1]}")
    assert outcome.code == 2
    assert options[0] in outcome.complaint
    assert words in outcome.complaint


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [
        ("--quorum", "1", "--strategy", "dynacomm"),
        ("--staleness", "inf"),
        ("--staleness", "2", "--strategy", "layerwise"),
        ("--on-leave", "shrink"),
    ],
)
def test_every_mode_trains_to_its_end(run, mode):
    outcome = run("train", *QUICK, "--steps", "12", *mode, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["steps"] == 12
    assert outcome.json["loss"] is not None


def test_a_run_is_resumed_in_the_mode_that_it_began_in(run, tmp_path):
    kept = ("--checkpoint-dir", str(tmp_path / "kept"), "--checkpoint-every", "4")
    outcome = run("train", *QUICK, "--steps", "8", *kept, "--staleness", "1", "--json")
    assert outcome.code == 0, outcome.err
    outcome = run("train", *QUICK, "--steps", "8", *kept, "--resume")
    assert outcome.code == 1
    assert "the checkpoint is of a run with on_leave 'shrink', not 'end'" in outcome.err
