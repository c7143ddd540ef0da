"""The parameters, each worker's contribution to them, and the arithmetic that joins the two.

Pure arithmetic on arrays: no sockets, no clock. For each cell the contributions are summed in
rank order, divided by their number, and given to the update rule. All of it is elementwise, so
the result has the same bits however cells are grouped and in whatever order they complete.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.errors import ConfigError, ShapeError
from dynacomm_async.optim import SGD, Constant, Schedule, UpdateRule
from dynacomm_async.ranges import Range
from dynacomm_async.wire.grid import Grid

__all__ = [
    "DEFAULT_MAX_GRADIENT",
    "LayerOptions",
    "Store",
    "Training",
    "is_sound",
    "parameters_sha256",
]

Floats = NDArray[np.float32]

_BLOCK_FLOATS = 128 * 1024
"""Floats (512 KiB) that are joined and updated together, as many as the rules handle at a time:
what the last pass over them wrote is in the cache for the next."""

_CHECK_FLOATS = 1 << 18
"""Floats (1 MiB) that :func:`is_sound` looks at together. Smaller pieces cost more for their calls
than they gain by staying in the cache."""


DEFAULT_MAX_GRADIENT = 1e9
"""No sane gradient holds a value above this."""


@dataclass(frozen=True, slots=True)
class LayerOptions:
    """What a layer does differently from the rest.

    Attributes:
        rate_scale: multiplies the learning rate; 0 freezes the layer.
        weight_decay: replaces the common weight decay, on the same leading parameters.
    """

    rate_scale: float = 1.0
    weight_decay: float | None = None


@dataclass(frozen=True, slots=True)
class Training:
    """How gradients become parameters.

    Attributes:
        rule: the update rule.
        rate: the learning rate of each step.
        weight_decay: on each layer's leading ``decay`` parameters.
        layers: options by layer name.
        statistics_momentum: how far running statistics move towards those of a batch.
        max_gradient: the largest magnitude that a value of a contribution may have; infinity
            allows everything that is finite. See :meth:`Store.is_sound`.

    Raises:
        ConfigError: ``max_gradient`` is not above 0.
    """

    rule: UpdateRule
    rate: Schedule
    weight_decay: float = 0.0
    layers: Mapping[str, LayerOptions] | None = None
    statistics_momentum: float = 0.1
    max_gradient: float = DEFAULT_MAX_GRADIENT

    def __post_init__(self) -> None:
        if not self.max_gradient > 0:
            raise ConfigError(f"the largest gradient is {self.max_gradient}, expected above 0")

    @classmethod
    def plain(cls, rate: float = 0.01) -> Training:
        """Return plain SGD at a constant rate."""
        return cls(SGD(), Constant(rate))


@dataclass(frozen=True, slots=True)
class _Span:
    """Floats start .. stop that share one learning rate and one weight decay."""

    start: int
    stop: int
    rate_scale: float
    decay: float


class Store:
    """Parameters and running statistics, updated cell by cell.

    Args:
        grid: the cells of the model.
        n_workers: how many contributions there are to each step.
        training: how gradients become parameters.

    Attributes:
        arena: (n_floats,) float32: parameters, then running statistics. The store alone writes.
        contributions: one (n_floats,) float32 array for each rank; a push is received into it.
            The store only reads.
        states: the update rule's, (n_parameters,) float32 each. The store alone writes.
    """

    def __init__(self, grid: Grid, n_workers: int, training: Training) -> None:
        self.grid = grid
        self.training = training
        self.arena: Floats = np.zeros(grid.n_floats, dtype=np.float32)
        self.contributions: list[Floats] = [
            np.zeros(grid.n_floats, dtype=np.float32) for _ in range(n_workers)
        ]
        self.states = tuple(
            np.zeros(grid.n_parameters, dtype=np.float32) for _ in range(training.rule.n_states)
        )
        self._spans = _spans(grid, training)
        self._joined: Floats = np.empty(_BLOCK_FLOATS, dtype=np.float32)

    @property
    def parameters(self) -> Floats:
        """(n_parameters,) float32 view of the arena."""
        return self.arena[: self.grid.n_parameters]

    @property
    def statistics(self) -> Floats:
        """(n_statistics,) float32 view of the arena: running statistics."""
        return self.arena[self.grid.n_parameters :]

    @property
    def nbytes(self) -> int:
        """Bytes held: parameters, optimizer states and one contribution for each rank."""
        arrays = [self.arena, *self.contributions, *self.states]
        return sum(array.nbytes for array in arrays)

    def set_initial(self, parameters: Floats, statistics: Floats | None = None) -> None:
        """Copy version 0 in.

        Raises:
            ShapeError: not one-dimensional float32 of the right length.
        """
        _fill(self.parameters, parameters, "initial parameters")
        if statistics is not None:
            _fill(self.statistics, statistics, "initial statistics")

    def restore(self, parameters: Floats, statistics: Floats, states: Sequence[Floats]) -> None:
        """Copy a saved state in.

        Raises:
            ShapeError: an array of it does not fit.
        """
        self.set_initial(parameters, statistics)
        for index, (own, saved) in enumerate(zip(self.states, states, strict=True)):
            _fill(own, saved, f"optimizer state {index}")

    def is_sound(self, slot: int, ranges: Iterable[Range]) -> bool:
        """Return whether cells of a contribution are free of poison: NaN, infinite or huge values.

        See :func:`is_sound`.
        """
        contribution = self.contributions[slot]
        return all(
            is_sound(contribution[start:stop], self.training.max_gradient)
            for start, stop in (self.grid.floats(*cells) for cells in ranges)
        )

    def apply(self, cells: Range, step: int, slots: Sequence[int] | None = None) -> None:
        """Join contributions to cells and update the cells with them.

        Takes about 1 ms per mebibyte; callers on an event loop cut their ranges to that.

        Args:
            cells: what is updated.
            step: 0-based index of the update.
            slots: whose contributions count, ascending; they are only read, and no others are
                looked at. None: all. Nobody's: the cells stay as they are.
        """
        chosen = range(len(self.contributions)) if slots is None else slots
        parts = [self.contributions[slot] for slot in chosen]
        if not parts:
            return
        start, stop = self.grid.floats(*cells)
        middle = min(max(start, self.grid.n_parameters), stop)
        for first, last in _blocks(start, middle):
            self._update(first, last, self._join(parts, first, last), step)
        for first, last in _blocks(middle, stop):
            self._move_statistics(first, last, self._join(parts, first, last))

    def _join(self, parts: Sequence[Floats], start: int, stop: int) -> Floats:
        """Return the mean of a block of the contributions; it is only to be read."""
        if len(parts) == 1:
            return parts[0][start:stop]
        joined = self._joined[: stop - start]
        np.add(parts[0][start:stop], parts[1][start:stop], out=joined)
        for part in parts[2:]:
            np.add(joined, part[start:stop], out=joined)
        return np.divide(joined, np.float32(len(parts)), out=joined)

    def _update(self, start: int, stop: int, gradient: Floats, step: int) -> None:
        rate = self.training.rate.rate(step)
        for span in self._spans_from(start):
            first, last = max(start, span.start), min(stop, span.stop)
            if first >= last:
                return
            self.training.rule.update(
                self.arena[first:last],
                gradient[first - start : last - start],
                tuple(state[first:last] for state in self.states),
                step=step,
                rate=rate * span.rate_scale,
                decay=span.decay,
            )

    def _spans_from(self, start: int) -> Iterator[_Span]:
        """Yield the span that ``start`` lies in and those after it, which leave no gap."""
        index = bisect_right(self._spans, start, key=attrgetter("stop"))
        return islice(self._spans, index, None)

    def _move_statistics(self, start: int, stop: int, batch: Floats) -> None:
        momentum = np.float32(self.training.statistics_momentum)
        running = self.arena[start:stop]
        running *= np.float32(1) - momentum
        running += np.multiply(batch, momentum, out=self._joined[: stop - start])

    def parameters_sha256(self) -> str:
        """See :func:`parameters_sha256`."""
        return parameters_sha256(self.parameters)


def parameters_sha256(parameters: Floats) -> str:
    """Return the hash of the parameters' bytes (float32, little endian, forward order)."""
    return hashlib.sha256(np.ascontiguousarray(parameters, dtype="<f4").tobytes()).hexdigest()


def is_sound(values: Floats, limit: float) -> bool:
    """Return whether every value is finite and at most ``limit`` in magnitude.

    Reads ``values``, (n,) float32, once and in place; about 20 us per mebibyte. The sum of squares
    is the cheapest pass over memory there is, and NaN and infinity show in it. Only if it is too
    large for every value to be below the limit does a slower pass decide.
    """
    limit = min(limit, float(np.finfo(np.float32).max))
    # A rounded sum of squares is never below its largest rounded term; the margin is for that.
    # Squares of tiny values vanish: below such a limit they say nothing.
    certain = 0.999 * limit * limit if limit > 1e-15 else -1.0
    with np.errstate(all="ignore"):
        for start in range(0, values.size, _CHECK_FLOATS):
            piece = values[start : start + _CHECK_FLOATS]
            if not float(np.dot(piece, piece)) <= certain and not (
                float(piece.max()) <= limit and float(piece.min()) >= -limit
            ):
                return False
    return True


def _blocks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, _BLOCK_FLOATS):
        yield first, min(first + _BLOCK_FLOATS, stop)


def _spans(grid: Grid, training: Training) -> list[_Span]:
    options = dict(training.layers or {})
    spans = []
    for index, spec in enumerate(grid.layers):
        own = options.pop(spec.name, LayerOptions())
        decay = training.weight_decay if own.weight_decay is None else own.weight_decay
        cells = grid.layer_slice(index)
        middle = cells.start + spec.decay
        spans += [
            _Span(cells.start, middle, own.rate_scale, decay),
            _Span(middle, cells.stop, own.rate_scale, 0.0),
        ]
    if options:
        names = ", ".join(spec.name for spec in grid.layers)
        raise ConfigError(f"options for a layer {next(iter(options))!r}; the model has: {names}")
    return [span for span in spans if span.start < span.stop]


def _fill(target: Floats, values: Floats, name: str) -> None:
    if values.shape != target.shape or values.dtype != np.float32:
        raise ShapeError(
            f"{name}: {values.dtype} of shape {values.shape}, expected float32 of {target.shape}"
        )
    target[:] = values
