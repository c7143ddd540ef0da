"""The passes of a convolution by Winograd's tiles; see :mod:`dynacomm_async.nn.kernels.winograd`.

They do what those of :mod:`~dynacomm_async.nn.layers.convolution_passes` do, for 3 x 3 and stride
1, block by block of tiles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dynacomm_async.nn.graph import Node
from dynacomm_async.nn.kernels import (
    PLACES,
    REACH,
    TILE,
    TileBlock,
    Transforms,
    block_tiles,
    column_sums,
    plan_tiles,
    pool_maximum,
    tiles_in,
)
from dynacomm_async.nn.layers.convolution_passes import Activations
from dynacomm_async.nn.memory import Array, Memory, Sink

if TYPE_CHECKING:
    from dynacomm_async.nn.layers.convolution import Conv2d

__all__ = ["WinogradForward", "WinogradInput", "WinogradWeights"]


class _Workspace:
    """What the blocks of one pass go through, shared with all other passes.

    Attributes:
        most: tiles of the largest block.
        tiles: 1-D: tiles on their way in, and on their way out.
        weights: (36, C, O), transformed.
        flat_weights: the same memory as (36, C * O).
    """

    def __init__(self, memory: Memory, tiles: tuple[int, int], channels: tuple[int, int]) -> None:
        self.most = block_tiles(memory.batch, tiles)
        size = PLACES * self.most * max(channels)
        self.tiles = memory.scratch("tiles", size)
        self._sides = memory.scratch("transformed tiles", 2 * size).reshape(2, size)
        count = PLACES * channels[0] * channels[1]
        self.flat_weights = memory.scratch("transformed weights", count).reshape(PLACES, -1)
        self.weights = self.flat_weights.reshape(PLACES, *channels)

    def transformed(self, side: int, count: int, channels: int) -> _Transformed:
        """Room for so many transformed tiles, on one of two sides of a product."""
        shaped = self._sides[side, : PLACES * count * channels].reshape(PLACES, count, channels)
        return _Transformed(shaped, shaped.reshape(PLACES, -1))


class _Transformed(NamedTuple):
    """Transformed tiles, or products of them."""

    shaped: Array
    """(36, tiles, channels)"""
    flat: Array
    """The same memory as (36, tiles * channels)."""


def _flat(block: TileBlock) -> Array:
    """The block's workspace as (places, tiles * C)."""
    return block.scratch.reshape(len(block.scratch), -1)


class _ForwardStep(NamedTuple):
    tiles: TileBlock
    inputs: Array
    """The workspace of ``tiles``, (36, tiles * C)."""
    transformed: _Transformed
    products: _Transformed
    outputs: Array
    """(16, tiles * O)"""
    pooling: _Pooling | None
    finished: Array
    """1-D: the outputs or their maxima, to which bias and ReLU are applied."""
    result: TileBlock
    """Where ``finished`` belongs."""


class _Pooling(NamedTuple):
    unpooled: TileBlock
    """Where the outputs are kept."""
    taps: list[Array]
    """The window positions of the outputs."""
    pooled: Array
    """(2, 2, tiles * O), their maxima."""
    maxima: TileBlock
    """Where those are kept."""


class WinogradForward:
    """Transform, products, transform back, pooling, bias and ReLU while the block is in cache."""

    def __init__(self, node: Node, layer: Conv2d, memory: Memory, kept: Activations) -> None:
        self._weights, *self._bias = memory.parameters(node)
        self._relu = node.relu
        _, _, channels, outputs = self._weights.shape
        tiles = tiles_in((node.raw_shape[0], node.raw_shape[1]))
        self._space = space = _Workspace(memory, tiles, (channels, outputs))
        self._transforms = Transforms(memory.dtype)
        count = TILE * TILE * space.most * outputs
        self._tile, self._zeros = memory.scratch("tile", count), memory.zeros(count)
        gathers = plan_tiles(
            memory.value(node.inputs[0], layer.border()), REACH, tiles, space.tiles
        )
        # The input's tiles are used up when those of the output are written in their place.
        self._steps = []
        if node.pool is None:
            results = plan_tiles(kept.output, TILE, tiles, space.tiles)
            for block, result in zip(gathers, results, strict=True):
                self._steps.append(self._step(block, None, result))
            return
        size, pooled = TILE // 2, memory.scratch("masked", count)
        unpooled = plan_tiles(kept.unpooled, TILE, tiles, space.tiles)
        maxima = plan_tiles(kept.maxima, size, tiles, pooled)
        results = plan_tiles(kept.output, size, tiles, pooled)
        for block, raw, most, result in zip(gathers, unpooled, maxima, results, strict=True):
            positions = raw.scratch.reshape(TILE, TILE, -1)
            taps = [positions[i::size, j::size] for i in range(size) for j in range(size)]
            pooling = _Pooling(raw, taps, most.scratch.reshape(size, size, -1), most)
            self._steps.append(self._step(block, pooling, result))

    def _step(self, tiles: TileBlock, pooling: _Pooling | None, result: TileBlock) -> _ForwardStep:
        count, channels = tiles.scratch.shape[1:]
        outputs = result.scratch.shape[2]
        return _ForwardStep(
            tiles,
            _flat(tiles),
            self._space.transformed(0, count, channels),
            self._space.transformed(1, count, outputs),
            _flat(result if pooling is None else pooling.unpooled),
            pooling,
            result.scratch.reshape(-1),
            result,
        )

    def run(self) -> None:
        transforms, weights = self._transforms, self._space.weights
        flat = self._weights.reshape(9, -1)
        np.matmul(transforms.weights, flat, out=self._space.flat_weights)
        if self._bias:
            np.copyto(self._tile.reshape(-1, self._bias[0].size), self._bias[0])
        for tiles, inputs, transformed, products, outputs, pooling, finished, result in self._steps:
            tiles.gather()
            np.matmul(transforms.inputs, inputs, out=transformed.flat)
            np.matmul(transformed.shaped, weights, out=products.shaped)
            np.matmul(transforms.outputs, products.flat, out=outputs)
            if pooling is not None:
                pooling.unpooled.scatter()
                pool_maximum(pooling.taps, pooling.pooled)
                pooling.maxima.scatter()
            if self._bias:
                np.add(finished, self._tile[: finished.size], out=finished)
            if self._relu:
                np.maximum(finished, self._zeros[: finished.size], out=finished)
            result.scatter()


class _WeightsStep(NamedTuple):
    tiles: TileBlock
    inputs: Array
    """The workspace of ``tiles``, (36, tiles * C)."""
    left: _Transformed
    gradients: TileBlock
    rows: Array
    """The workspace of ``gradients``, (16, tiles * O)."""
    right: _Transformed


class WinogradWeights:
    """Tiles again, transformed, times the transformed tiles of the output's gradient."""

    def __init__(self, node: Node, layer: Conv2d, memory: Memory, gradient: Array) -> None:
        self._out, *self._bias = memory.parameter_gradients(node)
        _, _, channels, outputs = self._out.shape
        tiles = tiles_in((node.raw_shape[0], node.raw_shape[1]))
        self._space = space = _Workspace(memory, tiles, (channels, outputs))
        self._transforms = Transforms(memory.dtype)
        part = memory.scratch("part of transformed weights", space.weights.size)
        self._part = part.reshape(space.weights.shape)
        self._bias_part = np.empty(outputs, memory.dtype)
        self._ones = memory.ones(TILE * TILE * space.most)
        bordered = memory.value(node.inputs[0], layer.border())
        # One after the other in the same place: each is transformed before the next is read.
        gathers = plan_tiles(bordered, REACH, tiles, space.tiles)
        gradients = plan_tiles(gradient, TILE, tiles, space.tiles)
        self._steps = []
        for x, dz in zip(gathers, gradients, strict=True):
            count = x.scratch.shape[1]
            left, right = (
                space.transformed(0, count, channels),
                space.transformed(1, count, outputs),
            )
            self._steps.append(_WeightsStep(x, _flat(x), left, dz, _flat(dz), right))

    def run(self) -> None:
        transforms, total, first = self._transforms, self._space.weights, True
        for tiles, inputs, left, gradients, rows, right in self._steps:
            tiles.gather()
            np.matmul(transforms.inputs, inputs, out=left.flat)
            gradients.gather()
            np.matmul(transforms.outputs.T, rows, out=right.flat)
            out = total if first else self._part
            np.matmul(left.shaped.transpose(0, 2, 1), right.shaped, out=out)
            if not first:
                np.add(total, self._part, out=total)
            for bias in self._bias:
                self._add_bias(bias, rows.reshape(-1, bias.size), first)
            first = False
        target = self._out.reshape(9, -1)
        np.matmul(transforms.weights.T, self._space.flat_weights, out=target)

    def _add_bias(self, bias: Array, rows: Array, first: bool) -> None:
        column_sums(rows, self._ones, bias if first else self._bias_part)
        if not first:
            np.add(bias, self._bias_part, out=bias)


class _InputStep(NamedTuple):
    tiles: TileBlock
    inputs: Array
    """The workspace of ``tiles``, (36, tiles * O)."""
    transformed: _Transformed
    products: _Transformed
    outputs: Array
    """The workspace of ``result``, (16, tiles * C)."""
    result: TileBlock


class WinogradInput:
    """The same convolution of the framed gradient with the turned weights."""

    def __init__(self, node: Node, layer: Conv2d, memory: Memory, frame: Array, sink: Sink) -> None:
        self._weights = memory.parameters(node)[0]
        _, _, channels, outputs = self._weights.shape
        height, width, _ = node.inputs[0].shape
        tiles = tiles_in((height, width))
        self._space = space = _Workspace(memory, tiles, (channels, outputs))
        self._transforms = Transforms(memory.dtype)
        gathers = plan_tiles(frame, REACH, tiles, space.tiles)
        results = plan_tiles(sink.array, TILE, tiles, space.tiles, accumulate=sink.accumulate)
        self._steps = []
        for dz, result in zip(gathers, results, strict=True):
            count = dz.scratch.shape[1]
            left, right = (
                space.transformed(0, count, outputs),
                space.transformed(1, count, channels),
            )
            self._steps.append(_InputStep(dz, _flat(dz), left, right, _flat(result), result))

    def run(self) -> None:
        transforms, flat = self._transforms, self._weights.reshape(9, -1)
        np.matmul(transforms.turned, flat, out=self._space.flat_weights)
        swapped = self._space.weights.transpose(0, 2, 1)
        for tiles, inputs, transformed, products, outputs, result in self._steps:
            tiles.gather()
            np.matmul(transforms.inputs, inputs, out=transformed.flat)
            np.matmul(transformed.shaped, swapped, out=products.shaped)
            np.matmul(transforms.outputs, products.flat, out=outputs)
            result.scatter()
