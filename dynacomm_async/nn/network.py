"""A network: its graph, and the table of its scheduled layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynacomm_async.errors import ConfigError, ShapeError
from dynacomm_async.nn.engine import Engine
from dynacomm_async.nn.graph import Definition, Graph, Node, Shape, fuse
from dynacomm_async.nn.memory import Arenas, Array

__all__ = ["LayerInfo", "Network"]

_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One scheduled layer: a convolution or dense layer with the batch norm behind it.

    Attributes:
        name: unique in the network.
        count: float32 elements of parameters; in an arena those with weight decay come first.
        decay: how many of the leading elements get weight decay: weights do; biases, gamma and
            beta do not.
        statistics: float32 elements of running statistics: mean, then variance, of each channel.
        forward_flops: operations for one image, two for a multiply-add.
    """

    name: str
    count: int
    decay: int
    statistics: int
    forward_flops: int


class Network:
    """What a model definition means for one input shape; holds no parameters.

    Args:
        name: of the model, for tables and messages.
        parts: the definition, in forward order.
        input_shape: (H, W, C) of an image.
        classes: what the last part must give, (classes,).

    Attributes:
        name, input_shape, classes: as given.
        layers: the scheduled layers in forward order.
        nodes: the operations in forward order, with fused ReLU and pooling.
        layer_nodes: for each scheduled layer, the operations that run in its interval.

    Raises:
        ShapeError: a layer does not fit behind the one before; names it.
        ConfigError: there is no layer with parameters, or two of one name.
    """

    def __init__(
        self, name: str, parts: Sequence[Definition], input_shape: Shape, classes: int
    ) -> None:
        self.name = name
        self.input_shape = _checked_shape(name, input_shape)
        self.classes = classes
        graph = Graph(self.input_shape)
        value = self.input = graph.input
        for part in parts:
            value = part.connect(graph, value)
        self.output = value
        if value.shape != (classes,):
            raise ShapeError(
                f"model {name} gives shape {value.shape} for each image, "
                f"expected one logit for each of the classes, ({classes},)"
            )
        self.nodes: tuple[Node, ...] = tuple(fuse(graph.nodes))
        self.layer_nodes = _schedule(name, self.nodes)
        self.layers: tuple[LayerInfo, ...] = tuple(_describe(nodes) for nodes in self.layer_nodes)

    @property
    def parameters(self) -> int:
        """Elements of all parameters."""
        return sum(layer.count for layer in self.layers)

    @property
    def statistics(self) -> int:
        """Elements of all running statistics."""
        return sum(layer.statistics for layer in self.layers)

    @property
    def forward_flops(self) -> int:
        """Operations of convolutions and dense layers for one image, two for a multiply-add."""
        return sum(layer.forward_flops for layer in self.layers)

    def initialise(self, seed: int) -> Array:
        """New parameters, float32, in arena order: a function of the seed and the definition."""
        arena = np.empty(self.parameters, np.float32)
        offset = 0
        for index, node in enumerate(self.nodes):
            views = []
            for shape in node.parameter_shapes:
                size = int(np.prod(shape))
                views.append(arena[offset : offset + size].reshape(shape))
                offset += size
            # One stream for each node: what one layer draws does not move those behind it.
            sequence = np.random.SeedSequence(seed, spawn_key=(index,))
            node.layer.initialise(views, np.random.Generator(np.random.Philox(sequence)))
        return arena

    def initial_statistics(self) -> Array:
        """New running statistics, float32: mean 0, variance 1."""
        parts = []
        for layer in self.layers:
            parts += [np.zeros(layer.statistics // 2), np.ones(layer.statistics // 2)]
        return np.concatenate(parts).astype(np.float32)

    def bind(
        self,
        batch: int,
        parameters: Array | None = None,
        gradients: Array | None = None,
        statistics: Array | None = None,
        batch_statistics: Array | None = None,
        *,
        dtype: Any = None,
        smoothing: float = 0.0,
        threads: int = 1,
    ) -> Engine:
        """Plan all workspaces for ``batch`` images; return what computes steps in them.

        The arenas are 1-D and C-contiguous, layer after layer; they stay the caller's, who may
        write the parameters and read the gradients when the hooks allow. Those not given are
        allocated: parameters and gradients zero, statistics as :meth:`initial_statistics`.

        Args:
            batch: images in a training step, at least 1 (2 with batch norm to train).
            dtype: float32 or float64; None takes that of ``parameters``, else float32.
            smoothing: of the labels in training, at least 0 and below 1.
            threads: compute up to so many shards of the batch side by side, where the network is
                large enough; BLAS should have one thread then. Results depend on it in their last
                bits.

        Raises:
            ConfigError: a batch, a smoothing or a number of threads that cannot be.
            ShapeError: an arena has the wrong size, dtype or layout.
        """
        if batch < 1:
            raise ConfigError(f"the batch is {batch}, expected at least 1")
        if not 0 <= smoothing < 1:
            raise ConfigError(f"label smoothing is {smoothing}, expected at least 0 and below 1")
        if threads < 1:
            raise ConfigError(f"threads is {threads}, expected at least 1")
        if dtype is None:
            dtype = np.float32 if parameters is None else parameters.dtype
        kind = np.dtype(dtype)
        if kind not in _DTYPES:
            raise ShapeError(f"model {self.name}: dtype {kind}, expected float32 or float64")
        count, moments = self.parameters, self.statistics
        if statistics is None:
            statistics = self.initial_statistics().astype(kind)
        arenas = Arenas(
            self._arena("parameters", parameters, count, kind),
            self._arena("gradients", gradients, count, kind),
            self._arena("statistics", statistics, moments, kind),
            self._arena("batch_statistics", batch_statistics, moments, kind),
        )
        return Engine(self, batch, arenas, smoothing, threads)

    def _arena(self, what: str, given: Array | None, count: int, dtype: np.dtype[Any]) -> Array:
        if given is None:
            return np.zeros(count, dtype)
        if given.shape != (count,) or given.dtype != dtype or not given.flags.c_contiguous:
            raise ShapeError(
                f"model {self.name}: {what} is an array {given.shape} of {given.dtype}, "
                f"expected a contiguous one ({count},) of {dtype}"
            )
        return given

    def __repr__(self) -> str:
        return (
            f"<Network {self.name}: {len(self.layers)} layers, {self.parameters} parameters, "
            f"input {self.input_shape}, {self.classes} classes>"
        )


def _checked_shape(name: str, shape: Shape) -> Shape:
    if len(shape) != 3 or any(extent < 1 for extent in shape):
        raise ShapeError(
            f"model {name}: input shape {tuple(shape)}, expected (height, width, channels)"
        )
    return tuple(shape)


def _schedule(name: str, nodes: Sequence[Node]) -> tuple[tuple[Node, ...], ...]:
    """Group nodes into scheduled layers, in order."""
    groups: list[list[Node]] = []
    waiting: list[Node] = []
    before: Node | None = None
    for node in nodes:
        joins = (
            node.layer.normalises
            and before is not None
            and before.layer.decayed > 0
            and not (before.relu or before.pool)
            and node.inputs == (before.output,)
        )
        if node.count and not joins:
            groups.append([*waiting, node])
            waiting = []
        elif groups:
            groups[-1].append(node)
        else:
            waiting.append(node)
        before = node
    if not groups:
        raise ConfigError(f"model {name} has no layer with parameters")
    return tuple(tuple(group) for group in groups)


def _describe(nodes: Sequence[Node]) -> LayerInfo:
    first = next(node for node in nodes if node.count)
    return LayerInfo(
        first.name,
        sum(node.count for node in nodes),
        sum(node.decay for node in nodes),
        sum(node.statistics for node in nodes),
        sum(node.flops for node in nodes),
    )
