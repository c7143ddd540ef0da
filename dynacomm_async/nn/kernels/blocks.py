"""Cutting a convolution into blocks whose columns stay in the second-level cache.

A convolution is a matrix product of *columns* (one row for each output pixel, holding the k x k x C
inputs that it sees) and the weights. The columns of a whole batch are k * k times as large as the
input; built for a block of pixels at a time they never leave the cache. All views are made once,
when a batch size is planned, since making one costs as much as a small copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

__all__ = [
    "COLUMN_FLOATS",
    "LEAST_ROWS",
    "Block",
    "GroupBlock",
    "columns_needed",
    "plan_blocks",
    "plan_group_blocks",
]

Array = NDArray[Any]

COLUMN_FLOATS = 160_000
"""How many elements of columns a block aims at (640 KB in float32)."""

LEAST_ROWS = 256
"""Output pixels a block should hold even if its columns outgrow that.

Each product packs the weights again and each block of their gradient is added up: with fewer
pixels that costs more than the cache saves.
"""

_FEW_CHANNELS = 4


@dataclass(frozen=True, slots=True)
class Block:
    """Some output pixels of a convolution: whole images, or some lines of one image.

    Attributes:
        windows: view of the bordered input, what each of the block's pixels sees.
        columns: view of the workspace, of the same shape as ``windows``.
        matrix: the same memory as ``columns``, as (pixels, kh * kw * C); the transpose of a
            C-contiguous array where channels are few.
        images: which images of the batch.
        lines: which lines of the output.
    """

    windows: Array
    columns: Array
    matrix: Array
    images: slice
    lines: slice

    @property
    def rows(self) -> int:
        """Output pixels in this block."""
        return int(self.matrix.shape[0])

    def fill(self) -> None:
        """Copy what the pixels see into the columns."""
        np.copyto(self.columns, self.windows)

    def cut(self, array: Array) -> Array:
        """This block's part of an (N, OH, ...) array, as a view."""
        return array[self.images, self.lines]


def _extent(batch: int, height: int, line_floats: int, limit: int, unit: int) -> tuple[int, int]:
    """Images and lines of a block: whole images if one fits, else some lines of one."""
    image_floats = height * line_floats
    if image_floats <= limit:
        return min(batch, limit // image_floats), height
    return 1, min(height, max(unit, limit // line_floats // unit * unit))


def _limit(inner: int) -> int:
    return max(COLUMN_FLOATS, LEAST_ROWS * inner)


def columns_needed(
    batch: int,
    output: tuple[int, int],
    inner: int,
    *,
    unit: int = 1,
) -> int:
    """Elements of workspace that :func:`plan_blocks` with the same arguments needs."""
    height, width = output
    images, lines = _extent(batch, height, width * inner, _limit(inner), unit)
    return images * lines * width * inner


def plan_blocks(
    bordered: Array,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    workspace: Array,
    *,
    unit: int = 1,
) -> list[Block]:
    """Cut the convolution of ``bordered`` into blocks.

    Args:
        bordered: (N, HB, WB, C) input with its zero border, channels contiguous and pixels of a
            line next to each other; blocks keep views of it.
        kernel: kh, kw.
        stride: vertical, horizontal.
        workspace: 1-D array of at least :func:`columns_needed` elements, shared by the blocks.
        unit: blocks that hold only part of an image hold a multiple of this many lines.
    """
    batch, height_b, width_b, channels = bordered.shape
    (kh, kw), (sh, sw) = kernel, stride
    height, width = (height_b - kh) // sh + 1, (width_b - kw) // sw + 1
    inner = kh * kw * channels
    few = channels <= _FEW_CHANNELS
    step_n, step_h, step_w, step_c = bordered.strides
    if few:
        # With few channels a pixel's k x k x C inputs come in runs too short to copy fast:
        # lines of output pixels are the longer run, so the columns are built transposed.
        windows = as_strided(
            bordered,
            (kh, kw, channels, batch, height, width),
            (step_h, step_w, step_c, step_n, step_h * sh, step_w * sw),
            writeable=False,
        )
    else:
        windows = as_strided(
            bordered,
            (batch, height, width, kh, kw * channels),
            (step_n, step_h * sh, step_w * sw, step_h, step_c),
            writeable=False,
        )
    images, lines = _extent(batch, height, width * inner, _limit(inner), unit)
    blocks = []
    for n in range(0, batch, images):
        for h in range(0, height, lines):
            where_n = slice(n, min(n + images, batch))
            where_h = slice(h, min(h + lines, height))
            part = windows[:, :, :, where_n, where_h] if few else windows[where_n, where_h]
            columns = workspace[: part.size].reshape(part.shape)
            matrix = columns.reshape(inner, -1).T if few else columns.reshape(-1, inner)
            blocks.append(Block(part, columns, matrix, where_n, where_h))
    return blocks


@dataclass(frozen=True, slots=True)
class GroupBlock(Block):
    """Some output pixels of a convolution in groups; as :class:`Block` but for its axes.

    Attributes:
        windows: view (groups, n, h, w, kh, kw, channels of a group) of the bordered input.
        columns: view of the workspace, of the same shape.
        matrix: the same memory as (groups, pixels, kh * kw * channels of a group).
    """

    @property
    def rows(self) -> int:
        """Output pixels in this block."""
        return int(self.matrix.shape[1])


def plan_group_blocks(
    bordered: Array,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    groups: int,
    workspace: Array,
) -> list[GroupBlock]:
    """Cut a convolution whose channels fall into ``groups`` into blocks.

    The arguments are as in :func:`plan_blocks`, with C a multiple of ``groups``.
    """
    batch, height_b, width_b, channels = bordered.shape
    (kh, kw), (sh, sw) = kernel, stride
    height, width = (height_b - kh) // sh + 1, (width_b - kw) // sw + 1
    inner, own = kh * kw * channels, channels // groups
    step_n, step_h, step_w, step_c = bordered.strides
    windows = as_strided(
        bordered,
        (groups, batch, height, width, kh, kw, own),
        (own * step_c, step_n, step_h * sh, step_w * sw, step_h, step_w, step_c),
        writeable=False,
    )
    images, lines = _extent(batch, height, width * inner, _limit(inner), 1)
    blocks = []
    for n in range(0, batch, images):
        for h in range(0, height, lines):
            where_n = slice(n, min(n + images, batch))
            where_h = slice(h, min(h + lines, height))
            part = windows[:, where_n, where_h]
            columns = workspace[: part.size].reshape(part.shape)
            matrix = columns.reshape(groups, -1, kh * kw * own)
            blocks.append(GroupBlock(part, columns, matrix, where_n, where_h))
    return blocks
