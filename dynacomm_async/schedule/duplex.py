"""Do both directions of a link have room at once, or do they take turns on one medium?

While one direction is alone, a message takes what the link's overhead and rate say. On a
half-duplex medium (Wi-Fi, most radio) it takes longer while the other direction is busy too: of
that time the medium gives it about half. So the excess over what a message takes alone, divided by
the time in which the other direction was busy, is about 0 on a full-duplex link and about 1/2 on a
half-duplex one. A plan that crosses the boundary between steps gains nothing on the latter.

What looks like a shared medium may be congestion control that has just met traffic both ways. So
the first step that crosses tells nothing, and a verdict of half duplex, under which nothing is
shared any more that could prove it wrong, is put to the test again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque

from dynacomm_async.errors import PlanError

__all__ = ["BusyTimes", "Duplex", "DuplexEstimator"]

_HALF = 0.4
"""An excess of this share of the shared time or more is a shared medium's: both directions together
get 1.2 times the rate of one, or less."""

_LEAST_SHARED_NS = 20_000_000
"""Shared time without which nothing is said: jitter of single messages must not decide."""

_PATIENCE, _MOST_PATIENCE = 3, 96
"""Steps behind a barrier until a verdict of half duplex is put to the test: at first, and at most.
They double with every test that confirms it."""

_MOST_TRIES = 8
"""Steps that cross in such a test at most. Where they contradict each other the verdict stands;
where they share too little, nothing is known any more."""

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

    Two counts over the last 256 observations with shared time must agree: whether those that were
    slowed down as by a shared medium make up half of that time, and whether the excess of all is
    that of a shared medium. The first alone would be moved by a reader that is late for one message
    and then finds the next ones there already; the second by a few messages that something else
    held up for long, such as congestion control that probes the path.
    """

    def __init__(self) -> None:
        self._shared: deque[tuple[bool, int, int]] = deque()  # slowed down, excess, shared time
        self._shared_ns = 0
        self._excess_ns = 0
        self._slowed_ns = 0

    @property
    def tells(self) -> bool:
        """Whether enough was shared to tell something, if only that it is uncertain."""
        return self._shared_ns >= _LEAST_SHARED_NS

    @property
    def half(self) -> bool | None:
        """Whether the link is half-duplex; None while too little was shared to tell, or the
        messages contradict each other."""
        if not self.tells:
            return None
        slowed = 2 * self._slowed_ns >= self._shared_ns
        return slowed if slowed == (self._excess_ns >= _HALF * self._shared_ns) else None

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
            excess_ns = elapsed_ns - expected_ns
            slowed = excess_ns >= _HALF * shared_ns
            counted = (slowed, max(-shared_ns, min(excess_ns, shared_ns)), shared_ns)
            self._count(*counted, 1)
            self._shared.append(counted)
            if len(self._shared) > _OBSERVATIONS:
                self._count(*self._shared.popleft(), -1)

    def _count(self, slowed: bool, excess_ns: int, shared_ns: int, sign: int) -> None:
        self._shared_ns += sign * shared_ns
        self._excess_ns += sign * excess_ns
        if slowed:
            self._slowed_ns += sign * shared_ns


class Duplex:
    """The verdict on a link, step by step, and when to doubt it.

    A step counts if it crossed the boundary and the one before did: in the first, congestion
    control meets traffic both ways for the first time and may slow down both for a while. A verdict
    is given when such a step has ended, by all messages since the last fresh start.

    Where the verdict is half duplex, steps keep a barrier, and nothing that they show could revise
    it. So after 3 steps behind a barrier it asks for steps that cross (:attr:`probing`), until they
    give a new verdict, mostly two; if that is the same, again after 6, 12, up to 96. On a link that
    is half-duplex these steps gain nothing, and lose little: both directions carry what they would
    have carried, on the same medium.

    Attributes:
        half: whether the link is half-duplex; None while that cannot be told. While it is put to
            the test the old verdict stands.
        probing: whether steps should cross though the verdict is half duplex.
    """

    def __init__(self) -> None:
        self.half: bool | None = None
        self.probing = False
        self._evidence = DuplexEstimator()
        self._has_crossed = False  # the step before
        self._patience = _PATIENCE
        self._n_left = 0  # steps behind a barrier until the next test
        self._n_tries = 0

    def observe(self, expected_ns: int, elapsed_ns: int, shared_ns: int) -> None:
        """Add what one message of the step under way took; see :meth:`DuplexEstimator.observe`."""
        if self._has_crossed:
            self._evidence.observe(expected_ns, elapsed_ns, shared_ns)

    def end_step(self, *, crossing: bool) -> None:
        """Give a verdict by the step that has ended, or come nearer to doubting the last.

        Args:
            crossing: whether the step's parameters could come down while gradients went up.
        """
        verdict = self._evidence.half if crossing and self._has_crossed else None
        self._has_crossed = crossing
        if verdict is not None:
            self._decide(verdict)
        elif self.probing and crossing:
            self._n_tries += 1
            if self._n_tries >= _MOST_TRIES and self._evidence.tells:
                self._decide(verdict=True)  # not refuted
            elif self._n_tries >= _MOST_TRIES:
                self.half, self.probing = None, False
        elif self.half and not self.probing and not crossing:
            self._n_left -= 1
            if self._n_left <= 0:
                self._evidence, self.probing, self._n_tries = DuplexEstimator(), True, 0

    def start_over(self) -> None:
        """The link has changed: forget what the verdict rests on, and doubt it at once.

        It stands until there is another: without one, what is shared would tell no rate, and
        without a rate nothing that is shared would tell a verdict.
        """
        self._evidence, self._n_left = DuplexEstimator(), 0

    def _decide(self, verdict: bool) -> None:
        if verdict and (self.probing or not self.half):
            self._n_left = self._patience
            self._patience = min(2 * self._patience, _MOST_PATIENCE)
        self.half, self.probing = verdict, False
