"""The passes of a convolution: forward, masking, gradient of the weights, gradient of the input.

Each is planned once: blocks with all their views are made when a batch size is bound, and running
a pass is a loop over copies and products.
"""

from __future__ import annotations

import itertools
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dynacomm_async.nn.graph import Node
from dynacomm_async.nn.kernels import (
    Block,
    Phase,
    column_sums,
    columns_needed,
    image_groups,
    mask_positive,
    plan_blocks,
    pool_maximum,
    rotate_weights,
    unpool_maximum,
    window_taps,
)
from dynacomm_async.nn.memory import Array, Memory, Sink

if TYPE_CHECKING:
    from dynacomm_async.nn.layers.convolution import Conv2d

__all__ = ["Activations", "ForwardPass", "InputPass", "MaskPass", "WeightsPass"]


class Activations(NamedTuple):
    """What a convolution leaves behind for its way back; one array three times without pooling."""

    output: Array
    unpooled: Array
    """Before pooling, bias and ReLU."""
    maxima: Array
    """Before bias and ReLU."""

    @classmethod
    def plan(cls, node: Node, memory: Memory) -> Activations:
        """The arrays of this node."""
        output = memory.value(node.output)
        if node.pool is None:
            return cls(output, output, output)
        return cls(output, memory.keep(node.raw_shape), memory.keep(node.output.shape))


class _ForwardStep(NamedTuple):
    block: Block
    product: Array
    """(pixels, O): where the matrix product is written."""
    taps: list[Array]
    """With pooling: the window positions of ``product``."""
    maxima: Array
    """With pooling: (n, h, w, O), the maxima before bias and ReLU."""
    source: Array
    """1-D: product or maxima, to which bias and ReLU are applied ..."""
    result: Array
    """... on the way into this, of the same length."""
    shaped: Array
    """``result`` as (n, h, w, O)."""
    target: Array | None
    """Where in the output it belongs; None if it lies there already."""


class ForwardPass:
    """Columns, product, pooling, bias and ReLU, block by block while the block is in cache.

    All arithmetic is on contiguous memory; only the last copy goes into the bordered output, since
    NumPy copies into strided memory much faster than it computes into it.
    """

    def __init__(self, node: Node, layer: Conv2d, memory: Memory, kept: Activations) -> None:
        self._kept = kept
        self._weights, *self._bias = memory.parameters(node)
        self._relu = node.relu
        height, width, channels = node.raw_shape
        unit = node.pool[0] if node.pool else 1
        bordered = memory.value(node.inputs[0], layer.border())
        inner = self._weights.size // channels
        count = columns_needed(memory.batch, (height, width), inner, unit=unit)
        columns = memory.scratch("columns", count)
        blocks = plan_blocks(bordered, layer.window, layer.steps, columns, unit=unit)
        largest = max(block.rows for block in blocks) * channels
        self._products = memory.scratch("products", largest)
        self._pooled = memory.scratch("masked", largest)
        self._tile = memory.scratch("tile", largest)
        self._zeros = memory.zeros(largest)
        self._matrix = self._weights.reshape(inner, channels)
        self._steps = [self._step(block, node) for block in blocks]

    def _step(self, block: Block, node: Node) -> _ForwardStep:
        raw = block.cut(self._kept.unpooled)
        if not raw.flags.c_contiguous:
            raw = self._products[: raw.size].reshape(raw.shape)
        product = raw.reshape(-1, raw.shape[3])
        if node.pool is None:
            target = block.cut(self._kept.output)
            here = np.may_share_memory(raw, target)
            flat = raw.reshape(-1)
            return _ForwardStep(block, product, [], raw, flat, flat, raw, None if here else target)
        high = node.pool[0]
        pooled = slice(block.lines.start // high, block.lines.stop // high)
        maxima = self._kept.maxima[block.images, pooled]
        target = self._kept.output[block.images, pooled]
        taps = window_taps(raw, node.pool, node.pool, (maxima.shape[1], maxima.shape[2]))
        source = maxima.reshape(-1)
        result = self._pooled[: maxima.size] if self._bias or self._relu else source
        shaped = result.reshape(maxima.shape)
        return _ForwardStep(block, product, taps, maxima, source, result, shaped, target)

    def run(self) -> None:
        if self._bias:
            np.copyto(self._tile.reshape(-1, self._bias[0].size), self._bias[0])
        for block, product, taps, maxima, source, result, shaped, target in self._steps:
            block.fill()
            np.matmul(block.matrix, self._matrix, out=product)
            if taps:
                pool_maximum(taps, maxima)
            now = source
            if self._bias:
                now = np.add(now, self._tile[: now.size], out=result)
            if self._relu:
                np.maximum(now, self._zeros[: now.size], out=result)
            if target is not None:
                np.copyto(target, shaped)


class MaskPass:
    """The gradient before ReLU and pooling, from the one behind them, image group by group."""

    def __init__(self, node: Node, memory: Memory, kept: Activations, gradient: Array) -> None:
        self._relu = node.relu
        incoming = memory.gradient(node.output)
        groups = image_groups(incoming.shape)
        size = incoming[groups[0]].size
        scratch, mask = memory.scratch("masked", size), memory.scratch("mask", size, np.bool_)
        self._groups = []
        for images in groups:
            dy, y = incoming[images], kept.output[images]
            m = mask[: dy.size].reshape(dy.shape)
            dz = gradient[images]
            masked = scratch[: dy.size].reshape(dy.shape)
            taps: list[Array] = []
            targets: list[Array] = []
            if node.pool:
                taps = window_taps(kept.unpooled[images], node.pool, node.pool, dy.shape[1:3])
                targets = window_taps(dz, node.pool, node.pool, dy.shape[1:3])
            self._groups.append((dy, y, m, masked, dz, taps, targets, kept.maxima[images]))

    def run(self) -> None:
        for dy, y, mask, masked, dz, taps, targets, maxima in self._groups:
            if not taps:
                mask_positive(dy, y, mask, dz)
                continue
            if self._relu:
                mask_positive(dy, y, mask, masked)
            else:
                np.copyto(masked, dy)
            unpool_maximum(taps, maxima, masked, mask, targets)


class WeightsPass:
    """Columns again, block by block, times the gradient of the output."""

    def __init__(self, node: Node, layer: Conv2d, memory: Memory, gradient: Array) -> None:
        self._out, *self._bias = memory.parameter_gradients(node)
        height, width, channels = node.raw_shape
        bordered = memory.value(node.inputs[0], layer.border())
        inner = self._out.size // channels
        count = columns_needed(memory.batch, (height, width), inner)
        columns = memory.scratch("columns", count)
        blocks = plan_blocks(bordered, layer.window, layer.steps, columns)
        most = max(block.rows for block in blocks)
        rows = memory.scratch("products", most * channels)
        self._sum = self._out.reshape(inner, channels)
        self._part = memory.scratch("weights", self._sum.size).reshape(self._sum.shape)
        self._bias_part = np.empty(channels, memory.dtype)
        self._ones = memory.ones(most)
        self._steps = []
        for block in blocks:
            source = block.cut(gradient)
            target = rows[: source.size].reshape(source.shape)
            self._steps.append((block, source, target, target.reshape(-1, channels)))

    def run(self) -> None:
        total, bias, first = self._sum, self._bias, True
        for block, source, target, rows in self._steps:
            block.fill()
            np.copyto(target, source)
            np.matmul(block.matrix.T, rows, out=total if first else self._part)
            if bias:
                column_sums(rows, self._ones, bias[0] if first else self._bias_part)
            if not first:
                np.add(total, self._part, out=total)
                if bias:
                    np.add(bias[0], self._bias_part, out=bias[0])
            first = False


MOST_PAIRED = 8
"""Channels of an input up to which a row of columns serves two neighbouring pixels.

Products with so few columns are slow. The row holds what both see, and the weights stand in the
matrix once for each of them, with zeros beside.
"""


def _wide_extent(v: Phase, h: Phase, channels: int) -> tuple[int, int, int]:
    """Lines and pixels that a row of columns holds, and pixels that it serves."""
    beside = 2 if channels <= MOST_PAIRED and h.count % 2 == 0 else 1
    return v.reach, h.reach + beside - 1, beside


class _InputStep(NamedTuple):
    block: Block
    matrix: Array
    """(taps * O, C) or (wider taps * O, 2 * C): turned weights of the block's phase."""
    product: Array
    """(pixels, C) or (pairs of pixels, 2 * C): where the matrix product is written."""
    shaped: Array
    """``product`` as (n, h, w, C)."""
    sink: Sink | None
    """Where it belongs; None if it lies there already."""


class InputPass:
    """Convolutions of the framed gradient with the turned weights, one for each phase."""

    def __init__(self, node: Node, layer: Conv2d, memory: Memory, frame: Array, sink: Sink) -> None:
        self._weights = memory.parameters(node)[0]
        self._sink = sink
        self._frame = layer.frame(node)
        self._rotations: list[tuple[tuple[slice, slice], Array]] = []
        self._spread: list[Array] = []
        self._steps: list[_InputStep] = []
        pairs = list(itertools.product(*layer.phases(node.inputs[0].shape)))
        live = [(v, h) for v, h in pairs if v.reach and h.reach]
        dead = [(v, h) for v, h in pairs if not (v.reach and h.reach)]
        self._untouched = [sink.array[:, v.pixels, h.pixels] for v, h in dead]
        channels, outputs = self._weights.shape[2:]
        extents = [_wide_extent(v, h, channels) for v, h in live]
        needed = [
            columns_needed(memory.batch, (v.count, h.count // beside), high * wide * outputs)
            for (v, h), (high, wide, beside) in zip(live, extents, strict=True)
        ]
        columns = memory.scratch("columns", max(needed))
        sizes = [prod(extent) * channels * outputs for extent in extents]
        weights = memory.scratch("weights", sum(sizes))
        used = 0
        for (v, h), size in zip(live, sizes, strict=True):
            self._add_phase((v, h), frame, columns, weights[used : used + size], memory)
            used += size

    def _add_phase(
        self,
        phase: tuple[Phase, Phase],
        framed: Array,
        columns: Array,
        weights: Array,
        memory: Memory,
    ) -> None:
        (v, h), (_, _, channels, outputs) = phase, self._weights.shape
        assert self._frame is not None
        top, left = self._frame.above + v.first, self._frame.left + h.first
        seen = framed[:, top : top + v.count + v.reach - 1, left : left + h.count + h.reach - 1]
        high, wide, beside = _wide_extent(v, h, channels)
        spread = weights.reshape(high, wide, outputs, beside, channels)
        if beside > 1:
            self._spread.append(spread)
        for pixel in range(beside):
            rotated = spread[:, pixel : pixel + h.reach, :, pixel]
            self._rotations.append(((v.taps, h.taps), rotated))
        matrix = spread.reshape(-1, beside * channels)
        blocks = plan_blocks(seen, (high, wide), (1, beside), columns)
        most = max(block.rows for block in blocks)
        scratch = memory.scratch("products", most * beside * channels)
        pixels = self._sink.array[:, v.pixels, h.pixels]
        for block in blocks:
            target = block.cut(pixels)
            direct = target.flags.c_contiguous and not self._sink.accumulate
            shaped = target if direct else scratch[: target.size].reshape(target.shape)
            sink = None if direct else Sink(target, self._sink.accumulate)
            flat = shaped.reshape(-1, beside * channels)
            self._steps.append(_InputStep(block, matrix, flat, shaped, sink))

    def run(self) -> None:
        if not self._sink.accumulate:
            for pixels in self._untouched:
                pixels[...] = 0
        for spread in self._spread:
            spread[...] = 0
        for taps, rotated in self._rotations:
            rotate_weights(self._weights, taps, rotated)
        for block, matrix, flat, shaped, sink in self._steps:
            block.fill()
            np.matmul(block.matrix, matrix, out=flat)
            if sink is not None:
                sink.put(shaped)
