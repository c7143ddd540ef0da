"""The real step logic on a fake clock: what a plan takes on links and layers of given costs.

The worker's :class:`~dynacomm_async.worker.step.StepMachine` and the rules of
:mod:`dynacomm_async.schedule.dispatch` are driven by a queue of events in integer nanoseconds.
Both links carry one message at a time, one thread computes. There is no cost formula in here, so
agreement with :func:`dynacomm_async.schedule.timeline.evaluate` says that what the cost model
judges is what the code does.

A step with a barrier begins with its first pull and ends when the server has its last gradient.
One without begins with its backward pass, the next step's machine takes the parameters that come
down, and it ends with that step's forward pass. Of what happens at one instant the cost model
takes everything into account before it chooses a message; here, as on a real link, what takes no
time at all may be chosen between. So the two agree where every backward computation and every
message takes some time.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from dynacomm_async.errors import PlanError
from dynacomm_async.ranges import CELL_NBYTES, Range
from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.dispatch import (
    Dispatcher,
    OrderedDispatcher,
    Policy,
    PriorityDispatcher,
)
from dynacomm_async.schedule.layout import Layout
from dynacomm_async.schedule.plan import AnyPlan, Plan, Segment, is_crossing
from dynacomm_async.worker.step import (
    Compute,
    Event,
    LayerComputed,
    LinkFree,
    Phase,
    RangeArrived,
    Send,
    StepMachine,
)

__all__ = ["simulate"]


def simulate(plan: AnyPlan, costs: Costs) -> int:
    """Return the nanoseconds that a step takes. O(K log K) for K layers and messages.

    Raises:
        PlanError: the plan is for another number of layers, or uses both directions of a
            half-duplex link at once.
    """
    if plan.n_layers != len(costs.layers):
        raise PlanError(f"the plan is for {plan.n_layers} layers, expected {len(costs.layers)}")
    if costs.half_duplex and is_crossing(plan):
        raise PlanError("the link is half-duplex, expected a plan with a barrier for it")
    return _Simulation(plan, costs).run()


class _Simulation:
    """One step of one worker; see :func:`simulate`."""

    def __init__(self, plan: AnyPlan, costs: Costs) -> None:
        self._costs = costs
        self._layout = Layout(layer.nbytes for layer in costs.layers)
        self._layers = [self._layout.layers_cells(i, i) for i in range(plan.n_layers)]
        self._barrier = isinstance(plan, Plan) and plan.barrier
        self._downlink = self._rule(plan.pull)
        self._down_free = True
        self._machine = StepMachine(self._layers, self._rule(plan.push))
        # The machine that takes the parameters that come down.
        self._pulling = (
            self._machine if self._barrier else StepMachine(self._layers, self._rule(plan.push))
        )
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._n_events = 0
        self._now_ns = 0
        self._to_compute: deque[Compute] = deque()
        self._computing = False

    def run(self) -> int:
        """Go from event to event until nothing is left to happen."""
        everything = Range(0, self._layout.n_cells)
        if self._barrier:
            self._downlink.ready(*everything)
            self._send_down()
        else:
            for instruction in self._machine.handle(RangeArrived(everything)):
                if isinstance(instruction, Compute) and instruction.phase is Phase.BACKWARD:
                    self._to_compute.append(instruction)  # its forward is over
            self._compute()
        while self._queue:
            self._now_ns, _, happen = heapq.heappop(self._queue)
            happen()
        assert self._machine.pushed, "the step ended before its last gradient was sent"
        assert self._pulling.pulled, "the step ended before its last parameters arrived"
        return self._now_ns

    def _rule(self, way: Policy | Sequence[Segment]) -> Dispatcher:
        if isinstance(way, Policy):
            return PriorityDispatcher(way, self._layout)
        messages = [(self._layout.layers_cells(s.first, s.last),) for s in way]
        return OrderedDispatcher(messages, n_cells=self._layout.n_cells)

    def _after(self, delay_ns: int, happen: Callable[[], None]) -> None:
        self._n_events += 1  # what is due at the same time happens in the order it was caused
        heapq.heappush(self._queue, (self._now_ns + delay_ns, self._n_events, happen))

    def _send_down(self) -> None:
        cells = self._downlink.next() if self._down_free else None
        if cells is None:
            return
        self._down_free = False
        pulls_ns = [layer.pull_ns for layer in self._costs.layers]
        busy_ns = self._costs.overhead_down_ns * self._costs.link_share

        def sent() -> None:
            self._down_free = True
            for part in cells:
                event = RangeArrived(part)
                self._after(self._costs.latency_down_ns, partial(self._feed, self._pulling, event))
            self._after(0, self._send_down)

        self._after(busy_ns + self._transfer_ns(cells, pulls_ns), sent)

    def _feed(self, machine: StepMachine, event: Event) -> None:
        for instruction in machine.handle(event):
            if isinstance(instruction, Send):
                self._send_up(instruction)
            elif self._barrier or machine is self._machine or instruction.phase is Phase.FORWARD:
                self._to_compute.append(instruction)
        self._compute()

    def _compute(self) -> None:
        if self._computing or not self._to_compute:
            return
        work = self._to_compute.popleft()
        layer = self._costs.layers[work.layer]
        self._computing = True

        def computed() -> None:
            self._computing = False
            if work.phase is Phase.BACKWARD:
                self._feed(self._machine, LayerComputed(work.layer))
            self._compute()

        forward = work.phase is Phase.FORWARD
        self._after(layer.forward_ns if forward else layer.backward_ns, computed)

    def _send_up(self, send: Send) -> None:
        pushes_ns = [layer.push_ns for layer in self._costs.layers]
        busy_ns = self._costs.overhead_up_ns * self._costs.link_share

        def sent() -> None:
            arrival_ns = self._costs.latency_up_ns + self._costs.server_ns
            self._after(arrival_ns, partial(self._apply, send.cells))
            # Gradients of the same instant are ready before the next message is chosen.
            self._after(0, partial(self._feed, self._machine, LinkFree()))

        self._after(busy_ns + self._transfer_ns(send.cells, pushes_ns), sent)

    def _apply(self, cells: Sequence[Range]) -> None:
        if not self._barrier:
            for first, count in cells:
                self._downlink.ready(first, count)
            self._after(0, self._send_down)

    def _transfer_ns(self, cells: Sequence[Range], layers_ns: Sequence[int]) -> int:
        """A part of a layer takes its share of the layer's time, begun cells counted whole."""
        total_ns = 0
        for first, count in cells:
            for layer, own in enumerate(self._layers):
                begin = max(first, own.first)
                end = min(first + count, own.first + own.count)
                if begin < end:
                    total_ns += self._until_ns(layer, end, layers_ns)
                    total_ns -= self._until_ns(layer, begin, layers_ns)
        return total_ns

    def _until_ns(self, layer: int, cell: int, layers_ns: Sequence[int]) -> int:
        nbytes = self._costs.layers[layer].nbytes
        done = min((cell - self._layers[layer].first) * CELL_NBYTES, nbytes)
        return layers_ns[layer] * self._costs.link_share * done // nbytes
