"""What lockstep and loose training have in common: the queue of updates, and who hears of them.

A pace decides which contributions become which version of the parameters, and when a member may
have it. It owns the arithmetic's order; memberships are the business of
:class:`~dynacomm_async.server.run.Run`.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic_ns
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from dynacomm_async.errors import DynaCommError, RemoteProtocolError
from dynacomm_async.failpoints import failpoint
from dynacomm_async.ranges import Range
from dynacomm_async.recording import Recorder, Updated
from dynacomm_async.server.clocks import StaleRounds
from dynacomm_async.server.places import Place, Places
from dynacomm_async.server.results import Applied, StepRecord
from dynacomm_async.server.rounds import Rounds
from dynacomm_async.server.store import Store, is_sound
from dynacomm_async.split import Split
from dynacomm_async.wire.messages import End, Error, Gradients, Have, Report, Skip

__all__ = ["Diverged", "Due", "Pace", "Watchers"]

RoundsT = TypeVar("RoundsT", Rounds, StaleRounds)

_TURN_CELLS = 64
"""Cells (1 MiB) that are updated before the event loop gets a turn."""


class Diverged(DynaCommError):
    """An update has made values that are not finite; nothing of it was sent."""


class Due(NamedTuple):
    """Cells that are to be updated.

    Attributes:
        cells: which.
        step: by the gradients of this step.
        slot: whose; None: everybody's.
    """

    cells: Range
    step: int
    slot: int | None = None


@dataclass(frozen=True, slots=True)
class Watchers:
    """Who wants to know what; all are called on the event loop.

    Attributes:
        on_step: of each step that has ended.
        on_applied: of each update, in the order in which they are made.
        on_poison: of each contribution that was refused, with the slot and what was wrong.
        recorder: of each update's time.
    """

    on_step: Callable[[StepRecord], None]
    on_poison: Callable[[int, str], None]
    on_applied: Callable[[Applied], None] | None = None
    recorder: Recorder | None = None


class Pace(ABC, Generic[RoundsT]):
    """Applies contributions and lets the members have the results.

    Args:
        store: the parameters.
        places: the members.
        steps: the last version.
        watchers: who wants to know.

    Attributes:
        copies: whether what is sent must be copied before, because it may change meanwhile.
    """

    copies = False
    _rounds: RoundsT

    def __init__(self, store: Store, places: Places, steps: int, watchers: Watchers) -> None:
        self._store = store
        self._grid = store.grid
        self._places = places
        self._steps = steps
        self._watchers = watchers
        self._due: deque[Due | Callable[[], object]] = deque()  # updates, and what comes between
        self._work = asyncio.Event()
        self._last_skips: dict[int, Skip] = {}  # by slot

    # -- where training stands --

    @property
    @abstractmethod
    def step(self) -> int:
        """The version that training as a whole has reached."""

    @property
    def finishing(self) -> bool:
        """Whether all updates have been made."""
        return self.step >= self._steps

    @abstractmethod
    def stands_at(self, slot: int) -> int:
        """Return the version that a member who comes to this rank begins with, or a lower one."""

    @abstractmethod
    def progress(self) -> dict[str, Any]:
        """Return what a checkpoint has to hold beside the arrays, as plain values for JSON.

        What is given to :meth:`restore` in the next life of the server.
        """

    @abstractmethod
    def restore(self, progress: Mapping[str, Any], versions: Any) -> None:
        """Go on from a checkpoint; the arrays are in the store already."""

    def split_of(self, version: int) -> Split | None:
        """Return among whom the data of a step are divided, where that changes."""
        return None

    @abstractmethod
    def ready(self, slot: int, version: int) -> list[Range]:
        """Return the parameter cells that may go out to a member as those of ``version``."""

    # -- members come and go --

    @abstractmethod
    def may_replace(self, slot: int) -> bool:
        """Whether a newcomer could do the step anew of a member that is away."""

    @abstractmethod
    def enter(self, place: Place) -> None:
        """Let a newcomer take part as soon as it can."""

    def come_back(self, slot: int, version: int) -> tuple[Have, Skip | None]:
        """Say what a member that is back need not send again, and what was made without it.

        Raises:
            RemoteProtocolError: it comes back to a version that it cannot have been at.
        """
        stands, skips = self.stands_at(slot), self._rounds.skips(slot)
        skip = self._missed(slot, skips) if skips >= min(version, stands) else None
        if version in (stands, stands + 1):
            return Have(stands, tuple(self._rounds.have(slot, stands))), skip
        if skip is None or version > stands:
            raise RemoteProtocolError(
                f"a member comes back to version {version}, expected {stands} or {stands + 1}"
            )
        return Have(version, (Range(0, self._grid.n_cells),)), skip

    @abstractmethod
    def give_up(self, slot: int) -> None:
        """Nobody waits for this rank's member any more."""

    # -- gradients --

    def counts(self, slot: int, step: int, ranges: Sequence[Range]) -> bool:
        """Whether gradients that begin to arrive are not to be dropped.

        Raises:
            RemoteProtocolError: they cannot be.
        """
        return self._rounds.check(slot, step, ranges)

    def arrived(self, slot: int, gradients: Gradients, now_ns: int) -> None:
        """A contribution, or a part of one, is in the store."""
        step, ranges = gradients.step, gradients.ranges
        if step <= self._rounds.skips(slot):
            return
        if gradients.report is not None:
            self._take_report(slot, step, gradients.report)
        if self._store.is_sound(slot, ranges):
            self._push(slot, step, ranges, now_ns)
            return
        limit = self._store.training.max_gradient
        text = (
            f"gradients of step {step} hold values that are not finite, or above {limit:g}: "
            "they do not count"
        )
        self._refuse(slot, step)
        self._tell_skip(slot, Skip(step, "poison", text))
        self._watchers.on_poison(slot, text)

    @abstractmethod
    def _take_report(self, slot: int, step: int, report: Report) -> None: ...

    @abstractmethod
    def _push(self, slot: int, step: int, ranges: Sequence[Range], now_ns: int) -> None: ...

    @abstractmethod
    def _refuse(self, slot: int, step: int) -> None: ...

    def _tell_skip(self, slot: int, skip: Skip) -> None:
        """What a rank's member computes is in vain; one that is away hears of it later."""
        self._last_skips[slot] = skip
        place = self._places.at(slot)
        if place is not None and place.begun and place.member is not None:
            place.member.skip(skip)
            place.member.make_ready()

    def _missed(self, slot: int, up_to: int) -> Skip:
        """Return what a member that is back has to hear of a step that is past."""
        skip = self._last_skips.get(slot)
        if skip is not None and skip.step == up_to:
            return skip
        return Skip(up_to, "quorum", f"step {up_to} was made without this worker's gradients")

    # -- updates --

    async def work(self, after_step: Callable[[], Awaitable[None]]) -> None:
        """Update what is due, a mebibyte at a time so that the loop stays responsive.

        Cancel it to stop; no update is ever left half done.

        Raises:
            Diverged: values are not finite any more.
        """
        while True:
            await self._work.wait()
            self._work.clear()
            while self._due:
                due = self._next_due()
                if isinstance(due, Due):
                    failpoint("server.before-apply")
                    ended = self._apply(due)
                else:
                    due()
                    ended = self._changed()
                if ended:
                    await after_step()
                await asyncio.sleep(0)

    def _changed(self) -> bool:
        """The roster has changed, in its turn; return whether a step ended with that."""
        return False

    def _enqueue(self, due: Iterable[Due | Callable[[], object]]) -> None:
        self._due.extend(due)
        self._work.set()

    def _next_due(self) -> Due | Callable[[], object]:
        due = self._due.popleft()
        if not isinstance(due, Due):
            return due
        cells = due.cells
        if cells.count <= _TURN_CELLS:
            return due
        rest = Range(cells.first + _TURN_CELLS, cells.count - _TURN_CELLS)
        self._due.appendleft(due._replace(cells=rest))
        return due._replace(cells=Range(cells.first, _TURN_CELLS))

    @abstractmethod
    def _apply(self, due: Due) -> bool:
        """Update cells; return whether a step ended with them.

        Free of awaits, so that no cell is ever seen half updated.
        """

    def _update(self, cells: Range, step: int, slots: tuple[int, ...]) -> None:
        """Change cells by the mean of the contributions of ``slots``; by nobody's: not at all.

        Raises:
            Diverged: the values are not finite any more.
        """
        started_ns = monotonic_ns()
        with np.errstate(over="ignore", invalid="ignore"):  # it is looked for below
            self._store.apply(cells, step, slots)
        if self._watchers.recorder is not None:
            self._watchers.recorder.add(Updated(step, started_ns, monotonic_ns(), *cells))
        start, stop = self._grid.floats(*cells)
        if slots and not is_sound(self._store.arena[start:stop], float("inf")):
            raise Diverged(
                f"the update of step {step} has made values that are not finite; they were not "
                "sent: try a lower --rate, or a lower --max-gradient"
            )
        if self._watchers.on_applied is not None:
            self._watchers.on_applied(Applied(step, cells, slots))
        failpoint("server.after-apply")

    def _come_to_step_end(self) -> None:
        failpoint("server.step-ended")

    def _parameters_of(self, ranges: Iterable[Range]) -> Iterator[Range]:
        """Yield the ranges without cells of statistics."""
        for first, count in ranges:
            end = min(first + count, self._grid.n_parameter_cells)
            if end > first:
                yield Range(first, end - first)

    # -- beginning and end --

    def begin(self) -> None:
        """Training begins with all who are there."""
        for place in self._places:
            place.entered = place.counted
        for place in self._places:
            if place.member is not None and place.member.joined:
                self.enter(place)  # one that came when another had gone already
        self._begin_newcomers()

    def _begin_newcomers(self) -> None:
        """Let those in whose first step has come."""
        for place in self._places:
            member = place.member
            if member is None or not member.joined or not place.entered or place.begun:
                continue
            version = self._first_version(place.slot)
            if version is not None:
                place.begun = True
                member.begin(version)

    @abstractmethod
    def _first_version(self, slot: int) -> int | None:
        """Return the version that a newcomer is to begin with; None while it has to wait."""

    def _finish(self) -> None:
        """Let everybody go, with all there is to have."""
        for place in self._places:
            if place.member is None:
                continue
            if place.begun:
                place.member.finish(End(self._steps))
            else:
                place.member.finish(Error("run-over", "this run has ended"))

    @abstractmethod
    def stop(self) -> None:
        """Leave a state behind that can be gone on from; :meth:`work` has been cancelled."""
