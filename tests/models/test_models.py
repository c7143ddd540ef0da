"""The models' published sizes."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from dynacomm_async import models
from dynacomm_async.models import MODELS

PARAMETERS = {
    # As torchvision says beside its weights: vgg11, vgg16, vgg19, resnet18, resnet50, resnet152,
    # mobilenet_v2 (https://pytorch.org/vision/stable/models.html).
    "googlenet": 6_998_552,
    "inception_v4": 42_679_816,
    "lenet": 61_706,
    "lenet_smooth": 61_706,
    "mlp": 784 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10,
    "mobilenet_v2": 3_504_872,
    "resnet18": 11_689_512,
    # 3x3: 3-16, 6 of 16-16, 16-32, 5 of 32-32, 32-64, 5 of 64-64; 688 channels; dense 64-10.
    "resnet20": 9 * (48 + 6 * 256 + 512 + 5 * 1024 + 2048 + 5 * 4096) + 2 * 688 + 650,
    "resnet50": 25_557_032,
    "resnet152": 60_192_808,
    "vgg11": 132_863_336,
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
    "vgg_small": 9 * (3 * 64 + 64 * 64 + 64 * 128 + 128 * 128 + 128 * 256 + 256 * 256)
    + 2 * (64 + 128 + 256)
    + 4096 * 10
    + 10,
}
LAYERS = {
    # Three convolutions, six in each of nine modules, one dense layer.
    "googlenet": 3 + 9 * 6 + 1,
    # The stem; modules A, B and C; reductions A and B; one dense layer.
    "inception_v4": (3 + 1 + 6 + 1) + 4 * 7 + 4 + 7 * 10 + 6 + 3 * 10 + 1,
    "lenet": 5,
    "lenet_smooth": 5,
    "mlp": 3,
    # One, two or three in each of 17 blocks, the first, the last, and the dense layer.
    "mobilenet_v2": 1 + 2 + 16 * 3 + 1 + 1,
    "resnet18": 18 + 3,
    "resnet20": 20,
    "resnet50": 50 + 4,
    # 152 on the long way, and a convolution in each stage's first shortcut.
    "resnet152": 152 + 4,
    "vgg11": 11,
    "vgg16": 16,
    "vgg19": 19,
    "vgg_small": 7,
}
GIGAFLOPS = {"vgg19": 39.26, "googlenet": 3.17, "inception_v4": 24.51, "resnet152": 23.03}
# Twice the multiply-adds that torchvision publishes, in 10^9: 7.61, 15.47, 1.81, 4.09 and 0.30.
GIGAFLOPS |= {"vgg11": 15.22, "vgg16": 30.94, "resnet18": 3.63, "resnet50": 8.18}
GIGAFLOPS |= {"mobilenet_v2": 0.60}
LARGE = list(GIGAFLOPS)
SMALL = dict.fromkeys(MODELS, (24, 32, 2))
SMALL |= dict.fromkeys(LARGE, (32, 40, 2))
SMALL |= {"inception_v4": (75, 80, 2)}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_layers_are_the_published_ones(name):
    network = models.build(name)
    assert network.parameters == PARAMETERS[name]
    assert len(network.layers) == LAYERS[name]
    assert network.name == name
    assert network.classes == (1000 if name in LARGE else 10)


@pytest.mark.parametrize("name", LARGE)
def test_forward_flops_of_the_large_networks_are_the_published_ones(name):
    assert models.build(name).forward_flops / 1e9 == pytest.approx(GIGAFLOPS[name], abs=5e-3)


def test_the_largest_layer_of_vgg19_has_411_megabytes():
    largest = max(models.build("vgg19").layers, key=lambda layer: layer.count)
    assert (largest.name, round(4 * largest.count / 1e6)) == ("classifier.0", 411)


def test_a_network_is_defined_without_its_arrays():
    tracemalloc.start()
    try:
        for name in LARGE:
            models.build(name)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8e6


@pytest.mark.parametrize("name", LARGE)
def test_a_large_network_computes_a_gradient_for_each_layer(name):
    network = models.build(name, input_shape=SMALL[name], classes=3)
    engine = network.bind(2, network.initialise(0))
    generator = np.random.default_rng(0)
    images = generator.standard_normal((2, *SMALL[name]), dtype=np.float32)
    labels = np.array([2, 0])
    assert np.isfinite(engine.step(images, labels, draw=(0, 0, 0)))
    assert np.isfinite(engine.gradients).all()
    offset = 0
    for layer in network.layers:
        assert engine.gradients[offset : offset + layer.count].any(), layer.name
        offset += layer.count


STEP = """
import sys
import numpy as np
from dynacomm_async.models import build

network = build(sys.argv[1])
engine = network.bind(2, network.initialise(0))
images = np.random.default_rng(0).standard_normal((2, *network.input_shape), dtype=np.float32)
loss = engine.step(images, np.array([7, 993]), draw=(0, 0, 0))
offset = 0
for layer in network.layers:
    part = engine.gradients[offset : offset + layer.count]
    assert np.isfinite(part).all() and part.any(), layer.name
    offset += layer.count
print(loss)
"""


LIKE_A_DEEPER_ONE = {"vgg11", "vgg16", "resnet18", "resnet50"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.soak) if n in LIKE_A_DEEPER_ONE else n for n in LARGE],
)
def test_a_large_network_steps_at_its_own_size(name):
    # In a process of its own: what it takes is given back at its end.
    done = subprocess.run(
        [sys.executable, "-c", STEP, name], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stderr) == (0, "")
    # New weights tell a thousand classes apart by chance only, give or take.
    assert 3 < float(done.stdout) < 20


def test_googlenet_descends_as_steep_as_its_gradient_says():
    network = models.build("googlenet", input_shape=(32, 32, 3), classes=3)
    engine = network.bind(2, network.initialise(0))
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3), dtype=np.float32)
    labels = np.array([2, 0])
    before = engine.step(images, labels, draw=(0, 0, 0))
    slope = float(engine.gradients @ engine.gradients)
    engine.parameters -= np.float32(1e-2 * before / slope) * engine.gradients
    assert before - engine.step(images, labels, draw=(0, 0, 0)) == pytest.approx(
        1e-2 * before, rel=0.1
    )


def test_parallel_branches_are_scheduled_in_the_order_of_their_definition():
    names = [layer.name for layer in models.build("googlenet").layers]
    module = ["1x1", "3x3_reduce", "3x3", "5x5_reduce", "5x5", "pool_proj"]
    assert names[:3] == ["conv1", "conv2_reduce", "conv2"]
    assert names[3:9] == [f"inception3a.{part}" for part in module]
    assert names[-2:] == ["inception5b.pool_proj", "fc1"]


def test_resnet20_has_027_million_parameters_and_no_other_statistics_than_of_its_norms():
    network = models.build("resnet20")
    assert round(network.parameters / 1e6, 2) == 0.27
    assert network.statistics == 2 * 688
    assert network.layers[1].name == "layer1.0.conv1"


def test_forward_flops_of_lenet_are_counted_by_hand():
    # A multiply-add for each weight and output pixel.
    products = 28 * 28 * 150 + 10 * 10 * 2400 + 400 * 120 + 120 * 84 + 84 * 10
    assert models.build("lenet").forward_flops == 2 * products


def test_forward_flops_of_resnet20_are_the_published_81_million():
    assert models.build("resnet20").forward_flops / 2 == pytest.approx(40.55e6, rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_other_shapes_and_classes_are_accepted(name):
    network = models.build(name, input_shape=SMALL[name], classes=7)
    assert network.input_shape == SMALL[name]
    assert network.layers[-1].count % 7 == 0


@pytest.mark.parametrize("name", MODELS)
def test_layer_names_are_unique(name):
    names = [layer.name for layer in models.build(name).layers]
    assert len(set(names)) == len(names)
