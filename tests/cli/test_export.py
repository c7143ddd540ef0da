"""``dynacomm export`` and ``--init``: weights out of one run and into another."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dynacomm_async.models import build, load_weights, save_run, save_weights


@pytest.fixture
def saved(tmp_path):
    """A file as --save writes it, and what is in it."""
    network = build("mlp")
    parameters = network.initialise(5)
    path = tmp_path / "model.npz"
    save_run(path, network, parameters, network.initial_statistics(), model="mlp")
    return path, parameters


def test_what_was_saved_is_written_as_pytorch_reads_it(call, saved, tmp_path):
    path, parameters = saved
    out = tmp_path / "model.safetensors"
    outcome = call("export", path, "-o", out)
    assert outcome.code == 0, outcome.err
    assert outcome.err == f"109,386 parameters of mlp written to {out}\n"
    tensors = load_file(out)
    assert tensors["fc1.weight"].shape == (128, 784)
    first = parameters[: 784 * 128].reshape(784, 128)
    assert np.array_equal(tensors["fc1.weight"], first.T)
    assert np.array_equal(load_weights(out, build("mlp"))[0], parameters)


def test_a_run_begins_with_the_weights_it_is_given(run, quick, saved, tmp_path):
    path, parameters = saved
    weights, after = tmp_path / "model.safetensors", tmp_path / "after.npz"
    network = build("mlp")
    save_weights(weights, network, parameters, network.initial_statistics())
    still = ("--model", "mlp", "--steps", "2", "--rate", "0", "--weight-decay", "0")
    for init in (weights, path):
        outcome = run("train", *quick, *still, "--init", init, "--save", after)
        assert outcome.code == 0, outcome.err
        assert np.array_equal(load_weights(after, network)[0], parameters)


@pytest.mark.parametrize("command", ["serve", "train"])
def test_weights_that_do_not_fit_are_refused_before_anything_is_started(
    call, quick, saved, tmp_path, command
):
    path, _ = saved
    outcome = call(command, *quick, "--model", "lenet", "--workers", "2", "--init", path)
    assert f"{path}: model lenet expects layer conv1" in outcome.complaint
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": np.zeros((2, 2), np.float32)}, foreign)
    outcome = call(command, *quick, "--model", "mlp", "--workers", "2", "--init", foreign)
    assert f"{foreign}: model mlp misses fc1.weight" in outcome.complaint
    missing = tmp_path / "nowhere.safetensors"
    outcome = call(command, *quick, "--model", "mlp", "--workers", "2", "--init", missing)
    assert f"{missing}: cannot be read as safetensors" in outcome.complaint


def test_a_file_that_does_not_say_its_model_needs_an_option(call, saved, tmp_path):
    path, parameters = saved
    bare = tmp_path / "bare.npz"
    with np.load(path) as arrays:
        np.savez(bare, **{name: arrays[name] for name in arrays.files if name != "model.name"})
    out = tmp_path / "model.safetensors"
    assert "give --model" in call("export", bare, "-o", out).complaint
    assert call("export", bare, "--model", "mlp", "-o", out).code == 0
    assert np.array_equal(load_weights(out, build("mlp"))[0], parameters)


def test_what_cannot_be_exported_is_refused_in_one_line(call, saved, tmp_path):
    path, _ = saved
    out = tmp_path / "model.safetensors"
    assert "cannot be read as .npz" in call("export", tmp_path / "no.npz", "-o", out).complaint
    assert "neither a checkpoint" in call("export", tmp_path, "-o", out).complaint
    wrong = call("export", path, "-o", out, "--model", "lenet")
    assert "model lenet expects layer conv1" in wrong.complaint
    nowhere = tmp_path / "nowhere" / "model.safetensors"
    assert "does not exist" in call("export", path, "-o", nowhere).complaint
