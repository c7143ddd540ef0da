"""Weights from and for torchvision's own definitions: the same names, the same logits, both ways.

torchvision is in no environment that is set up by this project, as its builds insist on one exact
build of PyTorch; these tests skip themselves without it. To run them::

    pip install torch==2.14.1 torchvision==0.29.1 && pip install -e '.[test]'
    pytest tests/models/test_torchvision.py
"""

from __future__ import annotations

import numpy as np
import pytest

from dynacomm_async.models import build, load_weights, save_weights
from dynacomm_async.nn import to_tensors

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
safetensors_torch = pytest.importorskip("safetensors.torch")

pytestmark = [pytest.mark.peers, pytest.mark.slow]

SAME = ("mobilenet_v2", "resnet18", "resnet50", "resnet152", "vgg11", "vgg16", "vgg19")
"""What is named alike in both and means the same; its GoogLeNet has batch norm, ours has none."""

COMPARED = ("vgg11", "resnet18", "mobilenet_v2")


def make_theirs(name):
    return torchvision.models.get_model(name, weights=None, num_classes=1000)


def planes(images):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def make_images(network):
    return np.random.default_rng(0).standard_normal((2, *network.input_shape)).astype(np.float32)


def settle(theirs, images):
    """Give batch norms factors, offsets and statistics as training could leave them."""
    norms = [each for each in theirs.modules() if isinstance(each, torch.nn.BatchNorm2d)]
    for norm in norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.normal_(norm.bias, 0, 0.2)
        norm.momentum = 1.0
    if norms:
        with torch.no_grad():
            theirs.train()(planes(images))
    return theirs.eval()


def disagreement(network, parameters, statistics, theirs, images):
    ours = network.bind(2, parameters, statistics=statistics).predict(images)
    with torch.no_grad():
        expected = theirs(planes(images)).numpy()
    assert expected.std() > 1e-3
    return np.abs(ours - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", SAME)
def test_names_and_shapes_are_torchvisions(name):
    network = build(name)
    ours = to_tensors(
        network, np.zeros(network.parameters, np.float32), network.initial_statistics()
    )
    with torch.device("meta"):
        theirs = make_theirs(name).state_dict()
    assert {key: array.shape for key, array in ours.items()} == {
        key: tuple(tensor.shape) for key, tensor in theirs.items()
    }


@pytest.mark.parametrize("name", COMPARED)
def test_weights_from_torchvision_give_its_logits(name, tmp_path):
    torch.manual_seed(0)
    network, theirs = build(name), make_theirs(name)
    images = make_images(network)
    settle(theirs, images)
    path = tmp_path / "theirs.safetensors"
    safetensors_torch.save_file(theirs.state_dict(), path)
    assert disagreement(network, *load_weights(path, network), theirs, images) < 1e-4


@pytest.mark.parametrize("name", COMPARED)
def test_weights_of_ours_give_the_same_logits_in_torchvision(name, tmp_path):
    network, theirs = build(name), make_theirs(name)
    images = make_images(network)
    parameters = network.initialise(1)
    engine = network.bind(2, parameters)
    engine.forward(images, draw=(0, 0, 0))
    if network.statistics:
        engine.move_statistics(1.0)
    path = tmp_path / "ours.safetensors"
    save_weights(path, network, parameters, engine.statistics)
    theirs.load_state_dict(safetensors_torch.load_file(path), strict=True)
    statistics = engine.statistics
    assert disagreement(network, parameters, statistics, theirs.eval(), images) < 1e-4
