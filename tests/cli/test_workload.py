"""Options that cannot be, for every command that trains: one line, and nothing is started."""

from __future__ import annotations

import pytest

WRONG = {
    # option, value: what the complaint must mention beside the value
    ("--rate", "fast"): "number from 0",
    ("--rate", "-0.1"): "number from 0",
    ("--rate", "nan"): "number from 0",
    ("--rate", "inf"): "number from 0",
    ("--weight-decay", "-1"): "number from 0",
    ("--steps", "0"): "whole number from 1",
    ("--steps", "-3"): "whole number from 1",
    ("--steps", "2.5"): "whole number from 1",
    ("--epochs", "0"): "whole number from 1",
    ("--workers", "0"): "whole number from 1",
    ("--workers", "two"): "whole number from 1",
    ("--batch", "0"): "whole number from 1",
    ("--threads", "0"): "whole number from 1",
    ("--seed", "-1"): "whole number from 0",
    ("--seed", "x"): "whole number from 0",
    ("--augment", "flop"): "expected none, or shift:PIXELS",
    ("--augment", "shift:-1"): "expected none, or shift:PIXELS",
    ("--augment", "crop:"): "expected none, or shift:PIXELS",
    ("--label-smoothing", "1"): "number from 0 to below 1",
    ("--label-smoothing", "some"): "number from 0 to below 1",
    ("--rule", "sdg"): "did you mean sgd?",
    ("--rule", "momentum:2"): "expected at least 0 and below 1",
    ("--rule", "momentum:much"): "is not a number",
    ("--rule", "sgd:1"): "at most 0 numbers",
    ("--rate-schedule", "cosinus"): "did you mean cosine?",
    ("--rate-schedule", "step:10"): "step:EVERY:FACTOR",
    ("--rate-schedule", "step:0:0.5"): "expected at least 1",
    ("--rate-schedule", "constant,warm:3"): "warmup:STEPS",
    ("--model", "lennet"): "did you mean 'lenet'?",
    ("--model", "no.such.module:net"): "cannot import 'no.such.module'",
    ("--model", "math:no_such_function"): "has no function 'no_such_function'",
    ("--model", "math:pi"): "has no function 'pi'",
    ("--model", ":"): "cannot import ''",
    ("--model", "math:"): "has no function ''",
    ("--model", "mine.nets:number"): "expected a Network",
    ("--model", "mine.nets:broken"): "out of ideas",
    ("--data", "mnits"): "did you mean mnist?",
    ("--data", "synthetic:0:1"): "at least 1",
    ("--data", "synthetic:many"): "synthetic:TRAIN:TEST",
    ("--data", "mnist"): "--data-dir",
}
LINKS = {
    ("--bandwidth", "fast"): "100mbit",
    ("--bandwidth", "0mbit"): "--bandwidth",
    ("--bandwidth", "-5mbit"): "--bandwidth",
    ("--bandwidth-up", "nan"): "--bandwidth-up",
    ("--delay", "-1ms"): "--delay",
    ("--delay", "5"): "--delay",
    ("--overhead", "soon"): "--overhead",
    ("--schedule", "100mbit"): "--schedule",
}
STRATEGIES = {
    ("--strategies", "dynacomm,dynacomm"): "once",
    ("--strategies", "dynacom"): "dynacomm",
    ("--strategies", ""): "dynacomm",
    ("--steps", "3"): "too few to compare",
}
CASES = [
    *(("serve", *case, word) for case, word in WRONG.items()),
    *(("train", *case, word) for case, word in {**WRONG, **LINKS}.items()),
    *(("compare", *case, word) for case, word in {**WRONG, **LINKS, **STRATEGIES}.items()),
    *(("profile", *case, word) for case, word in LINKS.items()),
    *((name, "--strategy", "dynacom", "dynacomm") for name in ("serve", "train")),
    *((name, "--model", "lennet", "did you mean 'lenet'?") for name in ("demo", "profile")),
]


@pytest.mark.parametrize(("command", "option", "value", "word"), CASES)
def test_a_wrong_value_is_refused_in_one_line_that_says_what_is_expected(
    call, user_model, monkeypatch, command, option, value, word
):
    monkeypatch.chdir(user_model)

    outcome = call(command, "--data", "synthetic:64:8", f"{option}={value}")

    assert outcome.code in (1, 2)
    assert word in outcome.complaint
    assert value.partition(":")[0] in outcome.complaint


@pytest.mark.parametrize("command", ["serve", "train", "compare"])
def test_steps_and_epochs_exclude_each_other(call, command):
    outcome = call(command, "--steps", "3", "--epochs", "3")
    assert outcome.code == 2
    assert "--epochs" in outcome.complaint


@pytest.mark.parametrize("command", ["serve", "train", "compare", "profile", "demo"])
def test_a_data_folder_that_does_not_exist_is_named(call, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    outcome = call(command, "--data", "mnist", "--data-dir", tmp_path / "nowhere")
    assert outcome.code == 1
    assert str(tmp_path / "nowhere") in outcome.complaint.splitlines()[-1]
    assert "does not exist" in outcome.complaint


def test_a_data_folder_without_the_data_is_named(call, tmp_path):
    outcome = call("train", "--data", "cifar10", "--model", "resnet20", "--data-dir", tmp_path)
    assert outcome.code == 1
    assert str(tmp_path) in outcome.complaint


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("serve", "--save"),
        ("train", "--save"),
        ("compare", "--save-costs"),
        ("profile", "--output"),
    ],
)
def test_results_cannot_go_into_a_folder_that_does_not_exist(call, tmp_path, command, option):
    path = tmp_path / "nowhere" / "file"
    outcome = call(command, "--data", "synthetic:64:8", option, path)
    assert outcome.code == 1
    assert f"the folder {path.parent} does not exist" in outcome.complaint


@pytest.mark.parametrize("command", ["serve", "train", "compare"])
def test_fewer_images_than_one_step_takes_are_refused(call, command):
    outcome = call(command, "--data", "synthetic:8:8", "--workers", "2", "--batch", "5")
    assert outcome.code == 1
    assert "8 images are too few" in outcome.complaint
    assert "at least 10" in outcome.complaint


@pytest.mark.parametrize("command", ["serve", "train", "compare"])
def test_batch_norm_with_one_image_a_batch_is_refused_before_anything_is_started(call, command):
    outcome = call(command, "--data", "synthetic:64:8", "--model", "resnet20", "--batch", "1")
    assert outcome.code == 1
    assert "at least 2" in outcome.complaint
