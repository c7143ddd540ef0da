"""Cells and ranges of them: the words that planning, wire and server share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

__all__ = ["CELL_NBYTES", "Range", "merge", "subtract"]

CELL_NBYTES = 16384
"""Size of a cell: what versions, ranges and messages are counted in, and where a layer may be cut.
Cells restart at each layer, so a layer's last one may be smaller."""


class Range(NamedTuple):
    """Cells ``first`` to ``first + count - 1``."""

    first: int
    count: int  # type: ignore[assignment]  # the word for it; nobody counts values in a range


def merge(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Return the same cells as ascending ranges that neither overlap nor touch."""
    merged: list[Range] = []
    for first, count in sorted(ranges):
        if merged and first <= merged[-1].first + merged[-1].count:
            begin = merged[-1].first
            end = max(begin + merged[-1].count, first + count)
            merged[-1] = Range(begin, end - begin)
        else:
            merged.append(Range(first, count))
    return tuple(merged)


def subtract(cells: Range, holes: Sequence[Range]) -> Iterator[Range]:
    """Yield what is left of a range without ``holes``, which ascend and do not overlap."""
    begin, end = cells.first, cells.first + cells.count
    for first, count in holes:
        if first >= end:
            break
        if first > begin:
            yield Range(begin, first - begin)
        begin = max(begin, first + count)
    if begin < end:
        yield Range(begin, end - begin)
