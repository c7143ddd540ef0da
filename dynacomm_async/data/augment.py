"""Small random shifts of the training images, the same wherever an image is used.

An image's shift is a function of (seed, epoch, index of the image) and of nothing else: it does
not depend on which worker sees the image, so N workers still train on what one process with an
N-fold batch would see, and a repeated step repeats its pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.errors import ConfigError

__all__ = ["parse_shift", "shift_images"]


def parse_shift(text: str) -> int:
    """Return the pixels in ``"shift:2"``, or 0 for ``"none"``.

    Raises:
        ConfigError: it is neither.
    """
    kind, _, number = text.partition(":")
    if text == "none":
        return 0
    if kind == "shift" and number.isascii() and number.isdigit() and 1 <= int(number) <= 32:
        return int(number)
    raise ConfigError(f"augmentation {text!r}, expected none or shift:PIXELS with 1 to 32 pixels")


def shift_images(
    images: NDArray[np.float32],
    indices: NDArray[np.int64],
    *,
    most: int,
    seed: int,
    epoch: int,
) -> NDArray[np.float32]:
    """Return the images, each moved by up to ``most`` pixels each way; edge pixels are repeated.

    Args:
        images: (N, H, W, C), only read.
        indices: (N,) the images' places in the data set, which choose their shifts.
        most: pixels.
        seed, epoch: choose the shifts, too.

    Returns:
        (N, H, W, C), new.
    """
    _, height, width, _ = images.shape
    shifts = _shifts(indices, most, seed, epoch)
    rows = np.clip(np.arange(height) + shifts[:, :1], 0, height - 1)
    columns = np.clip(np.arange(width) + shifts[:, 1:], 0, width - 1)
    n = np.arange(len(images))[:, None, None]
    shifted: NDArray[np.float32] = images[n, rows[:, :, None], columns[:, None, :]]
    return shifted


def _shifts(indices: NDArray[np.int64], most: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return (N, 2) shifts from -most to most."""
    (key,) = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
    bits = _mix(indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key)
    span = np.uint64(2 * most + 1)
    vertical = (bits & np.uint64(0xFFFFFFFF)) % span
    horizontal = (bits >> np.uint64(32)) % span
    return np.stack([vertical, horizontal], axis=1).astype(np.int64) - most


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): all bits depend on all."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
