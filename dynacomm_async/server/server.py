"""The parameter server: an asyncio shell around rounds and store."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from time import monotonic_ns
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.errors import (
    ChannelError,
    ConfigError,
    DynaCommError,
    PeerError,
    RemoteProtocolError,
)
from dynacomm_async.failpoints import failpoint
from dynacomm_async.ranges import Range
from dynacomm_async.recording import Recorder, Updated
from dynacomm_async.server.boundary import Boundary
from dynacomm_async.server.checkpoint import Checkpoints, CheckpointState
from dynacomm_async.server.member import Comeback, Member, Refusal
from dynacomm_async.server.places import Place, Places
from dynacomm_async.server.results import RunResult, StepRecord
from dynacomm_async.server.rounds import Rounds
from dynacomm_async.server.saving import Saving, check_settings, name_rule
from dynacomm_async.server.store import Store, Training
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
    Have,
    Hello,
    Initial,
    Join,
    Membership,
    Resume,
    Welcome,
    decode,
    encode,
)

__all__ = ["ParameterServer", "RunResult", "StepRecord"]

_log = logging.getLogger("dynacomm_async.server")

Floats = NDArray[np.float32]

_STOP_S = 1.2
"""How long connections may take to hear that the server stops."""

_LAST_S = 5.0
"""How long to wait for a member that was lost when all had been sent to it: it may have got it."""

_SAVE_S = 8.0
"""How long a server that stops may take to finish its last checkpoint."""

_LONGEST_S = 1e6

_TURN_CELLS = 64
"""Cells (1 MiB) that are updated before the event loop gets a turn."""


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
        on_step: called on the event loop after each step; after a restart from a checkpoint some
            steps come again.
        heartbeat_s: a connection over which nothing has come for so long is lost; both ends of it
            see to it that something does. The workers are told. A slow link is no silence: 16 KiB
            in that time are enough.
        absence_s: how long a member whose connection was lost keeps its place. Training waits for
            it meanwhile; then the run ends with ``worker-lost``. 0: at once.
        checkpoints: where checkpoints go; None makes none. The caller closes them.
        checkpoint_every: steps from one checkpoint to the next. The beginning and the end are
            saved too.
        resume: go on from the newest good checkpoint, if there is one. Workers that were there go
            back to its step by themselves.
        recorder: takes down what this server does and when; None records nothing.

    Raises:
        ConfigError: arguments that cannot work, or settings that cannot be sent; raised by
            ``async with`` for the address, and for checkpoints of another run.
        CheckpointError: by ``async with``: there are checkpoints, and none can be trusted.
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
        heartbeat_s: float = 15.0,
        absence_s: float = 120.0,
        checkpoints: Checkpoints | None = None,
        checkpoint_every: int = 100,
        resume: bool = False,
    ) -> None:
        if workers < 1:
            raise ConfigError(f"{workers} workers, expected at least 1")
        if steps < 1:
            raise ConfigError(f"{steps} steps, expected at least 1")
        if layers is None and initial is not None:
            raise ConfigError("initial parameters without a layer table: pass layers too")
        if not 0 < heartbeat_s < _LONGEST_S or not 0 <= absence_s < _LONGEST_S:
            raise ConfigError(
                f"heartbeat_s is {heartbeat_s}, absence_s {absence_s}, expected seconds"
            )
        self.run = run or secrets.token_hex(8)
        self._run_is_given = run is not None
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
        self._places = Places(workers)
        self._connections: set[Member] = set()
        self._heartbeat_s = heartbeat_s
        self._absence_s = absence_s
        self._incarnation = secrets.randbits(31)  # no life that left no trace had the same
        self._saving = None if checkpoints is None else Saving(checkpoints, checkpoint_every)
        self._resume = resume
        self._draining: Error | None = None
        self._boundary: Boundary | None = None  # where there are checkpoints
        self._began: asyncio.Task[None] | None = None
        self._kernels: str | None = None
        self._training_began = False
        self._reports: dict[int, tuple[float | None, int]] = {}  # by slot, of this step
        self._last_push_ns: dict[int, int] = {}  # by slot, of this step
        self._all_pushed_ns = 0
        self._records: list[StepRecord] = []
        self._complete: deque[Range] = deque()
        self._applied: list[Range] = []  # cells that are at the next version already
        self._work = asyncio.Event()
        self._apply_task: asyncio.Task[None] | None = None
        self._result: asyncio.Future[RunResult] | None = None

    # -- for its owner --

    async def __aenter__(self) -> ParameterServer:
        self._result = asyncio.get_running_loop().create_future()
        if self._saving is not None:
            await self._go_on(self._saving)
        self._listener = await listen(self._accept, self._listen_at, insecure=self._insecure)
        self._apply_task = asyncio.create_task(self._apply_all(), name="apply")
        self._apply_task.add_done_callback(self._task_ended)
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
        for place in list(self._places):
            self._places.release(place.slot)
        tasks = [task for task in (self._apply_task, self._began) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._saving is not None:
            await self._saving.close(_SAVE_S)

    async def drain(self) -> int:
        """Stop in order: go back to the last step boundary, save it, and tell the workers.

        :meth:`finished` raises ``server-draining`` then. Without checkpoints nothing is saved, and
        leaving the ``async with`` block says ``server-stopped``.

        Returns:
            the step that the run can be resumed from.

        Raises:
            CheckpointError: the checkpoint was not saved.
        """
        assert self._apply_task is not None
        if self._began is not None:
            await asyncio.gather(self._began, return_exceptions=True)
        self._apply_task.cancel()
        await asyncio.gather(self._apply_task, return_exceptions=True)
        saving = self._saving
        if saving is None or self._boundary is None or self._ended:
            return self._step
        self._boundary.restore()
        if not self._finishing:
            text = f"the server stops at step {self._step}; it may be started again to go on there"
            self._draining = Error("server-draining", text)
            self._fail(self._draining)
        saving.offer(self._state().copy())
        await saving.close(_SAVE_S)
        return self._step

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
        if self._draining is not None:
            raise Refusal("server-draining", self._draining.text)
        if self._ended:
            raise Refusal("run-over", "this run has ended; start the server again for another")
        place = None if hello.member is None else self._come_back(member, hello.member)
        resumed = place is not None and self._training_began
        if self._finishing and place is None:
            raise Refusal("run-over", "this run has ended; start the server again for another")
        if place is None:
            place = self._place_newcomer(member, hello.member)
        member.slot = place.slot
        failpoint("server.greeted")
        return Welcome(
            protocol=PROTOCOL_VERSION,
            run=self.run,
            slot=place.slot,
            term=place.term,
            workers=self.workers,
            layers=None if store is None else store.grid.layers,
            version=self._step,
            steps=self.steps,
            upload=self._uploads(member),
            settings=self._settings,
            incarnation=self._incarnation,
            resumed=resumed,
            silence_ms=max(1, round(1000 * self._heartbeat_s)),
        )

    def _come_back(self, member: Member, claimed: Membership) -> Place | None:
        place = self._places.come_back(claimed, member)
        if place is not None:
            former, place.member = place.member, member
            if former is not None:
                former.channel.abort()
        return place

    def _place_newcomer(self, member: Member, claimed: Membership | None) -> Place:
        """Hold a free rank, or that of a member who is away if its step can be done anew."""
        free = self._places.free
        if claimed is not None and claimed.slot in free:
            free = [claimed.slot]  # its own: training has begun anew, or not yet
        if self._training_began:
            free = [] if self._applied or self._complete else self._places.vacant
            if free and self._rounds is not None:
                self._rounds.withdraw(free[0])  # the newcomer computes the step anew
        if not free and self._places.away and not self._places.vacant:
            raise Refusal(
                "place-kept",
                "the server was restarted, and its workers may be on their way back; try again",
            )
        if not free:
            raise Refusal(
                "run-full",
                f"all {self.workers} workers of this run have joined; "
                "start the server with a larger --workers",
            )
        return self._places.take(free[0], member)

    def join(self, member: Member, join: Join) -> Comeback:
        """Take a greeted stranger in."""
        if join.subscription.version != self._step:
            raise RemoteProtocolError(
                f"join subscribes to version {join.subscription.version}, expected {self._step}"
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
        if not self._training_began:
            asyncio.get_running_loop().call_soon(self._begin_when_ready)
            return Comeback(store.grid)
        return self._comeback(member, self._step)

    def resume(self, member: Member, resume: Resume) -> Comeback:
        """Say what a member that is back need not send again, and what it can have at once."""
        step, version = self._step, resume.subscription.version
        if not self._training_began or version not in (step, step + 1):
            raise RemoteProtocolError(
                f"a member comes back to version {version}, expected {step} or {step + 1}"
            )
        failpoint("server.after-have")
        return self._comeback(member, version)

    def _comeback(self, member: Member, version: int) -> Comeback:
        rounds = self._rounds
        assert rounds is not None
        assert member.slot is not None
        step = rounds.step
        ready = [Range(0, self._grid.n_parameter_cells)]
        if version > step:
            ready = list(self._parameters_of(self._applied))
        ending = End(self.steps) if self._finishing else None
        return Comeback(
            self._grid, Have(step, tuple(rounds.have(member.slot, step))), ready, ending
        )

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
            failpoint("server.receiving")
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
        failpoint("server.before-push")
        if gradients.report is not None:
            self._reports[member.slot] = (gradients.report.loss, gradients.report.images)
        self._last_push_ns[member.slot] = now_ns
        complete = self._rounds.push(member.slot, gradients.step, gradients.ranges)
        if complete:
            self._all_pushed_ns = now_ns
            self._complete.extend(_statistics_first(complete, self._grid.n_parameter_cells))
            self._work.set()
        failpoint("server.after-push")

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
        place = self._places.of(member)
        if place is None:
            return  # never had one, or is back over another connection by now
        training = self._training_began and not self._ended
        may_return = isinstance(error, ChannelError) and not member.said_leave
        if training and may_return and self._absence_s:
            self._wait_for(place, str(error), _LAST_S if member.said_end else self._absence_s)
        elif member.said_leave:
            self._give_up(place, f"left in step {self._step}")
        else:
            self._give_up(place, f"was lost in step {self._step}: {error}")

    def _wait_for(self, place: Place, why: str, limit_s: float) -> None:
        _log.warning("worker %d is away (%s); waiting %g s for it", place.slot, why, limit_s)
        text = f"{why}; it did not come back within {limit_s:g} s"
        place.wait(limit_s, lambda: self._give_up(place, f"was lost in step {self._step}: {text}"))

    def _give_up(self, place: Place, what: str) -> None:
        """Nobody waits for this member any more."""
        if self._training_began and not self._finishing and not self._ended:
            self._fail(Error("worker-lost", f"worker {place.slot} ({place.peer}) {what}"))
        self._places.release(place.slot)
        if not self._training_began and not any(m.joined for m in self._places.members):
            self._kernels = None  # the next one may choose again
            if self._model_is_brought:
                self._store = self._rounds = None
                self._has_initial = False
        if self._finishing and not len(self._places):
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
        ready = [member for member in self._places.members if member.joined]
        if len(ready) < self.workers or not self._has_initial or self._training_began:
            return
        self._training_began = True
        if self._saving is None:
            self._release(Range(0, self._grid.n_parameter_cells), 0)
        else:
            self._began = asyncio.create_task(self._begin(self._saving), name="begin")
            self._began.add_done_callback(self._task_ended)

    async def _begin(self, saving: Saving) -> None:
        """Have the beginning on the disk before anybody computes with it."""
        assert self._store is not None
        self._boundary = Boundary(self._store)
        await saving.save_first(self._state)
        self._release(Range(0, self._grid.n_parameter_cells), 0)

    async def _go_on(self, saving: Saving) -> None:
        """Take up a run where its newest checkpoint left it, if there is one."""
        state = await saving.begin(
            resume=self._resume,
            run=self.run if self._run_is_given else None,
            grid=None if self._store is None else self._store.grid,
            rule=name_rule(self._training.rule),
        )
        self._incarnation = saving.incarnation
        self._places.term = saving.incarnation << 20  # no two lives give the same terms
        if state is None:
            return
        self._kernels = state.settings.get("kernels")
        check_settings(state.settings, self._saved_settings)
        store = self._store or self._adopt(Grid(state.layers))
        store.restore(state.parameters, state.statistics, state.optimizer)
        self.run = state.run
        self._rounds = Rounds(store.grid.n_cells, self.workers, state.step)
        self._has_initial = self._training_began = True
        self._boundary = Boundary(store)
        saving.resumed()
        for slot, term in state.roster.items():
            place = self._places.hold(slot, term)
            self._wait_for(place, "the server was restarted", self._absence_s)

    @property
    def _grid(self) -> Grid:
        assert self._store is not None
        return self._store.grid

    def _state(self) -> CheckpointState:
        """Return what the next life of this server needs; its arrays are the live ones."""
        store = self._store
        assert store is not None
        return CheckpointState(
            run=self.run,
            step=self._step,
            incarnation=self._incarnation,
            layers=store.grid.layers,
            rule=name_rule(self._training.rule),
            parameters=store.parameters,
            statistics=store.statistics,
            optimizer=store.states,
            settings=self._saved_settings,
            term=self._places.term,
            roster={place.slot: place.term for place in self._places},
        )

    @property
    def _saved_settings(self) -> dict[str, Any]:
        return {"workers": self.workers, "kernels": self._kernels, "settings": self._settings}

    def _parameters_of(self, ranges: Iterable[Range]) -> Iterator[Range]:
        """Yield the ranges without cells of statistics."""
        for first, count in ranges:
            end = min(first + count, self._grid.n_parameter_cells)
            if end > first:
                yield Range(first, end - first)

    def _release(self, cells: Range, version: int) -> None:
        """Cells have reached ``version``: they may go down to every member."""
        for part in self._parameters_of([cells]):
            for member in self._places.members:
                member.cells_ready(part, version)

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
                ended = self._apply(cells)
                if ended and self._saving is not None:
                    await self._saving.save_if_due(self._state, self._step, self.steps)
                await asyncio.sleep(0)

    def _apply(self, cells: Range) -> bool:
        """Update complete cells; return whether the step ended with them.

        Free of awaits, so that no cell is ever seen half updated.
        """
        assert self._store is not None
        assert self._rounds is not None
        step = self._rounds.step
        failpoint("server.before-apply")
        if self._boundary is not None:
            self._boundary.keep(cells)
        if self._recorder is None:
            self._store.apply(cells, step)
        else:
            started_ns = monotonic_ns()
            self._store.apply(cells, step)
            self._recorder.add(Updated(step, started_ns, monotonic_ns(), *cells))
        failpoint("server.after-apply")
        self._applied.append(cells)
        ended = self._rounds.apply(cells)
        if ended:
            self._applied.clear()
            if self._boundary is not None:
                self._boundary.pass_on()
            failpoint("server.step-ended")
            self._close_step(step)
        self._release(cells, step + 1)
        if ended and self._finishing:
            for member in self._places.members:
                member.finish(End(self.steps))
        return ended

    def _close_step(self, step: int) -> None:
        now_ns = monotonic_ns()
        last_slot = max(self._last_push_ns, key=self._last_push_ns.__getitem__)
        for place in self._places:
            if (member := place.member) is None:
                continue
            wait_ns = self._all_pushed_ns - self._last_push_ns.get(place.slot, self._all_pushed_ns)
            member.set_timing(wait_ns, now_ns - self._all_pushed_ns, last_slot)
        reports = [self._reports.get(slot, (None, 0)) for slot in range(self.workers)]
        losses = [loss for loss, _ in reports if loss is not None]
        mean = sum(losses) / len(losses) if len(losses) == self.workers else None
        record = StepRecord(step, mean, sum(images for _, images in reports), now_ns)
        self._reports.clear()
        self._records.append(record)
        if self._on_step is not None:
            self._on_step(record)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
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
