"""Helpers shared by the tests of the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dynacomm_async.nn import Definition, Dense, Engine, Flatten, Network

Array = NDArray[Any]


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
