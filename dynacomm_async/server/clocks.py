"""Who has pushed what where there is no common step: whatever arrives is applied. Pure.

Each member has a clock that counts its own steps, and nobody is more than the bound ahead of the
slowest. As in :mod:`dynacomm_async.server.rounds` a push is keyed (slot, step, cell), each key
counts at most once, and memory is O(slots).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.errors import LocalProtocolError, RemoteProtocolError
from dynacomm_async.ranges import Range
from dynacomm_async.server.rounds import check_new, check_ranges, runs

__all__ = ["StaleRounds"]


class StaleRounds:
    """Bounded staleness and asynchronous training: contributions are applied as they arrive.

    The member in a slot works on the step that its clock says. Its parameters of step k may go out
    as soon as k is at most the bound ahead of the lowest clock (:meth:`allows`).

    Source: stale synchronous parallel, Ho et al., NIPS 2013, here per cell.

    Args:
        n_cells: cells of the model, statistics included.
        n_slots: ranks.
        staleness: the bound; None: none, which is asynchronous training.
        step: where all clocks stand.
        members: the slots that are taken; all by default.

    Attributes:
        staleness: the bound.
        minimum: the lowest clock of a member, held ones included; it never goes back.
        versions: (n_cells,) int64: contributions applied to each cell so far.
    """

    def __init__(
        self,
        n_cells: int,
        n_slots: int,
        staleness: int | None,
        *,
        step: int = 0,
        members: Iterable[int] | None = None,
    ) -> None:
        self.staleness = staleness
        self.minimum = step
        self.versions = np.zeros(n_cells, dtype=np.int64)
        self._present = set(range(n_slots) if members is None else members)
        self._held: set[int] = set()
        self._clocks = [step] * n_slots
        self._arrived = np.zeros((n_slots, n_cells), dtype=np.bool_)
        self._applied = np.zeros((n_slots, n_cells), dtype=np.bool_)  # of the step that it says
        self._skipped = [-1] * n_slots  # the last step that each was told to skip

    def restore(
        self,
        versions: NDArray[np.int64],
        clocks: Sequence[int],
        applied: Mapping[int, Sequence[Range]],
    ) -> None:
        """Go on from a saved state: ``versions``, :attr:`clocks` and :meth:`applied` of each slot.

        Memberships are as they were given; nobody is behind the lowest of their clocks.
        """
        self.versions[:] = versions
        self._clocks = list(clocks)
        for slot, ranges in applied.items():
            for first, count in ranges:
                self._applied[slot, first : first + count] = True
        self._arrived[:] = self._applied
        self._find_minimum()

    # -- who takes part --

    @property
    def members(self) -> frozenset[int]:
        """The slots that are taken."""
        return frozenset(self._present)

    @property
    def clocks(self) -> tuple[int, ...]:
        """The clock of each slot, also of those that nobody holds."""
        return tuple(self._clocks)

    @property
    def waiting(self) -> tuple[int, ...]:
        """Held slots whose clock is the lowest, ascending."""
        return tuple(sorted(slot for slot in self._held if self._clocks[slot] == self.minimum))

    def clock(self, slot: int) -> int:
        """Return the step that the member in this slot works on: so many it has finished."""
        return self._clocks[slot]

    def allows(self, step: int) -> bool:
        """Whether parameters of this step may go out to those who have come so far."""
        return self.staleness is None or step - self.minimum <= self.staleness

    def enter(self, slot: int) -> int:
        """Let a new member into a free or held slot; return the step that it begins with.

        That is the lowest clock, but never a step to which this slot has pushed before: what was
        applied cannot be taken back, and no (slot, step, cell) is applied twice.

        Raises:
            LocalProtocolError: the slot is taken.
        """
        if slot in self._present and slot not in self._held:
            raise LocalProtocolError(f"slot {slot} is taken")
        unused = self._clocks[slot] + bool(self._arrived[slot].any())
        self._set_clock(slot, max(self.minimum, unused))
        self._held.discard(slot)
        self._present.add(slot)
        self._find_minimum()
        return self._clocks[slot]

    def hold(self, slot: int) -> None:
        """The member is lost: its clock holds the bound until it is replaced or given up."""
        self._check_present(slot)
        self._held.add(slot)

    def leave(self, slot: int) -> None:
        """The member has left, or waiting for its replacement is over: nobody waits for it."""
        self._check_present(slot)
        self._present.remove(slot)
        self._held.discard(slot)
        self._find_minimum()

    def refuse(self, slot: int) -> None:
        """The gradients of the step that its clock says do not count any more; those applied stay.

        Its clock moves on, and others may be allowed to: ask :meth:`allows`.
        """
        self._check_present(slot)
        self._skipped[slot] = self._clocks[slot]
        self._set_clock(slot, self._clocks[slot] + 1)
        self._find_minimum()

    # -- what they push --

    def check(self, slot: int, step: int, ranges: Sequence[Range]) -> bool:
        """Make sure that a push may come now. Nothing changes.

        Returns:
            whether it counts; False: its step was refused, and this is no fault: receive it, and
            drop it.

        Raises:
            RemoteProtocolError: another step's, one beyond the bound, cells that do not exist or
                are out of order, or cells that have been pushed already in this slot.
        """
        check_ranges(ranges, len(self.versions))
        if slot not in self._present or slot in self._held:
            raise RemoteProtocolError(f"nobody is in slot {slot}")
        if step <= self._skipped[slot]:
            return False
        if step != self._clocks[slot]:
            raise RemoteProtocolError(
                f"gradients of step {step}, expected step {self._clocks[slot]}"
            )
        if not self.allows(step):
            raise RemoteProtocolError(
                f"gradients of step {step} while the slowest worker is at {self.minimum}: more "
                f"than {self.staleness} ahead"
            )
        check_new(self._arrived[slot], step, ranges)
        return True

    def push(self, slot: int, step: int, ranges: Sequence[Range]) -> list[Range]:
        """Take note of a contribution that has arrived whole; return the cells to apply: its own.

        Call :meth:`check` before it is received. One that was refused since is dropped.
        """
        if step <= self._skipped[slot]:
            return []
        for first, count in ranges:
            self._arrived[slot, first : first + count] = True
        return list(ranges)

    def have(self, slot: int, step: int) -> list[Range]:
        """Return what need not be pushed again in this slot, for one who reconnects.

        Raises:
            RemoteProtocolError: a step that has not begun.
        """
        clock = self._clocks[slot]
        if step > clock:
            raise RemoteProtocolError(f"step {step} has not begun, expected at most {clock}")
        return runs(self._arrived[slot], 0) if step == clock else [Range(0, len(self.versions))]

    def skips(self, slot: int) -> int:
        """Return the last step that the member in this slot is to skip, or -1."""
        return self._skipped[slot]

    # -- what is applied --

    def applied(self, slot: int) -> list[Range]:
        """Return the cells that have been applied of the step that this slot's clock says."""
        return runs(self._applied[slot], 0)

    def apply(self, slot: int, step: int, cells: Range) -> bool:
        """Cells of a contribution have been applied; return whether the clock moved with them.

        Then parameters of the step that it shows now may be due, and if the lowest clock moved, to
        others too: ask :meth:`allows`. What a member pushed before it left is applied as well.
        """
        self.versions[cells.first : cells.first + cells.count] += 1
        if step != self._clocks[slot]:
            return False  # of a former member, whose successor is further on
        self._applied[slot, cells.first : cells.first + cells.count] = True
        if not self._applied[slot].all():
            return False
        self._set_clock(slot, step + 1)
        self._find_minimum()
        return True

    def _set_clock(self, slot: int, step: int) -> None:
        """The slot begins with a step, of which nothing has come."""
        self._clocks[slot] = step
        self._arrived[slot] = False
        self._applied[slot] = False

    def _find_minimum(self) -> None:
        clocks = [self._clocks[slot] for slot in self._present]
        self.minimum = min(clocks, default=self.minimum)  # nobody has come in below it

    def _check_present(self, slot: int) -> None:
        if slot not in self._present:
            raise LocalProtocolError(f"nobody is in slot {slot}")
