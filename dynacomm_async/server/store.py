"""The parameters, each worker's contribution to them, and the arithmetic that joins the two.

Pure arithmetic on arrays: no sockets, no clock. For each cell the contributions are summed in
rank order, divided by their number, and given to the update rule. All of it is elementwise, so
the result has the same bits however cells are grouped and in whatever order they complete.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.errors import ConfigError, ShapeError
from dynacomm_async.optim import SGD, Constant, Schedule, UpdateRule
from dynacomm_async.ranges import Range
from dynacomm_async.wire.grid import Grid

__all__ = ["LayerOptions", "Store", "Training", "is_sound", "parameters_sha256"]

Floats = NDArray[np.float32]

_CHECK_FLOATS = 1 << 18
"""Floats (1 MiB) that :func:`is_sound` looks at together. Smaller pieces cost more for their calls
than they gain by staying in the cache."""


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
    max_gradient: float = 1e9

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
        contributions: one (n_floats,) float32 array for each rank; a push is received into it,
            and :meth:`apply` uses it up.
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

        Call it before :meth:`apply`, which uses contributions up. See :func:`is_sound`.
        """
        contribution = self.contributions[slot]
        return all(
            is_sound(contribution[start:stop], self.training.max_gradient)
            for start, stop in (self.grid.floats(*cells) for cells in ranges)
        )

    def apply(self, cells: Range, step: int) -> None:
        """Join the contributions to complete cells and update the cells with them.

        Takes about 1 ms per mebibyte; callers on an event loop cut their ranges to that.
        """
        start, stop = self.grid.floats(*cells)
        joined = self.contributions[0][start:stop]
        for contribution in self.contributions[1:]:
            joined += contribution[start:stop]
        if len(self.contributions) > 1:
            joined /= np.float32(len(self.contributions))
        n_parameters = self.grid.n_parameters
        if start < n_parameters:
            self._update(start, min(stop, n_parameters), joined[: n_parameters - start], step)
        if stop > n_parameters:
            skipped = max(start, n_parameters)
            self._move_statistics(skipped, stop, joined[skipped - start :])

    def _update(self, start: int, stop: int, gradient: Floats, step: int) -> None:
        rate = self.training.rate.rate(step)
        for span in self._spans:
            first, last = max(start, span.start), min(stop, span.stop)
            if first < last:
                self.training.rule.update(
                    self.arena[first:last],
                    gradient[first - start : last - start],
                    tuple(state[first:last] for state in self.states),
                    step=step,
                    rate=rate * span.rate_scale,
                    decay=span.decay,
                )

    def _move_statistics(self, start: int, stop: int, batch: Floats) -> None:
        momentum = np.float32(self.training.statistics_momentum)
        running = self.arena[start:stop]
        running *= np.float32(1) - momentum
        batch *= momentum
        running += batch

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
