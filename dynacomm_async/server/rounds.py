"""Who has pushed what, and what may be applied: the bookkeeping of training.

Pure: no sockets, no clock, no parameters. A push is keyed (slot, step, cell): the gradient that
the member in ``slot`` computed for a cell from version ``step``. Each key counts at most once.
Memory is O(slots), whatever has happened: nothing of a step is kept once it is over.

:class:`Rounds` is synchronous training. Every cell has a version, and a cell moves from v to v + 1
once all members of the step have pushed it. A worker needs all of v before it can push anything of
v, so every cell is at v or v + 1, and between two steps there is an instant when all are at v + 1.
That is where members come in. One who leaves in the middle of a step shrinks the cells that are not
complete yet: they become the mean of what has arrived, and :meth:`Rounds.contributors` says of
whom. One who is *held* is waited for instead, until a replacement takes the slot or the caller,
who has the clock, gives up and calls :meth:`Rounds.leave`. The replacement needs all of v too, so
it must come before a cell is complete, which a *barrier* puts off: nothing is complete before all
is. With a *quorum* of k, the first k whole contributions of a step count, behind the same barrier.
One whose gradients are *refused* takes no part in the rest of the step: what has been applied
stays, unless the caller can undo it and says so (:meth:`Rounds.undo`).

Without a common step see :mod:`dynacomm_async.server.clocks`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.errors import LocalProtocolError, RemoteProtocolError
from dynacomm_async.ranges import Range

__all__ = ["Rounds", "check_new", "check_ranges", "runs"]


class Rounds:
    """The state of the current step of synchronous training.

    Args:
        n_cells: cells of the model, statistics included.
        n_slots: ranks, each of which contributes at most once to every cell of every step.
        step: the version that all cells are at.
        members: the slots that are taken; all by default.
        barrier: let no cell be complete before all are.
        quorum: how many whole contributions make a step, with a barrier; None: every member's.

    Attributes:
        step: the version that all cells are at, or are leaving.
        members: the slots among which the work of the step is divided, ascending. It stays what it
            is until the step ends, even where one of them leaves. With a quorum: all slots.
        upcoming: the members of the next step, from the moment at which a first cell is complete
            and may so be sent to them; None before. One who comes later waits for the step after.
    """

    def __init__(
        self,
        n_cells: int,
        n_slots: int,
        step: int = 0,
        *,
        members: Iterable[int] | None = None,
        barrier: bool = False,
        quorum: int | None = None,
    ) -> None:
        self.step = step
        self.members: tuple[int, ...] = ()
        self.upcoming: tuple[int, ...] | None = None
        self._barrier = barrier
        self._quorum = quorum
        self._present = set(range(n_slots) if members is None else members)
        self._held: set[int] = set()
        self._live: set[int] = set()  # members of the step that are still to push, or did
        self._arrived = np.zeros((n_slots, n_cells), dtype=np.bool_)
        self._n_arrived = [0] * n_slots
        self._owed = np.zeros(n_cells, dtype=np.int32)  # how many of the live have yet to push it
        self._n_owed = n_cells  # cells that somebody has yet to push
        self._counted: tuple[int, ...] | None = None  # with a quorum: whose contributions count
        self._whole: list[int] = []  # with a quorum: who has pushed everything, in that order
        self._skipped = [-1] * n_slots  # the last step that each was told to skip
        self._refused: set[int] = set()  # members whose contributions to the step are refused
        self._n_applied = 0  # cells that have moved on to step + 1
        self._begin()

    # -- who takes part --

    @property
    def waiting(self) -> tuple[int, ...]:
        """Held slots without which the step cannot end, ascending."""
        n_cells = len(self._owed)
        missing = [slot for slot in self._held & self._live if self._n_arrived[slot] < n_cells]
        return tuple(sorted(missing))

    @property
    def short(self) -> int:
        """How many newcomers it takes for the step to end: nobody, or too few, are left in it."""
        if self._quorum is not None:
            return max(0, self._needed - len(self._live.union(self._whole)))
        if self.upcoming is not None:
            return 0
        return int(not self._live and not any(self._n_arrived))

    @property
    def replaceable(self) -> bool:
        """Whether a replacement can still take part in this step: no cell is complete."""
        return self.upcoming is None

    def may_replace(self, slot: int) -> bool:
        """Whether a newcomer into this slot, of a member that is lost, could begin at once.

        Either the step can still be computed anew, or the lost one owes it nothing more.
        """
        owes = slot in self._live and self._n_arrived[slot] < len(self._owed)
        return self.replaceable or not owes

    def takes_part(self, slot: int, step: int) -> bool:
        """Whether a member is in ``slot`` that this step, or the next, is to be sent to."""
        if slot not in self._present or slot in self._held:
            return False
        if step == self.step:
            return slot in self._live
        return step == self.step + 1 and self.upcoming is not None and slot in self.upcoming

    def enter(self, slot: int) -> None:
        """Let a new member into a free or held slot.

        Into a held one it comes at once, and computes the whole step anew: what its predecessor
        had pushed is forgotten, unless it was everything. With a quorum any newcomer comes into
        the open step like that. Else it takes part from the next step of which nothing has been
        sent, or at once where nobody else takes part and nothing has come.

        Raises:
            LocalProtocolError: the slot is taken, or held in a step that is not replaceable.
        """
        if slot in self._present and slot not in self._held:
            raise LocalProtocolError(f"slot {slot} is taken")
        whole = self._n_arrived[slot] == len(self._owed)
        if slot in self._held:
            owes = slot in self._live and not whole
            if owes and not self.replaceable:
                raise LocalProtocolError(
                    f"cells of step {self.step} have changed: it is too late to replace slot {slot}"
                )
            self._held.remove(slot)
            self._live.discard(slot)
            if owes:
                self._forget(slot)
                self._live.add(slot)
            return
        self._present.add(slot)
        if self._quorum is not None:
            if self._counted is None and not whole and slot not in self._refused:
                self._forget(slot)
                self._live.add(slot)
        elif self.upcoming is None and not self._live and not any(self._n_arrived):
            self._begin()

    def hold(self, slot: int) -> None:
        """The member is lost: wait for its replacement. One that takes no part yet just leaves.

        Raises:
            LocalProtocolError: nobody is in the slot, or there is a quorum.
        """
        self._check_present(slot)
        if self._quorum is not None:
            raise LocalProtocolError("a quorum waits for nobody in particular")
        if slot in self._live or slot in (self.upcoming or ()):
            self._held.add(slot)
        else:
            self._present.remove(slot)

    def leave(self, slot: int) -> list[Range]:
        """The member has left, or waiting for its replacement is over.

        What has arrived from it stays; it is not waited for any more. If it was the last, the rest
        of the step is complete with what there is, be it nothing: such a cell moves on unchanged. A
        step to which nobody has pushed anything has not begun, and waits for whoever comes.

        Returns:
            the cells that are complete because of that.
        """
        self._check_present(slot)
        self._present.remove(slot)
        self._held.discard(slot)
        if slot not in self._live:
            return []
        self._live.remove(slot)
        if self._quorum is not None:
            return self._close_at_quorum()
        if not self._live and not self._refused and not any(self._n_arrived):
            self._begin()
            return []
        return self._settle_without(slot)

    def refuse(self, slot: int) -> list[Range]:
        """The member's gradients of this step do not count, whatever of them has arrived or comes.

        What has been applied already stays, see :meth:`undo`. The member is to skip the step, and
        takes part in the next one.

        Returns:
            the cells that are complete because of that; those that were stay so, without it.
        """
        self._check_present(slot)
        self._skipped[slot] = self.step
        if slot not in self._live:
            return []
        self._live.remove(slot)
        self._refused.add(slot)
        settled = [] if self._quorum is not None else self._settle_without(slot)
        self._arrived[slot] = False
        self._n_arrived[slot] = 0
        return settled if self._quorum is None else self._close_at_quorum()

    def undo(self) -> None:
        """Nothing of the step has been applied after all: its complete cells are to be, again."""
        self._n_applied = 0

    # -- what they push --

    def check(self, slot: int, step: int, ranges: Sequence[Range]) -> bool:
        """Make sure that a push may come now. Nothing changes.

        Returns:
            whether it counts; False: it belongs to a step that this member is to skip, and is no
            fault: receive it, and drop it.

        Raises:
            RemoteProtocolError: another step's, cells that do not exist or are out of order, or
                cells that have been pushed already in this slot.
        """
        check_ranges(ranges, len(self._owed))
        if step <= self._skipped[slot]:
            return False
        if step != self.step:
            raise RemoteProtocolError(f"gradients of step {step}, expected step {self.step}")
        if not self.takes_part(slot, step):
            raise RemoteProtocolError(f"worker {slot} takes no part in step {step}")
        check_new(self._arrived[slot], step, ranges)
        return True

    def push(self, slot: int, step: int, ranges: Sequence[Range]) -> list[Range]:
        """Take note of a contribution that has arrived whole; return the cells that it completes.

        Call :meth:`check` before it is received. With a quorum the step may have ended since: then
        it is dropped.
        """
        if step <= self._skipped[slot]:
            return []
        settled: list[Range] = []
        for first, count in ranges:
            self._arrived[slot, first : first + count] = True
            self._n_arrived[slot] += count
            if self._quorum is None:
                owed = self._owed[first : first + count]
                owed -= 1
                settled.extend(runs(owed == 0, first))
        if self._quorum is None:
            return self._complete(settled)
        if self._n_arrived[slot] < len(self._owed):
            return []
        self._whole.append(slot)
        return self._close_at_quorum()

    def have(self, slot: int, step: int) -> list[Range]:
        """Return what need not be pushed (again) in this slot, for one who comes back.

        Raises:
            RemoteProtocolError: a step that has not begun.
        """
        if step > self.step:
            raise RemoteProtocolError(f"step {step} has not begun, expected at most {self.step}")
        if step < self.step or step <= self._skipped[slot]:
            return [Range(0, len(self._owed))]
        return runs(self._arrived[slot], 0)

    def skips(self, slot: int) -> int:
        """Return the last step that the member in this slot is to skip, or -1."""
        return self._skipped[slot]

    # -- what is applied --

    def contributors(self, cells: Range) -> list[tuple[Range, tuple[int, ...]]]:
        """Say whose contributions complete cells are the mean of: slots ascending, which is the
        order to sum in. Cells of the same contributors come in one range; with nobody's, nothing
        is to be applied.
        """
        if self._counted is not None:
            return [(cells, self._counted)]
        arrived = self._arrived[:, cells.first : cells.first + cells.count]
        edges = np.flatnonzero((arrived[:, 1:] != arrived[:, :-1]).any(axis=0)) + 1
        starts = [0, *edges.tolist()]
        return [
            (
                Range(cells.first + start, stop - start),
                tuple(np.flatnonzero(arrived[:, start]).tolist()),
            )
            for start, stop in zip(starts, [*starts[1:], cells.count], strict=True)
        ]

    def apply(self, cells: Range) -> bool:
        """Move complete cells to the next version; return whether the step ended with them."""
        self._n_applied += cells.count
        if self._n_applied < len(self._owed):
            return False
        self.step += 1
        self._begin()
        return True

    # -- the rest --

    def _check_present(self, slot: int) -> None:
        if slot not in self._present:
            raise LocalProtocolError(f"nobody is in slot {slot}")

    def _begin(self) -> None:
        """Begin a step with those that were told so; if all of them have left: with whoever is."""
        chosen = self.upcoming or ()
        if self._present.isdisjoint(chosen):
            chosen = tuple(sorted(self._present))
        self.members, self._live = chosen, self._present.intersection(chosen)
        if self._quorum is not None:
            self.members, self._live = tuple(range(len(self._skipped))), set(self._present)
        self.upcoming = None
        self._counted = None
        self._whole.clear()
        self._refused.clear()
        self._n_applied = 0
        self._arrived[:] = False
        self._n_arrived = [0] * len(self._n_arrived)
        self._owed[:] = len(self._live)
        self._n_owed = len(self._owed)

    def _forget(self, slot: int) -> None:
        """What was pushed in a slot must be pushed again. Nothing of it has been applied."""
        if self._quorum is None:
            arrived = self._arrived[slot]
            self._n_owed += int(np.count_nonzero(arrived & (self._owed == 0)))
            self._owed[arrived] += 1
        self._arrived[slot] = False
        self._n_arrived[slot] = 0

    def _settle_without(self, slot: int) -> list[Range]:
        """Nobody waits for what this slot has not pushed."""
        missing = ~self._arrived[slot]
        self._owed[missing] -= 1
        return self._complete(runs(missing & (self._owed == 0), 0))

    @property
    def _needed(self) -> int:
        """Whole contributions that make this step: the quorum, less the refused if they lack."""
        assert self._quorum is not None
        lacking = max(0, self._quorum - len(self._live.union(self._whole)))
        return self._quorum - min(lacking, len(self._refused))

    def _complete(self, settled: list[Range]) -> list[Range]:
        """Return what is complete now that nobody is left to push these cells."""
        self._n_owed -= sum(count for _, count in settled)
        if self._barrier:
            settled = [Range(0, len(self._owed))] if settled and not self._n_owed else []
        return self._freeze(settled)

    def _close_at_quorum(self) -> list[Range]:
        if self._counted is not None or len(self._whole) < self._needed:
            return []
        self._counted = tuple(sorted(self._whole))
        for slot in range(len(self._skipped)):
            if slot not in self._whole:
                self._skipped[slot] = self.step
        return self._freeze([Range(0, len(self._owed))])

    def _freeze(self, complete: list[Range]) -> list[Range]:
        """The first complete cell may go down as part of the next step: settle who gets it."""
        if complete and self.upcoming is None:
            self.upcoming = tuple(sorted(self._present))
        return complete


def check_ranges(ranges: Sequence[Range], n_cells: int) -> None:
    """Make sure that a push names cells of the model, in ascending order.

    Raises:
        RemoteProtocolError: it does not.
    """
    end = 0
    for first, count in ranges:
        if first < end or first + count > n_cells:
            raise RemoteProtocolError(
                f"cells {first} to {first + count - 1}, expected ascending ranges within "
                f"0 to {n_cells - 1}"
            )
        end = first + count


def check_new(arrived: NDArray[np.bool_], step: int, ranges: Sequence[Range]) -> None:
    """Make sure that none of the cells of a push has arrived before.

    Raises:
        RemoteProtocolError: one has.
    """
    for first, count in ranges:
        if arrived[first : first + count].any():
            raise RemoteProtocolError(
                f"cells {first} to {first + count - 1} of step {step} were pushed before"
            )


def runs(mask: NDArray[np.bool_], offset: int) -> list[Range]:
    """Return the runs of True in ``mask``, shifted by ``offset``."""
    if mask.all():
        return [Range(offset, len(mask))]
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return [
        Range(offset + int(first), int(stop - first))
        for first, stop in zip(edges[::2], edges[1::2], strict=True)
    ]
