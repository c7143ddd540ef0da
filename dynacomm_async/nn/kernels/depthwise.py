"""Convolutions in which every channel has a kernel of its own.

There is nothing for a matrix product to share between channels, so no columns are built: einsum
runs over a strided view of the input and adds up the taps of a line while it is in the first-level
cache. With a horizontal stride of 1 the pixels and channels of a line are one contiguous run, along
which the weights are repeated.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

__all__ = ["DepthwiseWindows", "lines_of"]

Array = NDArray[Any]


def lines_of(array: Array) -> Array:
    """View (N, H, W * C) of ``array`` (N, H, W, C), whose lines are contiguous."""
    batch, height, width, channels = array.shape
    step_n, step_h, _, step_c = array.strides
    return as_strided(array, (batch, height, width * channels), (step_n, step_h, step_c))


class DepthwiseWindows:
    """What each pixel of the output sees, channel by channel.

    Args:
        bordered: (N, HB, WB, C) input with its zero border, channels contiguous and pixels of a
            line next to each other; views of it are kept.
        kernel: kh, kw.
        stride: vertical, horizontal.
        tile: 1-D workspace of at least :meth:`tile_needed` elements; what it holds does not
            survive a call.

    Attributes:
        extent: height and width of the output.
    """

    def __init__(
        self, bordered: Array, kernel: tuple[int, int], stride: tuple[int, int], tile: Array
    ) -> None:
        batch, height_b, width_b, channels = bordered.shape
        (kh, kw), (sh, sw) = kernel, stride
        height, width = (height_b - kh) // sh + 1, (width_b - kw) // sw + 1
        self.extent = height, width
        self._merged = sw == 1
        step_n, step_h, step_w, step_c = bordered.strides
        line = (width * channels,) if self._merged else (width, channels)
        along = (step_c,) if self._merged else (step_w * sw, step_c)
        self._windows = as_strided(
            bordered,
            (batch, height, kh, kw, *line),
            (step_n, step_h * sh, step_h, step_w, *along),
            writeable=False,
        )
        length = width * channels if self._merged else channels
        self._tile = tile[: kh * kw * length].reshape(kh, kw, length)
        self._spread = self._tile.reshape(kh, kw, -1, channels)

    @staticmethod
    def tile_needed(width: int, channels: int, kernel: tuple[int, int]) -> int:
        """Elements of workspace for an output of ``width`` pixels a line."""
        return kernel[0] * kernel[1] * width * channels

    def correlate(self, weights: Array, out: Array) -> None:
        """Write the sum over the window of input times ``weights`` (kh, kw, C).

        Args:
            out: (N, H, W, C); its lines are contiguous.
        """
        np.copyto(self._spread, weights[:, :, None])
        if self._merged:
            np.einsum("nhijk,ijk->nhk", self._windows, self._tile, out=lines_of(out))
        else:
            np.einsum("nhijwc,ijc->nhwc", self._windows, self._tile, out=out)

    def weigh(self, gradient: Array, out: Array) -> None:
        """Write the weights' gradient, (kh, kw, C), from the output's.

        Args:
            gradient: (N, H, W, C); its lines are contiguous.
        """
        if self._merged:
            np.einsum("nhijk,nhk->ijk", self._windows, lines_of(gradient), out=self._tile)
            np.add.reduce(self._spread, axis=2, out=out)
        else:
            np.einsum("nhijwc,nhwc->ijc", self._windows, gradient, out=out)
