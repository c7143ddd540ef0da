"""A range: a run of neighbouring cells. The one word that planning, wire and server share."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Range"]


class Range(NamedTuple):
    """Cells ``first`` to ``first + count - 1``."""

    first: int
    count: int  # type: ignore[assignment]  # the word for it; nobody counts values in a range
