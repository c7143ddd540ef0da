"""Messages without a barrier named one by one, found by local search.

A policy decides late and needs no list, but it cannot wait for a layer that is worth waiting for,
nor give its messages different sizes. Where overheads are large and messages few, that costs some
per cent. A list of segments in any order, one each way, can do both. The search changes a list a
little at a time: it moves the border of two segments, cuts one, joins two, or lets one leave
earlier; in one direction or, since what goes up apart is of use only where it comes down apart, in
both. It takes what makes the step shorter until nothing does.

The step of such lists follows from prefix sums alone. It is what
:class:`~dynacomm_async.schedule.crossing.Crossing` says of them, without asking a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import TypeAlias

from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.plan import Plan, Segment, cut_segments

__all__ = ["search_segments"]

_Order: TypeAlias = tuple[tuple[int, int], ...]  # segments as (first layer, layer after), as sent

_MOST_PARTS = 5
"""The search begins at 1, 2, ... messages each way of about the same size."""

_MOST_WORK = 300_000
"""Pairs of messages that are looked at before the search ends: some fifty milliseconds."""

_WORK_AT_ONCE = 5_000
"""The same before it pauses: about a millisecond."""


def search_segments(
    costs: Costs, plans: Iterable[Plan] = (), pause: Callable[[], object] = lambda: None
) -> tuple[Plan, int]:
    """Return the best plan without a barrier that was found, named joint, and its step in ns.

    Args:
        costs: of the step.
        plans: where to begin; messages of equal sizes are tried after them. Their barriers do not
            count.
        pause: called about once in a millisecond of work.
    """
    search = _Search(costs, pause)
    n_layers = len(costs.layers)
    starts = [(_order_of(plan.push), _order_of(plan.pull)) for plan in plans]
    for n_parts in range(1, min(_MOST_PARTS, n_layers) + 1):
        pull = _equal_parts(search.sent_down, n_parts)
        starts += [(pull[::-1], pull), (pull, pull), (pull[::-1], pull[::-1])]
    best = min(
        (search.descend(*start) for start in dict.fromkeys(starts)), key=lambda found: found[0]
    )
    step_ns, push, pull = best
    plan = Plan("joint", n_layers, _segments(pull), _segments(push), barrier=False)
    return plan, step_ns


class _Search:
    def __init__(self, costs: Costs, pause: Callable[[], object]) -> None:
        self._pause = pause
        self._pause_at = _MOST_WORK - _WORK_AT_ONCE
        layers, share = costs.layers, costs.link_share
        backward_ns = list(accumulate([layer.backward_ns for layer in reversed(layers)]))
        forward_ns = list(accumulate([layer.forward_ns for layer in reversed(layers)]))
        self._ready_ns = backward_ns[::-1]
        self._tails_ns = forward_ns[::-1]
        self._sent_up = list(accumulate([layer.push_ns * share for layer in layers], initial=0))
        self.sent_down = list(accumulate([layer.pull_ns * share for layer in layers], initial=0))
        self._up_ns = costs.overhead_up_ns * share
        self._down_ns = costs.overhead_down_ns * share
        self._to_server_ns = costs.latency_up_ns + costs.server_ns
        self._to_worker_ns = costs.latency_down_ns
        self._work_left = _MOST_WORK

    def descend(self, push: _Order, pull: _Order) -> tuple[int, _Order, _Order]:
        """Change the lists for as long as that makes the step shorter."""
        best_ns = self._step_ns(push, pull)
        improved = True
        while improved and self._work_left > 0:
            improved = False
            for new_push, new_pull in _neighbours(push, pull):
                step_ns = self._step_ns(new_push, new_pull)
                if step_ns < best_ns:
                    push, pull, best_ns, improved = new_push, new_pull, step_ns, True
                    break
        return best_ns, push, pull

    def _step_ns(self, push: _Order, pull: _Order) -> int:
        self._work_left -= 8 + len(push) * len(pull)
        if self._work_left < self._pause_at:
            self._pause_at = self._work_left - _WORK_AT_ONCE
            self._pause()
        now_ns = 0
        applied = []
        for first, end in push:
            ready_ns = self._ready_ns[first]
            if now_ns < ready_ns:
                now_ns = ready_ns
            now_ns += self._up_ns + self._sent_up[end] - self._sent_up[first]
            applied.append((first, end, now_ns + self._to_server_ns))
        now_ns = 0
        step_ns = self._ready_ns[0] + self._tails_ns[0]
        for first, end in pull:
            for other, other_end, applied_ns in applied:
                if applied_ns > now_ns and other < end and first < other_end:
                    now_ns = applied_ns
            now_ns += self._down_ns + self.sent_down[end] - self.sent_down[first]
            end_ns = now_ns + self._to_worker_ns + self._tails_ns[first]
            if end_ns > step_ns:
                step_ns = end_ns
        return step_ns


def _neighbours(push: _Order, pull: _Order) -> Iterator[tuple[_Order, _Order]]:
    """All small changes of one list, and of both at the same border."""
    pushes, pulls = list(_changes(push)), list(_changes(pull))
    for _, changed in pushes:
        yield changed, pull
    for _, changed in pulls:
        yield push, changed
    by_border: dict[object, list[_Order]] = {}
    for border, changed in pulls:
        by_border.setdefault(border, []).append(changed)
    for border, changed in pushes:
        for other in by_border.get(border, ()):
            yield changed, other


def _changes(order: _Order) -> Iterator[tuple[object, _Order]]:
    """Every list that is a small change away from this one, and where the change is."""
    for place in range(1, len(order)):
        before, after = order[place - 1], order[place]
        yield None, (*order[: place - 1], after, before, *order[place + 1 :])
    places = {segment: place for place, segment in enumerate(order)}
    ascending = sorted(order)
    for front, back in pairwise(ascending):
        joined = (front[0], back[1])
        for kept, dropped in ((front, back), (back, front)):
            changed = list(order)
            changed[places[kept]] = joined
            del changed[places[dropped]]
            yield ("join", front[1]), tuple(changed)
        step = 1
        while step < max(front[1] - front[0], back[1] - back[0]):
            for border in (front[1] - step, front[1] + step):
                if front[0] < border < back[1]:
                    changed = list(order)
                    changed[places[front]] = (front[0], border)
                    changed[places[back]] = (border, back[1])
                    yield ("move", front[1], border), tuple(changed)
            step *= 2
    for place, (first, end) in enumerate(order):
        for border in _borders(first, end):
            parts = (first, border), (border, end)
            yield ("cut", border), (*order[:place], *parts, *order[place + 1 :])
            yield ("cut", border), (*order[:place], *parts[::-1], *order[place + 1 :])


def _borders(first: int, end: int) -> Iterable[int]:
    """Some layers at which to cut a segment, all where they are few."""
    n_layers = end - first
    if n_layers <= 8:
        return range(first + 1, end)
    return [first + n_layers * part // 8 for part in range(1, 8)]


def _order_of(segments: Sequence[Segment]) -> _Order:
    return tuple((segment.first, segment.last + 1) for segment in segments)


def _segments(order: _Order) -> tuple[Segment, ...]:
    return tuple(Segment(first, end - 1) for first, end in order)


def _equal_parts(sent: Sequence[int], n_parts: int) -> _Order:
    """Cut the layers into parts of about the same transfer, in forward order."""
    n_layers = len(sent) - 1
    cuts: list[int] = []
    for layer in range(1, n_layers):
        due = len(cuts) + 1
        left = n_parts - due  # cuts that are still to come behind this one
        if due < n_parts and (
            sent[layer] * n_parts >= sent[-1] * due or n_layers - layer == left + 1
        ):
            cuts.append(layer)
    return _order_of(cut_segments(n_layers, cuts))
