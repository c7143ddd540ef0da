"""Local response normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dynacomm_async.errors import ConfigError
from dynacomm_async.nn.graph import Layer, Node, Operator, Shape
from dynacomm_async.nn.kernels import image_groups
from dynacomm_async.nn.layers.checks import require_image
from dynacomm_async.nn.memory import Array, Memory, Sink

__all__ = ["LocalResponseNorm"]


@dataclass(frozen=True)
class LocalResponseNorm(Layer):
    """x / (k + alpha / size * sum of squares over ``size`` neighbouring channels) ** beta.

    Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural
    Networks", NIPS 2012; with alpha divided by the size, as in Caffe and PyTorch.

    Attributes:
        size: of the window, in channels; an even one reaches further towards the first channel.
        alpha, beta, k: as above; k is more than 0.
    """

    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0

    kind = "lrn"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"window size is {self.size}, expected at least 1 channel")
        if not (self.alpha >= 0 and self.k > 0):
            raise ConfigError(
                f"alpha is {self.alpha} and k is {self.k}, expected at least 0 and more than 0"
            )

    def output_shape(self, inputs: tuple[Shape, ...]) -> Shape:
        return require_image(inputs[0])

    def plan(self, node: Node, memory: Memory) -> Operator:
        return _ResponseOperator(node, self, memory)


class _Group(NamedTuple):
    """Some images, all (n, H, W, C)."""

    x: Array
    y: Array
    dy: Array
    base: Array
    """What is raised to beta; kept from forward to backward."""
    power: Array
    """Scratch."""
    whole: Array
    """Scratch: the terms of the sums, with zeros for channels that are not there."""
    sink: Array | None


class _ResponseOperator:
    """Works on groups of images that stay in cache."""

    def __init__(self, node: Node, layer: LocalResponseNorm, memory: Memory) -> None:
        self._layer = layer
        self._sink = memory.sink(node.inputs[0])
        x, y = memory.value(node.inputs[0]), memory.value(node.output)
        dy, base = memory.gradient(node.output), memory.keep(y.shape[1:])
        channels = y.shape[3]
        groups = image_groups(y.shape)
        pixels = y[groups[0]].size // channels
        power = memory.scratch("masked", pixels * channels)
        whole = memory.scratch("windows", pixels * (channels + layer.size - 1))
        self._root = memory.scratch("products", pixels * channels)
        self._groups = []
        for images in groups:
            shape = y[images].shape
            wide = (*shape[:3], channels + layer.size - 1)
            self._groups.append(
                _Group(
                    x[images],
                    y[images],
                    dy[images],
                    base[images],
                    power[: y[images].size].reshape(shape),
                    whole[: y[images].size // channels * wide[3]].reshape(wide),
                    None if self._sink is None else self._sink.array[images],
                )
            )

    def _terms(self, whole: Array, before: int) -> Array:
        """Clear the channels that are not there; return those that are."""
        end = whole.shape[3] - (self._layer.size - 1 - before)
        whole[..., :before] = 0
        whole[..., end:] = 0
        return whole[..., before:end]

    def _sum(self, whole: Array, out: Array) -> None:
        channels = out.shape[3]
        np.copyto(out, whole[..., :channels])
        for first in range(1, self._layer.size):
            np.add(out, whole[..., first : first + channels], out=out)

    def _raise(self, base: Array, out: Array) -> None:
        if self._layer.beta == 0.75:  # the usual one; two roots are much faster than a power
            root = self._root[: base.size].reshape(base.shape)
            np.sqrt(base, out=out)
            np.sqrt(out, out=root)
            np.multiply(out, root, out=out)
        else:
            np.power(base, self._layer.beta, out=out)

    def forward(self, training: bool) -> None:
        layer = self._layer
        for x, y, _, base, power, whole, _ in self._groups:
            np.multiply(x, x, out=self._terms(whole, layer.size // 2))
            self._sum(whole, base)
            np.multiply(base, layer.alpha / layer.size, out=base)
            np.add(base, layer.k, out=base)
            self._raise(base, power)
            np.divide(x, power, out=y)

    def backward(self) -> None:
        if self._sink is None:
            return
        layer = self._layer
        for x, y, dy, base, power, whole, sink in self._groups:
            # A channel is in the windows of those that are in its window, mirrored.
            terms = self._terms(whole, (layer.size - 1) // 2)
            np.multiply(dy, y, out=terms)
            np.divide(terms, base, out=terms)
            self._raise(base, power)
            self._sum(whole, base)
            np.multiply(base, -2 * layer.alpha * layer.beta / layer.size, out=base)
            np.multiply(base, x, out=base)
            np.divide(dy, power, out=power)
            np.add(base, power, out=base)
            if sink is not None:
                Sink(sink, self._sink.accumulate).put(base)
