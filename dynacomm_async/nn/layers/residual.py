"""Residual blocks: a body, a shortcut around it, and their sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dynacomm_async.errors import ConfigError, ShapeError
from dynacomm_async.nn.graph import Definition, Graph, Layer, Node, Operator, Shape, Value
from dynacomm_async.nn.kernels import image_groups, mask_positive
from dynacomm_async.nn.layers.checks import require_image
from dynacomm_async.nn.memory import Memory

__all__ = ["Add", "PadShortcut", "Residual"]


@dataclass(frozen=True)
class Residual:
    """body(x) + shortcut(x); layers of the body come before those of the shortcut.

    Attributes:
        body: the parts that are skipped.
        shortcut: the parts beside it; empty: the identity.
        name: goes in front of the names inside; "" takes "block" and a number.
    """

    body: Sequence[Definition]
    shortcut: Sequence[Definition] = ()
    name: str = ""

    def connect(self, graph: Graph, source: Value) -> Value:
        """Add body, shortcut and sum behind ``source``."""
        with graph.scope(self.name, "block"):
            left = right = source
            for part in self.body:
                left = part.connect(graph, left)
            for part in self.shortcut:
                right = part.connect(graph, right)
            return graph.add(Add(), left, right)


@dataclass(frozen=True)
class Add(Layer):
    """The sum of two values of one shape."""

    kind = "add"
    fuses_relu = True

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        first, second = inputs
        if first != second:
            raise ShapeError(
                f"the body gives {first} and the shortcut {second}, expected equal shapes"
            )
        return first

    def plan(self, node: Node, memory: Memory) -> Operator:
        return _AddOperator(node, memory)


class _AddOperator:
    """Works on groups of images that stay in cache; masks its output's gradient in place."""

    def __init__(self, node: Node, memory: Memory) -> None:
        first, second = (memory.value(value) for value in node.inputs)
        output = memory.value(node.output)
        self._sinks = [memory.sink(value) for value in node.inputs]
        self._relu = node.relu
        self._share_gradient(node, memory)
        self._gradient = memory.gradient(node.output)
        groups = image_groups(output.shape)
        size = output[groups[0]].size
        self._zeros = memory.zeros(size)
        flat, mask = memory.scratch("masked", size), memory.scratch("mask", size, np.bool_)
        self._groups = []
        for images in groups:
            y = output[images]
            total = flat[: y.size]
            views = first[images], second[images], total, total.reshape(y.shape), y
            dy = self._gradient[images]
            self._groups.append((*views, dy, mask[: y.size].reshape(y.shape)))

    def _share_gradient(self, node: Node, memory: Memory) -> None:
        """Let the sum's gradient lie where the first input's belongs, which is the same."""
        sink = self._sinks[0]
        if sink is None or memory.shared(node.inputs[0]) or not sink.array.flags.c_contiguous:
            return
        memory.alias_gradient(node.output, sink.array)
        self._sinks[0] = None

    def forward(self, training: bool) -> None:
        for first, second, flat, total, y, _, _ in self._groups:
            np.add(first, second, out=total)
            if self._relu:
                np.maximum(flat, self._zeros[: flat.size], out=flat)
            np.copyto(y, total)

    def backward(self) -> None:
        if self._relu:
            for _, _, _, _, y, dy, mask in self._groups:
                mask_positive(dy, y, mask, dy)
        # Backwards, as always: where both inputs are one value, the last reader writes first.
        for sink in reversed(self._sinks):
            if sink is not None:
                sink.put(self._gradient)


@dataclass(frozen=True)
class PadShortcut(Layer):
    """The shortcut without parameters: every stride-th pixel, new channels filled with zeros.

    Option A of He et al., "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), with
    the zeros half before and half behind.

    Attributes:
        channels: of the output.
        stride: in both directions.
    """

    channels: int
    stride: int = 1

    kind = "shortcut"

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise ConfigError(f"stride is {self.stride}, expected at least 1")

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        height, width, channels = require_image(inputs[0])
        if self.channels < channels:
            raise ShapeError(f"the input has {channels} channels, expected at most {self.channels}")
        return -(-height // self.stride), -(-width // self.stride), self.channels

    def plan(self, node: Node, memory: Memory) -> Operator:
        return _PadShortcutOperator(node, self, memory)


class _PadShortcutOperator:
    def __init__(self, node: Node, layer: PadShortcut, memory: Memory) -> None:
        step, channels = layer.stride, node.inputs[0].shape[2]
        before = (layer.channels - channels) // 2
        inner = slice(before, before + channels)
        self._source = memory.value(node.inputs[0])[:, ::step, ::step]
        self._target = memory.value(node.output)[..., inner]
        self._sink = memory.sink(node.inputs[0])
        self._gradient = memory.gradient(node.output)[..., inner]
        self._step = step

    def forward(self, training: bool) -> None:
        np.copyto(self._target, self._source)

    def backward(self) -> None:
        if self._sink is None:
            return
        if not self._sink.accumulate:
            self._sink.array[...] = 0
        target = self._sink.array[:, :: self._step, :: self._step]
        np.add(target, self._gradient, out=target)
