"""The real step logic on a fake clock: what a plan takes on links and layers of given costs.

The worker's :class:`~dynacomm_async.worker.step.StepMachine` and the server's
:class:`~dynacomm_async.schedule.dispatch.OrderedDispatcher` are driven by a queue of events in
integer nanoseconds. Both links carry one message at a time, one thread computes. There is no cost
formula in here, so agreement with :func:`dynacomm_async.schedule.timeline.evaluate` says that
what the cost model judges is what the code does.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate

from dynacomm_async.errors import PlanError
from dynacomm_async.ranges import Range
from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.dispatch import OrderedDispatcher
from dynacomm_async.schedule.plan import Plan, Segment
from dynacomm_async.wire.grid import CELL_NBYTES
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


def simulate(plan: Plan, costs: Costs) -> int:
    """Return the nanoseconds from the first pull message's begin to the new parameters.

    O(L log L) for L layers.

    Raises:
        PlanError: the plan is for another number of layers.
    """
    if plan.n_layers != len(costs.layers):
        raise PlanError(f"the plan is for {plan.n_layers} layers, expected {len(costs.layers)}")
    return _Simulation(plan, costs).run()


class _Simulation:
    """One step of one worker; see :func:`simulate`."""

    def __init__(self, plan: Plan, costs: Costs) -> None:
        self._costs = costs
        self._layers = _lay_out(costs)
        n_cells = self._layers[-1].first + self._layers[-1].count
        self._pull = {self._cells_of(segment): segment for segment in plan.pull}
        self._push = {self._cells_of(segment): segment for segment in plan.push}
        self._downlink = OrderedDispatcher(tuple(self._pull), n_cells=n_cells, barrier=True)
        self._downlink.ready(0, n_cells)
        self._machine = StepMachine(
            self._layers, OrderedDispatcher(tuple(self._push), n_cells=n_cells)
        )
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._n_events = 0
        self._now_ns = 0
        self._to_compute: deque[Compute] = deque()
        self._computing = False

    def run(self) -> int:
        """Go from event to event until nothing is left to happen."""
        self._send_down()
        while self._queue:
            self._now_ns, _, happen = heapq.heappop(self._queue)
            happen()
        assert self._machine.pushed, "the step ended before its last gradient was sent"
        return self._now_ns + self._costs.latency_up_ns + self._costs.server_ns

    def _after(self, delay_ns: int, happen: Callable[[], None]) -> None:
        self._n_events += 1  # what is due at the same time happens in the order it was caused
        heapq.heappush(self._queue, (self._now_ns + delay_ns, self._n_events, happen))

    def _send_down(self) -> None:
        cells = self._downlink.next()
        if cells is None:
            return
        layers = self._pull[cells].layers
        busy_ns = self._costs.overhead_down_ns + sum(self._costs.layers[i].pull_ns for i in layers)

        def sent() -> None:
            event = RangeArrived(cells[0])
            self._after(self._costs.latency_down_ns, lambda: self._feed(event))
            self._send_down()

        self._after(busy_ns * self._costs.link_share, sent)

    def _feed(self, event: Event) -> None:
        for instruction in self._machine.handle(event):
            if isinstance(instruction, Compute):
                self._to_compute.append(instruction)
            else:
                self._send_up(instruction)
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
                self._feed(LayerComputed(work.layer))
            self._compute()

        forward = work.phase is Phase.FORWARD
        self._after(layer.forward_ns if forward else layer.backward_ns, computed)

    def _send_up(self, send: Send) -> None:
        layers = self._push[send.cells].layers
        busy_ns = self._costs.overhead_up_ns + sum(self._costs.layers[i].push_ns for i in layers)
        self._after(busy_ns * self._costs.link_share, lambda: self._feed(LinkFree()))

    def _cells_of(self, segment: Segment) -> tuple[Range, ...]:
        first, last = self._layers[segment.first], self._layers[segment.last]
        return (Range(first.first, last.first + last.count - first.first),)


def _lay_out(costs: Costs) -> Sequence[Range]:
    """Return each layer's cells, as a grid would."""
    counts = [-(-layer.nbytes // CELL_NBYTES) for layer in costs.layers]
    starts = accumulate(counts, initial=0)
    return [Range(first, count) for first, count in zip(starts, counts, strict=False)]
