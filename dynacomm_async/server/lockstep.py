"""Synchronous training: one step after the other, of all members or of a quorum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from time import monotonic_ns
from typing import Any

from dynacomm_async.ranges import Range
from dynacomm_async.server.boundary import Boundary
from dynacomm_async.server.modes import Mode
from dynacomm_async.server.pace import Due, Pace, Watchers
from dynacomm_async.server.places import Place, Places
from dynacomm_async.server.results import Applied, StepRecord, join_contributors
from dynacomm_async.server.rounds import Rounds
from dynacomm_async.server.store import Store
from dynacomm_async.split import Split
from dynacomm_async.wire.messages import Report, Skip

__all__ = ["Lockstep"]


class Lockstep(Pace[Rounds]):
    """See :class:`~dynacomm_async.server.rounds.Rounds` for what is complete when.

    Args:
        store, places, steps, watchers: as every pace's.
        mode: what becomes of those who are slow or gone.
        blocks: batches of one worker in an epoch; None: nobody knows.
        keeps_boundary: whether the last step boundary must be there to go back to.
        may_undo: whether a step behind a barrier keeps it too, so that a contribution can be
            refused whole after cells have been applied.
    """

    def __init__(
        self,
        store: Store,
        places: Places,
        steps: int,
        watchers: Watchers,
        *,
        mode: Mode,
        blocks: int | None,
        keeps_boundary: bool,
        may_undo: bool,
    ) -> None:
        super().__init__(store, places, steps, watchers)
        self.copies = mode.quorum is not None
        self._mode = mode
        self._split: Split | None = None  # of the step under way
        if mode.is_elastic:
            self._split = Split(blocks or _MANY_BLOCKS, tuple(range(places.n_slots)))
        self._keeps_boundary = keeps_boundary
        self._may_undo = may_undo
        self._boundary: Boundary | None = None
        self._keeping = keeps_boundary  # in the step under way
        self._applied: list[Range] = []  # cells that are at the next version already
        self._made_of: list[tuple[Range, tuple[int, ...]]] = []  # whose contributions those are
        self._reports: dict[int, Report] = {}  # by slot, of this step
        self._last_push_ns: dict[int, int] = {}  # likewise
        self._all_pushed_ns = 0
        self._make_rounds(0, range(places.n_slots))

    def _make_rounds(self, step: int, members: Iterable[int]) -> None:
        mode = self._mode
        self._rounds = Rounds(
            self._grid.n_cells,
            self._places.n_slots,
            step,
            members=members,
            barrier=mode.barrier,
            quorum=mode.quorum,
        )

    # -- where training stands --

    @property
    def step(self) -> int:
        """The version that all cells are at, or are leaving."""
        return self._rounds.step

    def stands_at(self, slot: int) -> int:
        """Return the step under way."""
        return self._rounds.step

    def progress(self) -> dict[str, Any]:
        """Return among whom the data are divided."""
        split = self._split
        if split is None:
            return {}
        row = [split.blocks, list(split.members), split.step, split.epoch, split.position]
        return {"split": row}

    def restore(self, progress: Mapping[str, Any], versions: Any) -> None:
        """Go on from a step boundary, with the members that have places."""
        self._make_rounds(progress["step"], [place.slot for place in self._places])
        if "split" in progress:
            blocks, members, *rest = progress["split"]
            self._split = Split(blocks, tuple(members), *rest)
        self._divide_anew()

    def split_of(self, version: int) -> Split | None:
        """Return among whom the data of the step under way, or of the next, are divided."""
        split, coming = self._split, self._rounds.upcoming
        if split is None or version <= self.step or not coming or coming == split.members:
            return split
        return split.anew(version, coming)

    def _divide_anew(self) -> None:
        """The members of the step under way are not those of the one before, perhaps."""
        members, split = self._rounds.members, self._split
        if split is not None and members and members != split.members:
            self._split = split.anew(self.step, members)

    def ready(self, slot: int, version: int) -> list[Range]:
        """Return all cells of the step under way, or those of the next that exist."""
        if version <= self._rounds.skips(slot):
            return []  # asked for before it was told
        if version == self.step:
            return [Range(0, self._grid.n_parameter_cells)]
        return list(self._parameters_of(self._applied)) if version == self.step + 1 else []

    # -- members come and go --

    def may_replace(self, slot: int) -> bool:
        """Whether nothing has been made of the step yet that its gradients would belong to."""
        return self._rounds.may_replace(slot)

    def enter(self, place: Place) -> None:
        """Let a newcomer do the step anew of whom it replaces, or take part in the next step."""
        if place.counted and not place.entered:
            if self._mode.quorum is None and self.may_replace(place.slot):
                self._rounds.hold(place.slot)
            else:
                self._leave(place.slot)
        if not place.entered:
            place.counted = place.entered = True
            self._rounds.enter(place.slot)
            self._divide_anew()
        self._begin_newcomers()

    def give_up(self, slot: int) -> None:
        """Go on with those who are left, from where it left the step."""
        self._leave(slot)
        self._begin_newcomers()

    def _leave(self, slot: int) -> None:
        self._take_complete(self._rounds.leave(slot))
        self._divide_anew()

    # -- gradients --

    def _take_report(self, slot: int, step: int, report: Report) -> None:
        self._reports[slot] = report

    def _push(self, slot: int, step: int, ranges: Sequence[Range], now_ns: int) -> None:
        self._last_push_ns[slot] = now_ns
        self._take_complete(self._rounds.push(slot, step, ranges), now_ns)

    def _refuse(self, slot: int, step: int) -> None:
        self._undo(step)
        self._reports.pop(slot, None)
        self._take_complete(self._rounds.refuse(slot))

    def _undo(self, step: int) -> None:
        """Take back what the step has changed, so that it can be made without a contribution.

        Only where nobody has been sent any of it, as behind a barrier.
        """
        sent = any(place.has_been_sent > step for place in self._places)
        if not self._applied or not self._keeping or self._boundary is None or sent:
            return
        self._boundary.restore()
        if self._watchers.on_applied is not None:
            for cells in self._applied:
                self._watchers.on_applied(Applied(step, cells, (), undone=True))
        self._enqueue(Due(cells, step) for cells in self._applied)
        self._applied.clear()
        self._made_of.clear()
        self._rounds.undo()

    def _take_complete(self, complete: Sequence[Range], now_ns: int | None = None) -> None:
        if not complete:
            return
        self._all_pushed_ns = now_ns or monotonic_ns()
        ordered = _statistics_first(complete, self._grid.n_parameter_cells)
        self._enqueue(Due(cells, self.step) for cells in ordered)
        if self._mode.quorum is not None:
            self._tell_the_late()
        self._begin_newcomers()

    def _tell_the_late(self) -> None:
        step = self.step
        text = f"a quorum of {self._mode.quorum} has made step {step} without these gradients"
        for place in self._places:
            if self._rounds.skips(place.slot) == step and place.begun:
                known = self._last_skips.get(place.slot)
                if known is None or known.step < step:
                    self._tell_skip(place.slot, Skip(step, "quorum", text))

    # -- updates --

    def _apply(self, due: Due) -> bool:
        step, cells = self.step, due.cells
        if not self._applied:
            self._keeping = self._keeps_boundary or (self._may_undo and self._is_behind_a_barrier())
        if self._keeping:
            self._keep(cells)
        parts = self._rounds.contributors(cells)
        for part, slots in parts:
            self._update(part, step, slots)
        self._made_of += parts
        self._applied.append(cells)
        ended = self._rounds.apply(cells)
        if ended:
            self._close(step)
        for part in self._parameters_of([cells]):
            for member in self._places.members:
                member.cells_ready(part, step + 1)
        if ended:
            self._begin_newcomers()
        if ended and self.finishing:
            self._finish()
        return ended

    def _is_behind_a_barrier(self) -> bool:
        """Whether nobody will be sent anything of the next version before all of it exists."""
        return all(member.has_barrier for member in self._places.members)

    def _keep(self, cells: Range) -> None:
        if self._boundary is None:
            self._boundary = Boundary(self._store)
        self._boundary.keep(cells)

    def _close(self, step: int) -> None:
        self._applied.clear()
        if self._boundary is not None:
            self._boundary.pass_on()
        self._divide_anew()
        self._come_to_step_end()
        now_ns = monotonic_ns()
        self._tell_timing(now_ns)
        contributors = join_contributors(self._made_of)
        self._made_of.clear()
        record = StepRecord.of(step, contributors, self._reports, now_ns)
        self._reports.clear()
        self._last_push_ns.clear()
        self._watchers.on_step(record)

    def _tell_timing(self, now_ns: int) -> None:
        pushed = self._last_push_ns
        if not pushed:
            return  # all who had pushed have left
        last_slot = max(pushed, key=pushed.__getitem__)
        for place in self._places:
            if place.member is not None:
                wait_ns = self._all_pushed_ns - pushed.get(place.slot, self._all_pushed_ns)
                place.member.set_timing(max(0, wait_ns), now_ns - self._all_pushed_ns, last_slot)

    def _first_version(self, slot: int) -> int | None:
        rounds = self._rounds
        versions = (rounds.step, rounds.step + 1)
        return next((version for version in versions if rounds.takes_part(slot, version)), None)

    def stop(self) -> None:
        """Go back to the last step boundary."""
        if self._boundary is not None and self._keeps_boundary:
            self._boundary.restore()
            self._applied.clear()


_MANY_BLOCKS = 1 << 53
"""An epoch that never ends."""


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
