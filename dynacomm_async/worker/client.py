"""The I/O side of a session: everything that happens on the event loop.

It answers the channel, drives a step machine for each step under way, and runs the uplink. The
compute side (:mod:`dynacomm_async.worker.session`) lives in another thread; the two meet in
:class:`Board`.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic_ns, thread_time_ns

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.errors import (
    ChannelClosed,
    DynaCommError,
    LocalProtocolError,
    PlanError,
    RemoteProtocolError,
)
from dynacomm_async.ranges import Range
from dynacomm_async.recording import ClockOffset, Planned, Recorder
from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.duplex import BusyTimes
from dynacomm_async.schedule.estimator import Estimator
from dynacomm_async.schedule.plan import AnyPlan, PolicyPlan, is_crossing
from dynacomm_async.transport import Channel
from dynacomm_async.wire.decoder import Arrival, Received
from dynacomm_async.wire.grid import Grid
from dynacomm_async.wire.messages import (
    End,
    Gradients,
    Heartbeat,
    Hello,
    Initial,
    Join,
    Leave,
    Message,
    Parameters,
    Report,
    Timing,
    Welcome,
)
from dynacomm_async.worker.planning import Plans, subscription, uplink
from dynacomm_async.worker.step import (
    Compute,
    Instruction,
    LayerComputed,
    LinkFree,
    Phase,
    RangeArrived,
    Send,
    StepMachine,
)

__all__ = ["Arenas", "Board", "Client"]

Floats = NDArray[np.float32]

_GOODBYE_S = 0.5
"""How long a goodbye may take before the connection is just dropped."""

_PINGS = 5
"""Round trips that are timed before training; the shortest counts."""


_KEPT_TIMINGS = 4
"""Versions for which the server's words are kept; those of two may be here at once."""

_EAGER_STEPS = 8
"""Plans are thought over after each of the first steps, whatever it costs."""

_THINKING_SHARE = 200
"""After that thinking waits until so many times what it cost last has passed: half a percent of the
time at most. Only where steps are very short it does not happen after every one."""


@dataclass(frozen=True, slots=True)
class Arenas:
    """The memory of a worker: parameters come in, gradients go out.

    Attributes:
        incoming: (n_floats,) float32: parameters, then running statistics.
        outgoing: (n_floats,) float32: gradients, then batch statistics.
    """

    incoming: Floats
    outgoing: Floats

    @classmethod
    def allocate(cls, grid: Grid) -> Arenas:
        """Return zeroed arenas for a model."""
        return cls(np.zeros(grid.n_floats, np.float32), np.zeros(grid.n_floats, np.float32))


class Board:
    """What the event loop tells the computing thread: which layer may be computed, and the end.

    Written by the loop, read by any thread. ``granted[phase][layer]`` is the step for which the
    layer may be computed, -1 at first. Steps may repeat: only the very same one counts.

    Attributes:
        error: what ended the session; None while it goes on, and after the end of the run.
        costs: the newest cost table; None while not known. Written by the loop.
    """

    def __init__(self, n_layers: int) -> None:
        self._lock = threading.Lock()
        self._granted = {phase: [-1] * n_layers for phase in Phase}
        self._waiting: list[tuple[Phase, int, int, Callable[[], None]]] = []
        self._ended = False
        self.error: DynaCommError | None = None
        self.costs: Costs | None = None
        self._timings: deque[tuple[int, Timing]] = deque(maxlen=_KEPT_TIMINGS)

    def note_timing(self, version: int, timing: Timing) -> None:
        """Keep what came with the parameters of a version."""
        self._timings.append((version, timing))

    def timing_of(self, version: int) -> Timing | None:
        """Return what came with the parameters of one of the last versions, if anything did."""
        return next((timing for of, timing in self._timings.copy() if of == version), None)

    def is_granted(self, phase: Phase, layer: int, step: int) -> bool:
        """Return whether the layer may be computed now.

        Raises:
            DynaCommError: what ended the session.
        """
        if self._granted[phase][layer] == step:
            return True
        if self.error is not None:
            raise self.error
        return False

    @property
    def ended(self) -> bool:
        """Whether the run has ended in order.

        Raises:
            DynaCommError: it has ended otherwise.
        """
        if not self._ended and self.error is not None:
            raise self.error
        return self._ended

    def when(self, phase: Phase, layer: int, step: int, call: Callable[[], None]) -> None:
        """Call ``call`` once, on the loop or now, when the layer is granted or all is over."""
        with self._lock:
            if self._granted[phase][layer] != step and not self._is_over:
                self._waiting.append((phase, layer, step, call))
                return
        call()

    def when_ended(self, call: Callable[[], None]) -> None:
        """Call ``call`` once, on the loop or now, when all is over."""
        with self._lock:
            if not self._is_over:
                self._waiting.append((Phase.FORWARD, -1, 0, call))
                return
        call()

    def grant(self, computes: Sequence[Compute], step: int) -> None:
        """The layers may be computed: all are granted before anybody is woken.

        One by one would be a race: the last forward wakes a thread, which may be done with it and
        hand the first gradient over before the loop has come to grant the backward.
        """
        granted = {(compute.phase, compute.layer) for compute in computes}
        with self._lock:
            for phase, layer in granted:
                self._granted[phase][layer] = step
            due = [entry for entry in self._waiting if entry[:2] in granted and entry[2] == step]
            for entry in due:
                self._waiting.remove(entry)
        for entry in due:
            entry[3]()

    def end(self, error: DynaCommError | None) -> None:
        """All is over, in order (None) or by an error; whoever waits is woken."""
        with self._lock:
            if self._is_over:
                return
            self._ended = error is None
            self.error = error
            waiting, self._waiting = self._waiting, []
        for entry in waiting:
            entry[3]()

    @property
    def _is_over(self) -> bool:
        return self._ended or self.error is not None


@dataclass(slots=True)
class _Training:
    """What exists once the worker has joined."""

    grid: Grid
    arenas: Arenas
    board: Board
    plans: Plans
    estimator: Estimator
    layer_cells: list[Range]


class Client:
    """A channel handler that keeps one worker's place in a run.

    All methods belong to the event loop's thread.

    Args:
        channel: to the server.
        recorder: takes down which plan is followed when, and how the clocks differ.
    """

    def __init__(self, channel: Channel, recorder: Recorder | None = None) -> None:
        loop = asyncio.get_running_loop()
        self.channel = channel
        self._recorder = recorder
        self.round_trip_ns = 0
        self._welcome: asyncio.Future[Welcome] = loop.create_future()
        self._pong: asyncio.Future[Heartbeat] | None = None
        self._over: asyncio.Future[None] = loop.create_future()
        self._training: _Training | None = None
        self._machines: dict[int, StepMachine] = {}
        self._version = 0  # of the parameters that are arriving
        self._steps: int = 0
        self._reports: dict[int, Report] = {}
        self._outbox: list[tuple[int, Send]] = []
        self._answer: Heartbeat | None = None  # the newest question's; older ones are moot
        self._wake = asyncio.Event()
        self._uplink: asyncio.Task[None] | None = None
        self._last_arrival_ns = 0
        self._sending = BusyTimes()
        self._n_computed = 0  # steps
        self._think_again_ns = 0
        self._leaving: asyncio.Task[None] | None = None

    # -- joining and leaving --

    async def greet(self, hello: Hello) -> Welcome:
        """Say hello; return the welcome.

        Raises:
            PeerError: the server refuses, and says why.
            ChannelError: the connection was lost.
        """
        await self.channel.send(hello)
        return await self._welcome

    async def measure_round_trip(self) -> None:
        """Time a few heartbeats; the shortest is the round trip, and relates the two clocks."""
        trips = []
        for number in range(_PINGS):
            self._pong = asyncio.get_running_loop().create_future()
            started_ns = monotonic_ns()
            await self.channel.send(Heartbeat(number, False, started_ns))
            answer = await self._pong
            ended_ns = monotonic_ns()
            trips.append((ended_ns - started_ns, answer.clock_ns - (started_ns + ended_ns) // 2))
        self.round_trip_ns, offset_ns = min(trips)
        if self._recorder is not None:
            self._recorder.clock_offset = ClockOffset(offset_ns, -(-self.round_trip_ns // 2))

    async def join(
        self,
        welcome: Welcome,
        grid: Grid,
        arenas: Arenas,
        board: Board,
        plans: Plans,
        estimator: Estimator,
        *,
        kernels: str,
    ) -> None:
        """Take the place that the welcome holds, and start to receive.

        The initial parameters are taken from ``arenas.incoming`` where the server wants them.
        """
        self._training = _Training(
            grid,
            arenas,
            board,
            plans,
            estimator,
            [grid.layer_cells(layer) for layer in range(len(grid.layers))],
        )
        self._steps = welcome.steps
        self._version = welcome.version
        if self._over.done():
            board.end(self._why_over)
        layers = grid.layers if welcome.layers is None else None
        first = subscription(self._open_step(welcome.version), welcome.version, grid)
        await self.channel.send(Join(grid.fingerprint, first, kernels, layers))
        if welcome.upload:
            everything = Range(0, grid.n_cells)
            await self.channel.send(
                Initial((everything,)), self._bytes(arenas.incoming, (everything,))
            )
        self._uplink = asyncio.create_task(self._send_all(), name="uplink")

    def guard(self, call: Callable[..., object], *args: object) -> None:
        """Make a call of this client's; what it raises ends the session instead of being lost."""
        try:
            call(*args)
        except Exception as error:
            self._fail(error)

    async def leave(self) -> None:
        """Go, in order if that can be had at once; the connection is closed afterwards."""
        if self._uplink is not None:
            self._uplink.cancel()  # within a message this aborts the connection
            await asyncio.gather(self._uplink, return_exceptions=True)
        if self._leaving is None:
            self._leaving = asyncio.create_task(self._say_goodbye(), name="goodbye")
        await self._leaving

    async def _say_goodbye(self) -> None:
        try:
            async with asyncio.timeout(_GOODBYE_S):
                if not self._over.done():
                    await self.channel.send(Leave())
                # The server hangs up then. Closing here, with parameters still coming in, would
                # reset the connection, and the goodbye could be lost with it.
                await asyncio.shield(self._over)
        except (DynaCommError, TimeoutError):
            self.channel.abort()  # it is over already, or nobody reads what we send

    # -- the channel's handler --

    def place(self, message: Message, payload_nbytes: int) -> Sequence[memoryview]:
        """Say where a payload goes."""
        training = self._training
        if isinstance(message, Parameters):
            if training is None or message.version != self._version:
                raise RemoteProtocolError(
                    f"parameters of version {message.version}, expected {self._version}"
                )
            if not training.grid.holds(message.ranges):
                raise RemoteProtocolError("parameters for cells that the model has not")
            return self._bytes(training.arenas.incoming, message.ranges)
        if isinstance(message, End):
            if training is None:
                raise RemoteProtocolError("the run ends before it was joined")
            cells = training.grid.statistics_cells
            return self._bytes(training.arenas.incoming, (cells,)) if cells.count else ()
        return ()

    def handle(self, received: Received) -> None:
        """Take a complete message."""
        message = received.message
        if isinstance(message, Parameters):
            self._take_parameters(message, received.arrival)
        elif isinstance(message, Heartbeat):
            if not message.reply:
                self._answer = Heartbeat(message.number, True, monotonic_ns())
                self._wake.set()
            elif self._pong is not None and not self._pong.done():
                self._pong.set_result(message)
        elif isinstance(message, Welcome):
            if not self._welcome.done():
                self._welcome.set_result(message)
        elif isinstance(message, End):
            self._board.end(None)
            # At once, whatever the owner does next: the server waits for it.
            self._leaving = asyncio.create_task(self._say_goodbye(), name="goodbye")

    def lost(self, error: DynaCommError) -> None:
        """The channel is over."""
        self._why_over = error
        self._over.set_result(None)
        for waiting in (self._welcome, self._pong):
            if waiting is not None and not waiting.done():
                waiting.set_exception(error)
                waiting.exception()
        if self._training is not None:
            self._board.end(error)
        self._wake.set()

    # -- from the computing thread, through call_soon_threadsafe --

    def report(self, step: int, report: Report) -> None:
        """Keep what the step's first message will say."""
        self._reports[step] = report

    def gradient_ready(self, step: int, layer: int) -> None:
        """The gradient of a layer is complete."""
        machine = self._machines.get(step)
        if machine is not None:
            self._carry_out(step, machine.handle(LayerComputed(layer)))

    def step_computed(self, forward_ns: Sequence[int], backward_ns: Sequence[int]) -> None:
        """Take in how long each layer took."""
        self._joined.estimator.times.observe(forward_ns, backward_ns)
        # Not at once: the step's last message is about to leave.
        self._n_computed += 1
        if self._n_computed <= _EAGER_STEPS or monotonic_ns() >= self._think_again_ns:
            asyncio.get_running_loop().call_soon(self.guard, self._think)

    def _think(self) -> None:
        began_ns = thread_time_ns()
        training = self._joined
        estimator = training.estimator
        overheads = estimator.up.overhead_ns + estimator.down.overhead_ns
        latency = max(0, self.round_trip_ns - overheads) // 2
        estimator.observe_latency(latency, latency)
        training.plans.refresh()
        training.board.costs = training.plans.costs or estimator.costs()
        cost_ns = thread_time_ns() - began_ns
        self._think_again_ns = monotonic_ns() + _THINKING_SHARE * cost_ns

    # -- the rest --

    _why_over: DynaCommError = ChannelClosed("the session was closed")

    @property
    def joined(self) -> bool:
        """Whether it has taken its place in the run."""
        return self._training is not None

    @property
    def _joined(self) -> _Training:
        assert self._training is not None
        return self._training

    @property
    def _board(self) -> Board:
        return self._joined.board

    def _open_step(self, step: int) -> AnyPlan:
        training = self._joined
        plan = training.plans.plan(step)
        if plan.n_layers != len(training.layer_cells):
            raise PlanError(
                f"the plan for step {step} has {plan.n_layers} layers, "
                f"expected {len(training.layer_cells)}"
            )
        self._machines[step] = StepMachine(
            training.layer_cells,
            uplink(plan, training.grid),
            training.grid.statistics_cells,
        )
        if self._recorder is not None and training.plans.changes[-1][0] == step:
            self._recorder.add(Planned(step, monotonic_ns(), plan.to_json()))
        return plan

    def _bytes(self, arena: Floats, ranges: Sequence[Range]) -> list[memoryview]:
        whole = arena.data.cast("B")
        spans = (self._joined.grid.floats(*cells) for cells in ranges)
        return [whole[4 * start : 4 * stop] for start, stop in spans]

    def _take_parameters(self, message: Parameters, arrival: Arrival) -> None:
        estimator = self._joined.estimator
        observation = arrival.observation(self._last_arrival_ns)
        if observation is not None:
            end_ns = arrival.last_ns
            shared_ns = self._sending.within(end_ns - observation[1], end_ns)
            estimator.observe_pull(*observation, shared_ns=shared_ns)
        self._last_arrival_ns = arrival.last_ns
        if message.timing is not None:
            crossing = is_crossing(self._joined.plans.plan_of(message.version))
            estimator.observe_pushes(message.timing.arrivals, crossing=crossing)
            estimator.observe_server(message.timing.apply_ns)
            self._board.note_timing(message.version, message.timing)
        machine = self._machines[message.version]
        for cells in message.ranges:
            try:
                instructions = machine.handle(RangeArrived(cells))
            except LocalProtocolError as error:  # on this side of the machine it is the server's
                raise RemoteProtocolError(str(error)) from error
            self._carry_out(message.version, instructions)

    def _carry_out(self, step: int, instructions: Sequence[Instruction]) -> None:
        computes = [instruction for instruction in instructions if isinstance(instruction, Compute)]
        if computes:
            self._board.grant(computes, step)
        for instruction in instructions:
            if isinstance(instruction, Send):
                self._outbox.append((step, instruction))
                self._wake.set()

    async def _send_all(self) -> None:
        """The uplink: one message at a time, the next one chosen when it has nearly left."""
        busy = False
        try:
            while not self._over.done():
                if self._answer is not None:
                    answer, self._answer = self._answer, None
                    await self.channel.send(answer)
                    continue
                if not self._outbox:
                    busy = False
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                step, send = self._outbox.pop(0)
                message = self._bind(step, send)
                payload = self._bytes(self._joined.arenas.outgoing, send.cells)
                start_ns = monotonic_ns()
                await self.channel.send(message, payload, back_to_back=busy)
                self._note_sending(sum(map(len, payload)), start_ns)
                busy = True
                machine = self._machines[step]
                self._carry_out(step, machine.handle(LinkFree()))
                if machine.pushed:
                    del self._machines[step]
        except Exception as error:
            self._fail(error)

    def _note_sending(self, nbytes: int, start_ns: int) -> None:
        """Take note of how long a message that has just been sent keeps the uplink busy.

        What is left of it in buffers goes on doing so for as long as the link is known to need.
        """
        start_ns = max(start_ns, self._sending.end_ns)
        needed_ns = self._joined.estimator.up.expect_ns(nbytes)
        self._sending.add(start_ns, max(monotonic_ns(), start_ns + needed_ns))

    def _fail(self, error: Exception) -> None:
        """End the session: nothing would be sent any more, and everybody would wait for it."""
        if not isinstance(error, DynaCommError):
            failure = LocalProtocolError(
                f"the session failed: {type(error).__name__}: {error} (in a planner of your own?)"
            )
            failure.__cause__ = error
            error = failure
        self._board.end(error)
        self.channel.abort()

    def _bind(self, step: int, send: Send) -> Gradients:
        if not send.first:
            return Gradients(step, send.cells)
        plan = self._joined.plans.plan_of(step)
        self.channel.limit_ahead(plan.push.cap_nbytes if isinstance(plan, PolicyPlan) else None)
        following = subscription(self._open_step(step + 1), step + 1, self._joined.grid)
        self._version = step + 1
        return Gradients(step, send.cells, following, self._reports.pop(step, Report()))
