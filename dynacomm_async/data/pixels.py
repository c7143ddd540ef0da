"""Stored pixels to a model's input: normalised, resized, with the channels the model wants.

Only elementwise float32 arithmetic, no matrix products, so every machine gets the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.errors import ConfigError

__all__ = ["Images", "Normalisation", "PreparedImages", "prepare", "resize"]

_BLOCK_FLOATS = 1 << 20
"""Floats converted at a time, so that no second float copy of a whole data set is ever needed."""


@dataclass(frozen=True, slots=True)
class Normalisation:
    """Mean and standard deviation per channel, in units of the stored pixels."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def apply(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return (pixels - mean) / deviation as a new (n, H, W, C) float32 array."""
        images = np.subtract(pixels, np.asarray(self.mean, np.float32), dtype=np.float32)
        images /= np.asarray(self.deviation, np.float32)
        return images


class PreparedImages:
    """Images that are prepared whenever some of them are taken: an array that is read by images.

    What is held are the stored pixels, a quarter of the memory of float32, or far less where images
    are enlarged; shared, and never written. Threads may take images at the same time.

    Args:
        pixels: (n, H, W, C) as stored.
        normalisation: of the stored pixels.
        shape: (H, W, C) that images are resized and converted to.
        name: of the data set, for messages.

    Attributes:
        shape: (n, *shape).
        ndim, dtype: 4, float32.

    Raises:
        ConfigError: channels that cannot be converted so.
    """

    ndim = 4
    dtype = np.dtype(np.float32)

    def __init__(
        self,
        pixels: NDArray[np.uint8],
        normalisation: Normalisation,
        shape: tuple[int, int, int],
        name: str,
    ) -> None:
        _check_channels(pixels.shape[3], shape[2], name)
        self.shape = (len(pixels), *shape)
        self._pixels = pixels
        self._normalisation = normalisation
        self._name = name

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, chosen: slice | NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """Return the chosen images (N, H, W, C), new and contiguous."""
        height, width, channels = self.shape[1:]
        shape = height, width, channels
        return prepare(self._pixels[chosen], self._normalisation, shape, self._name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """All of them, for NumPy's functions."""
        return self[:].astype(self.dtype if dtype is None else dtype, copy=False)


Images = NDArray[np.float32] | PreparedImages
"""(n, H, W, C), of which some are taken by ``images[indices]`` or ``images[start:stop]``."""


def prepare(
    pixels: NDArray[np.uint8], normalisation: Normalisation, shape: tuple[int, int, int], name: str
) -> NDArray[np.float32]:
    """Return ``pixels`` (n, H, W, C) as contiguous float32 images of (n, *shape).

    Colour becomes grey as the mean of its channels, grey becomes colour by repetition.

    Raises:
        ConfigError: channels that cannot be converted so.
    """
    _check_channels(pixels.shape[3], shape[2], name)
    height, width, channels = shape
    images = np.empty((len(pixels), *shape), np.float32)
    largest = max(int(np.prod(pixels.shape[1:])), height * width * channels)
    block = max(1, _BLOCK_FLOATS // largest)
    for begin in range(0, len(pixels), block):
        part = normalisation.apply(pixels[begin : begin + block])
        if channels < part.shape[3]:
            part = part.mean(axis=3, keepdims=True, dtype=np.float32)
        images[begin : begin + block] = resize(part, height, width)
    return images


def resize(images: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Return (n, height, width, C): ``images`` (n, H, W, C) resized bilinearly.

    Pixel centres are at half-integers and the border is repeated; a size that does not change
    leaves the values as they are, bit for bit. Shrinking does not smooth beforehand.
    """
    return _stretch(_stretch(images, height, axis=1), width, axis=2)


def _stretch(images: NDArray[np.float32], size: int, axis: int) -> NDArray[np.float32]:
    old = images.shape[axis]
    if size == old:
        return images
    centre = np.clip((np.arange(size) + 0.5) * (old / size) - 0.5, 0, old - 1)
    low = centre.astype(np.intp)
    high = np.minimum(low + 1, old - 1)
    weight = (centre - low).astype(np.float32)
    weight = weight.reshape([-1 if i == axis else 1 for i in range(4)])
    below = images.take(low, axis)
    stretched: NDArray[np.float32] = images.take(high, axis)
    stretched -= below
    stretched *= weight
    stretched += below
    return stretched


def _check_channels(came: int, wanted: int, name: str) -> None:
    if came != wanted and {came, wanted} != {1, 3}:
        raise ConfigError(
            f"{name} images have {came} channels and the model takes {wanted}: "
            "only 1 and 3 can be turned into each other"
        )
