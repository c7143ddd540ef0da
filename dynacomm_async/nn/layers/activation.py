"""ReLU and tanh as operations of their own, where no operator in front applies them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dynacomm_async.errors import ConfigError
from dynacomm_async.nn.graph import Layer, Node, Operator, Rectifies
from dynacomm_async.nn.kernels import mask_between, mask_positive
from dynacomm_async.nn.memory import Memory

__all__ = ["ReLU", "Tanh"]


@dataclass(frozen=True)
class ReLU(Rectifies):
    """max(x, 0), and no more than ``most`` where that is given (6: ReLU6).

    At 0, and at ``most``, the gradient is 0.
    """

    kind = "relu"

    def __post_init__(self) -> None:
        if self.most is not None and not self.most > 0:
            raise ConfigError(f"the limit of a ReLU is {self.most}, expected more than 0")

    def plan(self, node: Node, memory: Memory) -> Operator:
        return _ReLUOperator(node, self, memory)


class _ReLUOperator:
    def __init__(self, node: Node, layer: ReLU, memory: Memory) -> None:
        self._most = layer.most
        self._input, self._output = memory.value(node.inputs[0]), memory.value(node.output)
        self._sink = memory.sink(node.inputs[0])
        self._gradient = memory.gradient(node.output)
        shape, size = self._gradient.shape, self._gradient.size
        self._masks = memory.scratch("whole mask", 2 * size, np.bool_).reshape(2, *shape)
        self._masked = memory.scratch("whole", size).reshape(shape)

    def forward(self, training: bool) -> None:
        if self._most is None:
            np.maximum(self._input, 0, out=self._output)
        else:
            np.clip(self._input, 0, self._most, out=self._output)

    def backward(self) -> None:
        if self._sink is None:
            return
        if self._most is None:
            mask_positive(self._gradient, self._output, self._masks[0], self._masked)
        else:
            mask_between(self._gradient, self._output, self._most, self._masks, self._masked)
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
