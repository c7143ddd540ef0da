"""Dropout that can be drawn again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dynacomm_async.errors import ConfigError
from dynacomm_async.nn.graph import Layer, Node, Operator
from dynacomm_async.nn.kernels import draw_factors
from dynacomm_async.nn.memory import Memory

__all__ = ["Dropout"]


@dataclass(frozen=True)
class Dropout(Layer):
    """In training each element is 0 with a chance of ``rate``, and the others are raised for it.

    Srivastava, Hinton, Krizhevsky, Sutskever and Salakhutdinov, "Dropout: A Simple Way to Prevent
    Neural Networks from Overfitting", JMLR 15, 2014. Which elements is a function of the ``draw``
    that a step is given and of the layer's place in the network. In evaluation nothing happens.

    Attributes:
        rate: at least 0 and below 1.
    """

    rate: float = 0.5

    kind = "drop"

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ConfigError(f"dropout rate is {self.rate}, expected at least 0 and below 1")

    @property
    def draws(self) -> bool:
        return self.rate > 0

    def plan(self, node: Node, memory: Memory) -> Operator:
        return _DropoutOperator(node, self, memory)


class _DropoutOperator:
    def __init__(self, node: Node, layer: Dropout, memory: Memory) -> None:
        self._input, self._output = memory.value(node.inputs[0]), memory.value(node.output)
        self._sink = memory.sink(node.inputs[0])
        self._gradient = memory.gradient(node.output)
        self._memory, self._rate, self._place = memory, layer.rate, node.output.index
        self._factors = memory.keep(node.output.shape)
        self._before = memory.member.images.start * self._factors[0].size
        self._product = memory.scratch("whole", self._factors.size).reshape(self._factors.shape)

    def forward(self, training: bool) -> None:
        if training and self._rate:
            key = *self._memory.draw, self._place
            draw_factors(self._factors.reshape(-1), self._rate, key, self._before)
            np.multiply(self._input, self._factors, out=self._output)
        else:
            self._factors[...] = 1
            np.copyto(self._output, self._input)

    def backward(self) -> None:
        if self._sink is not None:
            self._sink.put(np.multiply(self._gradient, self._factors, out=self._product))
