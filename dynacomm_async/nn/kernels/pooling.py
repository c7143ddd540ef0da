"""Maximum over windows, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Tap",
    "clipped_taps",
    "maximum_steps",
    "pool_maximum",
    "unpool_maximum",
    "window_taps",
]

Array = NDArray[Any]


class Tap(NamedTuple):
    """One position of windows that may reach over the edge of an image."""

    where: tuple[slice, slice, slice]
    """Images, lines and pixels of the output whose windows have this position inside the image."""
    view: Array
    """What those windows see there, (N, lines, pixels, C)."""


def window_taps(
    array: Array, size: tuple[int, int], stride: tuple[int, int], output: tuple[int, int]
) -> list[Array]:
    """Views (N, OH, OW, C) of ``array`` (N, H, W, C), one for each position in the window.

    In the order in which a window is scanned: line by line.
    """
    height, width = ((count - 1) * step + 1 for count, step in zip(output, stride, strict=True))
    return [
        array[:, i : i + height : stride[0], j : j + width : stride[1]]
        for i in range(size[0])
        for j in range(size[1])
    ]


def clipped_taps(
    array: Array,
    size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    output: tuple[int, int],
) -> list[Tap]:
    """As :func:`window_taps` for windows that begin ``padding`` before the image ``array``.

    Positions that no window has inside the image are left out.
    """
    vertical, horizontal = (
        _clip(*numbers)
        for numbers in zip(array.shape[1:3], size, stride, padding, output, strict=True)
    )
    every = slice(None)
    return [
        Tap((every, lines, pixels), array[:, high, wide])
        for lines, high in vertical
        for pixels, wide in horizontal
    ]


def _clip(
    extent: int, size: int, stride: int, padding: int, output: int
) -> list[tuple[slice, slice]]:
    """For each position in one direction: windows that have it inside, and what it sees."""
    found = []
    for position in range(size):
        first = max(0, -(-(padding - position) // stride))
        end = min(output, (extent - 1 + padding - position) // stride + 1)
        if first < end:
            start = first * stride + position - padding
            seen = slice(start, start + (end - first - 1) * stride + 1, stride)
            found.append((slice(first, end), seen))
    return found


def maximum_steps(
    array: Array, out: Array, axis: int, size: int, stride: int, padding: int
) -> list[tuple[Array, Array, Array]]:
    """Maxima over windows in one direction, as calls (a, b, out) of :func:`numpy.maximum`.

    A window of both directions is one of windows: lines first, which are long, then pixels.

    Args:
        array, out: alike but along ``axis``; the steps keep views of them.
        size, stride: of the windows.
        padding: so far before the first element the first window begins.
    """

    def part(whole: Array, where: slice) -> Array:
        return whole[(*[slice(None)] * axis, where)]

    count = out.shape[axis]
    clips = _clip(array.shape[axis], size, stride, padding, count)
    whole = [part(array, seen) for where, seen in clips if where == slice(0, count)]
    if not whole:
        whole.append(np.broadcast_to(out.dtype.type(-np.inf), out.shape))
    steps = [(whole[0], whole[min(1, len(whole) - 1)], out)]
    steps += [(out, seen, out) for seen in whole[2:]]
    for where, seen in clips:
        if where != slice(0, count):
            steps.append((part(out, where), part(array, seen), part(out, where)))
    return steps


def pool_maximum(taps: Sequence[Array], out: Array) -> None:
    """Write the maximum over the window positions ``taps`` into ``out``, all of one shape."""
    if len(taps) == 1:
        np.copyto(out, taps[0])
        return
    np.maximum(taps[0], taps[1], out=out)
    for tap in taps[2:]:
        np.maximum(out, tap, out=out)


def unpool_maximum(
    taps: Sequence[Array],
    maxima: Array,
    gradient: Array,
    mask: Array,
    targets: Sequence[Array],
) -> None:
    """Hand each gradient to the first position of its window that holds the maximum.

    What was handed out is subtracted, so that a tie does not hand it out twice.

    Args:
        taps: the window positions of what was pooled.
        maxima: their maximum, as :func:`pool_maximum` wrote it.
        gradient: of the maxima; used up (zero afterwards).
        mask: boolean scratch of the same shape.
        targets: where the gradient of each position goes; windows must not overlap.
    """
    for tap, target in zip(taps, targets, strict=True):
        np.greater_equal(tap, maxima, out=mask)
        np.multiply(gradient, mask, out=target)
        np.subtract(gradient, target, out=gradient)
