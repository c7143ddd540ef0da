"""The graph of a network: which operation reads what, in forward order.

A model definition is a list of layers. Connecting them gives a list of nodes, each with its inputs
and one output; the order in which they were connected is the order in which they run. Nodes with
parameters open a *scheduled layer*; a node without parameters, and a batch norm directly behind a
convolution or dense node, belong to the layer before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Protocol

from dynacomm_async.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    import numpy as np

    from dynacomm_async.nn.memory import Array, Memory

__all__ = [
    "Definition",
    "Frame",
    "Graph",
    "Layer",
    "Node",
    "Operator",
    "Pools",
    "Rectifies",
    "Shape",
    "Value",
    "fuse",
]

Shape = tuple[int, ...]
"""Of one image's activations, without the batch: (H, W, C) or (features,)."""


class Operator(Protocol):
    """One node, planned for a batch size; reads and writes arrays that it was given views of."""

    def forward(self, training: bool) -> None:
        """Compute the output; with batch statistics if ``training``, else running ones."""

    def backward(self) -> None:
        """From the output's gradient, write parameter gradients and the inputs' gradients."""


class Definition(Protocol):
    """A part of a model definition: one layer, or several with the way they are connected."""

    def connect(self, graph: Graph, source: Value) -> Value:
        """Add the nodes of this part behind ``source``; return what comes out.

        Raises:
            ShapeError: the part does not fit behind ``source``.
        """


@dataclass(frozen=True)
class Layer:
    """Base of the definitions of single operations; subclasses say what differs.

    Attributes:
        name: of the node; "" takes the kind and a number.
    """

    name: str = field(default="", kw_only=True)

    kind = "layer"
    decayed = 0
    """How many of the leading parameters get weight decay."""
    normalises = False
    """True for a batch norm: joins the scheduled layer of a convolution in front of it."""

    @property
    def fuses_relu(self) -> bool:
        """The operator can apply a ReLU to its output itself."""
        return False

    @property
    def fuses_limit(self) -> bool:
        """The ReLU that the operator applies may have an upper limit."""
        return False

    @property
    def draws(self) -> bool:
        """In training the output depends on chance: a step must be given what it follows from."""
        return False

    @property
    def fuses_pool(self) -> bool:
        """The operator can pool its output itself, before bias and ReLU."""
        return False

    def connect(self, graph: Graph, source: Value) -> Value:
        """Add one node behind ``source``."""
        return graph.add(self, source)

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        """Shape of the output. Raises ShapeError, without the node's name, where none fits."""
        return inputs[0]

    def parameter_shapes(self, inputs: tuple[Shape, ...]) -> tuple[Shape, ...]:
        """Shapes of the parameters, those with weight decay first."""
        return ()

    def statistics(self, inputs: tuple[Shape, ...]) -> int:
        """Elements of running statistics."""
        return 0

    def flops(self, inputs: tuple[Shape, ...], output: Shape) -> int:
        """Forward operations for one image, two for a multiply-add."""
        return 0

    def initialise(self, parameters: Sequence[Array], generator: np.random.Generator) -> None:
        """Write initial values into the parameters."""

    def border(self) -> tuple[int, int]:
        """Zeros wanted above and below, left and right of the input."""
        return 0, 0

    def frame(self, node: Node) -> Frame | None:
        """How the gradient of the output wants to be laid out; None: contiguous."""
        return None

    def plan(self, node: Node, memory: Memory) -> Operator:
        """The operator for this node in the given memory."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Frame:
    """Zeros around a gradient (H, W, C).

    Attributes:
        above, left: before the first line and the first pixel of a line.
        below, right: behind the last.
    """

    above: int
    below: int
    left: int
    right: int


@dataclass(frozen=True, slots=True)
class Value:
    """What a node computes for one image.

    Attributes:
        index: 0 is the network's input.
        shape: (H, W, C) or (features,).
    """

    index: int
    shape: Shape


@dataclass(frozen=True, slots=True)
class Node:
    """One operation in the graph.

    Attributes:
        name: unique.
        layer: its definition.
        inputs: what it reads.
        output: what it computes, after the fused ReLU and pooling.
        relu: a ReLU is fused into it.
        limit: the fused ReLU's upper limit.
        pool: size of the pooling windows (stride the same) fused into it.
        raw_shape: of the output before fused pooling.
    """

    name: str
    layer: Layer
    inputs: tuple[Value, ...]
    output: Value
    raw_shape: Shape
    relu: bool = False
    limit: float | None = None
    pool: tuple[int, int] | None = None

    @property
    def input_shapes(self) -> tuple[Shape, ...]:
        """Shapes of the inputs."""
        return tuple(value.shape for value in self.inputs)

    @property
    def parameter_shapes(self) -> tuple[Shape, ...]:
        """Shapes of the parameters, those with weight decay first."""
        return self.layer.parameter_shapes(self.input_shapes)

    @property
    def count(self) -> int:
        """Elements of all parameters."""
        return sum(prod(shape) for shape in self.parameter_shapes)

    @property
    def decay(self) -> int:
        """Elements of the leading parameters that get weight decay."""
        return sum(prod(shape) for shape in self.parameter_shapes[: self.layer.decayed])

    @property
    def statistics(self) -> int:
        """Elements of running statistics."""
        return self.layer.statistics(self.input_shapes)

    @property
    def flops(self) -> int:
        """Forward operations for one image, two for a multiply-add."""
        return self.layer.flops(self.input_shapes, self.raw_shape)


class Graph:
    """Grows while a definition is connected; nodes are in forward order."""

    def __init__(self, input_shape: Shape) -> None:
        self.nodes: list[Node] = []
        self.input = Value(0, input_shape)
        self._names: set[str] = set()
        self._numbers: Counter[str] = Counter()
        self._scope = ""

    @contextmanager
    def scope(self, name: str, kind: str) -> Iterator[None]:
        """Names of nodes added inside begin with this part's name and a dot."""
        outer, numbers = self._scope, self._numbers
        self._scope = self._qualify(name, kind) + "."
        self._numbers = Counter()
        try:
            yield
        finally:
            self._scope, self._numbers = outer, numbers

    def add(self, layer: Layer, *inputs: Value) -> Value:
        """Add a node behind ``inputs``; return its output.

        Raises:
            ShapeError: the layer does not fit there.
            ConfigError: its name is taken.
        """
        name = self._qualify(layer.name, layer.kind)
        if name in self._names:
            raise ConfigError(f"two layers are named {name!r}: names must be unique")
        self._names.add(name)
        try:
            shape = layer.output_shape(tuple(value.shape for value in inputs))
        except ShapeError as error:
            raise ShapeError(f"layer {name}: {error}") from None
        output = Value(len(self.nodes) + 1, shape)
        self.nodes.append(Node(name, layer, inputs, output, shape))
        return output

    def _qualify(self, name: str, kind: str) -> str:
        if not name:
            self._numbers[kind] += 1
            name = f"{kind}{self._numbers[kind]}"
        return self._scope + name


def fuse(nodes: Sequence[Node]) -> list[Node]:
    """Let operators apply the ReLU and the pooling behind them, where nobody else reads between."""
    readers = Counter(value.index for node in nodes for value in node.inputs)
    fused: list[Node] = []
    producer: dict[int, int] = {}
    for node in nodes:
        source = node.inputs[0]
        place = producer.get(source.index)
        merged = None
        if place is not None and len(node.inputs) == 1 and readers[source.index] == 1:
            merged = _absorb(fused[place], node)
        if merged is None or place is None:
            producer[node.output.index] = len(fused)
            fused.append(node)
        else:
            producer[node.output.index] = place
            fused[place] = merged
    return fused


def _absorb(first: Node, second: Node) -> Node | None:
    """One node that does what the two do, or None."""
    if first.pool is not None:
        return None
    if isinstance(second.layer, Rectifies) and first.layer.fuses_relu and not first.relu:
        limit = second.layer.most
        if limit is None or first.layer.fuses_limit:
            return replace(first, output=second.output, relu=True, limit=limit)
        return None
    pool = second.layer.pool_size(first.raw_shape) if isinstance(second.layer, Pools) else None
    if pool is not None and first.layer.fuses_pool:
        return replace(first, output=second.output, pool=pool)
    return None


@dataclass(frozen=True)
class Rectifies(Layer):
    """Base of the layer that an operator in front may apply to its output.

    Attributes:
        most: the upper limit; None: there is none.
    """

    most: float | None = None


class Pools(Layer):
    """Base of layers that an operator in front may apply itself."""

    def pool_size(self, shape: Shape) -> tuple[int, int] | None:
        """Size of windows that cover an input of ``shape`` without overlap or rest, or None."""
        raise NotImplementedError
