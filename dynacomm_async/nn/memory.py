"""All arrays of one network at one batch size, planned once.

Activations lie in arrays that already have the zero border which their readers want, so that the
operator that computes them writes into the interior and nobody ever pads. Gradients likewise lie
the way the operator that reads them wants.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.nn.crew import Member
from dynacomm_async.nn.graph import Frame, Node, Shape, Value

__all__ = ["Arenas", "Array", "Memory", "MemoryUse", "Sink"]

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Arenas:
    """The flat arrays that a network lives in, all 1-D, of one dtype, layer after layer.

    Attributes:
        parameters: read in forward and backward.
        gradients: overwritten in backward; see ``starts`` of :class:`Memory`.
        statistics: running mean and variance of the batch norms, read in evaluation only.
        batch_statistics: mean and (unbiased) variance of the last training batch, overwritten.
    """

    parameters: Array
    gradients: Array
    statistics: Array
    batch_statistics: Array


@dataclass(frozen=True, slots=True)
class Sink:
    """Where an operator leaves the gradient of one of its inputs.

    Attributes:
        array: view (N, H, W, C) or (N, features), not always contiguous.
        accumulate: another reader of the same value has written already: add.
    """

    array: Array
    accumulate: bool

    def put(self, gradient: Array) -> None:
        """Write or add a gradient of the same shape."""
        if self.accumulate:
            np.add(self.array, gradient, out=self.array)
        else:
            np.copyto(self.array, gradient)


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes that an engine holds beside the arenas; planned once, so this is the peak, too.

    Attributes:
        activations: of all layers, with their borders, and what else backward needs of forward.
        gradients: of the activations, with their frames.
        workspace: columns, products and masks, which all layers share.
    """

    activations: int
    gradients: int
    workspace: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.gradients + self.workspace

    def __add__(self, other: MemoryUse) -> MemoryUse:
        """What both hold."""
        return MemoryUse(
            self.activations + other.activations,
            self.gradients + other.gradients,
            self.workspace + other.workspace,
        )


class Memory:
    """Hands out views while operators are planned.

    Args:
        nodes: of the network, in forward order.
        source: its input.
        member: the shard of the batch that the arrays are for.
        arenas: parameters and their like; views of them are handed out.
        scratch: elements that the workspaces will need, as :meth:`needs` of an earlier planning
            told; None: not known, they grow.
        starts: for each node, where in ``arenas.parameters`` what ``arenas.gradients`` holds
            begins; None: they hold all.

    Attributes:
        member: as given.
        batch: images of the shard.
        dtype: of all arrays but masks.
        draw: what the chance of the training step at hand follows from.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        source: Value,
        member: Member,
        arenas: Arenas,
        *,
        scratch: Mapping[str, int] | None = None,
        starts: Mapping[str, int] | None = None,
    ) -> None:
        self.member = member
        self.batch = member.batch
        self.dtype = arenas.parameters.dtype
        self._needs: Counter[str] = Counter(scratch)
        self._starts = starts or {}
        self._arenas = arenas
        self._producers = {node.output.index: node for node in nodes}
        self._readers = Counter(value.index for node in nodes for value in node.inputs)
        self._borders: dict[int, tuple[int, int]] = {}
        for node in nodes:
            for value in node.inputs:
                have, want = self._borders.get(value.index, (0, 0)), node.layer.border()
                self._borders[value.index] = max(have[0], want[0]), max(have[1], want[1])
        self._offsets = _offsets(nodes)
        self._differentiable = _differentiable(nodes)
        self._unwritten = Counter(self._readers)
        self._bordered: dict[int, Array] = {}
        self._gradients: dict[int, Array] = {}
        self._frames: dict[int, Array] = {}
        self._scratch: dict[str, Array] = {}
        self.draw: tuple[int, ...] = ()
        self._held: Counter[str] = Counter()
        self._ones = np.ones(0, self.dtype)
        self._zeros = np.zeros(0, self.dtype)

    def value(self, value: Value, border: tuple[int, int] = (0, 0)) -> Array:
        """View (N, H + 2 * bh, W + 2 * bw, C), or (N, features), of an activation."""
        whole = self._bordered.get(value.index)
        if whole is None:
            whole = self._bordered[value.index] = self._allocate_value(value)
        if len(value.shape) == 1:
            return whole
        height, width, _ = value.shape
        bh, bw = self._borders.get(value.index, (0, 0))
        top, left = bh - border[0], bw - border[1]
        return whole[:, top : bh + height + border[0], left : bw + width + border[1]]

    def alias(self, value: Value, array: Array) -> None:
        """Let ``value`` (not yet handed out) live in ``array``."""
        self._bordered[value.index] = array

    def gradient(self, value: Value) -> Array:
        """View of the gradient of an activation, of the activation's shape."""
        found = self._gradients.get(value.index)
        if found is None:
            found = self._gradients[value.index] = self._allocate_gradient(value)
        return found

    def alias_gradient(self, value: Value, array: Array) -> None:
        """Let the gradient of ``value`` (not yet handed out) live in ``array``."""
        self._gradients[value.index] = array

    def frame(self, value: Value) -> Array:
        """The whole framed array around :meth:`gradient`, for a producer that asked for one."""
        self.gradient(value)
        return self._frames[value.index]

    def make_frame(self, frame: Frame, shape: Shape) -> tuple[Array, Array]:
        """A new array of zeros for gradients of ``shape`` with ``frame``, and the inner view."""
        height, width, channels = shape
        size = frame.above + height + frame.below, frame.left + width + frame.right
        whole = self._new("gradients", (*size, channels))
        inner = whole[:, frame.above : frame.above + height, frame.left : frame.left + width]
        return whole, inner

    def keep(self, shape: Shape) -> Array:
        """A new array of zeros, (N, *shape), for what one operator keeps from forward on."""
        return self._new("activations", shape)

    def use(self) -> MemoryUse:
        """What has been allocated so far."""
        shared = self._ones.nbytes + self._zeros.nbytes
        return MemoryUse(
            self._held["activations"], self._held["gradients"], self._held["workspace"] + shared
        )

    def shared(self, value: Value) -> bool:
        """More than one node reads ``value``."""
        return self._readers[value.index] > 1

    def sink(self, value: Value) -> Sink | None:
        """Where the next reader, in forward order, of ``value`` leaves its gradient.

        Must be called once by each reader, in forward order. None: no gradient is needed.
        """
        self._unwritten[value.index] -= 1
        if value.index not in self._differentiable:
            return None
        return Sink(self.gradient(value), accumulate=self._unwritten[value.index] > 0)

    def parameters(self, node: Node) -> list[Array]:
        """Views of the node's parameters."""
        return self._cut(self._arenas.parameters, node, 0)

    def parameter_gradients(self, node: Node) -> list[Array]:
        """Views of the gradients of the node's parameters."""
        return self._cut(self._arenas.gradients, node, self._starts.get(node.name, 0))

    def statistics(self, node: Node) -> tuple[Array, Array]:
        """Views of the running and of the batch statistics of the node."""
        begin = self._offsets[node.name][1]
        end = begin + node.statistics
        return self._arenas.statistics[begin:end], self._arenas.batch_statistics[begin:end]

    def scratch(self, use: str, count: int, dtype: Any = None) -> Array:
        """1-D workspace of ``count`` elements, shared by all operators under the same name.

        What it holds does not survive the operator's call.
        """
        found = self._scratch.get(use)
        if found is None or found.size < count:
            # Where sizes are not known, views of the smaller one live on.
            self._needs[use] = size = max(count, self._needs[use])
            found = self._scratch[use] = np.empty(size, dtype or self.dtype)
            self._held["workspace"] += found.nbytes
        return found[:count]

    def needs(self) -> Mapping[str, int]:
        """How many elements of each workspace have been asked for."""
        return {**self._needs, "ones": self._ones.size, "zeros": self._zeros.size}

    def ones(self, count: int) -> Array:
        """1-D array of at least ``count`` ones; not to be written."""
        if self._ones.size < count:
            self._ones = np.ones(max(count, self._needs["ones"]), self.dtype)
        return self._ones

    def zeros(self, count: int) -> Array:
        """1-D array of at least ``count`` zeros; not to be written.

        NumPy takes a maximum with an array of zeros faster than with the number.
        """
        if self._zeros.size < count:
            self._zeros = np.zeros(max(count, self._needs["zeros"]), self.dtype)
        return self._zeros

    def _cut(self, arena: Array, node: Node, start: int) -> list[Array]:
        offset = self._offsets[node.name][0] - start
        views = []
        for shape in node.parameter_shapes:
            views.append(arena[offset : offset + prod(shape)].reshape(shape))
            offset += prod(shape)
        return views

    def _allocate_value(self, value: Value) -> Array:
        if len(value.shape) == 1:
            return self._new("activations", value.shape)
        height, width, channels = value.shape
        bh, bw = self._borders.get(value.index, (0, 0))
        return self._new("activations", (height + 2 * bh, width + 2 * bw, channels))

    def _allocate_gradient(self, value: Value) -> Array:
        producer = self._producers.get(value.index)
        frame = producer.layer.frame(producer) if producer is not None else None
        if frame is None or producer is None or producer.relu or producer.pool:
            return self._new("gradients", value.shape)
        self._frames[value.index], inner = self.make_frame(frame, value.shape)
        return inner

    def _new(self, kind: str, shape: Shape) -> Array:
        """A new array of zeros, (N, *shape), that counts as ``kind``."""
        array = np.zeros((self.batch, *shape), self.dtype)
        self._held[kind] += array.nbytes
        return array


def _offsets(nodes: Sequence[Node]) -> dict[str, tuple[int, int]]:
    """Where each node's parameters and statistics begin in their arenas."""
    found = {}
    parameters = statistics = 0
    for node in nodes:
        found[node.name] = parameters, statistics
        parameters += node.count
        statistics += node.statistics
    return found


def _differentiable(nodes: Sequence[Node]) -> set[int]:
    """Values that depend on a parameter."""
    found: set[int] = set()
    for node in nodes:
        if node.count or any(value.index in found for value in node.inputs):
            found.add(node.output.index)
    return found
