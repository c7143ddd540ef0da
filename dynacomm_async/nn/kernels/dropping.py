"""Random factors of dropout, the same on every machine and NumPy version."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["draw_factors"]

_WORDS = 4096
"""Random words drawn at a time, so that a step allocates nothing large."""


def draw_factors(factors: NDArray[Any], rate: float, key: Sequence[int], before: int = 0) -> None:
    """Fill ``factors`` (n,) with 0 at a chance of ``rate``, else 1 / (1 - rate).

    A function of ``key`` (integers from 0), ``rate`` and n alone: NumPy promises that seed
    sequences and raw bits never change, which it does not of the methods of a Generator.

    Args:
        before: leave out so many factors: part of a longer array is filled as if all of it were.
    """
    bits = np.random.PCG64(np.random.SeedSequence([int(part) for part in key]))
    bits.advance(before // 2)
    bound = np.uint32(min(round(rate * 2**32), 2**32 - 1))
    skip = before % 2
    for begin in range(0, factors.size + skip, 2 * _WORDS):
        part = factors[max(0, begin - skip) : begin - skip + 2 * _WORDS]
        first = skip if begin == 0 else 0
        words = bits.random_raw(-(-(first + part.size) // 2)).astype("<u8", copy=False).view("<u4")
        np.greater_equal(words[first : first + part.size], bound, out=part, casting="unsafe")
    factors *= factors.dtype.type(1 / (1 - rate))
