"""What a checkpoint holds, and how its vectors are named in files.

Each vector (parameters, running statistics, every optimizer state) becomes one safetensors file
with a tensor for each layer, so that other tools can open it and find ``conv1`` in it. The layers
lie one after the other in memory as in the file: the file is a header and the vector's bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.errors import ConfigError, ShapeError
from dynacomm_async.wire.grid import LayerSpec

__all__ = ["CheckpointState", "Vector", "encode_header", "vectors_of"]

Floats = NDArray[np.float32]

_FINITE_PIECE = 1 << 18
"""Floats (1 MiB) that are looked at together: what they need beside them stays small."""


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointState:
    """A server between two steps, when every cell is at the same version.

    Attributes:
        run: id of the run.
        step: the version that the cells are at: how many steps have been applied.
        incarnation: which life of the server this is; see
            :meth:`~dynacomm_async.server.checkpoint.Checkpoints.next_incarnation`.
        layers: the layer table in forward order.
        rule: names the update rule and its constants, such as ``repr`` of it.
        parameters: (n_parameters,) float32.
        statistics: (n_statistics,) float32 running statistics; may be empty.
        optimizer: the rule's states, (n_parameters,) float32 each.
        settings: the run's settings, as plain values that JSON can carry (string keys, finite
            numbers, lists).
        term: the highest term that has been given out.
        roster: term by slot.
        progress: what else the training needs to go on, as plain values like the settings.
        versions: (n_cells,) int64 version of each cell, where they differ from ``step``
            (asynchronous training); None: they do not.
        healthy: whether the training looked well. A saved state with a value that is not finite
            is never healthy, whatever this says.
    """

    run: str
    step: int
    incarnation: int
    layers: tuple[LayerSpec, ...]
    rule: str
    parameters: Floats
    statistics: Floats
    optimizer: tuple[Floats, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    term: int = 0
    roster: Mapping[int, int] = field(default_factory=dict)
    progress: Mapping[str, Any] = field(default_factory=dict)
    versions: NDArray[np.int64] | None = None
    healthy: bool = True

    def copy(self) -> CheckpointState:
        """Return the same state in arrays of its own. Takes about as long as a memcpy of it."""
        return replace(
            self,
            parameters=self.parameters.copy(),
            statistics=self.statistics.copy(),
            optimizer=tuple(vector.copy() for vector in self.optimizer),
            versions=None if self.versions is None else self.versions.copy(),
        )

    def is_finite(self) -> bool:
        """Return whether no parameter, statistic or optimizer state is infinite or NaN."""
        return all(
            bool(np.isfinite(vector[start : start + _FINITE_PIECE]).all())
            for vector in (self.parameters, self.statistics, *self.optimizer)
            for start in range(0, vector.size, _FINITE_PIECE)
        )


@dataclass(frozen=True, slots=True, eq=False)
class Vector:
    """One file's tensors: named runs of a vector, one behind the other.

    Attributes:
        stem: the file's name without its suffix.
        sizes: elements of each tensor, in the order they lie in.
        dtype: ``<f4`` or ``<i8``.
        values: their concatenation, or None where only the form is known (when loading).
    """

    stem: str
    sizes: Mapping[str, int]
    dtype: str
    values: NDArray[Any] | None = None


def vectors_of(
    layers: tuple[LayerSpec, ...],
    n_states: int,
    n_versions: int | None,
    state: CheckpointState | None = None,
) -> Iterator[Vector]:
    """Yield the files of a checkpoint, with the values of ``state`` if there is one.

    Raises:
        ShapeError: a vector of ``state`` does not fit the layers.
        ConfigError: a layer has a name that safetensors keeps for itself.
    """
    counts = {layer.name: layer.count for layer in layers}
    statistics = {layer.name: layer.statistics for layer in layers}
    if "__metadata__" in counts:
        raise ConfigError("a layer is named '__metadata__', which safetensors keeps for itself")

    def form(stem: str, sizes: Mapping[str, int], dtype: str, values: Any) -> Vector:
        expected = (sum(sizes.values()),)
        if values is not None and (values.dtype != np.dtype(dtype) or values.shape != expected):
            raise ShapeError(
                f"checkpoint: {stem} is {values.dtype} of shape {values.shape}, "
                f"expected {np.dtype(dtype).name} of {expected}"
            )
        return Vector(stem, sizes, dtype, values)

    yield form("parameters", counts, "<f4", state and state.parameters)
    yield form("statistics", statistics, "<f4", state and state.statistics)
    for index in range(n_states):
        yield form(f"optimizer-{index}", counts, "<f4", state and state.optimizer[index])
    if n_versions is not None:
        yield form("versions", {"cells": n_versions}, "<i8", state and state.versions)


def encode_header(vector: Vector) -> bytes:
    """Return what a safetensors file begins with, up to the first tensor's bytes.

    The format: https://github.com/huggingface/safetensors#format. Tensors are aligned to 8 bytes.
    """
    names = {"<f4": ("F32", 4), "<i8": ("I64", 8)}
    kind, itemsize = names[vector.dtype]
    table, start = {}, 0
    for name, size in vector.sizes.items():
        stop = start + itemsize * size
        table[name] = {"dtype": kind, "shape": [size], "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
