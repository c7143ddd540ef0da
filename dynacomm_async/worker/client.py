"""The I/O side of a session: everything that happens on the event loop.

It drives a step machine for each step under way and runs the uplink, over one
:class:`~dynacomm_async.worker.line.Line` after the other: a connection that is lost is replaced,
and the step goes on where it stood, or steps back with a server that was restarted. What the
server skips is left behind. The compute side (:mod:`dynacomm_async.worker.session`) lives in
another thread; the two meet in :class:`~dynacomm_async.worker.board.Board`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from time import monotonic_ns, thread_time_ns
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.errors import (
    ChannelBroken,
    DynaCommError,
    LocalProtocolError,
    PeerError,
    PlanError,
    RemoteProtocolError,
)
from dynacomm_async.failpoints import failpoint
from dynacomm_async.ranges import Range, merge, subtract
from dynacomm_async.recording import Planned, Recorder
from dynacomm_async.schedule.duplex import BusyTimes
from dynacomm_async.schedule.estimator import Estimator
from dynacomm_async.schedule.plan import AnyPlan, PolicyPlan, is_crossing
from dynacomm_async.wire.decoder import Arrival, Received
from dynacomm_async.wire.grid import Grid
from dynacomm_async.wire.messages import (
    End,
    Gradients,
    Have,
    Hello,
    Initial,
    Join,
    Membership,
    Message,
    Parameters,
    Report,
    Resume,
    Skip,
    Subscribe,
    Subscription,
    Welcome,
)
from dynacomm_async.worker.board import Board
from dynacomm_async.worker.line import Line
from dynacomm_async.worker.planning import Plans, subscription, uplink
from dynacomm_async.worker.step import (
    Compute,
    Instruction,
    LayerComputed,
    LinkFree,
    RangeArrived,
    Resumed,
    Send,
    StepMachine,
)

__all__ = ["Arenas", "Client", "Reach"]

_log = logging.getLogger("dynacomm_async.worker")
_connection_log = logging.getLogger("dynacomm_async.worker.connection")

Floats = NDArray[np.float32]

Reach: TypeAlias = Callable[[Callable[[], Hello]], Awaitable[tuple[Line, Welcome]]]
"""Connects anew and is welcomed, with a hello made for each attempt; raises DynaCommError or
TimeoutError when it gives up."""

_Opening: TypeAlias = Sequence[tuple[Message, Sequence[memoryview]]]

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


class Client:
    """One worker's membership of a run. All methods belong to the event loop's thread.

    Args:
        welcome: what the server said.
        grid: the model.
        arenas: where parameters land and gradients leave from.
        board: tells the computing thread.
        plans, estimator: which plan a step follows, and what is measured.
        kernels: numerical choices that all workers must share.
        fill_initial: writes version 0 into ``arenas.incoming``, for a server that has none.
        reach: connects anew after a loss; None: a loss ends the session.
        recorder: takes down which plan is followed when.
    """

    def __init__(
        self,
        welcome: Welcome,
        grid: Grid,
        arenas: Arenas,
        board: Board,
        plans: Plans,
        estimator: Estimator,
        *,
        kernels: str = "",
        fill_initial: Callable[[], None] = lambda: None,
        reach: Reach | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._welcome = welcome
        self._grid = grid
        self._arenas = arenas
        self._board = board
        self._plans = plans
        self._estimator = estimator
        self._kernels = kernels
        self._fill_initial = fill_initial
        self._reach = reach
        self._recorder = recorder
        self._layer_cells = [grid.layer_cells(layer) for layer in range(len(grid.layers))]
        self._line: Line | None = None  # None while there is no connection
        self._connection = 0
        self._round_trip_ns = 0
        self._machines: dict[int, StepMachine] = {}  # of steps that the server may not have whole
        self._version = welcome.version  # of the parameters that are arriving
        self._landed: list[Range] = []  # cells of it that have
        self._reports: dict[int, Report] = {}
        self._outbox: list[tuple[int, Send]] = []
        self._joins = False  # nobody has said yet which version training begins with here
        self._skipped = -1  # the last step that was left because it does not count
        self._notes: list[Message] = []  # that go before gradients
        self._may_push = False  # the server has said what it has
        self._wake = asyncio.Event()
        self._uplink: asyncio.Task[None] | None = None
        self._returning: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._last_arrival_ns = 0
        self._sending = BusyTimes()
        self._n_computed = 0  # steps
        self._think_again_ns = 0

    # -- joining and leaving --

    def join(self, line: Line) -> None:
        """Take the place that the welcome holds, and start to receive."""
        self._open_step(self._version)
        self._joins = True
        self._take_up(line, self._welcome)

    def guard(self, call: Callable[..., object], *args: object) -> None:
        """Make a call of this client's; what it raises ends the session instead of being lost."""
        try:
            call(*args)
        except Exception as error:
            self._fail(error)

    async def leave(self) -> None:
        """Go, in order if that can be had at once; the connection is closed afterwards."""
        line, self._reach = self._line, None  # a loss is final now
        tasks = [task for task in (self._uplink, self._returning) if task is not None]
        for task in tasks:
            task.cancel()  # within a message this aborts the connection
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._leaving is None and line is not None:
            self._leaving = asyncio.create_task(line.say_goodbye(), name="goodbye")
        if self._leaving is not None:
            await self._leaving

    # -- what its line calls --

    def place(self, message: Message) -> Sequence[memoryview]:
        """Say where a payload goes."""
        if isinstance(message, Parameters):
            if self._joins and message.version >= self._version:
                self._settle(message.version)
            if message.version != self._version or not self._may_push:
                raise RemoteProtocolError(
                    f"parameters of version {message.version}, expected {self._version}"
                )
            if not self._grid.holds(message.ranges):
                raise RemoteProtocolError("parameters for cells that the model has not")
            return self._bytes(self._arenas.incoming, message.ranges)
        if isinstance(message, End):
            cells = self._grid.statistics_cells
            return self._bytes(self._arenas.incoming, (cells,)) if cells.count else ()
        return ()

    def take(self, received: Received) -> None:
        """Take a complete message."""
        message = received.message
        if isinstance(message, Parameters):
            self._take_parameters(message, received.arrival)
        elif isinstance(message, Have):
            self._take_have(message)
        elif isinstance(message, Skip):
            self._take_skip(message)
        elif isinstance(message, End):
            self._board.end(None)
            # At once, whatever the owner does next: the server waits for it.
            assert self._line is not None
            self._leaving = asyncio.create_task(self._line.say_goodbye(), name="goodbye")

    def line_lost(self, line: Line, error: DynaCommError) -> None:
        """A connection is over: get another, unless the session is."""
        if line is not self._line:
            return
        self._line = None
        self._may_push = False
        if self._uplink is not None:
            self._uplink.cancel()
        if self._board.is_over:
            return
        failpoint("worker.lost")
        if self._reach is None or not _may_return(error):
            self._board.end(error)
            return
        _connection_log.warning("rank %d: %s; trying to return", self._welcome.slot, error)
        self._returning = asyncio.create_task(self._return(self._reach), name="return")

    # -- from the computing thread, through call_soon_threadsafe --

    def report(self, step: int, life: int, report: Report) -> None:
        """Keep what the step's first message will say."""
        if life == self._board.course.life:
            self._reports[step] = report

    def gradient_ready(self, step: int, life: int, layer: int) -> None:
        """The gradient of a layer is complete."""
        if life == self._board.course.life and (machine := self._machines.get(step)) is not None:
            self._carry_out(step, machine.handle(LayerComputed(layer)))

    def step_computed(self, forward_ns: Sequence[int], backward_ns: Sequence[int]) -> None:
        """Take in how long each layer took."""
        self._estimator.times.observe(forward_ns, backward_ns)
        # Not at once: the step's last message is about to leave.
        self._n_computed += 1
        if self._n_computed <= _EAGER_STEPS or monotonic_ns() >= self._think_again_ns:
            asyncio.get_running_loop().call_soon(self.guard, self._think)

    def _think(self) -> None:
        began_ns = thread_time_ns()
        estimator = self._estimator
        overheads = estimator.up.overhead_ns + estimator.down.overhead_ns
        latency = max(0, self._round_trip_ns - overheads) // 2
        estimator.observe_latency(latency, latency)
        self._plans.refresh()
        self._board.costs = self._plans.costs or estimator.costs()
        cost_ns = thread_time_ns() - began_ns
        self._think_again_ns = monotonic_ns() + _THINKING_SHARE * cost_ns

    # -- coming back --

    async def _return(self, reach: Reach) -> None:
        """Connect anew; what happens to the new line is a matter of its own."""
        try:
            line, welcome = await reach(self._say_hello)
            while line.error is not None:  # it is gone already
                line, welcome = await reach(self._say_hello)
            failpoint("worker.before-resume")
            self._take_up(line, welcome)
            _connection_log.warning("rank %d: back at %s", welcome.slot, line.channel.peer)
        except (DynaCommError, TimeoutError) as error:
            self._board.end(
                error if isinstance(error, DynaCommError) else ChannelBroken(str(error))
            )
        except Exception as error:  # a planner's
            self._fail(error)

    def _say_hello(self) -> Hello:
        self._connection += 1
        welcome = self._welcome
        member = Membership(welcome.slot, welcome.term, self._connection, welcome.incarnation)
        return Hello(run=welcome.run, member=member)

    def _take_up(self, line: Line, welcome: Welcome) -> None:
        """Go on over a new line, as the welcome has it."""
        if welcome.slot != self._welcome.slot:
            raise RemoteProtocolError(
                f"the server gives rank {welcome.slot} to rank {self._welcome.slot}"
            )
        known, self._welcome = self._welcome, welcome
        is_new = welcome.incarnation != known.incarnation or not welcome.resumed
        self._board.divide(welcome.split, keep_later=not is_new)
        if welcome.resumed and not self._joins:
            if welcome.incarnation != known.incarnation:
                self._step_back(welcome.version)
            opening = self._resume()
        else:
            self._connection = 0 if not welcome.resumed else self._connection
            if not self._joins:
                self._step_back(welcome.version, is_certain=False)
            elif self._version != welcome.version:
                self._begin_anew(welcome.version)
            opening = self._join(welcome)
            self._joins = self._may_push = True
        self._notes.clear()
        self._line = line
        self._round_trip_ns = self._round_trip_ns or line.round_trip_ns
        self._last_arrival_ns = 0
        line.on_answer = self._wake.set
        line.attach(self, welcome.silence_ms)
        self._uplink = asyncio.create_task(self._send_all(line, opening), name="uplink")

    def _join(self, welcome: Welcome) -> _Opening:
        grid = self._grid
        layers = grid.layers if welcome.layers is None else None
        first = self._subscription()
        opening: list[tuple[Message, Sequence[memoryview]]] = [
            (Join(grid.fingerprint, first, self._kernels, layers), ())
        ]
        if welcome.upload:
            self._fill_initial()
            everything = (Range(0, grid.n_cells),)
            payload = self._bytes(self._arenas.incoming, everything)
            opening.append((Initial(everything), payload))
        return opening

    def _resume(self) -> _Opening:
        return [(Resume(self._subscription(), merge(self._landed)), ())]

    def _step_back(self, step: int, *, is_certain: bool = True) -> None:
        """Training goes on with another step, or (not ``is_certain``) with whichever comes first:
        nothing of what is under way has been."""
        self._skipped = -1
        self._begin_anew(step)
        self._board.step_back(step if is_certain else None)
        failpoint("worker.rolled-back")

    def _begin_anew(self, step: int) -> None:
        self._machines.clear()
        self._outbox.clear()
        self._reports.clear()
        self._landed.clear()
        self._version = step
        self._open_step(step)

    def _settle(self, version: int) -> None:
        """The first parameters after a join say with which version training begins here."""
        self._joins = False
        if version != self._version:
            self._begin_anew(version)
        self._board.settle(version)

    def _take_skip(self, skip: Skip) -> None:
        """Leave steps behind that do not count."""
        step = skip.step
        machine = self._machines.get(step)
        if machine is None and self._version > step:
            return  # it was known before, or the server had all of it
        # A slow worker is left out again and again: it is told once.
        is_news = skip.code != "quorum" or self._skipped < 0
        level = logging.WARNING if is_news else logging.DEBUG
        _log.log(level, "rank %d: %s", self._welcome.slot, skip.text)
        self._joins = False
        self._skipped = step
        is_computing = machine is None or not machine.computed
        self._outbox = [(of, send) for of, send in self._outbox if of > step]
        if self._version <= step:  # with its first gradients it would have subscribed
            self._begin_anew(step + 1)
            self._notes = [Subscribe(self._subscription())]
            self._wake.set()
        for of in [of for of in self._machines if of <= step]:
            self._forget(of)
        if is_computing:
            self._board.step_back(step + 1)

    def _take_have(self, have: Have) -> None:
        """Send again what the server has not got, and nothing else."""
        version, step = self._version, have.step
        if step == version:
            self._forget(version - 1)
        elif step + 1 != version or (step not in self._machines and step > self._skipped):
            raise RemoteProtocolError(f"the server is in step {step}, expected {version}")
        self._outbox.clear()
        parameters = Range(0, self._grid.n_parameter_cells)
        for of, machine in self._machines.items():
            has = merge(have.has) if of == step else ()
            missing = tuple(subtract(parameters, has))
            skip = tuple(subtract(parameters, missing))
            rest = self._grid.statistics_cells
            statistics = rest if any(subtract(rest, has)) else None
            rule = uplink(self._plans.plan_of(of), self._grid, skip)
            self._carry_out(of, machine.handle(Resumed(rule, statistics)))
        self._may_push = True
        self._wake.set()

    # -- the rest --

    def _subscription(self) -> Subscription:
        return subscription(self._plans.plan_of(self._version), self._version, self._grid)

    def _open_step(self, step: int) -> AnyPlan:
        plan = self._plans.plan(step)
        if plan.n_layers != len(self._layer_cells):
            raise PlanError(
                f"the plan for step {step} has {plan.n_layers} layers, "
                f"expected {len(self._layer_cells)}"
            )
        rule = uplink(plan, self._grid)
        self._machines[step] = StepMachine(self._layer_cells, rule, self._grid.statistics_cells)
        if self._recorder is not None and self._plans.changes[-1][0] == step:
            self._recorder.add(Planned(step, monotonic_ns(), plan.to_json()))
        return plan

    def _forget(self, step: int) -> None:
        """The server has all gradients of the step, so it will never ask for them again."""
        self._machines.pop(step, None)
        self._reports.pop(step, None)

    def _bytes(self, arena: Floats, ranges: Sequence[Range]) -> list[memoryview]:
        whole = arena.data.cast("B")
        spans = (self._grid.floats(*cells) for cells in ranges)
        return [whole[4 * start : 4 * stop] for start, stop in spans]

    def _take_parameters(self, message: Parameters, arrival: Arrival) -> None:
        failpoint("worker.parameters")
        if self._board.opened < message.version or message.split is not None:
            self._board.open(message.version, message.split)
        estimator = self._estimator
        observation = arrival.observation(self._last_arrival_ns)
        if observation is not None:
            end_ns = arrival.last_ns
            shared_ns = self._sending.within(end_ns - observation[1], end_ns)
            estimator.observe_pull(*observation, shared_ns=shared_ns)
        self._last_arrival_ns = arrival.last_ns
        if message.timing is not None:
            crossing = is_crossing(self._plans.plan_of(message.version))
            estimator.observe_pushes(message.timing.arrivals, crossing=crossing)
            estimator.observe_server(message.timing.apply_ns)
            self._board.note_timing(message.version, message.timing)
        machine = self._machines[message.version]
        for cells in message.ranges:
            try:
                instructions = machine.handle(RangeArrived(cells))
            except LocalProtocolError as error:  # on this side of the machine it is the server's
                raise RemoteProtocolError(str(error)) from error
            self._landed.append(cells)
            self._carry_out(message.version, instructions)
        if machine.pulled:
            self._forget(message.version - 1)

    def _carry_out(self, step: int, instructions: Sequence[Instruction]) -> None:
        computes = [instruction for instruction in instructions if isinstance(instruction, Compute)]
        if computes:
            self._board.grant(computes, step)
        for instruction in instructions:
            if isinstance(instruction, Send):
                self._outbox.append((step, instruction))
                self._wake.set()

    async def _send_all(self, line: Line, opening: _Opening) -> None:
        """The uplink: one message at a time, the next one chosen when it has nearly left."""
        busy = False
        try:
            for message, payload in opening:
                await line.send(message, payload)
            while True:
                if line.answer is not None:
                    answer, line.answer = line.answer, None
                    await line.send(answer)
                elif self._notes:
                    await line.send(self._notes.pop(0))
                elif self._outbox and self._may_push and not self._board.is_over:
                    step, send = self._outbox.pop(0)
                    await self._push(line, step, send, busy)
                    busy = True
                else:
                    busy = False
                    self._wake.clear()
                    await self._wake.wait()
        except Exception as error:
            if not _is_the_lines(error):  # of those its owner hears when it is over
                self._fail(error)

    async def _push(self, line: Line, step: int, send: Send, back_to_back: bool) -> None:
        message = self._bind(line, step, send)
        payload = self._bytes(self._arenas.outgoing, send.cells)
        start_ns = monotonic_ns()
        failpoint("worker.before-push")
        await line.send(message, payload, back_to_back=back_to_back)
        failpoint("worker.after-push")
        self._note_sending(sum(map(len, payload)), start_ns)
        machine = self._machines.get(step)
        if machine is not None:  # else all of it has arrived, and this was known before
            self._carry_out(step, machine.handle(LinkFree()))

    def _note_sending(self, nbytes: int, start_ns: int) -> None:
        """Take note of how long a message that has just been sent keeps the uplink busy.

        What is left of it in buffers goes on doing so for as long as the link is known to need.
        """
        start_ns = max(start_ns, self._sending.end_ns)
        needed_ns = self._estimator.up.expect_ns(nbytes)
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
        self._outbox.clear()
        if self._line is not None and self._leaving is None:
            self._leaving = asyncio.create_task(self._line.say_goodbye(), name="goodbye")

    def _bind(self, line: Line, step: int, send: Send) -> Gradients:
        if not send.first:
            return Gradients(step, send.cells)
        plan = self._plans.plan_of(step)
        line.channel.limit_ahead(plan.push.cap_nbytes if isinstance(plan, PolicyPlan) else None)
        following = None
        if self._version == step:  # otherwise a resume has subscribed to it
            following = subscription(self._open_step(step + 1), step + 1, self._grid)
            self._version = step + 1
            self._landed.clear()
        return Gradients(step, send.cells, following, self._reports.get(step, Report()))


def _is_the_lines(error: Exception) -> bool:
    """Whether a line is over because of this, or was before."""
    return isinstance(error, DynaCommError) and not isinstance(
        error, LocalProtocolError | PlanError
    )


def _may_return(error: DynaCommError) -> bool:
    """Whether another connection may help."""
    if isinstance(error, PeerError):
        return error.code == "server-draining"
    return isinstance(error, ChannelBroken)
