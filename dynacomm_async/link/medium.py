"""The virtual link clock: when bytes are on the medium. Pure: no clock and no sockets.

Times are nanoseconds since the link started. Whoever wakes up late hands in the time at which its
bytes were *waiting*, not the time at which it got to run; so a busy medium goes on exactly where
it was and late wake-ups never add up. Only a medium that was idle starts again from "now".
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

__all__ = ["Medium", "Rates"]


class Rates:
    """The rate of one direction over time.

    Args:
        steps: ``(at_ns, bytes_per_s)`` in increasing ``at_ns``, the first at 0; None is no limit.
    """

    def __init__(self, steps: Sequence[tuple[int, float | None]]) -> None:
        self._at_ns = [at_ns for at_ns, _ in steps]
        self._bytes_per_ns = [
            None if bytes_per_s is None else bytes_per_s / 1e9 for _, bytes_per_s in steps
        ]

    def nbytes_in(self, duration_ns: int, now_ns: int) -> float:
        """Return how many bytes the rate of ``now_ns`` carries in ``duration_ns``."""
        rate = self._bytes_per_ns[bisect_right(self._at_ns, now_ns) - 1]
        return math.inf if rate is None else rate * duration_ns

    def most_nbytes_in(self, duration_ns: int) -> float:
        """Return how many bytes the highest rate of all carries in ``duration_ns``."""
        return max(self.nbytes_in(duration_ns, at_ns) for at_ns in self._at_ns)

    def end_ns(self, start_ns: float, nbytes: float) -> float:
        """Return when ``nbytes`` that begin at ``start_ns`` have passed; O(steps crossed)."""
        step = bisect_right(self._at_ns, start_ns) - 1
        while True:
            rate = self._bytes_per_ns[step]
            end_ns = start_ns if rate is None else start_ns + nbytes / rate
            step += 1
            if rate is None or step == len(self._at_ns) or end_ns <= self._at_ns[step]:
                return end_ns
            nbytes -= (self._at_ns[step] - start_ns) * rate
            start_ns = self._at_ns[step]


class Medium:
    """What carries one thing at a time, first come first served.

    One medium for both directions makes a half-duplex link; one for several connections makes a
    shared one. Pieces are the unit of taking turns, so a long message does not shut out the others.

    Args:
        overhead_ns: occupies the medium once per message, before the message's bytes.
    """

    def __init__(self, overhead_ns: int = 0) -> None:
        self._overhead_ns = overhead_ns
        # A float keeps fractions of a nanosecond, which would add up over small pieces at a high
        # rate; a double still resolves a tenth of a nanosecond after a week.
        self._free_ns = 0.0

    def reserve(self, now_ns: int, nbytes: int, messages: int, rates: Rates) -> tuple[int, int]:
        """Put ``nbytes`` that have been waiting since ``now_ns`` on the medium.

        Args:
            now_ns: since when they could have been sent.
            nbytes: how many.
            messages: how many messages begin with them; each occupies the overhead first.
            rates: the rates of their direction.

        Returns:
            When their turn (overhead included) begins, and when the last byte has passed.
        """
        start_ns = max(float(now_ns), self._free_ns)
        self._free_ns = rates.end_ns(start_ns + messages * self._overhead_ns, nbytes)
        return round(start_ns), round(self._free_ns)
