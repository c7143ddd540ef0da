"""Where layers and cells lie: the step between cells, layers and bytes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate

from dynacomm_async.errors import PlanError
from dynacomm_async.ranges import CELL_NBYTES, Range

__all__ = ["Layout"]


class Layout:
    """The grid of a model's cells, as planning and sending see it.

    The cells of a layer are full but for the last one, which holds the rest.

    Args:
        layers_nbytes: the size of each layer in forward order, at least one layer of at least
            one byte each.
        cell_nbytes: the size of a full cell.

    Attributes:
        firsts: the first cell of each layer; ``n_cells`` closes the list.
        offsets: where each layer begins, in bytes; ``nbytes`` closes the list.
        cell_nbytes: the size of a full cell.
        n_layers, n_cells, nbytes: how many there are.

    Raises:
        PlanError: no layers, or a size below 1.
    """

    __slots__ = ("cell_nbytes", "firsts", "n_cells", "n_layers", "nbytes", "offsets")

    def __init__(self, layers_nbytes: Iterable[int], cell_nbytes: int = CELL_NBYTES) -> None:
        sizes = list(layers_nbytes)
        if not sizes or min(*sizes, cell_nbytes) < 1:
            raise PlanError(
                f"a layout of {len(sizes)} layers in cells of {cell_nbytes} bytes, expected at "
                "least one layer and no size below 1"
            )
        self.cell_nbytes = cell_nbytes
        self.firsts = list(accumulate((-(-size // cell_nbytes) for size in sizes), initial=0))
        self.offsets = list(accumulate(sizes, initial=0))
        self.n_layers = len(sizes)
        self.n_cells = self.firsts[-1]
        self.nbytes = self.offsets[-1]

    def layer_of(self, cell: int) -> int:
        """Return the layer of a cell. O(log L)."""
        return bisect_right(self.firsts, cell) - 1

    def offset(self, cell: int) -> int:
        """Return where a cell begins, in bytes; cell ``n_cells`` is the end. O(log L)."""
        layer = bisect_right(self.firsts, cell) - 1
        return self.offsets[layer] + (cell - self.firsts[layer]) * self.cell_nbytes

    def cell_before(self, offset: int) -> int:
        """Return the last cell, or the end, that begins at or before a byte. O(log L)."""
        layer = bisect_right(self.offsets, offset) - 1
        first = self.firsts[layer]
        if layer == self.n_layers:
            return first
        return min(
            first + (offset - self.offsets[layer]) // self.cell_nbytes, self.firsts[layer + 1] - 1
        )

    def layers_cells(self, first: int, last: int) -> Range:
        """Return the cells of layers ``first`` to ``last``, both included."""
        begin = self.firsts[first]
        return Range(begin, self.firsts[last + 1] - begin)
