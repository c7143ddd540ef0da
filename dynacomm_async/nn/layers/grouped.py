"""Convolutions whose channels fall into groups that do not see each other.

Depthwise ones (a group for each channel) have a kernel of their own; for all others the columns of
every group lie one behind the other, so that one call multiplies them all.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dynacomm_async.nn.graph import Node
from dynacomm_async.nn.kernels import (
    DepthwiseWindows,
    GroupBlock,
    Phase,
    columns_needed,
    plan_group_blocks,
)
from dynacomm_async.nn.memory import Array, Memory, Sink

if TYPE_CHECKING:
    from dynacomm_async.nn.layers.convolution import Conv2d

__all__ = ["DepthwiseOperator", "GroupedOperator"]


class _Seen(NamedTuple):
    """One phase of the input's pixels, and what of the output's gradient they see."""

    phase: tuple[Phase, Phase]
    gradient: Array
    """View of the framed gradient, to be convolved with a stride of 1."""
    pixels: Array
    """View of the input's gradient."""

    @property
    def taps(self) -> tuple[slice, slice]:
        """Which of the weights, turned around."""
        return self.phase[0].taps, self.phase[1].taps

    @property
    def reach(self) -> tuple[int, int]:
        """How many taps those are."""
        return self.phase[0].reach, self.phase[1].reach


def _phases(node: Node, layer: Conv2d, memory: Memory, target: Array) -> list[_Seen]:
    """The phases that the kernel touches; the other pixels of ``target`` see nothing."""
    frame, framed = layer.frame(node), memory.frame(node.output)
    assert frame is not None
    found = []
    for v, h in itertools.product(*layer.phases(node.inputs[0].shape)):
        if v.reach and h.reach:
            top, left = frame.above + v.first, frame.left + h.first
            rows = slice(top, top + v.count + v.reach - 1)
            columns = slice(left, left + h.count + h.reach - 1)
            found.append(_Seen((v, h), framed[:, rows, columns], target[:, v.pixels, h.pixels]))
    return found


def _covers(layer: Conv2d) -> bool:
    """No pixel lies between the windows: every one has a phase that is written."""
    return all(k >= s for k, s in zip(layer.window, layer.steps, strict=True))


class _Operator:
    """What both kinds share: bias, and input pixels that no window sees."""

    def __init__(self, node: Node, layer: Conv2d, memory: Memory) -> None:
        self._sink = memory.sink(node.inputs[0])
        self._output, self._gradient = memory.value(node.output), memory.gradient(node.output)
        self._weights, *self._bias = memory.parameters(node)
        self._weights_gradient, *self._bias_gradient = memory.parameter_gradients(node)
        self._clears = not _covers(layer)

    def _add_bias(self) -> None:
        for bias in self._bias:
            np.add(self._output, bias, out=self._output)

    def _sum_bias(self) -> None:
        for gradient in self._bias_gradient:
            np.add.reduce(self._gradient, axis=(0, 1, 2), out=gradient)

    def _clear(self, sink: Sink) -> None:
        if self._clears and not sink.accumulate:
            sink.array[...] = 0


class _DepthwisePhase(NamedTuple):
    windows: DepthwiseWindows
    taps: tuple[slice, slice]
    result: Array
    """(n, h, w, C), with contiguous lines."""
    sink: Sink | None
    """Where it belongs; None if it lies there already."""


class DepthwiseOperator(_Operator):
    """A kernel for each channel, on the bordered input and the framed gradient themselves."""

    def __init__(self, node: Node, layer: Conv2d, memory: Memory) -> None:
        super().__init__(node, layer, memory)
        kh, kw, _, channels = self._weights.shape
        bordered = memory.value(node.inputs[0], layer.border())
        width = max(node.raw_shape[1], node.inputs[0].shape[1])
        needed = DepthwiseWindows.tile_needed(width, channels, (kh, kw))
        self._tile = memory.scratch("columns", needed)
        self._windows = DepthwiseWindows(bordered, layer.window, layer.steps, self._tile)
        self._phases: list[_DepthwisePhase] = []
        if self._sink is not None:
            seen = _phases(node, layer, memory, self._sink.array)
            self._phases = [self._phase(one, self._sink, memory) for one in seen]

    def _phase(self, seen: _Seen, sink: Sink, memory: Memory) -> _DepthwisePhase:
        windows = DepthwiseWindows(seen.gradient, seen.reach, (1, 1), self._tile)
        pixels = seen.pixels
        adjacent = pixels.strides[2] == pixels.shape[3] * pixels.itemsize
        if adjacent and not sink.accumulate:
            return _DepthwisePhase(windows, seen.taps, pixels, None)
        result = memory.scratch("whole", pixels.size).reshape(pixels.shape)
        return _DepthwisePhase(windows, seen.taps, result, Sink(pixels, sink.accumulate))

    def forward(self, training: bool) -> None:
        self._windows.correlate(self._weights[:, :, 0], self._output)
        self._add_bias()

    def backward(self) -> None:
        self._windows.weigh(self._gradient, self._weights_gradient[:, :, 0])
        self._sum_bias()
        if self._sink is None:
            return
        self._clear(self._sink)
        for windows, taps, result, sink in self._phases:
            windows.correlate(self._weights[:, :, 0][taps], result)
            if sink is not None:
                sink.put(result)


class _GroupedStep(NamedTuple):
    block: GroupBlock
    product: Array
    """(groups, pixels, channels of a group): where the matrix products are written."""
    shaped: Array
    """``product`` as (n, h, w, groups, channels of a group)."""
    other: Array
    """What it is copied into, or from where: of the shape of ``shaped``."""


def _step(block: GroupBlock, array: Array, scratch: Array) -> _GroupedStep:
    """The step of a block whose products belong to its part of ``array`` (N, H, W, C)."""
    part = block.cut(array)
    groups = block.matrix.shape[0]
    other = part.reshape(*part.shape[:3], groups, -1)
    assert np.may_share_memory(other, part)
    product = scratch[: part.size].reshape(groups, block.rows, -1)
    shaped = product.reshape(groups, *part.shape[:3], -1).transpose(1, 2, 3, 0, 4)
    return _GroupedStep(block, product, shaped, other)


class _GroupedPhase(NamedTuple):
    taps: tuple[slice, slice]
    rotated: Array
    """(groups, kh, kw, outputs of a group, channels of a group): where they are turned."""
    matrix: Array
    """The same memory as (groups, kh * kw * outputs, channels)."""
    steps: list[_GroupedStep]


class GroupedOperator(_Operator):
    """Columns and products as in an ordinary convolution, with the groups as a first axis."""

    def __init__(self, node: Node, layer: Conv2d, memory: Memory) -> None:
        super().__init__(node, layer, memory)
        self._groups = groups = layer.groups
        kh, kw, channels, outputs = self._weights.shape
        inner = kh * kw * channels
        # By group: the weights are (inner, groups, outputs of a group) in memory.
        self._by_group = self._weights.reshape(inner, groups, -1).transpose(1, 0, 2)
        target = self._weights_gradient.reshape(inner, groups, -1).transpose(1, 0, 2)
        self._target = target
        packed = memory.scratch("weights", 2 * self._weights.size).reshape(2, *target.shape)
        self._packed, self._part = packed
        self._sum = memory.scratch("weight sums", self._weights.size).reshape(target.shape)
        bordered = memory.value(node.inputs[0], layer.border())
        height, width, _ = node.raw_shape
        needed = columns_needed(memory.batch, (height, width), groups * inner)
        columns = memory.scratch("columns", needed)
        blocks = plan_group_blocks(bordered, layer.window, layer.steps, groups, columns)
        products = memory.scratch("products", max(block.rows for block in blocks) * outputs)
        self._forward_steps = [_step(block, self._output, products) for block in blocks]
        self._weight_steps = [_step(block, self._gradient, products) for block in blocks]
        self._phases: list[_GroupedPhase] = []
        if self._sink is not None:
            for seen in _phases(node, layer, memory, self._sink.array):
                self._phases.append(self._phase(seen, memory))

    def _phase(self, seen: _Seen, memory: Memory) -> _GroupedPhase:
        (high, wide), groups = seen.reach, self._groups
        _, _, channels, outputs = self._weights.shape
        used = high * wide * outputs * channels
        rotated = memory.scratch("weights", used).reshape(groups, high, wide, -1, channels)
        height, width = seen.pixels.shape[1:3]
        needed = columns_needed(memory.batch, (height, width), high * wide * outputs)
        columns = memory.scratch("columns", needed)
        blocks = plan_group_blocks(seen.gradient, (high, wide), (1, 1), groups, columns)
        most = max(block.rows for block in blocks)
        products = memory.scratch("products", most * groups * channels)
        steps = [_step(block, seen.pixels, products) for block in blocks]
        matrix = rotated.reshape(groups, -1, channels)
        return _GroupedPhase(seen.taps, rotated, matrix, steps)

    def forward(self, training: bool) -> None:
        np.copyto(self._packed, self._by_group)
        for block, product, shaped, output in self._forward_steps:
            block.fill()
            np.matmul(block.matrix, self._packed, out=product)
            np.copyto(output, shaped)
        self._add_bias()

    def backward(self) -> None:
        total = self._sum
        for index, (block, rows, shaped, gradient) in enumerate(self._weight_steps):
            block.fill()
            np.copyto(shaped, gradient)
            out = self._part if index else total
            np.matmul(block.matrix.transpose(0, 2, 1), rows, out=out)
            if index:
                np.add(total, self._part, out=total)
        np.copyto(self._target, total)
        self._sum_bias()
        if self._sink is not None:
            self._backward_input(self._sink)

    def _backward_input(self, sink: Sink) -> None:
        self._clear(sink)
        kh, kw, channels, _ = self._weights.shape
        weights = self._weights.reshape(kh, kw, channels, self._groups, -1)
        for taps, rotated, matrix, steps in self._phases:
            np.copyto(rotated, weights[taps].transpose(3, 0, 1, 4, 2))
            for block, product, shaped, pixels in steps:
                block.fill()
                np.matmul(block.matrix, matrix, out=product)
                Sink(pixels, sink.accumulate).put(shaped)
