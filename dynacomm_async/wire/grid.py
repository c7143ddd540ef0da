"""The grid of cells: what every version, range and message is counted in.

All parameters of a model lie in one flat float32 arena in forward order; the running statistics
of batch normalisation follow behind them. The grid divides each layer into cells of 4096 floats
and restarts at each layer, so the last cell of a layer may be short and no cell belongs to two
layers. Neighbouring cells are neighbours in memory, so a run of cells is one byte range.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgpack

from dynacomm_async.errors import ShapeError
from dynacomm_async.ranges import CELL_NBYTES, Range

__all__ = ["CELL_FLOATS", "CELL_NBYTES", "MAX_FLOATS", "Grid", "LayerSpec", "as_layer_specs"]

CELL_FLOATS = CELL_NBYTES // 4

MAX_FLOATS = 1 << 34
"""Parameters and statistics of the largest model (64 GiB). A grid costs memory by its size, and a
layer table comes from the network."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer of the model, as the transport sees it.

    Attributes:
        name: unique in the model.
        count: float32 parameters, at least one.
        decay: how many of the leading ones are subject to weight decay.
        statistics: float32 running statistics (batch normalisation), usually 0.

    Raises:
        ShapeError: a count that cannot be.
    """

    name: str
    count: int
    decay: int = 0
    statistics: int = 0

    def __post_init__(self) -> None:
        if not self.name:
            raise ShapeError("a layer has no name")
        if self.count < 1:
            raise ShapeError(f"layer {self.name!r} has {self.count} parameters, expected 1 or more")
        if not 0 <= self.decay <= self.count:
            raise ShapeError(
                f"layer {self.name!r}: weight decay on {self.decay} of {self.count} parameters"
            )
        if self.statistics < 0:
            raise ShapeError(f"layer {self.name!r} has {self.statistics} statistics")


def as_layer_specs(layers: Mapping[str, int] | Iterable[LayerSpec]) -> tuple[LayerSpec, ...]:
    """Return the layer table for ``{"conv1": 500, ...}`` (all of it decays) or for specs as is.

    Raises:
        ShapeError: a count that is not a positive whole number.
    """
    if not isinstance(layers, Mapping):
        return tuple(layers)
    for name, count in layers.items():
        if not isinstance(count, int) or isinstance(count, bool):
            raise ShapeError(
                f"layer {name!r}: {count!r} parameters, expected a whole number of float32 values"
            )
    return tuple(LayerSpec(name, count, decay=count) for name, count in layers.items())


class Grid:
    """Cells of a model: where each begins, and which layer it belongs to.

    Attributes:
        layers: the layer table in forward order.
        n_parameters: float32 parameters in all.
        n_statistics: float32 running statistics in all; they lie behind the parameters.
        n_parameter_cells: cells 0 .. n_parameter_cells - 1 hold parameters, in forward order.
        n_cells: all cells, those of statistics included.

    Raises:
        ShapeError: no layers, two with the same name, or more than :data:`MAX_FLOATS` values.
    """

    def __init__(self, layers: Sequence[LayerSpec]) -> None:
        self.layers = tuple(layers)
        if not self.layers:
            raise ShapeError("the model has no layers with parameters")
        if len({layer.name for layer in self.layers}) < len(self.layers):
            names = [layer.name for layer in self.layers]
            twice = next(name for name in names if names.count(name) > 1)
            raise ShapeError(f"two layers are named {twice!r}, expected unique names")
        n_floats = sum(layer.count + layer.statistics for layer in self.layers)
        if n_floats > MAX_FLOATS:
            raise ShapeError(f"the model has {n_floats} values, expected at most {MAX_FLOATS}")
        self._starts = [0]  # float offset of each cell; the end of the last one closes the list
        self._layer_cells = [self._divide(layer.count) for layer in self.layers]
        self.n_parameter_cells = len(self._starts) - 1
        self.n_parameters = self._starts[-1]
        for layer in self.layers:
            self._divide(layer.statistics)
        self.n_cells = len(self._starts) - 1
        self.n_statistics = self._starts[-1] - self.n_parameters

    def _divide(self, n_floats: int) -> Range:
        first, start = len(self._starts) - 1, self._starts[-1]
        self._starts.extend(range(start + CELL_FLOATS, start + n_floats, CELL_FLOATS))
        if n_floats:
            self._starts.append(start + n_floats)
        return Range(first, len(self._starts) - 1 - first)

    @property
    def n_floats(self) -> int:
        """Length of an arena: parameters and statistics."""
        return self._starts[-1]

    @property
    def statistics_cells(self) -> Range:
        """The cells that hold running statistics (count 0 where the model has none)."""
        return Range(self.n_parameter_cells, self.n_cells - self.n_parameter_cells)

    @cached_property
    def parameter_nbytes(self) -> int:
        """Bytes of all parameters: what one pull or one push carries."""
        return 4 * self.n_parameters

    def layer_cells(self, layer: int) -> Range:
        """Return the cells of a layer (by its index in forward order)."""
        return self._layer_cells[layer]

    def layers_cells(self, first: int, last: int) -> Range:
        """Return the cells of layers first .. last, both included."""
        start = self._layer_cells[first].first
        end = self._layer_cells[last]
        return Range(start, end.first + end.count - start)

    def layer_of_cell(self, cell: int) -> int:
        """Return the index of the layer that a parameter cell belongs to. O(log L)."""
        return bisect_right(self._firsts, cell) - 1

    @cached_property
    def _firsts(self) -> list[int]:
        return [cells.first for cells in self._layer_cells]

    def layer_slice(self, layer: int) -> slice:
        """Return where a layer's parameters lie in the arena, in floats."""
        cells = self._layer_cells[layer]
        return slice(self._starts[cells.first], self._starts[cells.first + cells.count])

    def floats(self, first: int, count: int) -> tuple[int, int]:
        """Return the half-open span of floats that a run of cells covers."""
        return self._starts[first], self._starts[first + count]

    def nbytes(self, ranges: Iterable[Range]) -> int:
        """Return how many bytes the ranges cover together."""
        starts = self._starts
        return 4 * sum(starts[first + count] - starts[first] for first, count in ranges)

    def holds(self, ranges: Iterable[Range]) -> bool:
        """Return whether every range is a non-empty run of this grid's cells."""
        return all(
            first >= 0 and count > 0 and first + count <= self.n_cells for first, count in ranges
        )

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the layer table: equal on two machines only if the models fit together."""
        table = [["float32", *row] for row in self.to_wire()]
        return hashlib.sha256(msgpack.packb(table)).hexdigest()[:32]

    def to_wire(self) -> list[list[str | int]]:
        """Return the layer table as plain values."""
        return [[layer.name, layer.count, layer.decay, layer.statistics] for layer in self.layers]
