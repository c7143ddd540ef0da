"""Helpers shared by the tests of the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from dynacomm_async.nn import (
    AvgPool,
    BatchNorm,
    Branches,
    Conv2d,
    Definition,
    Dense,
    Dropout,
    Engine,
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

Array = NDArray[Any]
Shape = tuple[int, ...]
Draw = Callable[[st.SearchStrategy[Any]], Any]


def _batch(network: Network, batch: int, seed: int, dtype: Any = np.float32) -> tuple[Array, Array]:
    generator = np.random.default_rng(seed)
    images = generator.standard_normal((batch, *network.input_shape)).astype(dtype)
    return images, generator.integers(0, network.classes, batch)


def _wrap(parts: Sequence[Definition], input_shape: tuple[int, ...], classes: int = 4) -> Network:
    return Network(
        "wrapped", [*parts, Flatten(), Dense(classes, name="head")], input_shape, classes
    )


def _worst_gradient_error(network: Network, batch: int, seed: int, probes: int = 25) -> float:
    """Largest relative error of the gradient against central differences, in float64."""
    generator = np.random.default_rng(seed)
    engine = network.bind(batch, dtype=np.float64, smoothing=0.1)
    engine.parameters[:] = 0.5 * generator.standard_normal(network.parameters)
    images, labels = _batch(network, batch, seed, np.float64)
    draw = (seed, 3, 1)
    engine.step(images, labels, draw=draw)
    gradients = engine.gradients.copy()
    floor = 1e-3 * np.abs(gradients).max()
    worst = 0.0
    for index in generator.permutation(network.parameters)[:probes]:
        losses = []
        middle = engine.parameters[index]
        for offset in (1e-6, -1e-6):
            engine.parameters[index] = middle + offset
            losses.append(engine.step(images, labels, draw=draw))
        engine.parameters[index] = middle
        numerical = (losses[0] - losses[1]) / 2e-6
        error = abs(numerical - gradients[index]) / max(floor, abs(numerical))
        worst = max(worst, float(error))
    return worst


# -- layers of any settings, drawn by hypothesis -------------------------------------------------


def _both(draw: Draw, least: int, most: Sequence[int]) -> tuple[int, int]:
    """One number for each direction, each up to its own most."""
    high, wide = (draw(st.integers(least, max(least, end))) for end in most)
    return high, wide


def _draw_convolution(draw: Draw, shape: Shape) -> Conv2d:
    height, width, channels = shape
    kernel = _both(draw, 1, (min(5, height), min(5, width)))
    padding = _both(draw, 0, (kernel[0] - 1, kernel[1] - 1))
    groups = draw(st.sampled_from([n for n in range(1, channels + 1) if channels % n == 0]))
    outputs = groups * draw(st.integers(1, 3))
    bias = draw(st.booleans())
    stride = _both(draw, 1, (3, 3))
    return Conv2d(outputs, kernel, stride, padding, bias=bias, groups=groups)


def _draw_pool(kind: type[MaxPool] | type[AvgPool], draw: Draw, shape: Shape) -> Definition:
    size = _both(draw, 1, (min(4, shape[0]), min(4, shape[1])))
    padding = _both(draw, 0, (size[0] // 2, size[1] // 2))
    return kind(size, _both(draw, 1, (4, 4)), padding, draw(st.booleans()))


def _draw_response(draw: Draw, shape: Shape) -> LocalResponseNorm:
    beta = draw(st.sampled_from([0.75, 0.5, 1.25]))
    k = draw(st.floats(0.5, 3))
    return LocalResponseNorm(draw(st.integers(1, 9)), draw(st.floats(0, 2)), beta, k)


def _draw_shortcut(draw: Draw, shape: Shape) -> PadShortcut:
    return PadShortcut(shape[2] + draw(st.integers(0, 5)), draw(st.integers(1, 3)))


def _keep(draw: Draw, channels: int) -> Conv2d:
    """A convolution that keeps height and width."""
    kernel = draw(st.sampled_from([1, 3, (1, 7), (7, 1), (3, 1)]))
    high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
    return Conv2d(channels, kernel, 1, (high // 2, wide // 2))


def _draw_residual(draw: Draw, shape: Shape) -> Residual:
    more = draw(st.integers(0, 3))
    shortcut = [PadShortcut(shape[2] + more)] if more else []
    inside = draw(st.sampled_from([[], [Tanh()], [BatchNorm(0.01), Tanh()]]))
    return Residual([_keep(draw, 3), *inside, _keep(draw, shape[2] + more)], shortcut)


def _draw_branches(draw: Draw, shape: Shape) -> Branches:
    make = {
        "convolution": lambda: [_keep(draw, draw(st.integers(1, 4))), Tanh()],
        "two": lambda: [_keep(draw, 2), BatchNorm(0.01), Tanh(), _keep(draw, 3)],
        "maximum": lambda: [MaxPool(3, 1, 1), _keep(draw, 2)],
        "average": lambda: [AvgPool(3, 1, 1)],
        "itself": list,
    }
    return Branches(
        [make[draw(st.sampled_from(list(make)))]() for _ in range(draw(st.integers(1, 4)))]
    )


DRAWN: dict[str, Callable[[Draw, Shape], Definition]] = {
    "convolution": _draw_convolution,
    "maximum": lambda draw, shape: _draw_pool(MaxPool, draw, shape),
    "average": lambda draw, shape: _draw_pool(AvgPool, draw, shape),
    "batch norm": lambda draw, shape: BatchNorm(draw(st.sampled_from([0.001, 0.01, 0.3]))),
    "response": _draw_response,
    "dropout": lambda draw, shape: Dropout(draw(st.sampled_from([0.0, 0.2, 0.7]))),
    "shortcut": _draw_shortcut,
    "residual": _draw_residual,
    "branches": _draw_branches,
    "tanh": lambda draw, shape: Tanh(),
    "relu": lambda draw, shape: ReLU(draw(st.sampled_from([None, 0.5]))),
}
"""What draws a layer with any settings that fit behind an image of a shape."""

ENDS: dict[str, Callable[[Draw], list[Definition]]] = {
    "flattened": lambda draw: [Flatten()],
    "global average": lambda draw: [GlobalAvgPool()],
    "dense": lambda draw: [Flatten(), Dense(draw(st.integers(1, 9)), bias=draw(st.booleans()))],
    "dense with batch norm": lambda draw: [Flatten(), Dense(5, bias=False), BatchNorm(0.01)],
    "dense with dropout": lambda draw: [GlobalAvgPool(), Dense(7), Tanh(), Dropout(0.4)],
}
"""What draws layers between the last image and the logits."""


def _draw_network(draw: Draw, kinds: Sequence[str]) -> Network:
    """Layers of these kinds, one behind the other, between a convolution and logits."""
    shape = (*_both(draw, 4, (11, 11)), draw(st.integers(1, 3)))
    parts: list[Definition] = [Conv2d(draw(st.integers(1, 7)), 1, name="front")]
    for kind in kinds:
        # An image of any number of pixels will do for a network that only tells its shape.
        inner = Network("so far", [*parts, GlobalAvgPool(), Dense(1)], shape, 1)
        image = next(
            node.inputs[0] for node in inner.nodes if isinstance(node.layer, GlobalAvgPool)
        )
        parts.append(DRAWN[kind](draw, image.shape))
    end = ENDS[draw(st.sampled_from(list(ENDS)))](draw)
    return _wrap([*parts, *end], shape)


@pytest.fixture(params=DRAWN)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of layer in turn."""
    return str(request.param)


@pytest.fixture
def draw_network() -> Callable[..., Network]:
    """draw_network(draw, kinds) -> a network with layers of these kinds, with any settings."""
    return _draw_network


@pytest.fixture
def kinds() -> list[str]:
    """What :func:`draw_network` knows."""
    return list(DRAWN)


@pytest.fixture
def make_batch() -> Callable[..., tuple[Array, Array]]:
    """make_batch(network, batch, seed, dtype) -> normal images and random labels."""
    return _batch


@pytest.fixture
def wrap() -> Callable[..., Network]:
    """wrap(parts, input_shape, classes) -> the parts with a dense head behind them."""
    return _wrap


@pytest.fixture
def worst_gradient_error() -> Callable[..., float]:
    """worst_gradient_error(network, batch, seed) -> relative error by central differences."""
    return _worst_gradient_error


@pytest.fixture
def make_engine() -> Callable[..., Engine]:
    """make_engine(network, batch, seed) -> bound to new parameters."""
    return lambda network, batch, seed=0: network.bind(batch, network.initialise(seed))
