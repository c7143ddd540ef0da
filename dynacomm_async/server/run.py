"""One run as its members see it: who may join, who is away, and what becomes of their gradients.

What a contribution does to the parameters, and when, is decided by a
:class:`~dynacomm_async.server.pace.Pace`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.errors import ChannelError, ConfigError, DynaCommError, RemoteProtocolError
from dynacomm_async.failpoints import failpoint
from dynacomm_async.ranges import Range
from dynacomm_async.recording import Recorder
from dynacomm_async.schedule.planners.table import CROSSING
from dynacomm_async.server.checkpoint import CheckpointState
from dynacomm_async.server.lockstep import Lockstep
from dynacomm_async.server.loose import Loose
from dynacomm_async.server.member import Comeback, Member, Refusal
from dynacomm_async.server.modes import Mode
from dynacomm_async.server.pace import Diverged, Watchers
from dynacomm_async.server.places import Place, Places
from dynacomm_async.server.results import Applied, RunResult, StepRecord
from dynacomm_async.server.saving import Saving, check_settings, name_rule
from dynacomm_async.server.store import Store, Training
from dynacomm_async.split import Split
from dynacomm_async.transport import Channel
from dynacomm_async.transport.channel import Handler
from dynacomm_async.transport.recorded import RecordedChannel
from dynacomm_async.wire.grid import Grid
from dynacomm_async.wire.messages import (
    PROTOCOL_VERSION,
    End,
    Error,
    Gradients,
    Hello,
    Initial,
    Join,
    Membership,
    Resume,
    Welcome,
)

__all__ = ["Options", "Run"]

_log = logging.getLogger("dynacomm_async.server")

Floats = NDArray[np.float32]

_LAST_S = 5.0
"""How long to wait for a member that was lost when all had been sent to it: it may have got it."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is told by its owner; see :class:`~dynacomm_async.server.ParameterServer`."""

    workers: int
    steps: int
    training: Training
    settings: Mapping[str, Any]
    mode: Mode
    blocks: int | None
    refusals: int
    heartbeat_s: float
    absence_s: float
    on_step: Callable[[StepRecord], None] | None
    on_applied: Callable[[Applied], None] | None
    recorder: Recorder | None


class Run:
    """Implements :class:`dynacomm_async.server.member.Run`.

    Args:
        name: id of the run.
        options: what its owner wants.
        saving: makes checkpoints; None makes none.
        ended: called once, with the result, or with what ended the run.

    Attributes:
        name: as given, or that of the checkpoint it goes on from.
        draining: what whoever comes is told, once the run is being drained; else None.
        records: a record of each step that has ended.
        store: the parameters; None while no model is known.
        connections: everybody who is connected.
        incarnation: which life of the server this is.
    """

    def __init__(
        self,
        name: str,
        options: Options,
        saving: Saving | None,
        ended: Callable[[RunResult | Error, BaseException | None], None],
    ) -> None:
        self.name = name
        self.draining: Error | None = None
        self.records: list[StepRecord] = []
        self.store: Store | None = None
        self.connections: set[Member] = set()
        self.incarnation = secrets.randbits(31)  # no life that left no trace had the same
        self._options = options
        self._saving = saving
        self._report_end = ended
        self._ended = False
        self._has_initial = False
        self._model_is_brought = False  # by a worker, rather than given by the owner
        self._places = Places(options.workers, term=self.incarnation << 20)
        self._pace: Lockstep | Loose | None = None
        self._kernels: str | None = None
        self._training_began = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._updates: asyncio.Task[None] | None = None

    # -- what the server calls --

    def take_model(self, grid: Grid, initial: Floats | None, statistics: Floats | None) -> None:
        """The owner says what is trained, and from what on, unless a worker is to say that."""
        store = self._adopt(grid)
        if initial is not None:
            store.set_initial(initial, statistics)
            self._has_initial = True

    def accept(self, channel: Channel) -> Handler:
        """Take a connection in; returns its handler."""
        recorder = self._options.recorder
        if recorder is None:
            member = Member(self, channel)
            self.connections.add(member)
            return member
        recorded = RecordedChannel(channel, recorder)
        member = Member(self, recorded)
        self.connections.add(member)
        return recorded.handler(member)

    def go_on_from(self, state: CheckpointState) -> None:
        """Take up a run where a checkpoint left it.

        Raises:
            ConfigError: it is of a run with other settings, or has gone on for longer than asked.
        """
        if state.step > self._options.steps:
            raise ConfigError(
                f"the checkpoint is of step {state.step}, behind the {self._options.steps} steps "
                "that the run is to have: ask for more of them, or choose an empty directory"
            )
        self._kernels = state.settings.get("kernels")
        check_settings(state.settings, self._saved_settings)
        before, now = state.progress.get("rate"), name_rule(self._options.training.rate)
        if before not in (None, now):
            _log.warning("from step %d on the learning rate is %s, not %s", state.step, now, before)
        store = self.store or self._adopt(Grid(state.layers))
        store.restore(state.parameters, state.statistics, state.optimizer)
        self.name = state.run
        self._has_initial = self._training_began = True
        roster = state.roster
        if self._options.mode.leaving == "end" and state.step < self._options.steps:
            # Who left because it was over, for fewer steps, is needed again; any newcomer will do.
            everybody = dict.fromkeys(range(self._options.workers), self._places.term)
            roster = {**everybody, **roster}
        for slot, term in roster.items():
            self._places.hold(slot, term)
        assert self._pace is not None
        self._pace.restore({"step": state.step, **state.progress}, state.versions)
        absence_s = self._options.absence_s
        for place in self._places:
            text = (
                f"was lost in step {state.step}: it did not come back within {absence_s:g} s after "
                "the server was restarted"
            )
            place.wait(absence_s, partial(self._give_up, place, text))
        self._start_updates()
        self._end_when_all_have_left()  # it may have been saved when they had

    def start_life(self, incarnation: int) -> None:
        """This is a numbered life of a server that leaves traces."""
        self.incarnation = incarnation
        self._places.term = incarnation << 20  # no two lives give the same terms

    @property
    def members(self) -> list[int]:
        """The ranks whose workers are there."""
        places = self._places
        return [place.slot for place in places if place.member is not None and place.member.joined]

    @property
    def has_ended(self) -> bool:
        """Whether there is a result, or a failure."""
        return self._ended

    @property
    def step(self) -> int:
        """The version that training stands at."""
        return 0 if self._pace is None else self._pace.step

    @property
    def finishing(self) -> bool:
        """Whether all updates have been made."""
        return self._pace is not None and self._pace.finishing

    async def stop_updates(self) -> CheckpointState | None:
        """Make no more updates; return the state to save, or None before training has begun."""
        while self._tasks - {self._updates}:
            await asyncio.gather(*self._tasks - {self._updates}, return_exceptions=True)
        if self._updates is None:
            return None
        self._updates.cancel()
        await asyncio.gather(self._updates, return_exceptions=True)
        assert self._pace is not None
        self._pace.stop()
        return self._state()

    async def close(self, limit_s: float) -> None:
        """Let everybody hear why it is over, and end what goes on."""
        await asyncio.gather(*(member.wait_closed(limit_s) for member in list(self.connections)))
        for place in list(self._places):
            self._places.release(place.slot)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if (
            self.finishing and self._saving is not None
        ):  # the last update may have been a moment ago
            await self._saving.save_end(self._state)

    def fail(self, error: Error, cause: BaseException | None = None) -> None:
        """The run ends, and everybody is told why."""
        self._end(error, cause)
        for member in list(self.connections):
            member.finish(error)

    # -- what members call: coming --

    def greet(self, member: Member, hello: Hello) -> Welcome:
        """Hold a rank for a stranger."""
        self._check_hello(hello)
        place = None if hello.member is None else self._come_back(member, hello.member)
        if self.finishing and place is None:
            raise Refusal("run-over", "this run has ended; start the server again for another")
        if place is None:
            slot, term = self._place_newcomer(member, hello.member)
        else:
            slot, term = place.slot, place.term
        member.slot = slot
        failpoint("server.greeted")
        options, store, pace = self._options, self.store, self._pace
        version = 0 if pace is None else pace.stands_at(slot)
        return Welcome(
            protocol=PROTOCOL_VERSION,
            run=self.name,
            slot=slot,
            term=term,
            workers=options.workers,
            layers=None if store is None else store.grid.layers,
            version=version,
            steps=options.steps,
            upload=self._uploads(member),
            settings=options.settings,
            incarnation=self.incarnation,
            resumed=self._training_began and place is not None and place.begun,
            silence_ms=max(1, round(1000 * options.heartbeat_s)),
            split=None if pace is None else pace.split_of(version),
        )

    def _check_hello(self, hello: Hello) -> None:
        if hello.protocol != PROTOCOL_VERSION:
            raise Refusal(
                "protocol-mismatch",
                f"this server speaks protocol {PROTOCOL_VERSION}, the worker {hello.protocol}; "
                "install the same version of dynacomm_async on both",
            )
        if hello.run is not None and hello.run != self.name:
            raise Refusal("run-mismatch", f"this server's run is {self.name!r}, not {hello.run!r}")
        if self.store is not None and hello.fingerprint is not None:
            _check_fingerprint(self.store.grid, hello.fingerprint)
        if self.draining is not None:
            raise Refusal("server-draining", self.draining.text)
        if self._ended:
            raise Refusal("run-over", "this run has ended; start the server again for another")

    def _come_back(self, member: Member, claimed: Membership) -> Place | None:
        place = self._places.come_back(claimed, member)
        if place is not None:
            former = place.member
            place.connect(member)
            if former is not None:
                former.channel.abort()
        return place

    def _place_newcomer(self, member: Member, claimed: Membership | None) -> tuple[int, int]:
        """Hold a free rank, or promise that of a member who is away if its step can be done anew;
        return the rank and the term."""
        slots, pace = self._places.free, self._pace
        if claimed is not None and claimed.slot in slots:
            slots = [claimed.slot]  # its own: training has begun anew, or not yet
        if slots:
            # Where each has a clock of its own, a rank that is ahead would wait for the others.
            slot = slots[0] if pace is None else min(slots, key=pace.stands_at)
            place = self._places.take(slot, member)
            return place.slot, place.term
        if pace is not None and self._training_began:
            slots = [slot for slot in self._places.vacant if pace.may_replace(slot)]
        if slots:
            return slots[0], self._places.promise(slots[0], member)
        if self._places.away and not self._places.vacant:
            raise Refusal(
                "place-kept",
                "the server was restarted, and its workers may be on their way back; try again",
            )
        raise Refusal(
            "run-full",
            f"all {self._options.workers} workers of this run have joined; "
            "start the server with a larger --workers",
        )

    def join(self, member: Member, join: Join) -> Grid:
        """Make sure that a greeted stranger computes what the others do."""
        store = self.store or self._adopt_from(join)
        _check_fingerprint(store.grid, join.fingerprint)
        if self._kernels is None:
            self._kernels = join.kernels
        elif join.kernels != self._kernels:
            raise Refusal(
                "kernel-mismatch",
                f"the others compute with {self._kernels!r}, this worker with {join.kernels!r}: "
                "results would not be reproducible",
            )
        return store.grid

    def joined(self, member: Member) -> None:
        """A stranger has become a member."""
        assert self._pace is not None
        place = self._places.of(member) or self._inherit(member, self._pace)
        if self._updates is None:  # nobody is let in by himself
            _log.info("worker %d has joined from %s", place.slot, place.peer)
            asyncio.get_running_loop().call_soon(self._begin_when_ready)
            return
        if not place.entered:
            _log.info("worker %d has joined from %s, while training runs", place.slot, place.peer)
        place.begun = False  # nothing had come to it before
        self._pace.enter(place)

    def _inherit(self, member: Member, pace: Lockstep | Loose) -> Place:
        """Give a newcomer the place that it was promised, if that can still be."""
        slot = member.slot
        assert slot is not None
        if self._options.mode.leaving == "end" and not pace.may_replace(slot):
            raise Refusal(
                "run-full",
                f"the step of worker {slot}, whose place this was to be, has begun to change "
                "parameters: nobody else can compute it any more",
            )
        place = self._places.inherit(member)
        if place is None:
            raise Refusal("run-full", f"worker {slot}, whose place this was to be, has come back")
        return place

    def resume(self, member: Member, resume: Resume) -> Comeback:
        """Say what a member that is back need not send again, and what it can have at once."""
        if not self._training_began or self._pace is None or member.slot is None:
            raise RemoteProtocolError("a member comes back before training has begun")
        version = resume.subscription.version
        have, skip = self._pace.come_back(member.slot, version)
        _log.info("worker %d is back from %s", member.slot, member.channel.peer)
        failpoint("server.after-have")
        ending = End(self._options.steps) if self.finishing else None
        return Comeback(self._grid, have, skip, ending)

    # -- what members call: gradients and parameters --

    def counts(self, member: Member, gradients: Gradients) -> bool:
        """Whether gradients are not to be dropped."""
        if not self._training_began or self._pace is None or member.slot is None:
            raise RemoteProtocolError("gradients while no training is under way")
        return self._pace.counts(member.slot, gradients.step, gradients.ranges)

    def place(self, member: Member, message: Initial | Gradients) -> Sequence[memoryview]:
        """Return where a payload goes."""
        store, slot = self.store, member.slot
        assert store is not None
        assert slot is not None
        if isinstance(message, Gradients):
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
        if self._ended:
            return  # the run has failed; its sender will hear of it
        assert self._pace is not None
        assert member.slot is not None
        failpoint("server.before-push")
        self._pace.arrived(member.slot, gradients, now_ns)
        failpoint("server.after-push")

    def ready(self, member: Member, version: int) -> Sequence[Range]:
        """Return the parameter cells that may go out to a member as those of a version."""
        if self._pace is None or member.slot is None or not self._training_began:
            return ()
        return self._pace.ready(member.slot, version)

    def split_of(self, version: int) -> Split | None:
        """Return among whom the data of a step are divided, where that may change."""
        return None if self._pace is None else self._pace.split_of(version)

    def bytes_of(self, ranges: Sequence[Range]) -> list[memoryview]:
        """Return the parameters' bytes, to be sent; a copy where they may change meanwhile."""
        assert self.store is not None
        assert self._pace is not None
        views = _views(self.store.arena, self.store.grid, ranges)
        return [memoryview(bytes(view)) for view in views] if self._pace.copies else views

    def statistics_bytes(self) -> memoryview:
        """Return the running statistics' bytes, to be sent."""
        assert self.store is not None
        return self.store.statistics.data.cast("B")

    # -- what members call: going --

    def departed(self, member: Member, error: DynaCommError) -> None:
        """A connection is over."""
        self.connections.discard(member)
        self._places.disinherit(member)
        place = self._places.of(member)
        if place is None:
            return  # never had one, or is back over another connection by now
        may_return = isinstance(error, ChannelError) and not member.said_leave
        what = f"was lost in step {self.step}: {error}"
        if member.said_leave:
            what = f"left in step {self.step}"
            place.has_left = True
            may_return = self._options.mode.leaving == "wait" and not self.finishing
        if place.counted and self._is_training and may_return and self._options.absence_s:
            limit_s = _LAST_S if member.said_end else self._options.absence_s
            self._wait_for(place, what if member.said_leave else str(error), limit_s)
        else:
            self._give_up(place, what)

    @property
    def _is_training(self) -> bool:
        return self._training_began and not self._ended

    def _wait_for(self, place: Place, why: str, limit_s: float) -> None:
        _log.warning("worker %d is away (%s); waiting %g s for it", place.slot, why, limit_s)
        text = f"{why}; it did not come back within {limit_s:g} s"
        place.wait(limit_s, lambda: self._give_up(place, f"was lost in step {self.step}: {text}"))

    def _give_up(self, place: Place, what: str, *, expelled: bool = False) -> None:
        """Nobody waits for this member any more."""
        had_joined = place.member is not None and place.member.joined
        if had_joined and not self._training_began and not self._ended:
            _log.warning(
                "worker %d (%s) %s, before training began: its place is free",
                *(place.slot, place.peer, what),
            )
        if expelled:
            self._places.expel(place)
        else:
            self._places.release(place.slot)
        if self._is_training and place.counted and not self.finishing:
            self._go_on_without(place, what)
        if not self._training_began and not any(m.joined for m in self._places.members):
            self._kernels = None  # the next one may choose again
            if self._model_is_brought:
                self.store = self._pace = None
                self._has_initial = False
        self._end_when_all_have_left()

    def _go_on_without(self, place: Place, what: str) -> None:
        assert self._pace is not None
        if self._options.mode.leaving == "end":
            self.fail(Error("worker-lost", f"worker {place.slot} ({place.peer}) {what}"))
            return
        left = sum(1 for other in self._places if other.counted)
        then = f"training goes on with {left}" if left else "nobody is left: training waits"
        _log.warning("worker %d (%s) %s; %s", place.slot, place.peer, what, then)
        self._pace.give_up(place.slot)

    def _on_poison(self, slot: int, text: str) -> None:
        place = self._places.at(slot)
        if place is None or place.member is None:
            return
        place.refusals += 1
        place.refused_at = self._pace.stands_at(slot) if self._pace is not None else 0
        limit = self._options.refusals
        _log.warning("worker %d (%s): %s (%d of %d)", slot, place.peer, text, place.refusals, limit)
        if place.refusals < limit:
            return
        if min(other.refused_at for other in self._places) >= place.refused_at - 1:
            told = "the gradients of all workers hold values that are not finite, or far too large"
            self.fail(Error("diverged", f"training has diverged: {told}; try a lower --rate"))
            return
        member, what = place.member, f"is quarantined: {text}, {limit} times by now"
        member.channel.turn_deaf()
        member.finish(Error("quarantined", f"{text}, {limit} times by now: look at its data"))
        self._give_up(place, what, expelled=True)

    # -- the rest --

    @property
    def _grid(self) -> Grid:
        assert self.store is not None
        return self.store.grid

    def _adopt(self, grid: Grid) -> Store:
        options = self._options
        store = self.store = Store(grid, options.workers, options.training)
        watchers = Watchers(self._on_step, self._on_poison, options.on_applied, options.recorder)
        if options.mode.staleness is not None:
            self._pace = Loose(store, self._places, options.steps, watchers, mode=options.mode)
        else:
            self._pace = Lockstep(
                store,
                self._places,
                options.steps,
                watchers,
                mode=options.mode,
                blocks=options.blocks,
                keeps_boundary=self._saving is not None,
                # Its warm-up steps alone have a barrier: not worth the memory of the model twice.
                may_undo=options.settings.get("strategy") not in CROSSING,
            )
        return store

    def _adopt_from(self, join: Join) -> Store:
        """Take the model that the first member brings, if it can be one."""
        if join.layers is None:
            raise Refusal("layers-missing", "this server has no model: connect with layers=")
        try:
            grid = Grid(join.layers)
            _check_fingerprint(grid, join.fingerprint)
            store = self._adopt(grid)
        except (ConfigError, MemoryError) as error:
            text = f"this server cannot train the worker's model: {_explain(error)}"
            raise Refusal("model-refused", text) from error
        self._model_is_brought = True
        return store

    def _uploads(self, member: Member) -> bool:
        """Whether this member has to send the initial parameters."""
        return not self._has_initial and member.slot == 0

    def _begin_when_ready(self) -> None:
        ready = [member for member in self._places.members if member.joined]
        if len(ready) < self._options.workers or not self._has_initial or self._training_began:
            return
        self._training_began = True
        for place in self._places:
            place.counted = True
        self._start(self._begin(), "begin")

    async def _begin(self) -> None:
        """Have the beginning on the disk before anybody computes with it."""
        assert self._pace is not None
        if self._saving is not None:
            await self._saving.save_first(self._state)
        self._start_updates()
        self._pace.begin()

    def _start_updates(self) -> None:
        assert self._pace is not None
        self._updates = self._start(self._pace.work(self._after_step), "updates")

    def _start(self, work: Any, name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        """What the owner's update rule or ``on_step`` raises fails the run, not silently."""
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, Diverged):
            self.fail(Error("diverged", str(error)))
            return
        text = f"the server failed in step {self.step}: {_explain(error)}"
        self.fail(Error("server-failed", text), error)

    async def _after_step(self) -> None:
        if self._saving is not None:
            await self._saving.save_if_due(self._state, self.step, self._options.steps)
        if self.finishing:
            for place in [place for place in self._places if place.has_left]:
                self._places.release(place.slot)  # it was kept for a newcomer
            self._end_when_all_have_left()

    def _end_when_all_have_left(self) -> None:
        if self.finishing and not len(self._places):
            self._end(self._result())

    def _state(self) -> CheckpointState:
        """Return what the next life of this server needs; its arrays are the live ones."""
        store, pace = self.store, self._pace
        assert store is not None
        assert pace is not None
        return CheckpointState(
            run=self.name,
            step=pace.step,
            incarnation=self.incarnation,
            layers=store.grid.layers,
            rule=name_rule(self._options.training.rule),
            parameters=store.parameters,
            statistics=store.statistics,
            optimizer=store.states,
            settings=self._saved_settings,
            term=self._places.term,
            roster={place.slot: place.term for place in self._places if place.counted},
            versions=pace.versions if isinstance(pace, Loose) else None,
            progress={**pace.progress(), "rate": name_rule(self._options.training.rate)},
        )

    @property
    def _saved_settings(self) -> dict[str, Any]:
        options = self._options
        mode = options.mode
        return {
            "workers": options.workers,
            "kernels": self._kernels,
            "settings": options.settings,
            "on_leave": mode.leaving,
            "quorum": mode.quorum,
            "staleness": None if mode.staleness is None else str(mode.staleness),
        }

    def _on_step(self, record: StepRecord) -> None:
        before = self.records[-1] if self.records else record
        if record.contributors == before.contributors:  # one of it is enough: steps are many
            record = replace(record, contributors=before.contributors)
        self.records.append(record)
        if self._options.on_step is not None:
            self._options.on_step(record)

    def _result(self) -> RunResult:
        assert self.store is not None
        return RunResult(
            self._options.steps,
            self.store.parameters.copy(),
            self.store.statistics.copy(),
            tuple(self.records),
        )

    def _end(self, outcome: RunResult | Error, cause: BaseException | None = None) -> None:
        if not self._ended:
            self._ended = True
            self._report_end(outcome, cause)


def _check_fingerprint(grid: Grid, fingerprint: str) -> None:
    if fingerprint != grid.fingerprint:
        raise Refusal(
            "model-mismatch",
            "the worker's model is not the server's: layer names, sizes or weight decay "
            f"differ (fingerprint {fingerprint[:8]}, expected {grid.fingerprint[:8]})",
        )


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
