"""Do both directions of a link have room at once, or do they take turns on one medium?

While one direction is alone, a message takes what the link's overhead and rate say. On a
half-duplex medium (Wi-Fi, most radio) it takes longer while the other direction is busy too: of
that time the medium gives it about half. So the excess over what a message takes alone, divided by
the time in which the other direction was busy, is about 0 on a full-duplex link and about 1/2 on a
half-duplex one. A plan that crosses the boundary between steps gains nothing on the latter.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque

from dynacomm_async.errors import PlanError

__all__ = ["BusyTimes", "DuplexEstimator"]

_HALF = 0.35
"""An excess of this share of the shared time or more is a shared medium's."""

_LEAST_SHARED_NS = 20_000_000
"""Shared time without which nothing is said: jitter of single messages must not decide."""

_OBSERVATIONS = 256
_INTERVALS = 256


class BusyTimes:
    """When one direction was busy: intervals on one clock, in the order of their ends.

    Attributes:
        end_ns: the end of the last interval; 0 before there is one.
    """

    def __init__(self) -> None:
        self._starts: deque[int] = deque(maxlen=_INTERVALS)
        self._ends: deque[int] = deque(maxlen=_INTERVALS)
        self.end_ns = 0

    def add(self, start_ns: int, end_ns: int) -> None:
        """Add an interval; what of it has been added before does not count twice.

        Raises:
            PlanError: it ends before it begins, or before the last one ended.
        """
        if end_ns < start_ns or (self._ends and end_ns < self._ends[-1]):
            raise PlanError(
                f"busy from {start_ns} to {end_ns} ns, expected an interval that ends after the "
                "last one"
            )
        self.end_ns = end_ns
        while self._ends and start_ns <= self._ends[-1]:
            self._ends.pop()
            start_ns = min(start_ns, self._starts.pop())
        self._starts.append(start_ns)
        self._ends.append(end_ns)

    def within(self, start_ns: int, end_ns: int) -> int:
        """Return for how long it was busy between two times. O(log n) for n intervals, and more
        for those inside."""
        busy_ns = 0
        for place in range(bisect_right(self._ends, start_ns), len(self._ends)):
            begin = max(start_ns, self._starts[place])
            end = min(end_ns, self._ends[place])
            if begin >= end_ns:
                break
            busy_ns += end - begin
        return busy_ns


class DuplexEstimator:
    """Tells a full-duplex link from a half-duplex one, by the messages of one direction.

    Of the last 256 observations with shared time those that were slowed down as by a shared medium
    must make up half of that time. A sum of excesses would be moved by a few messages that
    something else held up for long, such as congestion control that probes the path.
    """

    def __init__(self) -> None:
        self._shared: deque[tuple[bool, int]] = deque()  # whether it was slowed down, shared time
        self._shared_ns = 0
        self._slowed_ns = 0

    @property
    def half(self) -> bool | None:
        """Whether the link is half-duplex; None while too little was shared to tell."""
        if self._shared_ns < _LEAST_SHARED_NS:
            return None
        return 2 * self._slowed_ns >= self._shared_ns

    def observe(self, expected_ns: int, elapsed_ns: int, shared_ns: int) -> None:
        """Add what one message took.

        Args:
            expected_ns: what it takes while the other direction is idle.
            elapsed_ns: what it took.
            shared_ns: for how long of that the other direction was busy.

        Raises:
            PlanError: a negative time, or more shared time than elapsed; nothing is added.
        """
        if min(expected_ns, elapsed_ns, shared_ns) < 0 or shared_ns > elapsed_ns:
            raise PlanError(
                f"a message of {expected_ns} ns took {elapsed_ns} ns, {shared_ns} ns of it shared, "
                "expected no negative time and a part of the time that it took"
            )
        if shared_ns:
            # Where directions take turns a message takes twice as long at most. What takes longer
            # was held up by something else, and must not outweigh all others.
            shared_ns = min(shared_ns, 2 * expected_ns)
            slowed = elapsed_ns - expected_ns >= _HALF * shared_ns
            self._count(slowed, shared_ns, 1)
            self._shared.append((slowed, shared_ns))
            if len(self._shared) > _OBSERVATIONS:
                self._count(*self._shared.popleft(), -1)

    def _count(self, slowed: bool, shared_ns: int, sign: int) -> None:
        self._shared_ns += sign * shared_ns
        if slowed:
            self._slowed_ns += sign * shared_ns
