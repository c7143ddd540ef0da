"""The rules by which a sender picks its next message, the same for uplink and downlink.

:class:`OrderedDispatcher` sends the messages of a plan in their order, each as soon as all its
cells are ready; with a barrier it waits until everything is. :class:`PriorityDispatcher` has no
list: it sends what is ready, mostly the front of the model first, in messages that a policy
measures out.
Either is asked when the link is free, never before: what becomes ready while a message leaves can
still overtake what waits. Neither knows links or clocks.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from dynacomm_async.errors import PlanError
from dynacomm_async.ranges import Range, merge, subtract
from dynacomm_async.schedule.layout import Layout

__all__ = ["Dispatcher", "OrderedDispatcher", "Policy", "PriorityDispatcher"]


@dataclass(frozen=True, slots=True)
class Policy:
    """How much of what is ready leaves in one message, and when it is worth one.

    Every message occupies its link for a fixed overhead beside its bytes. Small messages reach the
    other side sooner, large ones waste less; waiting for more fills them.

    Attributes:
        cap_nbytes: a message holds at most this much, but at least one cell, or one layer where
            layers stay whole; None: no limit.
        threshold_nbytes: while less than this is ready and more is to come, nothing leaves.
        whole_layers: send layers only when all their cells are ready, and never a part of one.
        one_layer: a message holds cells of one layer only.
        rear_first: of what is ready the rear layers leave first, until everything is ready; then
            the front ones. A backward pass makes gradients ready in that order, so workers of
            unequal speed have sent the same cells, the faster ones more of them. Those who turn
            to the latest layer whenever there is one leave different cells behind.

    Raises:
        PlanError: a cap below 1, a threshold below 0, or a flag that is none.
    """

    cap_nbytes: int | None = None
    threshold_nbytes: int = 0
    whole_layers: bool = False
    one_layer: bool = False
    rear_first: bool = False

    def __post_init__(self) -> None:
        cap, threshold = self.cap_nbytes, self.threshold_nbytes
        if cap is not None and (type(cap) is not int or cap < 1):
            raise PlanError(f"a policy's cap is {cap!r} bytes, expected at least 1 or None")
        if type(threshold) is not int or threshold < 0:
            raise PlanError(f"a policy's threshold is {threshold!r} bytes, expected at least 0")
        for flag in (self.whole_layers, self.one_layer, self.rear_first):
            if not isinstance(flag, bool):
                raise PlanError(f"a policy's flag is {flag!r}, expected True or False")


class Dispatcher(Protocol):
    """A rule for one direction of one step."""

    @property
    def done(self) -> bool:
        """Whether everything has been handed out."""
        ...

    def ready(self, first: int, count: int) -> None:
        """Mark ``count`` cells from ``first`` as ready."""
        ...

    def next(self) -> tuple[Range, ...] | None:
        """Return the message to send now, None: wait, or nothing is left."""
        ...


class OrderedDispatcher:
    """Hands out messages in order, each when its cells are ready.

    Args:
        messages: the cells of each message, in the order to send; no cell is in two messages.
            Cells in no message are never sent.
        n_cells: how many cells there are; all ranges lie in 0 to ``n_cells``.
        barrier: hand out nothing before the cells of all messages are ready.
        skip: cells that are at the other end already; no message holds them.

    Attributes:
        barrier: as given.

    Raises:
        PlanError: a message or range without cells, cells outside the model or in two messages.
    """

    def __init__(
        self,
        messages: Sequence[tuple[Range, ...]],
        *,
        n_cells: int,
        barrier: bool = False,
        skip: Iterable[Range] = (),
    ) -> None:
        self._messages = _without(messages, merge(skip))
        self.barrier = barrier
        self._missing = [sum(part.count for part in message) for message in self._messages]
        self._n_missing = sum(self._missing)
        self._sent = 0
        self._parts = _sort_parts(self._messages, n_cells)
        self._part_ends = [first + count for first, count, _ in self._parts]
        self._ready = _Runs(n_cells)

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
        for begin, end in self._ready.add(first, count):
            self._count_down(begin, end)

    def next(self) -> tuple[Range, ...] | None:
        """Return the message to send now and count it as sent; None: wait, or nothing is left."""
        if self.done or (self._n_missing if self.barrier else self._missing[self._sent]):
            return None
        message = self._messages[self._sent]
        self._sent += 1
        return message

    def _count_down(self, begin: int, end: int) -> None:
        for index in range(bisect_right(self._part_ends, begin), len(self._parts)):
            first, count, message = self._parts[index]
            if first >= end:
                break
            n_cells = min(first + count, end) - max(first, begin)
            self._missing[message] -= n_cells
            self._n_missing -= n_cells


class PriorityDispatcher:
    """Hands out what is ready, the lowest cells first, or as its policy says.

    A layer that is cut costs nothing: what is ready is kept as runs of cells, so an operation is
    O(log R) for the R runs and O(log L) for the L layers, however many cells there are; with
    ``rear_first`` runs end with their layers, and it is so for each of them.

    Args:
        policy: how large messages are, and when one is worth sending.
        layout: the cells of the layers; all of them are to be sent, each once.
        skip: but these, which are at the other end already; whole layers where layers stay whole.

    Raises:
        PlanError: cells outside the model are to be skipped.
    """

    def __init__(self, policy: Policy, layout: Layout, skip: Iterable[Range] = ()) -> None:
        self._policy = policy
        self._layout = layout
        self._ready = _Runs(layout.n_cells)
        self._missing = list(map(int.__sub__, layout.firsts[1:], layout.firsts))
        self._waiting: list[tuple[int, int, int]] = []  # a heap: rank, first cell, the one after
        self._waiting_nbytes = 0
        self._to_come_nbytes = layout.nbytes
        for cells in skip:
            for begin, end in self._ready.add(*cells):
                self._to_come_nbytes -= layout.offset(end) - layout.offset(begin)
                if policy.whole_layers:
                    self._count_layers(begin, end)

    @property
    def done(self) -> bool:
        """Whether every cell has been handed out."""
        return not self._waiting and not self._to_come_nbytes

    def ready(self, first: int, count: int) -> None:
        """Mark ``count`` cells from ``first`` as ready; those that were already stay so.

        When the last cell is ready no more will come, and the threshold waits no longer.

        Raises:
            PlanError: cells outside the model; nothing is marked.
        """
        for begin, end in self._ready.add(first, count):
            if self._policy.whole_layers:
                self._complete_layers(begin, end)
            else:
                self._enqueue(begin, end)

    def next(self) -> tuple[Range, ...] | None:
        """Return the message to send now and count it as sent; None: wait, or nothing is left."""
        waiting, policy = self._waiting, self._policy
        if not waiting:
            return None
        if self._to_come_nbytes and self._waiting_nbytes < policy.threshold_nbytes:
            return None
        room = self._waiting_nbytes if policy.cap_nbytes is None else policy.cap_nbytes
        lowest, limit = 0, self._layout.n_cells
        if policy.one_layer:
            layer = self._layout.layer_of(waiting[0][1])
            lowest, limit = self._layout.firsts[layer : layer + 2]
        message: list[Range] = []
        while waiting and lowest <= waiting[0][1] < limit:
            rank, begin, end = waiting[0]
            stop, nbytes = self._measure(begin, min(end, limit), room, not message)
            if stop == begin:
                break
            if stop == end:
                heapq.heappop(waiting)
            else:
                heapq.heapreplace(waiting, (rank, stop, end))
            message.append(Range(begin, stop - begin))
            self._waiting_nbytes -= nbytes
            room -= nbytes
            if stop < end:
                break
        return merge(message)

    def _measure(self, begin: int, end: int, room: int, must: bool) -> tuple[int, int]:
        """Return how far a message with that much room takes a run, and how much that is."""
        layout = self._layout
        offset = layout.offset(begin)
        nbytes = layout.offset(end) - offset
        if nbytes <= room:
            return end, nbytes
        stop = layout.cell_before(offset + room) if room > 0 else begin
        if self._policy.whole_layers:
            stop = layout.firsts[layout.layer_of(stop)]
            if must and stop <= begin:
                stop = layout.firsts[layout.layer_of(begin) + 1]
        elif must and stop <= begin:
            stop = begin + 1
        return stop, layout.offset(stop) - offset

    def _enqueue(self, begin: int, end: int) -> None:
        layout = self._layout
        nbytes = layout.offset(end) - layout.offset(begin)
        self._waiting_nbytes += nbytes
        self._to_come_nbytes -= nbytes
        if not self._policy.rear_first:
            heapq.heappush(self._waiting, (0, begin, end))
            return
        while begin < end:
            layer = layout.layer_of(begin)
            stop = min(end, layout.firsts[layer + 1])
            heapq.heappush(self._waiting, (-layer, begin, stop))
            begin = stop
        if not self._to_come_nbytes:
            self._waiting = [(0, begin, end) for _, begin, end in self._waiting]
            heapq.heapify(self._waiting)

    def _complete_layers(self, begin: int, end: int) -> None:
        """Enqueue the layers of which these cells were the last ones, neighbours as one run."""
        firsts = self._layout.firsts
        for first, stop in self._count_layers(begin, end):
            self._enqueue(firsts[first], firsts[stop])

    def _count_layers(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Count cells off; return the layers that this completes, as runs of neighbours."""
        firsts, missing = self._layout.firsts, self._missing
        layer = self._layout.layer_of(begin)
        complete: list[tuple[int, int]] = []
        while begin < end:
            stop = min(end, firsts[layer + 1])
            missing[layer] -= stop - begin
            if not missing[layer]:
                first = complete.pop()[0] if complete and complete[-1][1] == layer else layer
                complete.append((first, layer + 1))
            begin = stop
            layer += 1
        return complete


class _Runs:
    """The cells that are ready, as disjoint runs that do not touch, in order."""

    def __init__(self, n_cells: int) -> None:
        self._n_cells = n_cells
        self._begins: list[int] = []
        self._ends: list[int] = []

    def add(self, first: int, count: int) -> Sequence[tuple[int, int]]:
        """Merge a run into the ready ones; return the parts of it that were not ready.

        O(log R) for R runs, and amortised O(1) for every run it touches.

        Raises:
            PlanError: cells outside the model; nothing is added.
        """
        begin, end = first, first + count
        if count < 1 or first < 0 or end > self._n_cells:
            raise PlanError(
                f"cells {first} to {end} are ready, expected at least one of 0 to {self._n_cells}"
            )
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


def _without(
    messages: Sequence[tuple[Range, ...]], skip: Sequence[Range]
) -> tuple[tuple[Range, ...], ...]:
    """Return the messages that are left when some cells need not be sent."""
    if not skip:
        return tuple(messages)
    rest = (
        tuple(part for cells in message for part in subtract(cells, skip)) for message in messages
    )
    return tuple(message for message in rest if message)


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
