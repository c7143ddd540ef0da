"""The cost model that judges every plan, and the bound that no schedule can beat.

One step of one worker, from the moment the first pull message begins. The downlink sends the pull
segments back to back; a layer computes when the layer before it has computed and its segment has
arrived whole. The backward pass follows without a stall, last layer first; a segment is pushed
when its last gradient exists and the uplink is free. Every message occupies its link for a fixed
overhead beside its bytes. Latency occupies nothing: it delays what arrives, once each way. The
server's time comes once, after the last push has arrived.

Without a barrier a step is counted from the start of its backward pass to the end of the next
forward pass, and the server's time comes once for each message; see
:mod:`dynacomm_async.schedule.crossing`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isqrt
from typing import Literal, NamedTuple

from dynacomm_async.errors import PlanError
from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.crossing import Crossing, Sent
from dynacomm_async.schedule.layout import Layout
from dynacomm_async.schedule.phase import earliest_ends_ns
from dynacomm_async.schedule.plan import AnyPlan, Plan, Segment

__all__ = ["Computation", "LowerBound", "Timeline", "Transfer", "evaluate", "lower_bound_ns"]


class Computation(NamedTuple):
    """One layer's work in one phase."""

    phase: Literal["forward", "backward"]
    layer: int
    start_ns: int
    end_ns: int


class Transfer(NamedTuple):
    """One message's occupation of its link, overhead included; it arrives a latency later.

    Attributes:
        direction: of the message.
        segment: the layers from the first to the last of which it carries something.
        start_ns, end_ns: when it occupies the link.
        ranges: what it carries, as (offset, nbytes) in the arena.
    """

    direction: Literal["pull", "push"]
    segment: Segment
    start_ns: int
    end_ns: int
    ranges: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Timeline:
    """When everything in a step happens.

    Times count from the start of the first pull, or without a barrier from that of the backward
    pass.

    Attributes:
        step_ns: the whole step.
        forward_ns: until the last layer's forward computation has ended; None without a barrier.
        backward_ns: the rest of the step; None without a barrier.
        computations: in the order in which they happen.
        transfers: all of one direction, then all of the other, as the step begins; each in the
            order in which they happen.
    """

    step_ns: int
    forward_ns: int | None
    backward_ns: int | None
    computations: tuple[Computation, ...]
    transfers: tuple[Transfer, ...]

    @property
    def compute_ns(self) -> int:
        """How long the worker computes."""
        return _total_ns(self.computations)

    @property
    def busy_ns(self) -> int:
        """How long the links are occupied, both directions together, overhead included."""
        return _total_ns(self.transfers)

    @property
    def hidden_fraction(self) -> float:
        """The share of the links' busy time that costs the step nothing; 0 where it is 0.

        Negative where latency and the server's time cost more than all that overlap saves.
        """
        busy_ns = self.busy_ns
        return 1 - (self.step_ns - self.compute_ns) / busy_ns if busy_ns else 0.0


class LowerBound(NamedTuple):
    """A time below which no step can be.

    Attributes:
        step_ns: the bound, rounded down.
        name: which proof it rests on: ``"equal-rate"`` where both directions cost the same for
            every layer and message, ``"any-rate"`` where they do not, ``"shared-link"`` where
            several workers share one medium.
    """

    step_ns: int
    name: Literal["equal-rate", "any-rate", "shared-link"]


def evaluate(plan: AnyPlan, costs: Costs) -> Timeline:
    """Return the timeline of a step under ``plan``. O(L), or O(K log K) for K messages.

    On a shared link (``costs.shared_link``) the N workers run in lockstep, so every transfer and
    every overhead takes N times as long.

    Raises:
        PlanError: the plan is for another number of layers.
    """
    if plan.n_layers != len(costs.layers):
        raise PlanError(
            f"the plan is for {plan.n_layers} layers, expected {len(costs.layers)} as in the costs"
        )
    if not isinstance(plan, Plan) or not plan.barrier:
        return _evaluate_crossing(plan, costs)
    pulls, forwards = _run_forward(plan, costs)
    forward_ns = forwards[-1].end_ns
    backwards, pushes = _run_backward(plan, costs, forward_ns)
    step_ns = pushes[-1].end_ns + costs.latency_up_ns + costs.server_ns
    return Timeline(
        step_ns=step_ns,
        forward_ns=forward_ns,
        backward_ns=step_ns - forward_ns,
        computations=(*forwards, *backwards),
        transfers=(*pulls, *pushes),
    )


def _evaluate_crossing(plan: AnyPlan, costs: Costs) -> Timeline:
    crossing = Crossing(costs)
    pushed, pulled = crossing.messages(plan)
    now_ns = 0
    computations: list[Computation] = []
    for layer in reversed(range(plan.n_layers)):
        start_ns, now_ns = now_ns, now_ns + costs.layers[layer].backward_ns
        computations.append(Computation("backward", layer, start_ns, now_ns))
    for layer, arrival_ns in enumerate(crossing.arrivals_ns(pulled)):
        start_ns = max(now_ns, arrival_ns)
        now_ns = start_ns + costs.layers[layer].forward_ns
        computations.append(Computation("forward", layer, start_ns, now_ns))
    return Timeline(
        step_ns=now_ns,
        forward_ns=None,
        backward_ns=None,
        computations=tuple(computations),
        transfers=(
            *_describe("push", pushed, crossing.layout),
            *_describe("pull", pulled, crossing.layout),
        ),
    )


def _describe(
    direction: Literal["pull", "push"], sent: Sequence[Sent], layout: Layout
) -> Iterator[Transfer]:
    for start_ns, end_ns, cells in sent:
        ranges = []
        for first, count in cells:
            offset = layout.offset(first)
            ranges.append((offset, layout.offset(first + count) - offset))
        first_layer = layout.layer_of(min(first for first, _ in cells))
        last_layer = layout.layer_of(max(first + count for first, count in cells) - 1)
        segment = Segment(first_layer, last_layer)
        yield Transfer(direction, segment, start_ns, end_ns, tuple(ranges))


def lower_bound_ns(costs: Costs) -> LowerBound:
    """Return a bound on the step of every schedule, with or without a barrier between steps.

    It holds for messages of any content in any order, cut inside layers too, as long as workers
    run in lockstep. With a shared link it holds for the mean step of a steady run, whatever the
    offsets between the workers. No schedule hides the server's time in this model. O(L).
    """
    layers = costs.layers
    up_ns, down_ns = costs.overhead_up_ns, costs.overhead_down_ns
    share = costs.link_share
    equal = up_ns == down_ns and all(layer.pull_ns == layer.push_ns for layer in layers)
    forward_ns, backward_ns = earliest_ends_ns(costs)
    bound_ns = max(
        backward_ns + down_ns + layers[-1].forward_ns,
        layers[-1].backward_ns + up_ns + forward_ns,
    )
    pull_ns = push_ns = least_ns = 0
    # Compute that neither precedes the first of these gradients nor follows these parameters.
    release_ns = sum(layer.backward_ns for layer in layers)
    tail_ns = sum(layer.forward_ns for layer in layers)
    for layer in layers:
        pull_ns += layer.pull_ns
        push_ns += layer.push_ns
        least_ns += min(layer.pull_ns, layer.push_ns)
        # A link that is as fast both ways as this one's faster direction is no slower than it.
        turn_ns = max(
            _turn_ns(least_ns, min(up_ns, down_ns)),
            max(pull_ns, push_ns) + up_ns + down_ns,
        )
        if share > 1:
            turn_ns = max(
                turn_ns,
                share * (push_ns + up_ns) + down_ns,
                up_ns + share * (pull_ns + down_ns),
            )
        bound_ns = max(bound_ns, release_ns + turn_ns + tail_ns)
        release_ns -= layer.backward_ns
        tail_ns -= layer.forward_ns
    return LowerBound(
        bound_ns + costs.latency_up_ns + costs.latency_down_ns + costs.server_ns,
        "shared-link" if share > 1 else "equal-rate" if equal else "any-rate",
    )


def _total_ns(events: Iterable[Computation | Transfer]) -> int:
    return sum(event.end_ns - event.start_ns for event in events)


def _offsets(costs: Costs) -> list[int]:
    return list(accumulate([layer.nbytes for layer in costs.layers], initial=0))


def _bytes_of(segment: Segment, offsets: Sequence[int]) -> tuple[int, int]:
    offset = offsets[segment.first]
    return offset, offsets[segment.last + 1] - offset


def _run_forward(plan: Plan, costs: Costs) -> tuple[list[Transfer], list[Computation]]:
    pulls: list[Transfer] = []
    forwards: list[Computation] = []
    link_ns = computed_ns = 0
    offsets = _offsets(costs)
    for segment in plan.pull:
        layers = costs.layers[segment.first : segment.last + 1]
        sent_ns = costs.overhead_down_ns + sum(layer.pull_ns for layer in layers)
        start_ns, link_ns = link_ns, link_ns + sent_ns * costs.link_share
        ranges = (_bytes_of(segment, offsets),)
        pulls.append(Transfer("pull", segment, start_ns, link_ns, ranges))
        computed_ns = max(computed_ns, link_ns + costs.latency_down_ns)
        for index, layer in zip(segment.layers, layers, strict=True):
            start_ns, computed_ns = computed_ns, computed_ns + layer.forward_ns
            forwards.append(Computation("forward", index, start_ns, computed_ns))
    return pulls, forwards


def _run_backward(
    plan: Plan, costs: Costs, computed_ns: int
) -> tuple[list[Computation], list[Transfer]]:
    backwards: list[Computation] = []
    pushes: list[Transfer] = []
    link_ns = computed_ns
    offsets = _offsets(costs)
    for segment in plan.push:
        layers = costs.layers[segment.first : segment.last + 1]
        for index, layer in zip(reversed(segment.layers), reversed(layers), strict=True):
            start_ns, computed_ns = computed_ns, computed_ns + layer.backward_ns
            backwards.append(Computation("backward", index, start_ns, computed_ns))
        sent_ns = costs.overhead_up_ns + sum(layer.push_ns for layer in layers)
        start_ns = max(link_ns, computed_ns)
        link_ns = start_ns + sent_ns * costs.link_share
        ranges = (_bytes_of(segment, offsets),)
        pushes.append(Transfer("push", segment, start_ns, link_ns, ranges))
    return backwards, pushes


def _turn_ns(transfer_ns: int, overhead_ns: int) -> int:
    """Return the shortest time in which data goes up and comes down again, rounded down.

    Cut into s messages, what is under way in both directions at once saves all but one message:
    transfer + transfer / s + (s + 1) * overhead, least at s = sqrt(transfer / overhead).
    """
    if not overhead_ns:
        return transfer_ns
    best = isqrt(transfer_ns // overhead_ns)
    return transfer_ns + min(
        transfer_ns // s + (s + 1) * overhead_ns for s in (max(1, best), best + 1)
    )
