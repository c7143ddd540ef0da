"""Slow planners that are plainly right: exhaustive search and the textbook dynamic programmes.

Most solve one phase, given as one number per layer in forward order; ``cuts`` are the layers,
ascending, at which a new segment begins. :func:`search_crossing` solves a whole step without a
barrier. None shares code with the planners they judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, combinations, pairwise
from typing import NamedTuple, TypeVar

from dynacomm_async.schedule.costs import Costs

__all__ = [
    "PhaseOptimum",
    "forward_end_ns",
    "list_all_cuts",
    "list_all_orders",
    "push_end_ns",
    "search_crossing",
    "search_forward",
    "search_push",
    "solve_forward_cubic",
    "solve_push_cubic",
    "solve_push_quadratic",
]


T = TypeVar("T")


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


def list_all_orders(items: Sequence[T]) -> Iterator[list[tuple[T, ...]]]:
    """Yield all ways to put items into messages and the messages in order: 1, 3, 13, 75, 541."""
    if not items:
        yield []
    for n_first in range(1, len(items) + 1):
        for chosen in combinations(range(len(items)), n_first):
            first = tuple(items[index] for index in chosen)
            rest = [item for index, item in enumerate(items) if index not in chosen]
            for order in list_all_orders(rest):
                yield [first, *order]


def search_crossing(costs: Costs, n_slices: int = 1) -> int:
    """Return the shortest step without a barrier, of all messages in all orders, both ways.

    Each layer is cut into ``n_slices`` equal parts that go up and come down by themselves; its
    times must be multiples of that. From the start of the backward pass to the end of the next
    forward pass. For U units in all it tries as many ways as there are pairs of orders: 169 for
    3 units, 5,625 for 4, 292,681 for 5.
    """
    n_layers = len(costs.layers)
    units = [layer for layer in range(n_layers) for _ in range(n_slices)]
    releases_ns = [
        sum(layer.backward_ns for layer in costs.layers[index:]) for index in range(n_layers)
    ]
    # From a unit's arrival at the server to the end of the step, at least.
    least_ns = [
        costs.overhead_down_ns
        + costs.latency_down_ns
        + sum(layer.forward_ns for layer in costs.layers[index:])
        for index in range(n_layers)
    ]
    orders = list(list_all_orders(range(len(units))))
    share = costs.link_share
    best_ns = None
    for up in orders:
        now_ns = 0
        applied_ns = [0] * len(units)
        for message in up:
            now_ns = max(now_ns, *(releases_ns[units[unit]] for unit in message))
            now_ns += costs.overhead_up_ns * share
            now_ns += sum(costs.layers[units[unit]].push_ns * share for unit in message) // n_slices
            for unit in message:
                applied_ns[unit] = now_ns + costs.latency_up_ns + costs.server_ns
        if best_ns is not None and best_ns <= max(
            applied_ns[unit] + least_ns[layer] for unit, layer in enumerate(units)
        ):
            continue
        for down in orders:
            now_ns = 0
            arrived_ns = [0] * n_layers
            for message in down:
                now_ns = max(now_ns, *(applied_ns[unit] for unit in message))
                now_ns += costs.overhead_down_ns * share
                pulls_ns = sum(costs.layers[units[unit]].pull_ns * share for unit in message)
                now_ns += pulls_ns // n_slices
                for unit in message:
                    arrived_ns[units[unit]] = now_ns + costs.latency_down_ns
            end_ns = releases_ns[0]
            for layer, arrival_ns in zip(costs.layers, arrived_ns, strict=True):
                end_ns = max(end_ns, arrival_ns) + layer.forward_ns
            best_ns = end_ns if best_ns is None else min(best_ns, end_ns)
    assert best_ns is not None
    return best_ns
