"""Cells and ranges of them: the words that planning, wire and server share."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["CELL_NBYTES", "Range"]

CELL_NBYTES = 16384
"""Size of a cell: what versions, ranges and messages are counted in, and where a layer may be cut.
Cells restart at each layer, so a layer's last one may be smaller."""


class Range(NamedTuple):
    """Cells ``first`` to ``first + count - 1``."""

    first: int
    count: int  # type: ignore[assignment]  # the word for it; nobody counts values in a range
