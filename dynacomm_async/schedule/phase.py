"""The shortest push or pull phase of a step and the messages that reach it, in linear time.

The problem is that of DynaComm (Cai et al., IEEE JSAC 40(2):611-625, 2022, arXiv 2101.07968).

Theory of operation. Number the positions of a phase 1..n in the order in which their data become
ready; C(k) is when position k is ready, G(k) the transfer time of positions 1..k, both prefix
sums. T(n), the earliest time at which positions 1..n have been sent, is the minimum over m < n of
max(T(m), C(n)) + overhead + G(n) - G(m). Both T and S(n) = T(n) - G(n) are nondecreasing: take the
last position out of a schedule, and what remains is a schedule that ends earlier by at least its
transfer. So, with p the largest m < n that has T(m) <= C(n), all m <= p cost C(n) - G(m), least at
p, and all m > p cost S(m), least at p + 1: two candidates decide, and p never moves back.

The push phase is such a problem as it stands: the last layer is ready first. The pull phase is one
when read from its end: what a layer's forward pass needs at the latest before the end is what a
gradient's readiness is at the earliest after the start. So both are solved from the last layer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from dynacomm_async.schedule.costs import Costs

__all__ = ["earliest_ends_ns", "fewest_cuts", "sum_up"]


def earliest_ends_ns(costs: Costs) -> tuple[int, int]:
    """Return the shortest forward and the shortest backward phase of a worker alone on its link.

    Latency and the server's time come on top. No order of messages and no cut, not even one inside
    a layer, makes either phase shorter. O(L).
    """
    layers = costs.layers[::-1]
    forward_ns = _earliest_end_ns(
        sum_up([layer.forward_ns for layer in layers]),
        sum_up([layer.pull_ns for layer in layers]),
        costs.overhead_down_ns,
    )
    backward_ns = _earliest_end_ns(
        sum_up([layer.backward_ns for layer in layers]),
        sum_up([layer.push_ns for layer in layers]),
        costs.overhead_up_ns,
    )
    return forward_ns, backward_ns


def sum_up(values: Sequence[int]) -> list[int]:
    """Return the prefix sums, the first of them 0."""
    return list(accumulate(values, initial=0))


def _earliest_end_ns(ready: Sequence[int], sent: Sequence[int], overhead_ns: int) -> int:
    """Return T(n) for the prefix sums C (``ready``) and G (``sent``), each of n + 1 numbers."""
    starts = [0]  # S(k) = T(k) - G(k)
    append = starts.append
    p_sent = 0  # G(p)
    following = following_start = following_end = 0  # p + 1, S(p + 1), T(p + 1)
    for k in range(1, len(ready)):
        now = ready[k]
        while following_end <= now:
            p_sent = sent[following]
            following += 1
            if following == k:  # the link is idle: only position k itself waits
                following_start = now - p_sent + overhead_ns
                following_end = following_start + sent[k]
                append(following_start)
                break
            following_start = starts[following]
            following_end = following_start + sent[following]
        else:
            start = now - p_sent
            if following_start < start:
                start = following_start
            append(start + overhead_ns)
    return starts[-1] + sent[-1]


def fewest_cuts(ready: Sequence[int], sent: Sequence[int], overhead_ns: int) -> list[int]:
    """Return the ascending cuts, as layers, of a phase given from its last layer.

    Of the plans that end the phase as early as possible it is one with the fewest messages. O(L).

    Going back from the end, every message leaves as late as the optimum allows and takes in as
    many positions as are ready by then. Any other choice has left at least as many for the
    messages before it, so none has fewer messages.

    Args:
        ready: (L + 1,) the prefix sums of the computation.
        sent: (L + 1,) the prefix sums of the transfer.
        overhead_ns: of every message.
    """
    slack_ns = _earliest_end_ns(ready, sent, overhead_ns) - sent[-1]
    n_layers = len(ready) - 1
    cuts: list[int] = []
    end = n_layers  # positions 1..end are not yet in a segment
    while True:
        slack_ns -= overhead_ns
        # The message with positions begin+1..end leaves at slack + G(begin), not before C(end).
        begin = bisect_left(sent, ready[end] - slack_ns, 0, end)
        if begin == 0:
            return cuts
        cuts.append(n_layers - begin)
        end = begin
