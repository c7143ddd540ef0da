"""The table of scheduled layers, initial values and binding."""

from __future__ import annotations

import numpy as np
import pytest

from dynacomm_async.errors import ConfigError, ShapeError
from dynacomm_async.nn import (
    BatchNorm,
    Conv2d,
    Dense,
    Flatten,
    GlobalAvgPool,
    LayerInfo,
    MaxPool,
    Network,
    ReLU,
    Residual,
)

PARTS = [
    Conv2d(8, 3, padding=1, bias=False),
    BatchNorm(),
    ReLU(),
    Residual(
        [Conv2d(8, 3, stride=2, padding=1), ReLU()],
        [Conv2d(8, 1, stride=2, bias=False, name="projection"), BatchNorm()],
        name="stage1",
    ),
    ReLU(),
    GlobalAvgPool(),
    Dense(3),
]


@pytest.fixture
def network():
    return Network("small", PARTS, (6, 6, 2), 3)


def test_layers_are_those_with_parameters_in_forward_order(network):
    assert network.layers == (
        LayerInfo("conv1", 144 + 16, 144, 16, 2 * 36 * 144),
        LayerInfo("stage1.conv1", 576 + 8, 576, 0, 2 * 9 * 576),
        LayerInfo("stage1.projection", 64 + 16, 64, 16, 2 * 9 * 64),
        LayerInfo("fc1", 24 + 3, 24, 0, 2 * 24),
    )


def test_totals_are_the_sums_over_layers(network):
    assert network.parameters == 160 + 584 + 80 + 27
    assert network.statistics == 32
    assert network.forward_flops == sum(layer.forward_flops for layer in network.layers)


def test_a_batch_norm_that_follows_no_weights_is_a_layer_of_its_own():
    network = Network(
        "n", [Conv2d(4, 3), MaxPool(2), BatchNorm(), Flatten(), Dense(2)], (6, 6, 1), 2
    )
    assert [(layer.name, layer.decay) for layer in network.layers] == [
        ("conv1", 36),
        ("norm1", 0),
        ("fc1", 32),
    ]


def test_initial_values_are_a_function_of_the_seed(network):
    first, again, other = network.initialise(7), network.initialise(7), network.initialise(8)
    assert first.dtype == np.float32
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_initial_values_are_the_usual_ones():
    network = Network("n", [Flatten(), Dense(500), BatchNorm(), ReLU(), Dense(2)], (20, 20, 1), 2)
    arena = network.initialise(0)
    weights, bias, gamma, beta = np.split(arena[: 200_000 + 1500], [200_000, 200_500, 201_000])
    assert weights.std() == pytest.approx(np.sqrt(2 / 400), rel=0.02)
    assert abs(weights.mean()) < 1e-3
    assert (bias == 0).all()
    assert (gamma == 1).all()
    assert (beta == 0).all()


def test_initial_statistics_are_mean_0_and_variance_1(network):
    expected = [0.0] * 8 + [1.0] * 8
    assert network.initial_statistics().tolist() == expected * 2
    assert network.bind(2).statistics.tolist() == expected * 2


def test_an_engine_lives_in_the_given_arenas(network, make_batch):
    arenas = [network.initialise(0), np.zeros(network.parameters, np.float32)]
    arenas += [network.initial_statistics(), np.zeros(network.statistics, np.float32)]
    engine = network.bind(4, *arenas)
    engine.step(*make_batch(network, 4, 0))
    assert engine.parameters is arenas[0]
    assert np.count_nonzero(arenas[1]) > 800
    assert np.count_nonzero(arenas[3]) == 32


@pytest.mark.parametrize(
    ("arenas", "message"),
    [
        ((np.zeros(10, np.float32),), r"parameters is an array \(10,\) of float32"),
        ((np.zeros(851, np.float16),), "dtype float16, expected float32 or float64"),
        ((np.zeros(2 * 851, np.float32)[::2],), "expected a contiguous one"),
        ((np.zeros(851, np.float32), np.zeros(851)), "gradients is an array .* of float64"),
    ],
)
def test_an_arena_that_does_not_fit_is_refused(network, arenas, message):
    with pytest.raises(ShapeError, match=message):
        network.bind(4, *arenas)


def test_a_batch_below_one_is_refused(network):
    with pytest.raises(ConfigError, match="the batch is 0"):
        network.bind(0)


def test_a_network_without_parameters_is_refused():
    with pytest.raises(ConfigError, match="no layer with parameters"):
        Network("empty", [Flatten()], (1, 2, 1), 2)


def test_two_layers_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="two layers are named 'a'"):
        Network("twins", [Flatten(), Dense(2, name="a"), Dense(2, name="a")], (1, 2, 1), 2)


def test_an_output_that_is_not_one_logit_per_class_is_refused():
    with pytest.raises(ShapeError, match=r"gives shape \(4,\) .*\(5,\)"):
        Network("n", [Flatten(), Dense(4)], (2, 2, 1), 5)


def test_an_input_that_is_not_an_image_is_refused():
    with pytest.raises(ShapeError, match=r"input shape \(28, 28\)"):
        Network("n", [Flatten(), Dense(4)], (28, 28), 4)
