"""Random factors of dropout, the same on every machine and NumPy version."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["draw_factors"]

_WORDS = 4096
"""Random words drawn at a time, so that a step allocates nothing large."""


def draw_factors(factors: NDArray[Any], rate: float, key: Sequence[int]) -> None:
    """Fill ``factors`` (n,) with 0 at a chance of ``rate``, else 1 / (1 - rate).

    A function of ``key`` (integers from 0), ``rate`` and n alone: NumPy promises that seed
    sequences and raw bits never change, which it does not of the methods of a Generator.
    """
    bits = np.random.PCG64(np.random.SeedSequence([int(part) for part in key]))
    bound = np.uint32(min(round(rate * 2**32), 2**32 - 1))
    for begin in range(0, factors.size, 2 * _WORDS):
        part = factors[begin : begin + 2 * _WORDS]
        words = bits.random_raw(-(-part.size // 2)).astype("<u8", copy=False).view("<u4")
        np.greater_equal(words[: part.size], bound, out=part, casting="unsafe")
    factors *= factors.dtype.type(1 / (1 - rate))
