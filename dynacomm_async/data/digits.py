"""The 1,797 scanned digits that come with scikit-learn (8x8 pixels, values 0 to 16)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

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
    table = _read_table()
    pixels = table[:, :-1].astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = table[:, -1].astype(np.int64)
    held_out = split_stratified(labels)
    return (
        RawImages(pixels[~held_out], labels[~held_out]),
        RawImages(pixels[held_out], labels[held_out]),
    )


def _read_table() -> NDArray[np.float64]:
    """Return (1797, 65) pixels and labels; from the file, for to import scikit-learn takes 2 s."""
    spec = find_spec("sklearn")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder, "datasets", "data", "digits.csv.gz")
        if path.is_file():
            return np.loadtxt(path, delimiter=",")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            "the digits data come with scikit-learn, which is not installed: "
            'run pip install "dynacomm_async[digits]"'
        ) from None
    scans = load_digits()
    return np.column_stack((scans.data, scans.target))


def split_stratified(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which samples are held out: every fifth of each class, in stored order."""
    held_out = np.zeros(labels.shape, np.bool_)
    for label in np.unique(labels):
        held_out[np.flatnonzero(labels == label)[4::5]] = True
    return held_out
