"""Small random changes of the training images, the same wherever an image is used.

What happens to an image is a function of (seed, epoch, index of the image) and of nothing else: it
does not depend on which worker sees the image, so N workers still train on what one process with an
N-fold batch would see, and a repeated step repeats its pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.data.pixels import Images
from dynacomm_async.errors import ConfigError

__all__ = ["Augmentation", "parse_augmentation"]

Batch = NDArray[np.float32]
Indices = NDArray[np.int64]

_MOST = 32
_CROP, _FLIP = 1, 2
"""Streams of random bits; shifts have the one without a number."""


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What is done to training images, in this order.

    Attributes:
        shift: move by up to so many pixels each way; edge pixels are repeated.
        crop: move by up to so many pixels each way; zeros, which are the mean of normalised
            pixels, come in.
        flip: mirror left to right, every other time.
    """

    shift: int = 0
    crop: int = 0
    flip: bool = False

    def take(self, images: Images, indices: Indices, *, seed: int, epoch: int) -> Batch:
        """Return the images at ``indices``, changed; new.

        Args:
            images: (n, H, W, C) of the whole data set, only read.
            indices: (N,), which choose the changes, too.
            seed, epoch: choose the changes, too.

        Returns:
            (N, H, W, C).
        """
        batch: Batch = images[indices]
        if self.shift:
            batch = _shift(batch, _moves(_bits(indices, seed, epoch), self.shift))
        if self.crop:
            batch = _crop(batch, _moves(_bits(indices, seed, epoch, _CROP), self.crop))
        if self.flip:
            mirrored = _bits(indices, seed, epoch, _FLIP) >> np.uint64(63) == 1
            batch[mirrored] = batch[mirrored, :, ::-1]
        return batch


def parse_augmentation(text: str) -> Augmentation:
    """Return what ``"shift:2"`` or ``"crop:4,flip"`` means; ``"none"`` changes nothing.

    Raises:
        ConfigError: it means nothing.
    """
    if text == "none":
        return Augmentation()
    settings: dict[str, Any] = {}
    for part in text.split(","):
        kind, _, number = part.partition(":")
        pixels = int(number) if number.isascii() and number.isdigit() else 0
        sound = part == "flip" or (kind in ("shift", "crop") and 1 <= pixels <= _MOST)
        if not sound or kind in settings:
            raise ConfigError(
                f"augmentation {text!r}, expected none, or shift:PIXELS, crop:PIXELS (1 to "
                f"{_MOST} pixels) and flip, each at most once, with commas between"
            )
        settings[kind] = pixels or True
    return Augmentation(**settings)


def _shift(images: Batch, moves: Indices) -> Batch:
    _, height, width, _ = images.shape
    rows = np.clip(np.arange(height) + moves[:, :1], 0, height - 1)
    columns = np.clip(np.arange(width) + moves[:, 1:], 0, width - 1)
    n = np.arange(len(images))[:, None, None]
    shifted: Batch = images[n, rows[:, :, None], columns[:, None, :]]
    return shifted


def _crop(images: Batch, moves: Indices) -> Batch:
    _, height, width, _ = images.shape
    cropped = np.zeros_like(images)
    for image, source, (down, right) in zip(cropped, images, moves.tolist(), strict=True):
        top, left = max(0, -down), max(0, -right)
        bottom, end = min(height, height - down), min(width, width - right)
        if top < bottom and left < end:
            seen = source[top + down : bottom + down, left + right : end + right]
            image[top:bottom, left:end] = seen
    return cropped


def _moves(bits: NDArray[np.uint64], most: int) -> Indices:
    """Return (N, 2) pixels down and to the right, from -most to most."""
    span = np.uint64(2 * most + 1)
    vertical = (bits & np.uint64(0xFFFFFFFF)) % span
    horizontal = (bits >> np.uint64(32)) % span
    return np.stack([vertical, horizontal], axis=1).astype(np.int64) - most


def _bits(indices: Indices, seed: int, epoch: int, *stream: int) -> NDArray[np.uint64]:
    """Return (N,) random bits."""
    (key,) = np.random.SeedSequence([seed, epoch, *stream]).generate_state(1, np.uint64)
    return _mix(indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key)


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): all bits depend on all."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
