"""Options that cannot be, for every command that trains: one line, and nothing is started."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save_file

from dynacomm_async.cli import workload
from dynacomm_async.cli.workload import load_workload
from dynacomm_async.models import build
from dynacomm_async.nn import to_tensors

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
    assert "model resnet20, layer bn1: a batch of 1 image" in outcome.complaint
    assert "expected --batch of at least 2" in outcome.complaint


MISFITS = """
from dynacomm_async.nn import Conv2d, Dense, Flatten, MaxPool, Network, Residual

def make(parts, input_shape, classes):
    return Network("mine", [*parts, Flatten(), Dense(classes)], input_shape, classes)

def window(input_shape=(6, 6, 1), classes=10):
    return make([Conv2d(4, 3, name="first"), Conv2d(4, 5, name="second")], input_shape, classes)

def block(input_shape=(6, 6, 1), classes=10):
    return make([Residual([Conv2d(4, 3, padding=1)], name="b")], input_shape, classes)

def groups(input_shape=(6, 6, 1), classes=10):
    return make([Conv2d(9, 3, name="first"), Conv2d(8, 1, groups=4)], input_shape, classes)

def logits(input_shape=(6, 6, 1), classes=10):
    return Network("mine", [Flatten(), Dense(7)], input_shape, classes)

def few(input_shape=(6, 6, 1), classes=7):
    return make([], input_shape, classes)

def channels(input_shape=(6, 6, 4), classes=10):
    return make([], input_shape, classes)
"""


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("window", "layer second: the input is 4x4 with a border of 0x0, expected at least the"),
        ("block", "layer b.add1: the body gives (6, 6, 4) and the shortcut (6, 6, 1), expected"),
        ("groups", "layer conv1: the input has 9 channels, expected a multiple of the 4 groups"),
        ("logits", "model mine gives shape (7,) for each image, expected one logit for each"),
        ("few", "digits has 10 classes, but the model has 7 outputs"),
        ("channels", "digits images have 1 channels and the model takes 4"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "train"])
def test_what_does_not_fit_together_is_named_before_anything_is_started(
    call, tmp_path, monkeypatch, command, model, words
):
    (tmp_path / "misfits.py").write_text(MISFITS)
    monkeypatch.syspath_prepend(tmp_path)
    outcome = call(command, "--model", f"misfits:{model}", "--workers", "2")
    assert outcome.code == 1
    assert words in outcome.complaint


@pytest.mark.parametrize("command", ["serve", "train"])
def test_a_label_out_of_range_is_named_before_anything_is_started(call, tmp_path, command):
    for name, count in (("train", 8), ("t10k", 4)):
        pixels = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28) + bytes(count * 28 * 28)
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(pixels)
        labels = struct.pack(">4BI", 0, 0, 8, 1, count) + bytes([9] * (count - 1) + [17])
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(labels)
    outcome = call(command, "--data", "mnist", "--data-dir", tmp_path, "--workers", "1")
    assert outcome.code == 1
    assert "train-labels-idx1-ubyte: label 17, expected 0 to 9" in outcome.complaint


@pytest.mark.parametrize("command", ["serve", "train"])
def test_weights_of_another_dtype_are_named_before_anything_is_started(call, tmp_path, command):
    network = build("mlp")
    tensors = to_tensors(network, network.initialise(0), network.initial_statistics())
    path = tmp_path / "whole.safetensors"
    save_file(tensors | {"fc2.bias": np.zeros(64, np.int64)}, path)
    outcome = call(
        command, "--data", "synthetic:64:8", "--model", "mlp", "--workers", "2", "--init", path
    )
    assert outcome.code == 1
    words = "it does not fit model mlp: fc2.bias is int64 of shape (64,) instead of floats of (64,)"
    assert words in outcome.complaint


def test_few_images_are_evaluated_at_a_time_where_activations_are_large(monkeypatch):
    settings = {"model": "resnet20", "data": "synthetic:64:50", "augment": "none", "batch": 2}
    loaded = load_workload(settings | {"seed": 0, "workers": 1})
    network = loaded.network
    parameters, statistics = network.initialise(0), network.initial_statistics()

    def evaluate():
        tracemalloc.start()
        try:
            accuracy = loaded.accuracy(parameters, statistics)
            return accuracy, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    expected, together_nbytes = evaluate()
    monkeypatch.setattr(workload, "_EVALUATED_FLOATS", 1)
    accuracy, nbytes = evaluate()
    assert accuracy == expected
    assert nbytes < together_nbytes / 4, "50 images at a time, and then one"
