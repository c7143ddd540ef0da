"""Weights in files: written, read, and refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dynacomm_async.errors import ConfigError, ShapeError
from dynacomm_async.models import build, load_weights, read_run, save_run, save_weights
from dynacomm_async.nn import (
    BatchNorm,
    Branches,
    Conv2d,
    Dense,
    Dropout,
    Flatten,
    GlobalAvgPool,
    MaxPool,
    Network,
    ReLU,
    Residual,
    from_tensors,
    to_tensors,
)


@pytest.fixture
def network():
    parts = [
        Conv2d(4, 3, padding=1, bias=False, name="conv1"),
        BatchNorm(name="bn1"),
        ReLU(),
        Conv2d(8, (1, 3), groups=2, name="conv2"),
        MaxPool(2),
        Flatten(),
        Dropout(),
        BatchNorm(name="bn2"),
        Dense(5, name="fc1"),
        Residual([Dense(5, bias=False, name="inner")], name="block"),
        Dense(3, name="fc2"),
    ]
    return Network("sample", parts, (6, 8, 2), 3)


@pytest.fixture
def arenas(network):
    generator = np.random.default_rng(0)
    return [
        generator.standard_normal(count).astype(np.float32)
        for count in (network.parameters, network.statistics)
    ]


def test_tensors_have_the_names_and_shapes_of_pytorch(network, arenas):
    tensors = to_tensors(network, *arenas)
    assert {name: array.shape for name, array in tensors.items()} == {
        "conv1.weight": (4, 2, 3, 3),
        "bn1.weight": (4,),
        "bn1.bias": (4,),
        "bn1.running_mean": (4,),
        "bn1.running_var": (4,),
        "bn1.num_batches_tracked": (),
        "conv2.weight": (8, 2, 1, 3),
        "conv2.bias": (8,),
        "bn2.weight": (72,),
        "bn2.bias": (72,),
        "bn2.running_mean": (72,),
        "bn2.running_var": (72,),
        "bn2.num_batches_tracked": (),
        "fc1.weight": (5, 72),
        "fc1.bias": (5,),
        "block.inner.weight": (5, 5),
        "fc2.weight": (3, 5),
        "fc2.bias": (3,),
    }


def test_every_element_is_where_pytorch_looks_for_it(network, arenas):
    tensors = to_tensors(network, *arenas)
    parameters, statistics = arenas
    convolution = parameters[: 3 * 3 * 2 * 4].reshape(3, 3, 2, 4)
    assert tensors["conv1.weight"][3, 1, 2, 0] == convolution[2, 0, 1, 3]
    assert np.array_equal(tensors["bn1.running_var"], statistics[4:8])
    # conv1, bn1 and conv2 with its bias, then 72 gammas of 3 x 3 pixels with 8 channels.
    gammas = parameters[72 + 8 + 48 + 8 :][:72].reshape(3, 3, 8)
    assert tensors["bn2.weight"][5 * 9 + 1 * 3 + 2] == gammas[1, 2, 5]
    weights = parameters[72 + 8 + 48 + 8 + 144 :][: 72 * 5].reshape(3, 3, 8, 5)
    assert tensors["fc1.weight"][4, 5 * 9 + 1 * 3 + 2] == weights[1, 2, 5, 4]


@pytest.mark.parametrize("name", ["lenet", "resnet20", "mobilenet_v2", "googlenet"])
def test_weights_come_back_bit_for_bit(name, tmp_path):
    network = build(name)
    parameters = network.initialise(3)
    statistics = np.random.default_rng(1).random(network.statistics, np.float32)
    path = tmp_path / "model.safetensors"
    save_weights(path, network, parameters, statistics)
    again = load_weights(path, network)
    assert again[0].tobytes() == parameters.tobytes()
    assert again[1].tobytes() == statistics.tobytes()


def test_half_and_double_precision_are_read(network, arenas):
    for dtype in (np.float16, np.float64):
        tensors = {
            name: array.astype(dtype)
            for name, array in to_tensors(network, *arenas).items()
            if "tracked" not in name
        }
        parameters, statistics = from_tensors(network, tensors)
        assert (parameters.dtype, statistics.dtype) == (np.float32, np.float32)
        np.testing.assert_allclose(parameters, arenas[0], rtol=1e-3, atol=1e-6)


def test_a_run_comes_back_as_it_was_saved(network, arenas, tmp_path):
    path = tmp_path / "model.npz"
    save_run(path, network, *arenas, model="sample")
    assert read_run(path).model == "sample"
    for mine, came in zip(arenas, load_weights(path, network), strict=True):
        assert mine.tobytes() == came.tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("fc1.bias"), "model sample misses fc1.bias$"),
        (
            lambda t: t.update({"head.bias": t.pop("fc2.bias")}),
            "misses fc2.bias; it has head.bias instead",
        ),
        (lambda t: t.update(extra=t["fc1.bias"]), "model sample has no layer for extra"),
        (
            lambda t: t.update({"fc2.weight": np.zeros((10, 5), np.float32)}),
            r"sample: fc2.weight is float32 of shape \(10, 5\) instead of floats of \(3, 5\)$",
        ),
        (
            lambda t: t.update({"fc2.bias": np.zeros(3, np.int64)}),
            "fc2.bias is int64 of shape",
        ),
        (
            lambda t: t.update({name: np.zeros((7, 7), np.float32) for name in list(t)[5:-1]}),
            r": conv2.weight is .*\(7, 7\) instead .* \(8, 2, 1, 3\), conv2.bias is .* and 7 more$",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if "bn" in name],
            r"misses bn1.weight, bn1.bias, bn1.running_mean and 5 more$",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_one_line(
    network, arenas, tmp_path, change, message
):
    tensors = to_tensors(network, *arenas)
    change(tensors)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    with pytest.raises(ShapeError, match=message) as caught:
        load_weights(path, network)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.safetensors", "a.npz"])
@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 cut off", b"\xff" * 64])
def test_files_of_another_kind_are_refused_in_one_line(network, tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read as") as caught:
        load_weights(path, network)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_saved_run_of_another_model_is_refused(network, arenas, tmp_path):
    path = tmp_path / "model.npz"
    save_run(path, network, *arenas, model="sample")
    with pytest.raises(ShapeError, match="model mlp expects layer fc1 of"):
        load_weights(path, build("mlp"))


def test_a_saved_run_of_something_else_than_floats_is_refused(network, arenas, tmp_path):
    path = tmp_path / "model.npz"
    save_run(path, network, *arenas, model="sample")
    with np.load(path) as archive:
        arrays = dict(archive)
    for wrong in (arrays["fc1"].astype(np.int32), arrays["fc1"].astype("U8")):
        np.savez(path, **(arrays | {"fc1": wrong}))
        with pytest.raises(ShapeError, match=r"expects layer fc1 of \(365,\) floats, but there is"):
            load_weights(path, network)


def test_the_newest_checkpoint_is_read(network, arenas, tmp_path):
    for number, factor in ((9, 3), (10, 1)):
        checkpoint = tmp_path / f"{number:06d}-step-{number}"
        checkpoint.mkdir()
        rows = [[layer.name, layer.count, layer.decay, 0] for layer in network.layers]
        about = {"settings": {"model": "sample"}, "layers": rows}
        (checkpoint / "checkpoint.json").write_text(json.dumps(about))
        parameters, statistics, start, moment = {}, {}, 0, 0
        for layer in network.layers:
            end, later = start + layer.count, moment + layer.statistics
            parameters[layer.name] = factor * arenas[0][start:end]
            statistics[layer.name] = factor * arenas[1][moment:later]
            start, moment = end, later
        save_file(parameters, checkpoint / "parameters.safetensors")
        save_file(statistics, checkpoint / "statistics.safetensors")
    saved = read_run(tmp_path)
    assert saved.model == "sample"
    assert saved.path == tmp_path / "000010-step-10"
    for mine, came in zip(arenas, saved.fit(network), strict=True):
        assert mine.tobytes() == came.tobytes()
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ConfigError, match="neither a checkpoint nor a directory of checkpoints"):
        read_run(tmp_path / "nothing")


def test_what_pytorch_has_no_order_for_is_refused():
    parts = [Conv2d(3, 3, name="conv1")]
    branches = Branches([[Flatten()], [GlobalAvgPool()]], name="both")
    network = Network("joined", [*parts, branches, Dense(2, name="fc")], (6, 6, 1), 2)
    with pytest.raises(ConfigError, match=r"layer both\.concat1: .* no one order in PyTorch"):
        to_tensors(network, network.initialise(0), network.initial_statistics())


def test_a_file_is_what_readers_of_pytorch_files_expect(network, arenas, tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights(path, network, *arenas)
    assert load_file(path).keys() == to_tensors(network, *arenas).keys()
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    assert header["__metadata__"] == {"format": "pt", "model": "sample"}
    with pytest.raises(ConfigError, match="cannot be written"):
        save_weights(tmp_path / "nowhere" / "a.safetensors", network, *arenas)
