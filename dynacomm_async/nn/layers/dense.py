"""Fully connected layers, and the flattening in front of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from dynacomm_async.errors import ConfigError
from dynacomm_async.nn.graph import Layer, Node, Operator, Shape
from dynacomm_async.nn.kernels import column_sums, mask_positive
from dynacomm_async.nn.layers.checks import require_features
from dynacomm_async.nn.layers.initialisers import draw_weights, require_initialiser
from dynacomm_async.nn.memory import Array, Memory

__all__ = ["Dense", "Flatten"]


@dataclass(frozen=True)
class Dense(Layer):
    """y = x @ W + b, with W (inputs, features).

    Attributes:
        features: outputs.
        bias: whether b is there.
        initialiser: "he" or "xavier".
    """

    features: int
    bias: bool = True
    initialiser: str = "he"

    kind = "fc"
    decayed = 1
    fuses_relu = True

    def __post_init__(self) -> None:
        if self.features < 1:
            raise ConfigError(f"a dense layer has {self.features} features, expected at least 1")
        require_initialiser(self.initialiser)

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        require_features(inputs[0])
        return (self.features,)

    def parameter_shapes(self, inputs: tuple[Shape, ...]) -> tuple[Shape, ...]:
        weights = (inputs[0][0], self.features)
        return (weights, (self.features,)) if self.bias else (weights,)

    def flops(self, inputs: tuple[Shape, ...], output: Shape) -> int:
        return 2 * inputs[0][0] * self.features

    def initialise(self, parameters: Sequence[Array], generator: np.random.Generator) -> None:
        weights = parameters[0]
        fan_in, fan_out = weights.shape
        draw_weights(weights, (fan_in, fan_out), self.initialiser, generator)
        for bias in parameters[1:]:
            bias[...] = 0

    def plan(self, node: Node, memory: Memory) -> Operator:
        return _DenseOperator(node, memory)


class _DenseOperator:
    def __init__(self, node: Node, memory: Memory) -> None:
        self._input, self._output = memory.value(node.inputs[0]), memory.value(node.output)
        self._sink = memory.sink(node.inputs[0])
        self._gradient = memory.gradient(node.output)
        self._parameters = memory.parameters(node)
        self._parameter_gradients = memory.parameter_gradients(node)
        self._relu = node.relu
        size = self._gradient.size
        self._mask = memory.scratch("mask", size, np.bool_).reshape(self._gradient.shape)
        self._masked = memory.scratch("masked", size).reshape(self._gradient.shape)
        self._down = memory.scratch("whole", self._input.size).reshape(self._input.shape)
        self._ones = memory.ones(memory.batch)

    def forward(self, training: bool) -> None:
        weights, *bias = self._parameters
        np.matmul(self._input, weights, out=self._output)
        if bias:
            np.add(self._output, bias[0], out=self._output)
        if self._relu:
            np.maximum(self._output, 0, out=self._output)

    def backward(self) -> None:
        gradient = self._gradient
        if self._relu:
            mask_positive(gradient, self._output, self._mask, self._masked)
            gradient = self._masked
        weights_gradient, *bias_gradient = self._parameter_gradients
        np.matmul(self._input.T, gradient, out=weights_gradient)
        if bias_gradient:
            column_sums(gradient, self._ones, bias_gradient[0])
        if self._sink is None:
            return
        weights = self._parameters[0]
        if self._sink.accumulate:
            self._sink.put(np.matmul(gradient, weights.T, out=self._down))
        else:
            np.matmul(gradient, weights.T, out=self._sink.array)


@dataclass(frozen=True)
class Flatten(Layer):
    """(H, W, C) as (H * W * C,), in this order."""

    kind = "flatten"

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        return (prod(inputs[0]),)

    def plan(self, node: Node, memory: Memory) -> Operator:
        return _FlattenOperator(node, memory)


class _FlattenOperator:
    """Costs nothing where input and output can share their memory."""

    def __init__(self, node: Node, memory: Memory) -> None:
        source, output = node.inputs[0], node.output
        self._input = memory.value(source)
        flat = (memory.batch, *output.shape)
        self._copies = not self._input.flags.c_contiguous
        if not self._copies:
            memory.alias(output, self._input.reshape(flat))
        self._output = memory.value(output).reshape(self._input.shape)
        self._sink = memory.sink(source)
        sink = self._sink
        if sink is not None and not memory.shared(source) and sink.array.flags.c_contiguous:
            memory.alias_gradient(output, sink.array.reshape(flat))
            self._sink = None
        self._gradient = memory.gradient(output).reshape(self._input.shape)

    def forward(self, training: bool) -> None:
        if self._copies:
            np.copyto(self._output, self._input)

    def backward(self) -> None:
        if self._sink is not None:
            self._sink.put(self._gradient)
