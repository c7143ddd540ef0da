"""The parameter server: an asyncio shell around rounds and store."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic_ns
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.errors import (
    ConfigError,
    DynaCommError,
    PeerError,
    RemoteProtocolError,
)
from dynacomm_async.ranges import Range
from dynacomm_async.recording import Recorder, Updated
from dynacomm_async.server.member import Member, Refusal
from dynacomm_async.server.rounds import Rounds
from dynacomm_async.server.store import Store, Training, parameters_sha256
from dynacomm_async.transport import Address, Channel, TcpListener, listen, parse_address
from dynacomm_async.transport.channel import Handler
from dynacomm_async.transport.recorded import RecordedChannel
from dynacomm_async.wire.frame import PREFIX_NBYTES, Prefix
from dynacomm_async.wire.grid import Grid, LayerSpec, as_layer_specs
from dynacomm_async.wire.messages import (
    PROTOCOL_VERSION,
    End,
    Error,
    Gradients,
    Hello,
    Initial,
    Join,
    Welcome,
    decode,
    encode,
)

__all__ = ["ParameterServer", "RunResult", "StepRecord"]

Floats = NDArray[np.float32]

_STOP_S = 1.2
"""How long connections may take to hear that the server stops."""

_TURN_CELLS = 64
"""Cells (1 MiB) that are updated before the event loop gets a turn."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One finished step.

    Attributes:
        index: from 0.
        loss: mean of the workers' losses, in rank order, or None if one did not report.
        images: samples that all workers used in the step.
        ended_ns: monotonic clock.
    """

    index: int
    loss: float | None
    images: int
    ended_ns: int


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run.

    Attributes:
        steps: updates of the model.
        parameters: (n,) float32, forward order; the caller's own copy.
        statistics: (m,) float32 running statistics; the caller's own copy.
        records: one for each step.
    """

    steps: int
    parameters: Floats
    statistics: Floats
    records: tuple[StepRecord, ...]

    @property
    def parameters_sha256(self) -> str:
        """Hash of the parameters' bytes."""
        return parameters_sha256(self.parameters)

    @property
    def losses(self) -> list[float | None]:
        """Loss of each step."""
        return [record.loss for record in self.records]


class ParameterServer:
    """Keeps the parameters, waits for its workers, trains, ends. An async context manager.

    Example::

        async with ParameterServer({"w": 10}, workers=2, steps=100) as server:
            print("listening on", server.address)
            result = await server.finished()

    Args:
        layers: the layer table in forward order, as ``{name: float32 count}`` or as specs; None:
            the first member brings it.
        workers: ranks; training begins when all are taken.
        steps: updates of the model, at least one.
        training: how gradients become parameters; plain SGD at 0.01 by default.
        initial: (n,) float32 initial parameters, copied; None: the first member uploads them.
        initial_statistics: (m,) float32 running statistics, copied; zeros by default.
        settings: told to each worker in its welcome; plain values that msgpack can carry.
        run: id of the run; workers that name another one are refused. Random by default.
        listen: where; port 0 lets the kernel choose one.
        insecure: allow listening where other machines can reach it. There is no authentication.
        on_step: called on the event loop after each step.
        recorder: takes down what this server does and when; None records nothing.

    Raises:
        ConfigError: arguments that cannot work, or settings that cannot be sent; raised by
            ``async with`` for the address.
        ShapeError: ``initial`` does not fit the layers.
    """

    def __init__(
        self,
        layers: Mapping[str, int] | Iterable[LayerSpec] | None,
        *,
        workers: int,
        steps: int,
        training: Training | None = None,
        initial: Floats | None = None,
        initial_statistics: Floats | None = None,
        settings: Mapping[str, Any] | None = None,
        run: str | None = None,
        listen: str | Address = "127.0.0.1:0",
        insecure: bool = False,
        on_step: Callable[[StepRecord], None] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        if workers < 1:
            raise ConfigError(f"{workers} workers, expected at least 1")
        if steps < 1:
            raise ConfigError(f"{steps} steps, expected at least 1")
        if layers is None and initial is not None:
            raise ConfigError("initial parameters without a layer table: pass layers too")
        self.run = run or secrets.token_hex(8)
        self.steps = steps
        self.workers = workers
        self._training = training or Training.plain()
        self._settings = _check_settings(settings or {})
        self._listen_at = parse_address(listen) if isinstance(listen, str) else listen
        self._insecure = insecure
        self._on_step = on_step
        if recorder is not None:
            recorder.begin("server")
        self._recorder = recorder
        self._store: Store | None = None
        self._rounds: Rounds | None = None
        self._has_initial = initial is not None
        self._model_is_brought = False  # by a worker, rather than given by the owner
        if layers is not None:
            store = self._adopt(Grid(as_layer_specs(layers)))
            if initial is not None:
                store.set_initial(initial, initial_statistics)
        if initial is None and initial_statistics is not None:
            raise ConfigError("initial statistics without initial parameters: pass both")
        self._listener: TcpListener | None = None
        self._members: dict[int, Member] = {}  # by slot
        self._connections: set[Member] = set()
        self._term = 0
        self._kernels: str | None = None
        self._training_began = False
        self._reports: dict[int, tuple[float | None, int]] = {}  # by slot, of this step
        self._last_push_ns: dict[int, int] = {}  # by slot, of this step
        self._all_pushed_ns = 0
        self._records: list[StepRecord] = []
        self._complete: deque[Range] = deque()
        self._work = asyncio.Event()
        self._apply_task: asyncio.Task[None] | None = None
        self._result: asyncio.Future[RunResult] | None = None

    # -- for its owner --

    async def __aenter__(self) -> ParameterServer:
        self._result = asyncio.get_running_loop().create_future()
        self._listener = await listen(self._accept, self._listen_at, insecure=self._insecure)
        self._apply_task = asyncio.create_task(self._apply_all(), name="apply")
        self._apply_task.add_done_callback(self._applying_ended)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._listener is not None
        assert self._apply_task is not None
        await self._listener.close()
        if not self._ended:
            self._fail(Error("server-stopped", "the server was stopped before the run ended"))
        await asyncio.gather(*(member.wait_closed(_STOP_S) for member in list(self._connections)))
        self._apply_task.cancel()
        await asyncio.gather(self._apply_task, return_exceptions=True)

    @property
    def address(self) -> Address:
        """Where workers connect to."""
        return self.addresses[0]

    @property
    def addresses(self) -> Sequence[Address]:
        """All addresses that it listens on (a name such as localhost may have several)."""
        assert self._listener is not None, "the server has not been started"
        return self._listener.addresses

    @property
    def memory_nbytes(self) -> int | None:
        """Bytes held for parameters, states and contributions, or None before there is a model."""
        return None if self._store is None else self._store.nbytes

    async def finished(self) -> RunResult:
        """Wait for the end of the run.

        Raises:
            PeerError: the run failed, because a worker was lost or sent an error.
        """
        assert self._result is not None, "the server has not been started"
        return await asyncio.shield(self._result)

    def connect_channel(self, channel: Channel) -> Handler:
        """Take a connection in that does not come from the listener; returns its handler."""
        return self._accept(channel)

    # -- what members call --

    def greet(self, member: Member, hello: Hello) -> Welcome:
        """Hold a rank for a stranger."""
        if hello.protocol != PROTOCOL_VERSION:
            raise Refusal(
                "protocol-mismatch",
                f"this server speaks protocol {PROTOCOL_VERSION}, the worker {hello.protocol}; "
                "install the same version of dynacomm_async on both",
            )
        if hello.run is not None and hello.run != self.run:
            raise Refusal("run-mismatch", f"this server's run is {self.run!r}, not {hello.run!r}")
        store = self._store
        if store is not None and hello.fingerprint is not None:
            self._check_fingerprint(store.grid, hello.fingerprint)
        if self._ended or self._finishing:
            raise Refusal("run-over", "this run has ended; start the server again for another")
        free = [slot for slot in range(self.workers) if slot not in self._members]
        if not free or self._training_began:
            raise Refusal(
                "run-full",
                f"all {self.workers} workers of this run have joined; "
                "start the server with a larger --workers",
            )
        member.slot = free[0]
        self._members[member.slot] = member
        self._term += 1
        return Welcome(
            protocol=PROTOCOL_VERSION,
            run=self.run,
            slot=member.slot,
            term=self._term,
            workers=self.workers,
            layers=None if store is None else store.grid.layers,
            version=0,
            steps=self.steps,
            upload=self._uploads(member),
            settings=self._settings,
        )

    def join(self, member: Member, join: Join) -> Grid:
        """Take a greeted stranger in."""
        if join.subscription.version != 0:
            raise RemoteProtocolError(
                f"join subscribes to version {join.subscription.version}, expected 0"
            )
        store = self._store
        if store is None:
            store = self._adopt_from(join)
        self._check_fingerprint(store.grid, join.fingerprint)
        if self._kernels is None:
            self._kernels = join.kernels
        elif join.kernels != self._kernels:
            raise Refusal(
                "kernel-mismatch",
                f"the others compute with {self._kernels!r}, this worker with {join.kernels!r}: "
                "results would not be reproducible",
            )
        asyncio.get_running_loop().call_soon(self._begin_when_ready)
        return store.grid

    def place(self, member: Member, message: Initial | Gradients) -> Sequence[memoryview]:
        """Return where a payload goes."""
        store, rounds, slot = self._store, self._rounds, member.slot
        assert store is not None
        assert rounds is not None
        assert slot is not None
        if isinstance(message, Gradients):
            if not self._training_began:
                raise RemoteProtocolError("gradients while no training is under way")
            rounds.check(slot, message.step, message.ranges)
            return _views(store.contributions[slot], store.grid, message.ranges)
        if not self._uploads(member) or message.ranges != (Range(0, store.grid.n_cells),):
            raise RemoteProtocolError("initial parameters that this server did not ask for")
        return _views(store.arena, store.grid, message.ranges)

    def initial_arrived(self, member: Member, initial: Initial) -> None:
        """Cells of version 0 are in place."""
        self._has_initial = True
        self._begin_when_ready()

    def gradients_arrived(self, member: Member, gradients: Gradients, now_ns: int) -> None:
        """A contribution is in place."""
        assert self._rounds is not None
        assert member.slot is not None
        if self._ended:
            return  # the run has failed; its sender will hear of it
        if gradients.report is not None:
            self._reports[member.slot] = (gradients.report.loss, gradients.report.images)
        self._last_push_ns[member.slot] = now_ns
        complete = self._rounds.push(member.slot, gradients.step, gradients.ranges)
        if complete:
            self._all_pushed_ns = now_ns
            self._complete.extend(_statistics_first(complete, self._grid.n_parameter_cells))
            self._work.set()

    def bytes_of(self, ranges: Sequence[Range]) -> list[memoryview]:
        """Return the parameters' bytes, to be sent."""
        assert self._store is not None
        return _views(self._store.arena, self._store.grid, ranges)

    def statistics_bytes(self) -> memoryview:
        """Return the running statistics' bytes, to be sent."""
        assert self._store is not None
        return self._store.statistics.data.cast("B")

    def departed(self, member: Member, error: DynaCommError) -> None:
        """A connection is over."""
        self._connections.discard(member)
        slot = member.slot
        if slot is None or self._members.get(slot) is not member:
            return
        if self._training_began and not self._finishing and not self._ended:
            text = f"worker {slot} ({member.channel.peer}) was lost in step {self._step}: {error}"
            if member.said_leave:
                text = f"worker {slot} ({member.channel.peer}) left in step {self._step}"
            self._fail(Error("worker-lost", text))
        del self._members[slot]
        if not self._training_began and not any(m.joined for m in self._members.values()):
            self._kernels = None  # the next one may choose again
            if self._model_is_brought:
                self._store = self._rounds = None
                self._has_initial = False
        if self._finishing and not self._members:
            self._end()

    # -- the rest --

    @property
    def _ended(self) -> bool:
        return self._result is not None and self._result.done()

    @property
    def _step(self) -> int:
        return 0 if self._rounds is None else self._rounds.step

    @property
    def _finishing(self) -> bool:
        return self._step >= self.steps

    def _accept(self, channel: Channel) -> Handler:
        if self._recorder is None:
            member = Member(self, channel)
            self._connections.add(member)
            return member
        recorded = RecordedChannel(channel, self._recorder)
        member = Member(self, recorded)
        self._connections.add(member)
        return recorded.handler(member)

    def _adopt(self, grid: Grid) -> Store:
        self._store = Store(grid, self.workers, self._training)
        self._rounds = Rounds(grid.n_cells, self.workers)
        return self._store

    def _adopt_from(self, join: Join) -> Store:
        """Take the model that the first member brings, if it can be one."""
        if join.layers is None:
            raise Refusal("layers-missing", "this server has no model: connect with layers=")
        try:
            grid = Grid(join.layers)
            self._check_fingerprint(grid, join.fingerprint)
            store = self._adopt(grid)
        except (ConfigError, MemoryError) as error:
            text = f"this server cannot train the worker's model: {_explain(error)}"
            raise Refusal("model-refused", text) from error
        self._model_is_brought = True
        return store

    def _uploads(self, member: Member) -> bool:
        """Whether this member has to send the initial parameters."""
        return not self._has_initial and member.slot == 0

    def _check_fingerprint(self, grid: Grid, fingerprint: str) -> None:
        if fingerprint != grid.fingerprint:
            raise Refusal(
                "model-mismatch",
                "the worker's model is not the server's: layer names, sizes or weight decay "
                f"differ (fingerprint {fingerprint[:8]}, expected {grid.fingerprint[:8]})",
            )

    def _begin_when_ready(self) -> None:
        ready = [member for member in self._members.values() if member.joined]
        if len(ready) < self.workers or not self._has_initial or self._training_began:
            return
        self._training_began = True
        self._release(Range(0, self._grid.n_parameter_cells), 0)

    @property
    def _grid(self) -> Grid:
        assert self._store is not None
        return self._store.grid

    def _release(self, cells: Range, version: int) -> None:
        """Cells have reached ``version``: they may go down to every member."""
        end = min(cells.first + cells.count, self._grid.n_parameter_cells)
        if end > cells.first:
            for member in self._members.values():
                member.cells_ready(Range(cells.first, end - cells.first), version)

    async def _apply_all(self) -> None:
        """Update what is complete, a mebibyte at a time so that the loop stays responsive."""
        while True:
            await self._work.wait()
            self._work.clear()
            while self._complete:
                cells = self._complete.popleft()
                if cells.count > _TURN_CELLS:
                    rest = Range(cells.first + _TURN_CELLS, cells.count - _TURN_CELLS)
                    self._complete.appendleft(rest)
                    cells = Range(cells.first, _TURN_CELLS)
                self._apply(cells)
                await asyncio.sleep(0)

    def _apply(self, cells: Range) -> None:
        """Free of awaits, so that no cell is ever seen half updated."""
        assert self._store is not None
        assert self._rounds is not None
        step = self._rounds.step
        if self._recorder is None:
            self._store.apply(cells, step)
        else:
            started_ns = monotonic_ns()
            self._store.apply(cells, step)
            self._recorder.add(Updated(step, started_ns, monotonic_ns(), *cells))
        ended = self._rounds.apply(cells)
        if ended:
            self._close_step(step)
        self._release(cells, step + 1)
        if ended and self._finishing:
            for member in list(self._members.values()):
                member.finish(End(self.steps))

    def _close_step(self, step: int) -> None:
        now_ns = monotonic_ns()
        last_slot = max(self._last_push_ns, key=self._last_push_ns.__getitem__)
        for slot, member in self._members.items():
            wait_ns = self._all_pushed_ns - self._last_push_ns[slot]
            member.set_timing(wait_ns, now_ns - self._all_pushed_ns, last_slot)
        reports = [self._reports.get(slot, (None, 0)) for slot in range(self.workers)]
        losses = [loss for loss, _ in reports if loss is not None]
        mean = sum(losses) / len(losses) if len(losses) == self.workers else None
        record = StepRecord(step, mean, sum(images for _, images in reports), now_ns)
        self._reports.clear()
        self._records.append(record)
        if self._on_step is not None:
            self._on_step(record)

    def _applying_ended(self, task: asyncio.Task[None]) -> None:
        """What the owner's update rule or ``on_step`` raises fails the run, not silently."""
        if not task.cancelled() and (error := task.exception()) is not None:
            text = f"the server failed in step {self._step}: {_explain(error)}"
            self._fail(Error("server-failed", text), error)

    def _end(self) -> None:
        assert self._store is not None
        assert self._result is not None
        result = RunResult(
            self.steps,
            self._store.parameters.copy(),
            self._store.statistics.copy(),
            tuple(self._records),
        )
        if not self._result.done():
            self._result.set_result(result)

    def _fail(self, error: Error, cause: BaseException | None = None) -> None:
        assert self._result is not None
        if not self._result.done():
            failure = PeerError(error.code, error.text)
            failure.__cause__ = cause
            self._result.set_exception(failure)
            self._result.exception()  # seen: an owner that leaves early need not ask for it
        for member in list(self._connections):
            member.finish(error)


def _statistics_first(complete: Iterable[Range], n_parameter_cells: int) -> list[Range]:
    """Put statistics before parameters, in the order in which they are applied.

    The step is over when its last cell has been applied. That must be one of the parameters, which
    then tell the workers so: sent before, they would lack the step's timing, and a gradient of the
    next step could come before its time.
    """
    edge = n_parameter_cells
    ends = [(first, first + count) for first, count in complete]
    statistics = [
        Range(max(first, edge), end - max(first, edge)) for first, end in ends if end > edge
    ]
    parameters = [Range(first, min(end, edge) - first) for first, end in ends if first < edge]
    return [*statistics, *parameters]


def _views(arena: Floats, grid: Grid, ranges: Sequence[Range]) -> list[memoryview]:
    views = []
    whole = arena.data.cast("B")
    for first, count in ranges:
        start, stop = grid.floats(first, count)
        views.append(whole[4 * start : 4 * stop])
    return views


def _explain(error: BaseException) -> str:
    """Name the kind of an error too: the text alone of a ``KeyError`` says nothing."""
    return str(error) if isinstance(error, DynaCommError) else f"{type(error).__name__}: {error}"


def _check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Make sure that a welcome can carry the settings and a worker can read them."""
    welcome = Welcome(PROTOCOL_VERSION, "", 0, 0, 0, None, 0, 0, False, dict(settings))
    try:
        head = encode(welcome)
        decode(Prefix.unpack(head), head[PREFIX_NBYTES:])
    except (TypeError, ValueError, OverflowError, RemoteProtocolError) as error:
        raise ConfigError(
            f"the settings cannot be sent to workers ({error}); expected a dict of text keys and "
            "plain values: text, numbers, true, false, None, lists, dicts"
        ) from error
    return dict(settings)
