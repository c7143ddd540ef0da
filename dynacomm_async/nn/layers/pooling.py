"""Maximum, average and global average pooling."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from dynacomm_async.errors import ConfigError
from dynacomm_async.nn.graph import Layer, Node, Operator, Pools, Shape
from dynacomm_async.nn.kernels import Tap, clipped_taps, image_groups, maximum_steps
from dynacomm_async.nn.layers.checks import Pair, pair, require_image, window_output
from dynacomm_async.nn.memory import Array, Memory

__all__ = ["AvgPool", "GlobalAvgPool", "MaxPool"]


@dataclass(frozen=True)
class _Windows(Layer):
    """Base of layers that make one number of each window and channel.

    Attributes:
        size: of the window.
        stride: distance of neighbouring windows; None: the size.
        padding: how far the first window begins before the image; at most half the size. Nothing
            is padded: what lies outside does not count.
        ceil: a last window may reach over the far edge, instead of leaving out pixels there.
    """

    size: Pair = 2
    stride: Pair | None = None
    padding: Pair = 0
    ceil: bool = False

    kind = "pool"

    def __post_init__(self) -> None:
        size, padding = pair(self.size, "pool size", 1), self.before
        pair(self.steps, "pool stride", 1)
        if any(2 * before > window for before, window in zip(padding, size, strict=True)):
            raise ConfigError(f"pool padding is {padding}, expected at most half of {size}")

    @property
    def window(self) -> tuple[int, int]:
        """Height and width of the window."""
        return pair(self.size, "pool size", 1)

    @property
    def steps(self) -> tuple[int, int]:
        """Vertical and horizontal stride."""
        return pair(self.size if self.stride is None else self.stride, "pool stride", 1)

    @property
    def before(self) -> tuple[int, int]:
        """Vertical and horizontal padding."""
        return pair(self.padding, "pool padding", 0)

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        extent = window_output(inputs[0], self.window, self.steps, self.before, ceil=self.ceil)
        return *extent, inputs[0][2]

    def taps(self, image: Array, output: Array) -> list[Tap]:
        """The positions of the window in ``image`` (N, H, W, C), as views."""
        extent = output.shape[1], output.shape[2]
        return clipped_taps(image, self.window, self.steps, self.before, extent)


@dataclass(frozen=True)
class MaxPool(_Windows, Pools):
    """Maximum over windows; a tie hands its gradient to the first position."""

    def pool_size(self, shape: Shape) -> tuple[int, int] | None:
        (kh, kw), (height, width, _) = self.window, require_image(shape)
        apart = self.steps == (kh, kw) and self.before == (0, 0)
        return (kh, kw) if apart and height % kh == 0 and width % kw == 0 else None

    def plan(self, node: Node, memory: Memory) -> Operator:
        return _MaxPoolOperator(node, self, memory)


class _MaxPoolOperator:
    def __init__(self, node: Node, layer: MaxPool, memory: Memory) -> None:
        source = memory.value(node.inputs[0])
        output = memory.value(node.output)
        self._maxima = self._plan_maxima(layer, source, output, memory)
        parts = [(tap.view, output[tap.where]) for tap in layer.taps(source, output)]
        self._sink = memory.sink(node.inputs[0])
        self._gradient = memory.gradient(node.output)
        shape, size = self._gradient.shape, self._gradient.size
        mask = memory.scratch("whole mask", size, np.bool_).reshape(shape)
        self._left, share = memory.scratch("whole", 2 * size).reshape(2, *shape)
        self._steps = []
        if self._sink is not None:
            targets = layer.taps(self._sink.array, output)
            for (view, maxima), target in zip(parts, targets, strict=True):
                where = target.where
                scratch = mask[where], self._left[where], share[where]
                self._steps.append((view, maxima, *scratch, target.view))

    @staticmethod
    def _plan_maxima(
        layer: MaxPool, source: Array, output: Array, memory: Memory
    ) -> list[tuple[Array, Array, Array]]:
        """Lines, then pixels, of some images at a time, so that the lines' maxima stay in cache."""
        (kh, kw), (sh, sw), (ph, pw) = layer.window, layer.steps, layer.before
        shape = output.shape[1], *source.shape[2:]
        groups = image_groups((memory.batch, *shape))
        scratch = memory.scratch("masked", prod(shape) * groups[0].stop)
        steps = []
        for images in groups:
            x, y = source[images], output[images]
            lines = scratch[: prod(shape) * len(x)].reshape(len(x), *shape)
            steps += maximum_steps(x, lines, 1, kh, sh, ph)
            steps += maximum_steps(lines, y, 2, kw, sw, pw)
        return steps

    def forward(self, training: bool) -> None:
        for first, second, out in self._maxima:
            np.maximum(first, second, out=out)

    def backward(self) -> None:
        if self._sink is None:
            return
        if not self._sink.accumulate:
            self._sink.array[...] = 0
        np.copyto(self._left, self._gradient)
        for view, maxima, mask, left, share, target in self._steps:
            np.greater_equal(view, maxima, out=mask)
            np.multiply(left, mask, out=share)
            np.subtract(left, share, out=left)
            np.add(target, share, out=target)


@dataclass(frozen=True)
class AvgPool(_Windows):
    """Mean over what each window holds of the image."""

    def plan(self, node: Node, memory: Memory) -> Operator:
        return _AvgPoolOperator(node, self, memory)


class _AvgPoolOperator:
    def __init__(self, node: Node, layer: AvgPool, memory: Memory) -> None:
        output = self._output = memory.value(node.output)
        taps = layer.taps(memory.value(node.inputs[0]), output)
        self._parts = [(tap.view, output[tap.where]) for tap in taps]
        count = np.zeros((1, *node.raw_shape[:2], 1), memory.dtype)
        for tap in taps:
            count[tap.where] += 1
        self._weights = 1 / count
        self._sink = memory.sink(node.inputs[0])
        self._gradient = memory.gradient(node.output)
        size = self._gradient.size
        self._share = memory.scratch("whole", size).reshape(self._gradient.shape)
        self._steps = []
        if self._sink is not None:
            targets = layer.taps(self._sink.array, output)
            self._steps = [(self._share[target.where], target.view) for target in targets]

    def forward(self, training: bool) -> None:
        self._output[...] = 0
        for view, part in self._parts:
            np.add(part, view, out=part)
        np.multiply(self._output, self._weights, out=self._output)

    def backward(self) -> None:
        if self._sink is None:
            return
        if not self._sink.accumulate:
            self._sink.array[...] = 0
        np.multiply(self._gradient, self._weights, out=self._share)
        for share, target in self._steps:
            np.add(target, share, out=target)


@dataclass(frozen=True)
class GlobalAvgPool(Layer):
    """Mean over each channel's whole plane: (H, W, C) becomes (C,)."""

    kind = "pool"

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        return (require_image(inputs[0])[2],)

    def plan(self, node: Node, memory: Memory) -> Operator:
        return _GlobalAvgPoolOperator(node, memory)


class _GlobalAvgPoolOperator:
    def __init__(self, node: Node, memory: Memory) -> None:
        height, width, channels = node.inputs[0].shape
        self._input, self._output = memory.value(node.inputs[0]), memory.value(node.output)
        self._weight = memory.dtype.type(1 / (height * width))
        self._sink = memory.sink(node.inputs[0])
        self._gradient = memory.gradient(node.output)
        shape = (memory.batch, 1, 1, channels)
        self._share = memory.scratch("whole", memory.batch * channels).reshape(shape)

    def forward(self, training: bool) -> None:
        np.add.reduce(self._input, axis=(1, 2), out=self._output)
        np.multiply(self._output, self._weight, out=self._output)

    def backward(self) -> None:
        if self._sink is None:
            return
        np.multiply(self._gradient.reshape(self._share.shape), self._weight, out=self._share)
        target = self._sink.array
        if self._sink.accumulate:
            np.add(target, self._share, out=target)
        else:
            np.copyto(target, self._share)
