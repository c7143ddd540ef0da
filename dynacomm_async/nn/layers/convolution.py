"""Convolutions: by blocked columns, by Winograd's tiles, or channel by channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dynacomm_async.errors import ConfigError, ShapeError
from dynacomm_async.nn.graph import Frame, Layer, Node, Operator, Shape
from dynacomm_async.nn.kernels import Phase, input_phases, phase_border, suits_winograd
from dynacomm_async.nn.layers.checks import Pair, pair, require_image, window_output
from dynacomm_async.nn.layers.convolution_passes import (
    Activations,
    ForwardPass,
    InputPass,
    MaskPass,
    WeightsPass,
)
from dynacomm_async.nn.layers.grouped import DepthwiseOperator, GroupedOperator
from dynacomm_async.nn.layers.initialisers import draw_weights, require_initialiser
from dynacomm_async.nn.layers.winograd_passes import (
    WinogradForward,
    WinogradInput,
    WinogradWeights,
)
from dynacomm_async.nn.memory import Array, Memory

__all__ = ["Conv2d"]


@dataclass(frozen=True)
class Conv2d(Layer):
    """Cross-correlation with weights (kh, kw, C / groups, channels), plus a bias.

    Attributes:
        channels: of the output; a multiple of the groups.
        kernel: height and width of the window.
        stride: distance of neighbouring windows.
        padding: zeros around the input; less than the kernel.
        bias: whether there is one; leave it out in front of a batch norm.
        initialiser: "he" or "xavier".
        groups: into which the channels fall, in order, of the input as of the output; an output
            sees the input of its group only. As many as channels: a depthwise convolution.
    """

    channels: int
    kernel: Pair
    stride: Pair = 1
    padding: Pair = 0
    bias: bool = True
    initialiser: str = "he"
    groups: int = 1

    kind = "conv"
    decayed = 1

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ConfigError(f"a convolution has {self.channels} channels, expected at least 1")
        if self.groups < 1 or self.channels % self.groups:
            raise ConfigError(
                f"groups is {self.groups}, expected a divisor of the {self.channels} channels"
            )
        kernel, padding = pair(self.kernel, "kernel", 1), pair(self.padding, "padding", 0)
        pair(self.stride, "stride", 1)
        if padding[0] >= kernel[0] or padding[1] >= kernel[1]:
            raise ConfigError(f"padding is {padding}, expected less than the kernel, {kernel}")
        require_initialiser(self.initialiser)

    @property
    def fuses_relu(self) -> bool:
        return self.groups == 1

    @property
    def fuses_pool(self) -> bool:
        return self.groups == 1

    @property
    def window(self) -> tuple[int, int]:
        """Height and width of the kernel."""
        return pair(self.kernel, "kernel", 1)

    @property
    def steps(self) -> tuple[int, int]:
        """Vertical and horizontal stride."""
        return pair(self.stride, "stride", 1)

    def border(self) -> tuple[int, int]:
        return pair(self.padding, "padding", 0)

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        channels = require_image(inputs[0])[2]
        if channels % self.groups:
            raise ShapeError(
                f"the input has {channels} channels, expected a multiple of the "
                f"{self.groups} groups"
            )
        return *window_output(inputs[0], self.window, self.steps, self.border()), self.channels

    def parameter_shapes(self, inputs: tuple[Shape, ...]) -> tuple[Shape, ...]:
        weights = (*self.window, inputs[0][2] // self.groups, self.channels)
        return (weights, (self.channels,)) if self.bias else (weights,)

    def flops(self, inputs: tuple[Shape, ...], output: Shape) -> int:
        height, width, channels = output
        kh, kw = self.window
        return 2 * height * width * channels * kh * kw * (inputs[0][2] // self.groups)

    def initialise(self, parameters: Sequence[Array], generator: np.random.Generator) -> None:
        weights = parameters[0]
        kh, kw, fan_in, outputs = weights.shape
        fan = kh * kw * fan_in, kh * kw * (outputs // self.groups)
        draw_weights(weights, fan, self.initialiser, generator)
        for bias in parameters[1:]:
            bias[...] = 0

    def phases(self, shape: Shape) -> tuple[list[Phase], list[Phase]]:
        """Vertical and horizontal phases of an input of ``shape``."""
        vertical, horizontal = (
            input_phases(*numbers)
            for numbers in zip(shape[:2], self.window, self.steps, self.border(), strict=True)
        )
        return vertical, horizontal

    def frame(self, node: Node) -> Frame | None:
        """What the input's gradient, as a convolution, reads around the output's."""
        vertical, horizontal = self.phases(node.inputs[0].shape)
        height, width, _ = node.raw_shape
        return Frame(*phase_border(vertical, height), *phase_border(horizontal, width))

    def plan(self, node: Node, memory: Memory) -> Operator:
        if self.groups == 1:
            return _ConvolutionOperator(node, self, memory)
        if self.groups == self.channels == node.inputs[0].shape[2]:
            return DepthwiseOperator(node, self, memory)
        return GroupedOperator(node, self, memory)


def _is_tiled(node: Node, layer: Conv2d) -> bool:
    """Whether Winograd's tiles compute this node: they hold whole windows of 2 x 2 only."""
    height, width, outputs = node.raw_shape
    channels = node.inputs[0].shape[2], outputs
    fits = suits_winograd(layer.window, layer.steps, channels, (height, width))
    return fits and node.pool in (None, (2, 2))


class _ConvolutionOperator:
    def __init__(self, node: Node, layer: Conv2d, memory: Memory) -> None:
        sink = memory.sink(node.inputs[0])
        kept = Activations.plan(node, memory)
        tiled = _is_tiled(node, layer)
        self._forward: ForwardPass | WinogradForward
        self._weights: WeightsPass | WinogradWeights
        self._input: InputPass | WinogradInput | None = None
        self._forward = (WinogradForward if tiled else ForwardPass)(node, layer, memory, kept)
        frame, gradient = self._gradient_frame(node, layer, memory)
        self._mask = MaskPass(node, memory, kept, gradient) if frame is not None else None
        if frame is None:
            frame = memory.frame(node.output)
        self._weights = (WinogradWeights if tiled else WeightsPass)(node, layer, memory, gradient)
        if sink:
            self._input = (WinogradInput if tiled else InputPass)(node, layer, memory, frame, sink)

    @staticmethod
    def _gradient_frame(node: Node, layer: Conv2d, memory: Memory) -> tuple[Array | None, Array]:
        """A frame of the operator's own where it masks, and the gradient before activation."""
        frame = layer.frame(node)
        if frame is not None and (node.relu or node.pool):
            return memory.make_frame(frame, node.raw_shape)
        return None, memory.gradient(node.output)

    def forward(self, training: bool) -> None:
        self._forward.run()

    def backward(self) -> None:
        if self._mask is not None:
            self._mask.run()
        self._weights.run()
        if self._input is not None:
            self._input.run()
