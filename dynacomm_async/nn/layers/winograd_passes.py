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
from dynacomm_async.nn.memory import Array, Memory, Sink

if TYPE_CHECKING:
    from dynacomm_async.nn.layers.convolution import Conv2d

__all__ = ["WinogradForward", "WinogradInput", "WinogradWeights"]


class _Workspace:
    """Of one pass, shared with all others: what a block is on its way through."""

    def __init__(self, memory: Memory, tiles: tuple[int, int], channels: tuple[int, int]) -> None:
        self.most = block_tiles(memory.batch, tiles)
        size = PLACES * self.most * max(channels)
        self.tiles = memory.scratch("tiles", size)
        self.transformed = memory.scratch("transformed tiles", size)
        self.products = memory.scratch("tile products", size)
        count = PLACES * channels[0] * channels[1]
        self.weights = memory.scratch("transformed weights", count).reshape(PLACES, *channels)


class _ForwardStep(NamedTuple):
    tiles: TileBlock
    transformed: Array
    """(36, tiles, C)"""
    products: Array
    """(36, tiles, O)"""
    outputs: Array
    """(16, tiles * O)"""
    unpooled: TileBlock | None
    """With pooling: where ``outputs`` is kept."""
    maxima: TileBlock
    """With pooling of the maxima, else of ``outputs``, before bias and ReLU."""
    taps: list[Array]
    """With pooling: the window positions of ``outputs``."""
    pooled: Array
    """With pooling: (2, 2, tiles, O), where the maxima are written."""
    result: TileBlock
    """Where what comes out goes."""


class WinogradForward:
    """Transform, products, transform back, pooling, bias and ReLU while the block is in cache.

    Attributes:
        output, unpooled, maxima: as those of ``ForwardPass``.
    """

    def __init__(self, node: Node, layer: Conv2d, memory: Memory, unpooled: Array) -> None:
        self.output = memory.value(node.output)
        self.unpooled = unpooled
        self.maxima = memory.keep(node.output.shape) if node.pool else self.output
        self._weights, *self._bias = memory.parameters(node)
        self._relu, self._pool = node.relu, node.pool is not None
        _, _, channels, outputs = self._weights.shape
        tiles = tiles_in((node.raw_shape[0], node.raw_shape[1]))
        self._space = space = _Workspace(memory, tiles, (channels, outputs))
        self._transforms = Transforms(memory.dtype)
        count = TILE * TILE * space.most * outputs
        self._tile, self._zeros = memory.scratch("tile", count), memory.zeros(count)
        second = memory.scratch("masked", count)
        bordered = memory.value(node.inputs[0], layer.border())
        gathers = plan_tiles(bordered, REACH, tiles, space.tiles)
        size = TILE // 2 if self._pool else TILE
        # Tiles of the input are used up when what comes out is written in their place.
        source = second if self._pool else space.tiles
        raw = plan_tiles(unpooled, TILE, tiles, space.tiles) if self._pool else [None] * len(gathers)
        maxima = plan_tiles(self.maxima, size, tiles, source, step=size)
        results = plan_tiles(self.output, size, tiles, source, step=size)
        self._steps = [
            self._step(*blocks) for blocks in zip(gathers, raw, maxima, results, strict=True)
        ]

    def _step(
        self, tiles: TileBlock, raw: TileBlock | None, maxima: TileBlock, result: TileBlock
    ) -> _ForwardStep:
        count, channels = tiles.scratch.shape[1:]
        outputs = self._weights.shape[3]
        space = self._space
        transformed = space.transformed[: PLACES * count * channels]
        products = space.products[: PLACES * count * outputs]
        out = space.tiles[: TILE * TILE * count * outputs]
        positions = out.reshape(TILE, TILE, -1)
        taps = [positions[i::2, j::2] for i in range(2) for j in range(2)]
        return _ForwardStep(
            tiles,
            transformed.reshape(PLACES, count, channels),
            products.reshape(PLACES, count, outputs),
            out.reshape(TILE * TILE, -1),
            raw,
            maxima,
            taps if raw is not None else [],
            maxima.scratch.reshape(TILE // 2, TILE // 2, -1) if raw is not None else maxima.scratch,
            result,
        )

    def run(self) -> None:
        transforms, weights = self._transforms, self._space.weights
        flat = weights.reshape(PLACES, -1)
        np.matmul(transforms.weights, self._weights.reshape(9, -1), out=flat)
        if self._bias:
            np.copyto(self._tile.reshape(-1, self._bias[0].size), self._bias[0])
        for step in self._steps:
            step.tiles.gather()
            inputs = step.tiles.scratch.reshape(PLACES, -1)
            np.matmul(transforms.inputs, inputs, out=step.transformed.reshape(PLACES, -1))
            np.matmul(step.transformed, weights, out=step.products)
            np.matmul(transforms.outputs, step.products.reshape(PLACES, -1), out=step.outputs)
            if step.unpooled is not None:
                step.unpooled.scatter()
                pool_maximum(step.taps, step.pooled)
                step.maxima.scatter()
            self._finish(step.result.scratch.reshape(-1))
            step.result.scatter()

    def _finish(self, flat: Array) -> None:
        """Add the bias and rectify, in place."""
        if self._bias:
            np.add(flat, self._tile[: flat.size], out=flat)
        if self._relu:
            np.maximum(flat, self._zeros[: flat.size], out=flat)


class _WeightsStep(NamedTuple):
    tiles: TileBlock
    transformed: Array
    """(36, tiles, C)"""
    gradients: TileBlock
    products: Array
    """(36, tiles, O): transformed gradients of the output."""


class WinogradWeights:
    """Tiles again, transformed, times the transformed tiles of the output's gradient."""

    def __init__(self, node: Node, layer: Conv2d, memory: Memory, gradient: Array) -> None:
        self._out, *self._bias = memory.parameter_gradients(node)
        _, _, channels, outputs = self._out.shape
        tiles = tiles_in((node.raw_shape[0], node.raw_shape[1]))
        space = _Workspace(memory, tiles, (channels, outputs))
        self._transforms = Transforms(memory.dtype)
        self._spread = np.ascontiguousarray(self._transforms.outputs.T)
        self._gathered = np.ascontiguousarray(self._transforms.weights.T)
        self._sum = space.weights
        part = memory.scratch("part of transformed weights", self._sum.size)
        self._part = part.reshape(self._sum.shape)
        self._bias_part = np.empty(outputs, memory.dtype)
        self._ones = memory.ones(TILE * TILE * space.most)
        bordered = memory.value(node.inputs[0], layer.border())
        # One after the other in the same place: each is transformed before the next is read.
        gathers = plan_tiles(bordered, REACH, tiles, space.tiles)
        gradients = plan_tiles(gradient, TILE, tiles, space.tiles)
        self._steps = []
        for x, dz in zip(gathers, gradients, strict=True):
            count = x.scratch.shape[1]
            left = space.transformed[: PLACES * count * channels].reshape(PLACES, count, channels)
            right = space.products[: PLACES * count * outputs].reshape(PLACES, count, outputs)
            self._steps.append(_WeightsStep(x, left, dz, right))

    def run(self) -> None:
        transforms, total, first = self._transforms, self._sum, True
        for tiles, transformed, gradients, products in self._steps:
            tiles.gather()
            inputs = tiles.scratch.reshape(PLACES, -1)
            np.matmul(transforms.inputs, inputs, out=transformed.reshape(PLACES, -1))
            gradients.gather()
            rows = gradients.scratch.reshape(TILE * TILE, -1)
            np.matmul(self._spread, rows, out=products.reshape(PLACES, -1))
            out = total if first else self._part
            np.matmul(transformed.transpose(0, 2, 1), products, out=out)
            if not first:
                np.add(total, self._part, out=total)
            for bias in self._bias:
                sums = bias if first else self._bias_part
                column_sums(rows.reshape(-1, bias.size), self._ones, sums)
                if not first:
                    np.add(bias, self._bias_part, out=bias)
            first = False
        out = self._out.reshape(9, -1)
        np.matmul(self._gathered, total.reshape(PLACES, -1), out=out)


class _InputStep(NamedTuple):
    tiles: TileBlock
    transformed: Array
    """(36, tiles, O)"""
    products: Array
    """(36, tiles, C)"""
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
            left = space.transformed[: PLACES * count * outputs].reshape(PLACES, count, outputs)
            right = space.products[: PLACES * count * channels].reshape(PLACES, count, channels)
            self._steps.append(_InputStep(dz, left, right, result))

    def run(self) -> None:
        transforms, weights = self._transforms, self._space.weights
        flat = weights.reshape(PLACES, -1)
        np.matmul(transforms.turned, self._weights.reshape(9, -1), out=flat)
        swapped = weights.transpose(0, 2, 1)
        for tiles, transformed, products, result in self._steps:
            tiles.gather()
            inputs = tiles.scratch.reshape(PLACES, -1)
            np.matmul(transforms.inputs, inputs, out=transformed.reshape(PLACES, -1))
            np.matmul(transformed, swapped, out=products)
            out = result.scratch.reshape(TILE * TILE, -1)
            np.matmul(transforms.outputs, products.reshape(PLACES, -1), out=out)
            result.scatter()
