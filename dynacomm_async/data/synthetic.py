"""Made-up images of any shape and number of classes that a network can learn to tell apart."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.data.dataset import Dataset
from dynacomm_async.data.pixels import resize

__all__ = ["make_synthetic"]

_COARSE = 4
"""Prototypes vary on a grid this coarse, so that pooling does not wipe them out."""


def make_synthetic(
    sizes: tuple[int, int], *, shape: tuple[int, int, int], classes: int, seed: int
) -> tuple[Dataset, Dataset]:
    """Return ``sizes`` = (train, test) images: a smooth prototype per class, plus noise.

    A function of the arguments alone, on every machine and NumPy version. Values have a mean of
    about 0 and a variance of about 1 or a little less; classes are as equally frequent as the sizes
    allow, and dealt out in turn (training shuffles).
    """
    height, width, channels = shape
    coarse = (classes, min(height, _COARSE), min(width, _COARSE), channels)
    prototypes = resize(_draw(coarse, seed, 0), height, width)
    train, test = (_make_split(prototypes, size, seed, i + 1) for i, size in enumerate(sizes))
    return train, test


def _make_split(prototypes: NDArray[np.float32], size: int, seed: int, stream: int) -> Dataset:
    classes = len(prototypes)
    labels = np.arange(size) % classes
    images = _draw((size, *prototypes.shape[1:]), seed, stream)
    for label, prototype in enumerate(prototypes):
        images[label::classes] += prototype
    images *= np.float32(math.sqrt(0.5))
    return Dataset(images, labels.astype(np.int64, copy=False), classes, "synthetic")


def _draw(shape: tuple[int, ...], seed: int, stream: int) -> NDArray[np.float32]:
    # Uniform in +-sqrt(3), variance 1, made of raw bits: NumPy promises that those never change.
    count = math.prod(shape)
    raw = np.random.PCG64(np.random.SeedSequence([seed, stream])).random_raw(-(-count // 4))
    values = raw.astype("<u8", copy=False).view("<u2")[:count].astype(np.float32)
    values -= np.float32(32767.5)
    values *= np.float32(math.sqrt(3) / 32768)
    return values.reshape(shape)
