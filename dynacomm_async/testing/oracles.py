"""Slow planners that are plainly right: exhaustive search and the textbook dynamic programmes.

They solve one phase, given as one number per layer in forward order, and share no code with the
planners they judge. ``cuts`` are the layers, ascending, at which a new segment begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, combinations, pairwise
from typing import NamedTuple

__all__ = [
    "PhaseOptimum",
    "forward_end_ns",
    "list_all_cuts",
    "push_end_ns",
    "search_forward",
    "search_push",
    "solve_forward_cubic",
    "solve_push_cubic",
    "solve_push_quadratic",
]


class PhaseOptimum(NamedTuple):
    """The shortest phase, and the fewest segments that reach it."""

    end_ns: int
    n_segments: int


def list_all_cuts(n_layers: int) -> Iterator[tuple[int, ...]]:
    """Yield all 2**(L-1) ways to cut L layers into segments, those with fewer cuts first."""
    for n_cuts in range(n_layers):
        yield from combinations(range(1, n_layers), n_cuts)


def forward_end_ns(
    compute: Sequence[int], transfer: Sequence[int], overhead_ns: int, cuts: Sequence[int]
) -> int:
    """Return when the last layer has computed, if the segments are pulled back to back."""
    bounds = [0, *cuts, len(compute)]
    arrived = computed = 0
    for begin, end in pairwise(bounds):
        arrived += overhead_ns + sum(transfer[begin:end])
        computed = max(computed, arrived) + sum(compute[begin:end])
    return computed


def push_end_ns(
    compute: Sequence[int], transfer: Sequence[int], overhead_ns: int, cuts: Sequence[int]
) -> int:
    """Return when the last gradient has been sent, if nothing stalls the backward pass."""
    bounds = [0, *cuts, len(compute)]
    computed = sent = 0
    for begin, end in reversed(list(pairwise(bounds))):
        computed += sum(compute[begin:end])
        sent = max(sent, computed) + overhead_ns + sum(transfer[begin:end])
    return sent


def search_forward(
    compute: Sequence[int], transfer: Sequence[int], overhead_ns: int
) -> PhaseOptimum:
    """Try every pull plan. O(L * 2**L)."""
    return min(
        PhaseOptimum(forward_end_ns(compute, transfer, overhead_ns, cuts), len(cuts) + 1)
        for cuts in list_all_cuts(len(compute))
    )


def search_push(compute: Sequence[int], transfer: Sequence[int], overhead_ns: int) -> PhaseOptimum:
    """Try every push plan. O(L * 2**L)."""
    return min(
        PhaseOptimum(push_end_ns(compute, transfer, overhead_ns, cuts), len(cuts) + 1)
        for cuts in list_all_cuts(len(compute))
    )


def solve_push_quadratic(compute: Sequence[int], transfer: Sequence[int], overhead_ns: int) -> int:
    """Return when the best push phase ends: a minimum over the last message's begin. O(L**2).

    Played backwards, a push phase is a pull phase: the best of the same lists takes as long.
    """
    ready = list(accumulate(reversed(compute), initial=0))
    total = list(accumulate(reversed(transfer), initial=0))
    ends = [0]
    for n in range(1, len(ready)):
        ends.append(
            overhead_ns + total[n] + min(max(ends[m], ready[n]) - total[m] for m in range(n))
        )
    return ends[-1]


def solve_push_cubic(
    compute: Sequence[int], transfer: Sequence[int], overhead_ns: int
) -> PhaseOptimum:
    """Find the best push phase for each number of segments. O(L**3), as in DynaComm's paper."""
    ready = list(accumulate(reversed(compute), initial=0))
    total = list(accumulate(reversed(transfer), initial=0))
    n_layers = len(compute)
    # ends[i] belongs to the first n_segments + i positions, cut into n_segments messages.
    ends = [ready[n] + overhead_ns + total[n] for n in range(1, n_layers + 1)]
    best = PhaseOptimum(ends[-1], 1)
    for n_segments in range(2, n_layers + 1):
        before = n_segments - 1
        ends = [
            overhead_ns
            + total[n]
            + min(max(ends[m - before], ready[n]) - total[m] for m in range(before, n))
            for n in range(n_segments, n_layers + 1)
        ]
        best = min(best, PhaseOptimum(ends[-1], n_segments))
    return best


def solve_forward_cubic(
    compute: Sequence[int], transfer: Sequence[int], overhead_ns: int
) -> PhaseOptimum:
    """Find the best pull phase for each number of segments. O(L**3), as in DynaComm's paper.

    When a segment arrives depends on how many messages went before, and on nothing else.
    """
    computed = list(accumulate(compute, initial=0))
    total = list(accumulate(transfer, initial=0))
    n_layers = len(compute)
    # ends[i] belongs to the first n_segments + i layers, cut into n_segments messages.
    ends = [overhead_ns + total[n] + computed[n] for n in range(1, n_layers + 1)]
    best = PhaseOptimum(ends[-1], 1)
    for n_segments in range(2, n_layers + 1):
        before = n_segments - 1
        sent_ns = n_segments * overhead_ns
        ends = [
            computed[n]
            + min(max(ends[m - before], sent_ns + total[n]) - computed[m] for m in range(before, n))
            for n in range(n_segments, n_layers + 1)
        ]
        best = min(best, PhaseOptimum(ends[-1], n_segments))
    return best
