"""Batch normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dynacomm_async.errors import ConfigError
from dynacomm_async.nn.graph import Layer, Node, Operator, Shape
from dynacomm_async.nn.kernels import column_sums, line_groups, mask_between, mask_positive
from dynacomm_async.nn.memory import Array, Memory, Sink

__all__ = ["BatchNorm"]


@dataclass(frozen=True)
class BatchNorm(Layer):
    """gamma * (x - mean) / sqrt(variance + epsilon) + beta, for each channel.

    Ioffe and Szegedy, "Batch Normalization" (arXiv 1502.03167). In training mean and variance are
    those of the batch, in evaluation the running ones. Behind a convolution or a dense layer it
    belongs to that scheduled layer.

    Attributes:
        epsilon: keeps the division from zero.
    """

    epsilon: float = 1e-5

    kind = "norm"
    normalises = True
    fuses_relu = True
    fuses_limit = True

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise ConfigError(f"epsilon is {self.epsilon}, expected more than 0")

    def parameter_shapes(self, inputs: tuple[Shape, ...]) -> tuple[Shape, ...]:
        channels = inputs[0][-1]
        return (channels,), (channels,)

    def statistics(self, inputs: tuple[Shape, ...]) -> int:
        return 2 * inputs[0][-1]

    def initialise(self, parameters: Sequence[Array], generator: np.random.Generator) -> None:
        gamma, beta = parameters
        gamma[...] = 1
        beta[...] = 0

    def plan(self, node: Node, memory: Memory) -> Operator:
        return _BatchNormOperator(node, self, memory)


class _Group(NamedTuple):
    """Some images, or lines of one; 1-D arrays unless said otherwise."""

    x: Array
    load: tuple[Array, Array] | None
    """Where the input is not contiguous: ``x`` in the input's shape, and the input."""
    y: Array
    """View of the output, (n, ...)."""
    out: Array
    """Where the output is computed: the output itself where it is contiguous, else ``t``."""
    dy: Array
    """View of the output's gradient; masked in place."""
    shaped_dy: Array
    masks: Array
    """Scratch, two of the shape of ``y``."""
    t: Array
    shaped_t: Array
    u: Array
    result: Array
    """Where the gradient of the input is computed: ``t``, or where it belongs."""
    sink: Sink | None
    """Where it is moved from ``t``; None: nowhere."""


class _BatchNormOperator:
    """Works on groups of images that stay in cache.

    Factors and offsets of the channels are laid out as long as a group, so that every pass is one
    run over contiguous memory. Sums are products of a row of ones with (n * H, W * C); the W sums
    of each channel are then added up.
    """

    def __init__(self, node: Node, layer: BatchNorm, memory: Memory) -> None:
        shape = node.raw_shape
        self._channels = channels = shape[-1]
        height, width = (shape[0], shape[1]) if len(shape) == 3 else (1, 1)
        self._run = width * channels
        self._epsilon = memory.dtype.type(layer.epsilon)
        self._member = member = memory.member
        self._own = memory.dtype.type(memory.batch * height * width)
        self._count = memory.dtype.type(member.whole_batch * height * width)
        self._relu, self._limit = node.relu, node.limit
        self._parameters = memory.parameters(node)
        self._parameter_gradients = memory.parameter_gradients(node)
        self._running, self._of_batch = memory.statistics(node)
        self._sink = memory.sink(node.inputs[0])
        groups = line_groups((memory.batch, *shape))
        size = memory.gradient(node.output)[groups[0]].size
        self._groups = [self._group(where, node, memory, size) for where in groups]
        self._ones, self._zeros = memory.ones(size // self._run), memory.zeros(size)
        self._tiles = [memory.scratch(f"tile {index}", size) for index in range(3)]
        self._line, self._row, self._other, self._part = np.empty((4, self._run), memory.dtype)
        self._moments, self._sums = np.empty((2, 2, channels), memory.dtype)
        self._mean, self._variance = self._moments
        self._shift, self._scale = np.empty((2, channels), memory.dtype)
        self._tables = [
            member.table(f"{node.name} {use}", size, memory.dtype)
            for use, size in (("mean", channels), ("moment", channels), ("sums", 2 * channels))
        ]

    def _group(self, where: tuple[slice, ...], node: Node, memory: Memory, size: int) -> _Group:
        source, y = memory.value(node.inputs[0])[where], memory.value(node.output)[where]
        dy = memory.gradient(node.output)[where]
        load = None
        if source.flags.c_contiguous:
            x = source.reshape(-1)
        else:
            x = memory.scratch("norm input", size)[: source.size]
            load = x.reshape(source.shape), source
        t = memory.scratch("masked", size)[: y.size]
        u = memory.scratch("products", size)[: y.size]
        masks = memory.scratch("mask", 2 * size, np.bool_)[: 2 * y.size].reshape(2, *y.shape)
        out = y.reshape(-1) if y.flags.c_contiguous else t
        result, sink = t, None
        if self._sink is not None:
            target = self._sink.array[where]
            if target.flags.c_contiguous and not self._sink.accumulate:
                result = target.reshape(-1)
            else:
                sink = Sink(target, self._sink.accumulate)
        shaped = t.reshape(y.shape)
        return _Group(x, load, y, out, dy.reshape(-1), dy, masks, t, shaped, u, result, sink)

    def _tile(self, index: int, values: Array) -> Array:
        """``values`` (C,), repeated for each pixel of a group; valid while this operator runs."""
        tile = self._tiles[index]
        # By way of a line: many short runs take longer to copy than a few long ones.
        np.copyto(self._line.reshape(-1, self._channels), values)
        np.copyto(tile.reshape(-1, self._run), self._line)
        return tile

    def _add_rows(self, flat: Array, row: Array, first: bool) -> None:
        """Add the sums over a group's lines, (W * C,), to ``row``."""
        matrix = flat.reshape(-1, self._run)
        column_sums(matrix, self._ones, row if first else self._part)
        if not first:
            np.add(row, self._part, out=row)

    def _fold(self, row: Array, out: Array) -> None:
        np.add.reduce(row.reshape(-1, self._channels), axis=0, out=out)

    def forward(self, training: bool) -> None:
        if training:
            self._measure()
        else:
            self._mean[...], self._variance[...] = self._running.reshape(2, -1)
        gamma, beta = self._parameters
        np.sqrt(self._variance + self._epsilon, out=self._scale)
        np.divide(1, self._scale, out=self._scale)
        factor = self._tile(0, gamma * self._scale)
        offset = self._tile(1, beta - self._mean * gamma * self._scale)
        for group in self._groups:
            t, out, length = group.t, group.out, group.t.size
            np.multiply(_load(group), factor[:length], out=out)
            np.add(out, offset[:length], out=out)
            if self._limit is not None:
                np.clip(out, 0, self._limit, out=out)
            elif self._relu:
                np.maximum(out, self._zeros[:length], out=out)
            if out is t:
                np.copyto(group.y, group.shaped_t)

    def _measure(self) -> None:
        """Mean and variance of this batch, into the batch statistics too.

        In one pass over the differences from a shift, the mean of the first group. The squared
        distance of shift and mean, which is subtracted in the end, is at most as many times the
        variance as there are groups, so little cancels.
        """
        rows = self._row, self._other
        self._add_rows(_load(self._groups[0]), self._row, True)
        self._fold(self._row, self._shift)
        self._shift /= self._groups[0].t.size // self._channels
        shift = self._tile(0, self._shift)
        for index, group in enumerate(self._groups):
            t = group.t
            np.subtract(_load(group), shift[: t.size], out=t)
            self._add_rows(t, self._row, index == 0)
            np.multiply(t, t, out=t)
            self._add_rows(t, self._other, index == 0)
        for row, moment in zip(rows, self._moments, strict=True):
            self._fold(row, moment)
        mean, variance = self._moments
        mean /= self._own
        variance -= mean * mean * self._own
        mean += self._shift
        self._join_moments()
        np.maximum(variance, 0, out=variance)
        of_mean, of_variance = self._of_batch.reshape(2, -1)
        if self._member.index == 0:
            np.copyto(of_mean, mean)
            np.divide(variance, self._count - 1, out=of_variance)
        variance /= self._count

    def _join_moments(self) -> None:
        """From mean and squared distances of a shard's own, those of the whole batch.

        Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", 1983.
        """
        if self._member.is_alone:
            return
        means, moments, _ = self._tables
        own, variance = self._mean.copy(), self._variance
        self._mean *= self._own / self._count
        self._member.add_up(self._mean, means)
        own -= self._mean
        variance += own * own * self._own
        self._member.add_up(variance, moments)

    def backward(self) -> None:
        gamma_gradient, beta_gradient = self._parameter_gradients
        mean = self._tile(0, self._mean)
        for index, group in enumerate(self._groups):
            t, dy = group.t, group.dy
            self._mask(group)
            self._add_rows(dy, self._row, index == 0)
            np.subtract(_load(group), mean[: t.size], out=t)
            np.multiply(t, dy, out=t)
            self._add_rows(t, self._other, index == 0)
        of_beta, of_gamma = self._sums
        self._fold(self._row, of_beta)
        self._fold(self._other, of_gamma)
        np.multiply(of_gamma, self._scale, out=of_gamma)
        # The shards' gradients are added up behind the layer: these are this shard's own.
        np.copyto(beta_gradient, of_beta)
        np.copyto(gamma_gradient, of_gamma)
        if self._sink is not None:
            self._member.add_up(self._sums.reshape(-1), self._tables[2])
            self._backward_input()

    def _mask(self, group: _Group) -> None:
        """Turn the gradient behind the fused ReLU into the one in front of it, in place."""
        dy = group.shaped_dy
        if self._limit is not None:
            mask_between(dy, group.y, self._limit, group.masks, dy)
        elif self._relu:
            mask_positive(dy, group.y, group.masks[0], dy)

    def _backward_input(self) -> None:
        """The input's gradient is a * dy + b * x + c with three numbers for each channel."""
        gamma, _ = self._parameters
        beta_gradient, gamma_gradient = self._sums
        slope = gamma * self._scale
        towards = -slope * self._scale * gamma_gradient / self._count
        constant = -slope * beta_gradient / self._count - towards * self._mean
        a, b, c = self._tile(0, slope), self._tile(1, towards), self._tile(2, constant)
        for group in self._groups:
            t, u, length = group.t, group.u, group.t.size
            np.multiply(_load(group), b[:length], out=t)
            np.add(t, c[:length], out=t)
            np.multiply(group.dy, a[:length], out=u)
            np.add(t, u, out=group.result)
            if group.sink is not None:
                group.sink.put(group.shaped_t)


def _load(group: _Group) -> Array:
    """The group's input, contiguous."""
    if group.load is not None:
        np.copyto(*group.load)
    return group.x
