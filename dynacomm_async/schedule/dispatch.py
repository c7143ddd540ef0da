"""The rule by which a sender picks its next message, the same for uplink and downlink.

Messages leave in the order of the plan, each as soon as all its cells are ready; a sender with a
barrier waits until everything is. The rule is asked when the link is free, never before, and
knows neither links nor clocks.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

from dynacomm_async.errors import PlanError
from dynacomm_async.ranges import Range

__all__ = ["OrderedDispatcher"]


class OrderedDispatcher:
    """Hands out messages in order, each when its cells are ready.

    Args:
        messages: the cells of each message, in the order to send; no cell is in two messages.
            Cells in no message are never sent.
        n_cells: how many cells there are; all ranges lie in 0 to ``n_cells``.
        barrier: hand out nothing before the cells of all messages are ready.

    Raises:
        PlanError: a message or range without cells, cells outside the model or in two messages.
    """

    def __init__(
        self, messages: Sequence[tuple[Range, ...]], *, n_cells: int, barrier: bool = False
    ) -> None:
        self._messages = tuple(messages)
        self._n_cells = n_cells
        self._barrier = barrier
        self._missing = [sum(part.count for part in message) for message in self._messages]
        self._n_missing = sum(self._missing)
        self._sent = 0
        self._parts = _sort_parts(self._messages, n_cells)
        self._part_ends = [first + count for first, count, _ in self._parts]
        # What is ready, as disjoint runs that do not touch, in order.
        self._begins: list[int] = []
        self._ends: list[int] = []

    @property
    def done(self) -> bool:
        """Whether every message has been handed out."""
        return self._sent == len(self._messages)

    def ready(self, first: int, count: int) -> None:
        """Mark ``count`` cells from ``first`` as ready; those that were already stay so.

        O(log R) for R ranges, and amortised O(1) for every range and earlier run it touches.

        Raises:
            PlanError: cells outside the model; nothing is marked.
        """
        end = first + count
        if count < 1 or first < 0 or end > self._n_cells:
            raise PlanError(
                f"cells {first} to {end} are ready, expected at least one of 0 to {self._n_cells}"
            )
        for gap_begin, gap_end in self._fill(first, end):
            self._count_down(gap_begin, gap_end)

    def next(self) -> tuple[Range, ...] | None:
        """Return the message to send now and count it as sent; None: wait, or nothing is left."""
        if self.done or (self._n_missing if self._barrier else self._missing[self._sent]):
            return None
        message = self._messages[self._sent]
        self._sent += 1
        return message

    def _fill(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Merge a run into the ready ones; return the parts of it that were not ready."""
        begins, ends = self._begins, self._ends
        # Runs low..high-1 overlap or touch this one and become one run with it.
        low = bisect_left(ends, begin)
        high = bisect_right(begins, end)
        gaps = []
        position = begin
        for run in range(low, high):
            if position < begins[run]:
                gaps.append((position, begins[run]))
            position = ends[run]
        if position < end:
            gaps.append((position, end))
        if low < high:
            begin, end = min(begin, begins[low]), max(end, ends[high - 1])
        begins[low:high] = [begin]
        ends[low:high] = [end]
        return gaps

    def _count_down(self, begin: int, end: int) -> None:
        for index in range(bisect_right(self._part_ends, begin), len(self._parts)):
            first, count, message = self._parts[index]
            if first >= end:
                break
            n_cells = min(first + count, end) - max(first, begin)
            self._missing[message] -= n_cells
            self._n_missing -= n_cells


def _sort_parts(messages: Sequence[tuple[Range, ...]], n_cells: int) -> list[tuple[int, int, int]]:
    """Return every range as (first, count, message) in the order of cells."""
    parts = sorted(_iter_parts(messages))
    due = 0
    for first, count, message in parts:
        if count < 1:
            raise PlanError(f"message {message} has a range of {count} cells, expected at least 1")
        if first < 0 or first + count > n_cells:
            raise PlanError(
                f"message {message} has cells {first} to {first + count}, "
                f"expected them in 0 to {n_cells}"
            )
        if first < due:
            raise PlanError(
                f"cell {first} is in message {message} and in another range, expected it once"
            )
        due = first + count
    return parts


def _iter_parts(messages: Sequence[tuple[Range, ...]]) -> Iterator[tuple[int, int, int]]:
    for index, message in enumerate(messages):
        if not message:
            raise PlanError(f"message {index} has no ranges, expected at least one")
        for first, count in message:
            yield first, count, index
