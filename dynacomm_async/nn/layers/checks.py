"""Checks at the door of every layer, so that operators can trust their shapes."""

from __future__ import annotations

from dynacomm_async.errors import ConfigError, ShapeError
from dynacomm_async.nn.graph import Shape

__all__ = ["Pair", "pair", "require_features", "require_image", "window_output"]

Pair = int | tuple[int, int]
"""One number for both directions, or (vertical, horizontal)."""


def pair(value: Pair, what: str, least: int) -> tuple[int, int]:
    """Both numbers of a setting. Raises ConfigError where one is below ``least``."""
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2 or any(not isinstance(one, int) or one < least for one in both):
        raise ConfigError(
            f"{what} is {value!r}, expected an integer >= {least} or a pair of such integers"
        )
    return both


def require_image(shape: Shape) -> tuple[int, int, int]:
    """H, W, C of an input that must be an image."""
    if len(shape) != 3:
        raise ShapeError(f"the input has shape {shape}, expected (height, width, channels)")
    return shape


def require_features(shape: Shape) -> int:
    """Number of features of an input that must be flat."""
    if len(shape) != 1:
        raise ShapeError(f"the input has shape {shape}, expected (features,): put Flatten() before")
    return shape[0]


def window_output(
    shape: Shape,
    size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    *,
    ceil: bool = False,
) -> tuple[int, int]:
    """Height and width after sliding a window over an image of ``shape``.

    With ``ceil`` a last window, and be it the only one, may reach over the far edge, as long as it
    begins in front of it.
    """
    height, width, _ = require_image(shape)
    counts = []
    for extent, window, step, pad in zip((height, width), size, stride, padding, strict=True):
        rest = extent + 2 * pad - window
        count = max(rest // step + 1, 0)
        if ceil and count * step < extent + pad and (count - 1) * step < rest:
            count += 1
        if not count:
            raise ShapeError(
                f"the input is {height}x{width} with a border of {padding[0]}x{padding[1]}, "
                f"expected at least the window, {size[0]}x{size[1]}"
            )
        counts.append(count)
    return counts[0], counts[1]
