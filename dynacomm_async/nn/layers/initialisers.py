"""Initial values of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.errors import ConfigError

__all__ = ["INITIALISERS", "draw_weights", "require_initialiser"]


def _he_deviation(fan_in: int, fan_out: int) -> float:
    """He et al., "Delving Deep into Rectifiers" (arXiv 1502.01852): for layers before a ReLU."""
    return sqrt(2 / fan_in)


def _xavier_deviation(fan_in: int, fan_out: int) -> float:
    """Glorot and Bengio, "Understanding the difficulty of training deep feedforward networks"."""
    return sqrt(2 / (fan_in + fan_out))


INITIALISERS: Mapping[str, Callable[[int, int], float]] = {
    "he": _he_deviation,
    "xavier": _xavier_deviation,
}
"""Standard deviation of normally distributed weights, from what a unit reads and feeds."""


def require_initialiser(name: str) -> None:
    """Raises ConfigError for an unknown name."""
    if name not in INITIALISERS:
        raise ConfigError(f"unknown initialiser {name!r}, expected one of {list(INITIALISERS)}")


def draw_weights(
    weights: NDArray[Any], fan: tuple[int, int], name: str, generator: np.random.Generator
) -> None:
    """Fill ``weights`` with normal values of the initialiser's deviation for ``fan`` in, out.

    Values are drawn in float32 whatever the dtype of ``weights``, so that a network starts from
    the same point in both precisions.
    """
    drawn = generator.standard_normal(weights.shape, np.float32)
    drawn *= np.float32(INITIALISERS[name](*fan))
    np.copyto(weights, drawn)
