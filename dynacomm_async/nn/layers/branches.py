"""Parallel branches behind one input, joined along the channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from dynacomm_async.errors import ConfigError, ShapeError
from dynacomm_async.nn.graph import Definition, Graph, Layer, Node, Operator, Shape, Value
from dynacomm_async.nn.memory import Memory

__all__ = ["Branches", "Concat"]


@dataclass(frozen=True)
class Branches:
    """Several parts side by side; what they give is joined along the channels.

    Attributes:
        branches: in the order in which they run and are joined; an empty one passes the input on.
        name: goes in front of the names inside; "" takes "branches" and a number.
    """

    branches: Sequence[Sequence[Definition]]
    name: str = ""

    def __post_init__(self) -> None:
        if not self.branches:
            raise ConfigError("there are no branches to join, expected at least one")

    def connect(self, graph: Graph, source: Value) -> Value:
        """Add the branches and their concatenation behind ``source``."""
        with graph.scope(self.name, "branches"):
            ends = []
            for branch in self.branches:
                value = source
                for part in branch:
                    value = part.connect(graph, value)
                ends.append(value)
            return graph.add(Concat(), *ends)


@dataclass(frozen=True)
class Concat(Layer):
    """Values of one height and width, (H, W, C) each, or flat ones, joined along the last axis."""

    kind = "concat"

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        extents = {shape[:-1] for shape in inputs}
        if len(extents) > 1:
            raise ShapeError(
                f"the branches give {', '.join(map(str, inputs))}, "
                f"expected shapes that differ in their channels only"
            )
        return *inputs[0][:-1], sum(shape[-1] for shape in inputs)

    def plan(self, node: Node, memory: Memory) -> Operator:
        return _ConcatOperator(node, memory)


class _ConcatOperator:
    def __init__(self, node: Node, memory: Memory) -> None:
        ends = accumulate(shape[-1] for shape in node.input_shapes)
        places = [
            slice(end - shape[-1], end) for end, shape in zip(ends, node.input_shapes, strict=True)
        ]
        output, gradient = memory.value(node.output), memory.gradient(node.output)
        self._copies = [
            (output[..., place], memory.value(value))
            for place, value in zip(places, node.inputs, strict=True)
        ]
        sinks = [memory.sink(value) for value in node.inputs]
        self._shares = [
            (sink, gradient[..., place])
            for sink, place in zip(sinks, places, strict=True)
            if sink is not None
        ]

    def forward(self, training: bool) -> None:
        for target, source in self._copies:
            np.copyto(target, source)

    def backward(self) -> None:
        # Backwards, as always: where inputs are one value, the last reader writes first.
        for sink, share in reversed(self._shares):
            sink.put(share)
