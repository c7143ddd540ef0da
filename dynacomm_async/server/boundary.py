"""The way back to the last step boundary, where every cell was at one version."""

from __future__ import annotations

import numpy as np

from dynacomm_async.ranges import Range
from dynacomm_async.server.store import Store

__all__ = ["Boundary"]


class Boundary:
    """Keeps what cells were before the step under way changed them.

    Costs the memory of the parameters, statistics and optimizer states once more, and copying each
    cell once a step.

    Args:
        store: what is watched; its arrays stay the same ones.
    """

    def __init__(self, store: Store) -> None:
        self._grid = store.grid
        self._live = (store.arena, *store.states)
        self._before = [np.empty_like(array) for array in self._live]
        self._kept: list[Range] = []

    def keep(self, cells: Range) -> None:
        """These cells are about to change; each of them once a step."""
        self._kept.append(cells)
        self._copy(cells, to_live=False)

    def pass_on(self) -> None:
        """The step has ended: here is the next boundary."""
        self._kept.clear()

    def restore(self) -> None:
        """Take back what the step under way has changed."""
        for cells in self._kept:
            self._copy(cells, to_live=True)
        self._kept.clear()

    def _copy(self, cells: Range, *, to_live: bool) -> None:
        start, stop = self._grid.floats(*cells)
        for live, before in zip(self._live, self._before, strict=True):
            source, target = (before, live) if to_live else (live, before)
            target[start:stop] = source[start:stop]  # states end where parameters do
