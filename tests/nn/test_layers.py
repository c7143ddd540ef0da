"""Every layer against numerical gradients in float64, and its checks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from dynacomm_async.errors import ConfigError, ShapeError
from dynacomm_async.nn import (
    AvgPool,
    BatchNorm,
    Branches,
    Conv2d,
    Dense,
    Dropout,
    Flatten,
    GlobalAvgPool,
    LocalResponseNorm,
    MaxPool,
    Network,
    PadShortcut,
    ReLU,
    Residual,
    Tanh,
)
from dynacomm_async.nn.kernels import blocks, elementwise, winograd
from dynacomm_async.nn.layers import convolution

# A 1 x 1 convolution in front: its gradients hold the layer's input gradient to account.
FRONT = Conv2d(5, 1, name="front")
TOLERANCE = 1e-5

CASES = {
    "convolution 3x3 padded": ([FRONT, Conv2d(3, 3, padding=1)], (6, 5, 2)),
    "convolution 5x5 unpadded": ([FRONT, Conv2d(3, 5)], (7, 6, 2)),
    "convolution 5x5 with relu": ([FRONT, Conv2d(3, 5, padding=2), ReLU()], (7, 6, 2)),
    "convolution of stride 2": ([FRONT, Conv2d(3, 3, stride=2, padding=1)], (8, 7, 2)),
    "convolution of stride 2 without padding": ([FRONT, Conv2d(3, 3, stride=2)], (8, 7, 2)),
    "convolution of stride 3 with a rest": ([FRONT, Conv2d(3, 2, stride=3), Tanh()], (10, 9, 2)),
    "convolution 1x1 of stride 2": ([FRONT, Conv2d(3, 1, stride=2)], (5, 6, 2)),
    "rectangular convolution": (
        [FRONT, Conv2d(3, (1, 5), stride=(2, 1), padding=(0, 2))],
        (5, 6, 2),
    ),
    "convolution without bias": ([FRONT, Conv2d(3, 3, padding=1, bias=False)], (5, 6, 2)),
    "convolution of few channels": (
        [Conv2d(3, 3, padding=1), Tanh(), Conv2d(6, 3, stride=2), ReLU()],
        (7, 8, 2),
    ),
    "depthwise convolution": ([FRONT, Conv2d(5, 3, padding=1, groups=5), Tanh()], (6, 7, 2)),
    "depthwise convolution of stride 2": (
        [FRONT, Conv2d(5, 3, 2, 1, groups=5), ReLU(), MaxPool(2)],
        (9, 8, 2),
    ),
    "depthwise convolution that skips pixels": (
        [FRONT, Conv2d(5, (1, 2), 3, groups=5, bias=False)],
        (7, 8, 2),
    ),
    "depthwise convolution with batch norm into a border": (
        [FRONT, Conv2d(5, 3, 1, 1, bias=False, groups=5), BatchNorm(), ReLU(), Conv2d(3, 3, 1, 1)],
        (5, 6, 2),
    ),
    "depthwise convolution beside another reader": (
        [FRONT, Tanh(), Residual([Conv2d(5, 3, padding=1, groups=5)]), Residual([])],
        (5, 4, 2),
    ),
    "depthwise convolution of the input": ([Conv2d(2, 3, groups=2), Tanh()], (5, 6, 2)),
    "convolution in two groups": (
        [Conv2d(6, 1, name="front"), Conv2d(4, 3, 2, 1, groups=2), ReLU()],
        (8, 7, 2),
    ),
    "two outputs for each channel": ([FRONT, Conv2d(10, 3, groups=5), Tanh()], (6, 5, 2)),
    "groups beside another reader": (
        [Conv2d(6, 1, name="front"), Residual([Conv2d(6, 3, padding=1, groups=3)]), Tanh()],
        (5, 4, 2),
    ),
    "convolution, relu, pooling": (
        [FRONT, Conv2d(3, 3, padding=1), ReLU(), MaxPool(2), Conv2d(3, 3, padding=1)],
        (8, 6, 2),
    ),
    "convolution, pooling, relu": ([FRONT, Conv2d(3, 3), MaxPool((1, 2)), ReLU()], (7, 6, 2)),
    "convolution, pooling": ([FRONT, Conv2d(3, 3, padding=1), MaxPool(3)], (6, 6, 2)),
    "convolution, pooling with a rest": (
        [FRONT, Conv2d(3, 3, padding=1), ReLU(), MaxPool(2)],
        (7, 5, 2),
    ),
    "overlapping maximum": ([FRONT, Tanh(), MaxPool(3, 2)], (7, 8, 2)),
    "average pooling": ([FRONT, AvgPool(2)], (7, 6, 2)),
    "overlapping average": ([FRONT, AvgPool(3, 1), Tanh()], (5, 6, 2)),
    "global average": ([FRONT, GlobalAvgPool(), Dense(6)], (5, 6, 2)),
    "dense with relu": ([Flatten(), Dense(7), ReLU(), Dense(6, bias=False), Tanh()], (3, 3, 2)),
    "relu and tanh on their own": ([FRONT, Tanh(), ReLU(), Tanh()], (4, 4, 2)),
    "relu with a limit on its own": ([FRONT, Tanh(), ReLU(0.4), Tanh()], (4, 4, 2)),
    "relu with a limit behind a convolution": ([FRONT, Conv2d(3, 3), ReLU(0.5)], (6, 5, 2)),
    "batch norm with a limited relu into a border": (
        [FRONT, BatchNorm(), ReLU(0.6), Conv2d(3, 3, padding=1), BatchNorm(), ReLU(0.3)],
        (5, 4, 2),
    ),
    "dropout of images": ([FRONT, Dropout(0.3), Conv2d(3, 3, padding=1)], (5, 4, 2)),
    "dropout of features": ([Flatten(), Dense(9), ReLU(), Dropout(), Dense(6)], (3, 3, 2)),
    "local response normalisation": (
        [Conv2d(7, 1, name="front"), LocalResponseNorm(5, 0.8), Tanh()],
        (4, 5, 2),
    ),
    "local response normalisation of an even window": (
        [FRONT, LocalResponseNorm(4, 2.0, 0.6, 0.5), Conv2d(3, 3, padding=1)],
        (4, 5, 2),
    ),
    "local response normalisation wider than the channels": (
        [FRONT, Residual([LocalResponseNorm(13, 1.0, 1.0)]), Tanh()],
        (4, 3, 2),
    ),
    "batch norm": ([FRONT, BatchNorm(), Tanh()], (5, 4, 2)),
    "batch norm with relu into a border": (
        [FRONT, BatchNorm(), ReLU(), Conv2d(3, 3, padding=1), BatchNorm()],
        (5, 4, 2),
    ),
    "batch norm behind stride 2": (
        [FRONT, Conv2d(3, 3, stride=2, padding=1, bias=False), BatchNorm(), ReLU()],
        (8, 7, 2),
    ),
    "batch norm behind a dense layer": ([Flatten(), Dense(6), BatchNorm(), ReLU()], (3, 3, 2)),
    "batch norm in front of everything": ([BatchNorm(), Conv2d(3, 3)], (5, 4, 2)),
    "residual block": (
        [FRONT, Residual([Conv2d(4, 3, padding=1), ReLU(), Conv2d(5, 3, padding=1)]), ReLU()],
        (5, 6, 2),
    ),
    "residual block with projection": (
        [
            FRONT,
            ReLU(),
            Residual(
                [Conv2d(6, 3, 2, 1, bias=False), BatchNorm(), Tanh(), Conv2d(6, 3, padding=1)],
                [Conv2d(6, 1, 2, bias=False), BatchNorm()],
            ),
            Tanh(),
        ],
        (6, 5, 2),
    ),
    "residual block with padded shortcut": (
        [
            FRONT,
            Residual([Conv2d(8, 3, 2, 1)], [PadShortcut(8, 2)]),
            ReLU(),
            Residual([Conv2d(8, 3, 1, 1)]),
        ],
        (7, 6, 2),
    ),
    "residual block around dense layers": (
        [Flatten(), Dense(6), Residual([Tanh(), Dense(6)]), ReLU(), Residual([Dense(6)])],
        (3, 3, 2),
    ),
    "maximum over the edges": ([FRONT, Tanh(), MaxPool(3, 2, padding=1)], (7, 8, 2)),
    "maximum with a rest": ([FRONT, Tanh(), MaxPool(3, 2, ceil=True), Tanh()], (8, 6, 2)),
    "average over the edges": ([FRONT, AvgPool(3, 1, padding=1), Tanh()], (5, 6, 2)),
    "average with a rest": ([FRONT, AvgPool((2, 3), padding=(1, 0), ceil=True)], (5, 7, 2)),
    "branches": (
        [
            FRONT,
            Branches(
                [
                    [Conv2d(2, 1), ReLU()],
                    [Conv2d(3, 1), Tanh(), Conv2d(4, 3, padding=1), BatchNorm(), ReLU()],
                    [MaxPool(3, 1, padding=1), Conv2d(3, 1)],
                ]
            ),
            Conv2d(3, 3, padding=1),
        ],
        (6, 5, 2),
    ),
    "branches that shrink, with relu behind": (
        [FRONT, Branches([[Conv2d(4, 3, 2, 1)], [MaxPool(3, 2, padding=1)]]), ReLU()],
        (7, 6, 2),
    ),
    "branches that share their input as it is": (
        [FRONT, Branches([[], [Tanh()], []]), Tanh()],
        (3, 4, 2),
    ),
    "branches in a branch": (
        [
            FRONT,
            Branches(
                [
                    [Tanh(), Branches([[Conv2d(2, (1, 3), padding=(0, 1))], [Conv2d(3, 1)]])],
                    [AvgPool(3, 1, padding=1), Conv2d(2, 1)],
                ]
            ),
            Conv2d(2, 3),
        ],
        (5, 6, 2),
    ),
    "branches of dense layers": (
        [Flatten(), Branches([[Dense(3), ReLU()], [Dense(4)]])],
        (3, 3, 2),
    ),
    "identity beside identity": ([FRONT, Residual([]), Tanh()], (3, 4, 2)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", [2, 5])
def test_gradients_equal_central_differences(case, batch, wrap, worst_gradient_error):
    parts, input_shape = CASES[case]
    assert worst_gradient_error(wrap(parts, input_shape), batch, seed=batch) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_right_when_blocks_hold_a_few_pixels_only(
    case, wrap, worst_gradient_error, monkeypatch
):
    monkeypatch.setattr(blocks, "COLUMN_FLOATS", 150)
    monkeypatch.setattr(blocks, "LEAST_ROWS", 1)
    monkeypatch.setattr(elementwise, "GROUP_FLOATS", 200)
    parts, input_shape = CASES[case]
    assert worst_gradient_error(wrap(parts, input_shape), 5, seed=1) < TOLERANCE


@pytest.mark.parametrize("most", [2, 128])
@pytest.mark.parametrize("case", [case for case in CASES if "convolution" in case or "res" in case])
def test_gradients_are_right_by_tiles(case, most, wrap, worst_gradient_error, monkeypatch):
    def suits(kernel, stride, channels, output):
        return (kernel, stride) == ((3, 3), (1, 1))

    monkeypatch.setattr(convolution, "suits_winograd", suits)
    monkeypatch.setattr(winograd, "MOST_TILES", most)
    parts, input_shape = CASES[case]
    assert worst_gradient_error(wrap(parts, input_shape), 5, seed=1, probes=12) < TOLERANCE


sizes = st.integers(1, 4)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    extent=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    channels=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    groups=st.integers(1, 3),
    depthwise=st.booleans(),
    kernel=st.tuples(sizes, sizes),
    stride=st.tuples(sizes, sizes),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    behind=st.sampled_from([[], [ReLU()], [BatchNorm(), ReLU()], [MaxPool(2), ReLU()]]),
)
def test_convolutions_of_any_shape_have_the_right_gradients(
    extent,
    channels,
    groups,
    depthwise,
    kernel,
    stride,
    padding,
    behind,
    wrap,
    worst_gradient_error,
):
    padding = tuple(min(p, k - 1) for p, k in zip(padding, kernel, strict=True))
    before, after = (groups * count for count in channels)
    if depthwise:
        groups = after = before
    convolution = Conv2d(after, kernel, stride, padding, groups=groups)
    shape = convolution.output_shape(((*extent, before),))
    if min(shape[:2]) < 2 and any(isinstance(part, MaxPool) for part in behind):
        behind = []
    parts = [Conv2d(before, 1, name="front"), convolution, *behind]
    assert worst_gradient_error(wrap(parts, (*extent, 2)), 3, seed=0, probes=10) < TOLERANCE


ANY = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@ANY
@given(data=st.data(), batch=st.integers(2, 4), seed=st.integers(0, 1000))
def test_a_layer_of_any_settings_has_the_right_gradients(
    kind, data, batch, seed, draw_network, worst_gradient_error
):
    network = draw_network(data.draw, [kind])
    assert worst_gradient_error(network, batch, seed, probes=12) < TOLERANCE


@settings(ANY, max_examples=120)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_layers_in_any_order_have_the_right_gradients(
    data, seed, kinds, draw_network, worst_gradient_error
):
    chosen = data.draw(st.lists(st.sampled_from(kinds), min_size=2, max_size=4))
    network = draw_network(data.draw, chosen)
    assert worst_gradient_error(network, 3, seed, probes=12) < TOLERANCE


def test_a_convolution_equals_its_definition():
    network = Network("one", [Conv2d(2, 3, stride=2, padding=1), GlobalAvgPool()], (5, 6, 3), 2)
    engine = network.bind(2, network.initialise(0), dtype=np.float32)
    bias = np.array([0.5, -2])
    engine.parameters[-2:] = bias
    images = np.random.default_rng(1).standard_normal((2, 5, 6, 3), dtype=np.float32)
    weights = engine.parameters[:-2].reshape(3, 3, 3, 2)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.zeros((2, 3, 3, 2))
    for h in range(3):
        for w in range(3):
            window = padded[:, 2 * h : 2 * h + 3, 2 * w : 2 * w + 3]
            expected[:, h, w] = np.einsum("nijc,ijco->no", window, weights) + bias
    np.testing.assert_allclose(engine.forward(images), expected.mean((1, 2)), rtol=1e-5, atol=1e-6)


def test_a_tie_in_a_window_hands_its_gradient_to_the_first_position_only():
    parts = [Conv2d(1, 1), MaxPool(2), Flatten()]
    network = Network("ties", parts, (2, 2, 1), 1)
    engine = network.bind(1)
    engine.parameters[:] = (1, 0)
    engine.forward(np.ones((1, 2, 2, 1), np.float32))
    engine.backward(np.ones((1, 1), np.float32))
    assert engine.gradients.tolist() == [1, 1]


def test_branches_are_joined_and_scheduled_in_the_order_of_their_definition():
    parts = [Branches([[Conv2d(2, 1)], [], [Conv2d(1, 1, name="last")]], name="b"), Flatten()]
    network = Network("joined", parts, (1, 1, 1), 4)
    assert [layer.name for layer in network.layers] == ["b.conv1", "b.last"]
    engine = network.bind(1)
    engine.parameters[:] = (2, 3, 20, 30, 4, 40)
    assert engine.forward(np.full((1, 1, 1, 1), 7, np.float32)).tolist() == [[34, 51, 7, 68]]
    engine.backward(np.array([[1, 2, 3, 4]], np.float32))
    assert engine.gradients.tolist() == [7, 14, 1, 2, 28, 4]


@pytest.mark.parametrize(
    ("extent", "size", "stride", "padding", "ceil", "expected"),
    [
        (112, 3, 2, 0, True, 56),
        (112, 3, 2, 0, False, 55),
        (112, 3, 2, 1, False, 56),
        (7, 3, 2, 0, True, 3),
        (5, 2, 2, 1, True, 3),  # a fourth window would begin behind the image
        (28, 3, 1, 1, False, 28),
        (2, 3, 2, 0, True, 1),
        (1, 4, 1, 2, True, 2),
    ],
)
def test_how_many_windows_fit(extent, size, stride, padding, ceil, expected):
    pool = MaxPool(size, stride, padding, ceil)
    assert pool.output_shape(((extent, extent, 3),)) == (expected, expected, 3)


def test_what_lies_outside_an_image_does_not_count():
    images = -np.arange(1, 5, dtype=np.float32).reshape(1, 2, 2, 1)
    for pool, expected in [(MaxPool, [-1, -2, -3, -4]), (AvgPool, [-1, -2, -3, -4])]:
        parts = [Conv2d(1, 1, bias=False), pool(2, padding=1), Flatten()]
        engine = Network("edges", parts, (2, 2, 1), 4).bind(1)
        engine.parameters[:] = 1
        assert engine.forward(images)[0].tolist() == expected


def test_a_network_may_begin_with_layers_without_parameters(wrap, make_batch, make_engine):
    network = wrap([AvgPool(2), Tanh()], (4, 4, 3))
    engine = make_engine(network, 2)
    assert [layer.name for layer in network.layers] == ["head"]
    assert np.isfinite(engine.step(*make_batch(network, 2, 0)))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([Conv2d(4, 3), Conv2d(4, 5, name="big")], r"layer big: the input is 4x4 .* window, 5x5"),
        ([Conv2d(4, 3), Dense(3, name="dense")], r"layer dense: .*\(4, 4, 4\).*Flatten\(\)"),
        ([Flatten(), Conv2d(4, 3)], r"layer conv1: the input has shape \(72,\)"),
        ([Residual([Conv2d(4, 3, padding=1)], name="b")], r"layer b\.add1: .*\(6, 6, 4\).*2\)"),
        ([PadShortcut(1)], r"layer shortcut1: the input has 2 channels, expected at most 1"),
        ([Conv2d(9, 3, groups=3)], r"layer conv1: the input has 2 channels, .* the 3 groups"),
        ([MaxPool(7)], r"layer pool1: the input is 6x6"),
        (
            [Branches([[Conv2d(4, 3)], [Conv2d(4, 1)]], name="b")],
            r"layer b\.concat1: the branches give \(4, 4, 4\), \(6, 6, 4\), expected .* channels",
        ),
    ],
)
def test_a_layer_that_does_not_fit_is_named(parts, message, wrap):
    with pytest.raises(ShapeError, match=message):
        wrap(parts, (6, 6, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Conv2d(0, 3), "0 channels"),
        (lambda: Conv2d(4, 0), "kernel is 0"),
        (lambda: Conv2d(4, 3, stride=0), "stride is 0"),
        (lambda: Conv2d(4, 3, padding=3), "less than the kernel"),
        (lambda: Conv2d(4, (3, 3, 3)), "kernel is"),
        (lambda: Conv2d(4, 3, initialiser="best"), "unknown initialiser 'best'"),
        (lambda: Conv2d(4, 3, groups=3), "groups is 3, expected a divisor of the 4 channels"),
        (lambda: Conv2d(4, 3, groups=0), "groups is 0"),
        (lambda: Dropout(1), "dropout rate is 1, expected at least 0 and below 1"),
        (lambda: ReLU(0), "the limit of a ReLU is 0"),
        (lambda: LocalResponseNorm(0), "window size is 0"),
        (lambda: LocalResponseNorm(k=0), "k is 0"),
        (lambda: Dense(0), "0 features"),
        (lambda: MaxPool(0), "pool size is 0"),
        (lambda: AvgPool(2, 0), "pool stride is 0"),
        (lambda: MaxPool(3, padding=2), r"pool padding is \(2, 2\), expected at most half"),
        (lambda: AvgPool(3, padding=-1), "pool padding is -1"),
        (lambda: Branches([]), "no branches"),
        (lambda: BatchNorm(epsilon=0), "epsilon is 0"),
        (lambda: PadShortcut(4, 0), "stride is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
