"""A step across the step boundary: gradients still go up while new parameters come down.

Backward of the last layer cannot begin before the forward pass has used every parameter, so both
links are empty then, and a step is a finite problem: it begins with the backward pass and ends
when the next forward pass has. A layer's gradient is ready when its backward has ended; its new
parameters are ready at the server when the gradient has arrived and has been applied; its forward
begins when they have arrived and the layer before has computed. Both links are driven by the very
rules that workers and server follow (:mod:`dynacomm_async.schedule.dispatch`).

Workers alike, each on a link of its own, run in lockstep and are one worker as far as this goes.
On a half-duplex link the directions take turns, message by message, while both have something.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Final, NamedTuple

from dynacomm_async.ranges import Range
from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.dispatch import (
    Dispatcher,
    OrderedDispatcher,
    Policy,
    PriorityDispatcher,
)
from dynacomm_async.schedule.layout import Layout
from dynacomm_async.schedule.plan import AnyPlan, PolicyPlan, Segment

__all__ = ["Crossing", "Sent", "lockstep_ns"]

_SETTLING_STEPS: Final = 24


class Sent(NamedTuple):
    """One message's occupation of its link, overhead included; it arrives a latency later."""

    start_ns: int
    end_ns: int
    cells: tuple[Range, ...]


class Crossing:
    """The step of one cost table, for as many plans as one likes.

    Times count from the start of the backward pass. K messages take O(K log K).

    Attributes:
        layout: the cells of the layers.
        n_simulated: how many messages have been simulated, as a measure of work.
        computed_ns: when the backward pass ends.
        tails_ns: of each layer, the forward pass from there to the end.
    """

    def __init__(self, costs: Costs) -> None:
        layers, share = costs.layers, costs.link_share
        self.n_simulated = 0
        self.layout = layout = Layout([layer.nbytes for layer in layers])
        ends = list(accumulate([layer.backward_ns for layer in reversed(layers)]))
        self.computed_ns = ends[-1]
        self.tails_ns = list(accumulate([layer.forward_ns for layer in reversed(layers)]))[::-1]
        self._gradients = [
            (end_ns, (layout.layers_cells(layer, layer),))
            for layer, end_ns in zip(range(len(layers) - 1, -1, -1), ends, strict=True)
        ]
        self._to_server_ns = costs.latency_up_ns + costs.server_ns
        self._to_worker_ns = costs.latency_down_ns
        self._half_duplex = costs.half_duplex
        down_ns, up_ns = costs.overhead_down_ns * share, costs.overhead_up_ns * share
        self._uplink = _Link(
            layout,
            [layer.push_ns * share for layer in layers],
            up_ns,
            # What has gone up must at least come down again before the rest of the forward pass.
            [tail + self._to_server_ns + down_ns + self._to_worker_ns for tail in self.tails_ns],
        )
        self._downlink = _Link(
            layout,
            [layer.pull_ns * share for layer in layers],
            down_ns,
            [tail + self._to_worker_ns for tail in self.tails_ns],
        )

    def step_ns(self, plan: AnyPlan) -> int:
        """Return how long a step takes under ``plan``."""
        return self.end_ns(self.messages(plan)[1])

    def messages(self, plan: AnyPlan) -> tuple[list[Sent], list[Sent]]:
        """Return the gradient messages and the parameter messages, each in the order sent."""
        if self._half_duplex:
            return self._take_turns(self._push_rule(plan), self._pull_rule(plan))
        pushed = self.push(plan)
        return pushed, self.pull(plan, pushed)

    def push(self, plan: AnyPlan) -> list[Sent]:
        """Return the gradient messages, in the order sent; the link must not be half-duplex."""
        return self._uplink.send(self._push_rule(plan), self._gradients)

    def pull(self, plan: AnyPlan, pushed: Sequence[Sent]) -> list[Sent]:
        """Return the parameter messages, in the order sent, after these gradients; likewise."""
        return self.pull_when(plan, self.applied(pushed))

    def pull_when(
        self, plan: AnyPlan, ready: Sequence[tuple[int, tuple[Range, ...]]]
    ) -> list[Sent]:
        """Return the parameter messages if cells are ready at the server at these times."""
        return self._downlink.send(self._pull_rule(plan), ready)

    def applied(self, pushed: Sequence[Sent]) -> list[tuple[int, tuple[Range, ...]]]:
        """Return when new parameters are ready at the server, if it waits for nobody else."""
        return [(sent.end_ns + self._to_server_ns, sent.cells) for sent in pushed]

    def try_push(self, policy: Policy, limit_ns: int) -> list[Sent] | None:
        """Return the gradient messages that a policy makes; None: no step below the limit."""
        sent = self._uplink.send(PriorityDispatcher(policy, self.layout), self._gradients, limit_ns)
        self.n_simulated += len(sent)
        return sent if self._uplink.least_ns(sent[-1:]) < limit_ns else None

    def try_pull(self, policy: Policy, pushed: Sequence[Sent], limit_ns: int) -> int | None:
        """Return the step with parameters sent by a policy; None: it is not below the limit."""
        dispatcher = PriorityDispatcher(policy, self.layout)
        sent = self._downlink.send(dispatcher, self.applied(pushed), limit_ns)
        self.n_simulated += len(sent)
        end_ns = self.end_ns(sent)
        return end_ns if end_ns < limit_ns else None

    def end_ns(self, pulled: Sequence[Sent]) -> int:
        """Return when the forward pass ends, if these parameters come."""
        return max(self.computed_ns + self.tails_ns[0], self._downlink.least_ns(pulled))

    def arrivals_ns(self, pulled: Sequence[Sent]) -> list[int]:
        """Return when each layer's parameters have all arrived."""
        layer_of = self.layout.layer_of
        arrivals_ns = [0] * self.layout.n_layers
        for sent in pulled:
            for first, count in sent.cells:
                for layer in range(layer_of(first), layer_of(first + count - 1) + 1):
                    arrivals_ns[layer] = sent.end_ns + self._to_worker_ns
        return arrivals_ns

    def whole_layers(self, sent: Sequence[Sent]) -> tuple[Segment, ...]:
        """Return segments like these messages: every layer goes with the first of its parts."""
        layer_of = self.layout.layer_of
        seen: set[int] = set()
        segments: list[Segment] = []
        for message in sent:
            fresh = [
                layer
                for first, count in message.cells
                for layer in range(layer_of(first), layer_of(first + count - 1) + 1)
                if layer not in seen
            ]
            seen.update(fresh)
            for place, layer in enumerate(fresh):
                if place and fresh[place - 1] == layer - 1:
                    segments[-1] = Segment(segments[-1].first, layer)
                else:
                    segments.append(Segment(layer, layer))
        return tuple(segments)

    def _take_turns(self, push: Dispatcher, pull: Dispatcher) -> tuple[list[Sent], list[Sent]]:
        pushed: list[Sent] = []
        pulled: list[Sent] = []
        applied: list[tuple[int, tuple[Range, ...]]] = []
        now_ns = n_ready = n_applied = 0
        up_first = True
        while not (push.done and pull.done):
            n_ready = _feed(push, self._gradients, n_ready, now_ns)
            n_applied = _feed(pull, applied, n_applied, now_ns)
            up = up_first
            cells = (push if up else pull).next()
            if cells is None:
                up = not up
                cells = (push if up else pull).next()
            if cells is None:
                coming = (*self._gradients[n_ready : n_ready + 1], *applied[n_applied:])
                now_ns = min(at_ns for at_ns, _ in coming)
                continue
            start_ns = now_ns
            now_ns += (self._uplink if up else self._downlink).occupied_ns(cells)
            (pushed if up else pulled).append(Sent(start_ns, now_ns, cells))
            if up:
                applied += self.applied(pushed[-1:])
            up_first = not up
        return pushed, pulled

    def _push_rule(self, plan: AnyPlan) -> Dispatcher:
        if isinstance(plan, PolicyPlan):
            return PriorityDispatcher(plan.push, self.layout)
        return self._ordered(plan.push, barrier=False)

    def _pull_rule(self, plan: AnyPlan) -> Dispatcher:
        if isinstance(plan, PolicyPlan):
            return PriorityDispatcher(plan.pull, self.layout)
        return self._ordered(plan.pull, barrier=plan.barrier)

    def _ordered(self, segments: Sequence[Segment], *, barrier: bool) -> OrderedDispatcher:
        messages = [(self.layout.layers_cells(s.first, s.last),) for s in segments]
        return OrderedDispatcher(messages, n_cells=self.layout.n_cells, barrier=barrier)


def lockstep_ns(crossings: Sequence[Crossing], plans: Sequence[AnyPlan]) -> int:
    """Return the step of workers who differ, once the offsets between them have settled.

    The server has a cell's new value when every worker's gradient of it has arrived, so one's late
    gradients and another's slow parameters add up: the step may be longer than that of any worker
    alone. Takes up to 24 steps to settle, each O(K log K) for K messages of all workers.

    Args:
        crossings: one for each worker, full duplex, all with the same layers.
        plans: what each follows.
    """
    pushed = [crossing.push(plan) for crossing, plan in zip(crossings, plans, strict=True)]
    edges = sorted({edge for sent in pushed for cells in _cells_of(sent) for edge in cells})
    starts_ns = [0] * len(crossings)
    step_ns = 0
    for _ in range(_SETTLING_STEPS):
        ready = [0] * len(edges)
        for crossing, sent, start_ns in zip(crossings, pushed, starts_ns, strict=True):
            for at_ns, cells in crossing.applied(sent):
                for first, count in cells:
                    for place in range(
                        bisect_left(edges, first), bisect_left(edges, first + count)
                    ):
                        ready[place] = max(ready[place], start_ns + at_ns)
        runs = [
            (at_ns, (Range(first, end - first),))
            for at_ns, (first, end) in zip(ready, pairwise(edges), strict=False)
        ]
        runs.sort()
        ends_ns = []
        for crossing, plan, start_ns in zip(crossings, plans, starts_ns, strict=True):
            own = [(at_ns - start_ns, cells) for at_ns, cells in runs]
            ends_ns.append(start_ns + crossing.end_ns(crossing.pull_when(plan, own)))
        before_ns, step_ns = step_ns, max(ends_ns) - max(starts_ns)
        starts_ns = ends_ns
        if step_ns == before_ns:
            break
    return step_ns


def _cells_of(sent: Sequence[Sent]) -> Iterator[tuple[int, int]]:
    for message in sent:
        for first, count in message.cells:
            yield first, first + count


class _Link:
    """One direction: how long messages occupy it, and what still follows them.

    A part of a layer takes its share of the layer's time, rounded so that parts add up.

    Args:
        layout: the cells of the layers.
        transfers_ns: of each layer.
        overhead_ns: of each message.
        remains_ns: of each layer: the least time from the end of a message that carries it to the
            end of the step.
    """

    def __init__(
        self,
        layout: Layout,
        transfers_ns: Sequence[int],
        overhead_ns: int,
        remains_ns: Sequence[int],
    ) -> None:
        self._firsts = layout.firsts
        self._cell_nbytes = layout.cell_nbytes
        self._sizes = list(map(int.__sub__, layout.offsets[1:], layout.offsets))
        self._transfers_ns = transfers_ns
        self._totals_ns = list(accumulate(transfers_ns, initial=0))
        self._overhead_ns = overhead_ns
        self._remains_ns = remains_ns

    def send(
        self,
        dispatcher: Dispatcher,
        arrivals: Sequence[tuple[int, tuple[Range, ...]]],
        limit_ns: int | None = None,
    ) -> list[Sent]:
        """Let a rule send what arrives, given in the order of time; return its messages.

        With a limit it stops after the first message with which the step cannot end before it.
        """
        sent: list[Sent] = []
        free_ns = index = 0
        while not dispatcher.done:
            index = _feed(dispatcher, arrivals, index, free_ns)
            cells = dispatcher.next()
            if cells is None:
                free_ns = arrivals[index][0]
                continue
            start_ns, free_ns = free_ns, free_ns + self.occupied_ns(cells)
            sent.append(Sent(start_ns, free_ns, cells))
            if limit_ns is not None and self._least_ns(sent[-1]) >= limit_ns:
                break
        return sent

    def least_ns(self, sent: Sequence[Sent]) -> int:
        """Return the least time at which a step with these messages ends."""
        return max(map(self._least_ns, sent))

    def _least_ns(self, sent: Sent) -> int:
        # Of a message's layers the first one has the longest way to the end.
        return sent.end_ns + self._remains_ns[bisect_right(self._firsts, sent.cells[0].first) - 1]

    def occupied_ns(self, cells: Sequence[Range]) -> int:
        """Return how long a message occupies the link."""
        occupied_ns = self._overhead_ns
        for first, count in cells:
            occupied_ns += self._until_ns(first + count) - self._until_ns(first)
        return occupied_ns

    def _until_ns(self, cell: int) -> int:
        """Return how long everything before a cell takes."""
        layer = bisect_right(self._firsts, cell) - 1
        within = cell - self._firsts[layer]
        if not within:
            return self._totals_ns[layer]
        part_ns = self._transfers_ns[layer] * within * self._cell_nbytes // self._sizes[layer]
        return self._totals_ns[layer] + part_ns


def _feed(
    dispatcher: Dispatcher,
    arrivals: Sequence[tuple[int, tuple[Range, ...]]],
    index: int,
    now_ns: int,
) -> int:
    """Mark what has arrived as ready, neighbours at once; return the index of what is to come."""
    begin = end = -1
    while index < len(arrivals) and arrivals[index][0] <= now_ns:
        for first, count in arrivals[index][1]:
            if first == end:
                end += count
            elif first + count == begin:
                begin = first
            else:
                if begin < end:
                    dispatcher.ready(begin, end - begin)
                begin, end = first, first + count
        index += 1
    if begin < end:
        dispatcher.ready(begin, end - begin)
    return index
