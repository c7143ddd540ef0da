"""Labelled images: raw, as files hold them, and ready to be trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.data.pixels import Images
from dynacomm_async.errors import ShapeError

__all__ = ["Dataset", "RawImages"]


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Images ready for a model. The arrays are shared: copy before writing into them.

    Attributes:
        images: (n, H, W, C) float32, normalised; an array, or what prepares them when some are
            taken by ``images[indices]``.
        labels: (n,) int64, each in [0, classes).
        classes: number of classes, which a model must tell apart.
        name: what the data set is called, for messages.

    Raises:
        ShapeError: the arrays are not as above.
    """

    images: Images
    labels: NDArray[np.int64]
    classes: int
    name: str

    def __post_init__(self) -> None:
        if self.images.dtype != np.float32 or self.images.ndim != 4:
            raise ShapeError(
                f"{self.name}: images are {self.images.dtype} of shape {self.images.shape}, "
                "expected float32 of (n, H, W, C)"
            )
        expected = self.images.shape[:1]
        if self.labels.dtype != np.int64 or self.labels.shape != expected:
            raise ShapeError(
                f"{self.name}: labels are {self.labels.dtype} of shape {self.labels.shape}, "
                f"expected int64 of {expected}"
            )
        if self.labels.size and not 0 <= self.labels.min() <= self.labels.max() < self.classes:
            raise ShapeError(
                f"{self.name}: labels from {self.labels.min()} to {self.labels.max()}, "
                f"expected 0 to {self.classes - 1}"
            )

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, slots=True, eq=False)
class RawImages:
    """Images as stored.

    Attributes:
        pixels: (n, H, W, C) uint8; may be a strided view of a file's bytes.
        labels: (n,) int64.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
