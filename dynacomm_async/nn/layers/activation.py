"""ReLU and tanh as operations of their own, where no operator in front applies them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dynacomm_async.nn.graph import Layer, Node, Operator
from dynacomm_async.nn.kernels import mask_positive
from dynacomm_async.nn.memory import Memory

__all__ = ["ReLU", "Tanh"]


@dataclass(frozen=True)
class ReLU(Layer):
    """max(x, 0); at 0 the gradient is 0."""

    kind = "relu"

    def plan(self, node: Node, memory: Memory) -> Operator:
        return _ReLUOperator(node, memory)


class _ReLUOperator:
    def __init__(self, node: Node, memory: Memory) -> None:
        self._input, self._output = memory.value(node.inputs[0]), memory.value(node.output)
        self._sink = memory.sink(node.inputs[0])
        self._gradient = memory.gradient(node.output)
        shape, size = self._gradient.shape, self._gradient.size
        self._mask = memory.scratch("whole mask", size, np.bool_).reshape(shape)
        self._masked = memory.scratch("whole", size).reshape(shape)

    def forward(self, training: bool) -> None:
        np.maximum(self._input, 0, out=self._output)

    def backward(self) -> None:
        if self._sink is not None:
            mask_positive(self._gradient, self._output, self._mask, self._masked)
            self._sink.put(self._masked)


@dataclass(frozen=True)
class Tanh(Layer):
    """The hyperbolic tangent."""

    kind = "tanh"

    def plan(self, node: Node, memory: Memory) -> Operator:
        return _TanhOperator(node, memory)


class _TanhOperator:
    def __init__(self, node: Node, memory: Memory) -> None:
        self._input, self._output = memory.value(node.inputs[0]), memory.value(node.output)
        self._sink = memory.sink(node.inputs[0])
        self._gradient = memory.gradient(node.output)
        self._slope = memory.scratch("whole", self._gradient.size).reshape(self._gradient.shape)

    def forward(self, training: bool) -> None:
        np.tanh(self._input, out=self._output)

    def backward(self) -> None:
        if self._sink is None:
            return
        slope = self._slope
        np.multiply(self._output, self._output, out=slope)
        np.subtract(1, slope, out=slope)
        np.multiply(slope, self._gradient, out=slope)
        self._sink.put(slope)
