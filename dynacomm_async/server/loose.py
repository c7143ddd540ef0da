"""Bounded staleness and asynchronous training: no common step, each member at its own pace."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from time import monotonic_ns
from typing import Any

from dynacomm_async.ranges import Range
from dynacomm_async.server.clocks import StaleRounds
from dynacomm_async.server.modes import Mode
from dynacomm_async.server.pace import Due, Pace, Watchers
from dynacomm_async.server.places import Place, Places
from dynacomm_async.server.results import StepRecord
from dynacomm_async.server.store import Store
from dynacomm_async.wire.messages import Report

__all__ = ["Loose"]


class Loose(Pace[StaleRounds]):
    """See :class:`~dynacomm_async.server.clocks.StaleRounds` for what is applied when.

    A member gets cells of its step k + 1 when its own gradients of k for them have been applied,
    and the bound allows k + 1. The last version is what all have made: nobody gets it before.

    Args:
        store, places, steps, watchers: as every pace's.
        mode: the bound.
    """

    copies = True

    def __init__(
        self, store: Store, places: Places, steps: int, watchers: Watchers, *, mode: Mode
    ) -> None:
        super().__init__(store, places, steps, watchers)
        bound = mode.staleness
        assert bound is not None
        self._bound = None if bound == math.inf else int(bound)
        self._reports: dict[tuple[int, int], Report] = {}  # by step and slot, until all are there
        self._told = 0  # the lowest clock that everybody has heard of
        self._make_rounds(0, range(places.n_slots))

    def _make_rounds(self, step: int, members: Sequence[int]) -> None:
        self._told = step
        self._rounds = StaleRounds(
            self._grid.n_cells, self._places.n_slots, self._bound, step=step, members=members
        )

    # -- where training stands --

    @property
    def step(self) -> int:
        """The lowest clock: so many steps everybody has finished."""
        return self._rounds.minimum

    def stands_at(self, slot: int) -> int:
        """Return what this rank's clock says."""
        return self._rounds.clock(slot)

    def progress(self) -> dict[str, Any]:
        """Return the clocks, and which cells each rank's step under way has changed."""
        rounds = self._rounds
        slots = range(self._places.n_slots)
        applied = {str(slot): [list(cells) for cells in rounds.applied(slot)] for slot in slots}
        return {"clocks": list(rounds.clocks), "applied": applied}

    @property
    def versions(self) -> Any:
        """(n_cells,) int64: updates of each cell so far."""
        return self._rounds.versions

    def restore(self, progress: Mapping[str, Any], versions: Any) -> None:
        """Go on from where the clocks stood, with the members that have places."""
        self._make_rounds(progress["step"], [place.slot for place in self._places])
        applied = {
            int(slot): [Range(*cells) for cells in ranges]
            for slot, ranges in progress["applied"].items()
        }
        self._rounds.restore(versions, progress["clocks"], applied)

    def ready(self, slot: int, version: int) -> list[Range]:
        """Return the cells whose gradients of the step before have been applied, if they may go."""
        rounds = self._rounds
        clock = rounds.clock(slot)
        if not self._allows(version) or version not in (clock, clock + 1):
            return []
        if version == clock:
            return [Range(0, self._grid.n_parameter_cells)]
        return list(self._parameters_of(rounds.applied(slot)))

    def _allows(self, version: int) -> bool:
        return self.finishing if version >= self._steps else self._rounds.allows(version)

    # -- members come and go --

    def may_replace(self, slot: int) -> bool:
        """Always: a newcomer begins with a step of its own."""
        return True

    def enter(self, place: Place) -> None:
        """Let a newcomer begin with the lowest clock, or with the first step unused in its slot."""
        if place.entered:
            self._begin_newcomers()
            return
        self.give_up(place.slot)  # whom it replaces, if it does
        place.counted = True
        self._change(lambda: self._let_in(place))

    def _let_in(self, place: Place) -> None:
        if self._places.at(place.slot) is not place or place.entered:
            return  # it has gone again
        place.entered = True
        self._rounds.enter(place.slot)

    def _change(self, change: Callable[[], object]) -> None:
        """Have the roster changed when all that has come so far has been applied: the gradients of
        a newcomer land where those of its predecessor lie."""
        self._enqueue([change])

    def give_up(self, slot: int) -> None:
        """Nobody waits for its clock any more, once all that it has pushed has been applied."""
        self._change(lambda: self._let_go(slot))

    def _let_go(self, slot: int) -> None:
        if slot in self._rounds.members:
            self._rounds.leave(slot)

    # -- gradients --

    def _take_report(self, slot: int, step: int, report: Report) -> None:
        self._reports[step, slot] = report

    def _push(self, slot: int, step: int, ranges: Sequence[Range], now_ns: int) -> None:
        self._enqueue(Due(cells, step, slot) for cells in self._rounds.push(slot, step, ranges))

    def _refuse(self, slot: int, step: int) -> None:
        # Never to be applied: the next step's gradients land where they lie.
        for due in [due for due in self._due if isinstance(due, Due) and due.slot == slot]:
            self._due.remove(due)
        self._reports.pop((step, slot), None)
        self._rounds.refuse(slot)
        self._change(lambda: None)  # others may go on

    # -- updates --

    def _apply(self, due: Due) -> bool:
        slot, step, cells = due.slot, due.step, due.cells
        assert slot is not None
        self._update(cells, step, (slot,))
        moved = self._rounds.apply(slot, step, cells)
        place = self._places.at(slot)
        member = None if place is None or not place.entered else place.member
        if member is not None and step + 1 >= self._rounds.clock(slot) and self._allows(step + 1):
            for part in self._parameters_of([cells]):
                member.cells_ready(part, step + 1)
        if not moved:
            return False
        self._come_to_step_end()
        if member is not None:
            member.set_timing(0, 0, slot)
        return self._advance()

    def _changed(self) -> bool:
        self._begin_newcomers()
        return self._advance()

    def _advance(self) -> bool:
        """The lowest clock may have moved: let those go on who have waited for that."""
        if self.step == self._told:
            return False
        self._close(self._told)
        self._told = self.step
        for place in self._places:
            if place.begun and place.member is not None:
                place.member.make_ready()
        self._begin_newcomers()
        if self.finishing:
            self._finish()
        return True

    def _close(self, before: int) -> None:
        """Everybody has finished some steps: tell of them."""
        now_ns, everything = monotonic_ns(), Range(0, self._grid.n_cells)
        for step in range(before, min(self.step, self._steps)):
            reports = {slot: report for (of, slot), report in self._reports.items() if of == step}
            for slot in reports:
                del self._reports[step, slot]
            contributors = ((everything, tuple(sorted(reports))),)
            self._watchers.on_step(StepRecord.of(step, contributors, reports, now_ns))

    def _first_version(self, slot: int) -> int | None:
        clock = self._rounds.clock(slot)
        return clock if self._allows(clock) else None

    def stop(self) -> None:
        """Between any two updates there is one."""
