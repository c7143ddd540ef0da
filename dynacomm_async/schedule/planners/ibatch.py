"""A reconstruction of iBatch's greedy batching.

iBatch (Wang, Pi, Zhou, "Scalable Distributed DL Training: Batching Communication and Computation",
AAAI 2019, doi 10.1609/aaai.v33i01.33015289) hides each batch of layers under the computation of
the one before. The text of its algorithm was not available, so this follows its idea, not its
letter: results under this name say what such a greedy method reaches, not what the authors'
program does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise

from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.plan import Plan

__all__ = ["plan_ibatch"]


def plan_ibatch(costs: Costs) -> Plan:
    """Return the best of the greedy plans, one per size of the first batch.

    The next batch is the longest run of layers whose overhead and transfer fit under the
    computation of the batch before, and at least one layer. The backward phase is mirrored: read
    from its end, a push phase is a pull phase. O(L**2 log L).
    """
    layers = costs.layers
    share = costs.link_share
    pull_cuts = _best_cuts(
        [layer.forward_ns for layer in layers],
        [layer.pull_ns * share for layer in layers],
        costs.overhead_down_ns * share,
    )
    push_cuts = _best_cuts(
        [layer.backward_ns for layer in layers],
        [layer.push_ns * share for layer in layers],
        costs.overhead_up_ns * share,
    )
    return Plan.from_cuts("ibatch", len(layers), pull_cuts, push_cuts)


def _best_cuts(compute: Sequence[int], transfer: Sequence[int], overhead_ns: int) -> list[int]:
    computed = list(accumulate(compute, initial=0))
    arrived = list(accumulate(transfer, initial=0))
    candidates = (
        _greedy_ends(computed, arrived, overhead_ns, first_end)
        for first_end in range(1, len(computed))
    )
    best = min(candidates, key=lambda ends: _phase_ns(computed, arrived, overhead_ns, ends))
    return best[:-1]


def _greedy_ends(
    computed: Sequence[int], arrived: Sequence[int], overhead_ns: int, first_end: int
) -> list[int]:
    """Return where each batch ends, given the end of the first; the last entry is L."""
    n_layers = len(computed) - 1
    begin, end = 0, first_end
    ends = [end]
    while end < n_layers:
        hidden_ns = computed[end] - computed[begin] - overhead_ns
        fits = bisect_right(arrived, arrived[end] + hidden_ns, end + 1) - 1
        begin, end = end, max(fits, end + 1)
        ends.append(end)
    return ends


def _phase_ns(
    computed: Sequence[int], arrived: Sequence[int], overhead_ns: int, ends: Sequence[int]
) -> int:
    """Return when the last layer has computed."""
    now_ns = 0
    for count, (begin, end) in enumerate(pairwise([0, *ends]), start=1):
        now_ns = max(now_ns, count * overhead_ns + arrived[end]) + computed[end] - computed[begin]
    return now_ns
