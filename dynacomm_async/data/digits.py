"""The 1,797 scanned digits that come with scikit-learn (8x8 pixels, values 0 to 16)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.data.dataset import RawImages
from dynacomm_async.errors import ConfigError

__all__ = ["read_digits", "split_stratified"]


def read_digits() -> tuple[RawImages, RawImages]:
    """Return the train and test images (n, 8, 8, 1); the split is always the same.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            "the digits data come with scikit-learn, which is not installed: "
            'run pip install "dynacomm_async[digits]"'
        ) from None
    scans = load_digits()
    pixels = scans.images.astype(np.uint8)[..., None]
    labels = scans.target.astype(np.int64)
    held_out = split_stratified(labels)
    return (
        RawImages(pixels[~held_out], labels[~held_out]),
        RawImages(pixels[held_out], labels[held_out]),
    )


def split_stratified(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which samples are held out: every fifth of each class, in stored order."""
    held_out = np.zeros(labels.shape, np.bool_)
    for label in np.unique(labels):
        held_out[np.flatnonzero(labels == label)[4::5]] = True
    return held_out
