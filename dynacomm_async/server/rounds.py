"""Who has pushed what, and what is complete: the bookkeeping of synchronous training.

Pure: no sockets, no clock, no parameters. Every cell has a version. A contribution to version v
of a cell is one worker's gradient computed from v; once every worker's has arrived, the cell is
complete and moves to v + 1. In synchronous training a worker needs all of v before it can push
anything of v, so every cell is at v or v + 1, and between two steps there is an instant when all
are at v + 1. One number, v, and who has pushed which cell say it all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.errors import RemoteProtocolError
from dynacomm_async.ranges import Range

__all__ = ["Rounds"]


class Rounds:
    """The state of the current step.

    Args:
        n_cells: cells of the model, statistics included.
        n_workers: ranks, each of which contributes once to every cell of every step.
        step: the version that all cells are at.
    """

    def __init__(self, n_cells: int, n_workers: int, step: int = 0) -> None:
        self.step = step
        self._n_workers = n_workers
        self._n_applied = 0  # cells that have moved on to step + 1
        self._arrived = np.zeros((n_workers, n_cells), dtype=np.bool_)
        self._counts = np.zeros(n_cells, dtype=np.int32)

    def check(self, slot: int, step: int, ranges: Sequence[Range]) -> None:
        """Make sure that a push may come now. Nothing changes.

        Raises:
            RemoteProtocolError: another step's, cells that do not exist or are out of order, or
                cells that this worker has pushed already.
        """
        if step != self.step:
            raise RemoteProtocolError(f"gradients of step {step}, expected step {self.step}")
        end = 0
        for first, count in ranges:
            if first < end or first + count > len(self._counts):
                raise RemoteProtocolError(
                    f"cells {first} to {first + count - 1}, expected ascending ranges within "
                    f"0 to {len(self._counts) - 1}"
                )
            end = first + count
            if self._arrived[slot, first:end].any():
                raise RemoteProtocolError(
                    f"cells {first} to {end - 1} of step {step} were pushed before"
                )

    def push(self, slot: int, ranges: Sequence[Range]) -> list[Range]:
        """Take note of a contribution that has arrived whole; return the cells that it completes.

        Call :meth:`check` first.
        """
        complete: list[Range] = []
        for first, count in ranges:
            self._arrived[slot, first : first + count] = True
            counts = self._counts[first : first + count]
            counts += 1
            complete.extend(_runs(counts == self._n_workers, first))
        return complete

    def apply(self, cells: Range) -> bool:
        """Move complete cells to the next version; return whether the step ended with them."""
        self._n_applied += cells.count
        if self._n_applied < len(self._counts):
            return False
        self.step += 1
        self._n_applied = 0
        self._arrived[:] = False
        self._counts[:] = 0
        return True


def _runs(mask: NDArray[np.bool_], offset: int) -> list[Range]:
    """Return the runs of True in ``mask``, shifted by ``offset``."""
    if mask.all():
        return [Range(offset, len(mask))]
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return [
        Range(offset + int(first), int(stop - first))
        for first, stop in zip(edges[::2], edges[1::2], strict=True)
    ]
