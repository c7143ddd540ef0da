"""The data sets by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TypeAlias

from dynacomm_async.data.cifar import read_cifar10
from dynacomm_async.data.dataset import Dataset, RawImages
from dynacomm_async.data.digits import read_digits
from dynacomm_async.data.idx import read_mnist
from dynacomm_async.data.pixels import Normalisation, PreparedImages
from dynacomm_async.data.synthetic import make_synthetic
from dynacomm_async.errors import ConfigError

__all__ = ["DATASETS", "load"]

Shape: TypeAlias = tuple[int, int, int]

DATASETS = ("digits", "mnist", "cifar10", "synthetic")
"""The names that :func:`load` knows."""

_CLASSES = 10
_SYNTHETIC_SHAPE = (28, 28, 1)
_SYNTHETIC_SIZES = (2048, 512)
_SYNTHETIC_NBYTES = 256 << 20
"""What the default sizes may take; large images come in smaller numbers."""


@dataclass(frozen=True, slots=True)
class _Scale:
    """Constants of one data set: its images' own shape, and how to normalise them."""

    shape: Shape
    normalisation: Normalisation


# Mean and standard deviation of the training pixels, rounded; fixed, so that every worker and
# every later evaluation scales alike.
_DIGITS = _Scale((8, 8, 1), Normalisation((4.88,), (6.02,)))
_MNIST = _Scale((28, 28, 1), Normalisation((33.3,), (78.6,)))
_CIFAR10 = _Scale((32, 32, 3), Normalisation((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)))


def load(
    name: str,
    *,
    folder: Path | None = None,
    input_shape: Shape | None = None,
    classes: int | None = None,
    seed: int = 0,
) -> tuple[Dataset, Dataset]:
    """Return the train and test split of a data set, fitted to a model's input.

    Args:
        name: one of :data:`DATASETS`; ``synthetic:TRAIN:TEST`` sets the numbers of images.
        folder: where the files of mnist and cifar10 are; the others need none.
        input_shape: (H, W, C) that the images are resized and converted to; None keeps theirs.
        classes: outputs of the model. Synthetic data have as many classes (10 when None); the
            others have 10 of their own and refuse a model with fewer.
        seed: synthetic data only; the other splits are always the same.

    Raises:
        ConfigError: unknown name, missing or unsound file, or a shape that cannot be made.
    """
    kind, *numbers = name.strip().split(":")
    if kind not in DATASETS or (numbers and kind != "synthetic"):
        raise ConfigError(_describe_unknown(name, kind))
    _check_model(input_shape, classes)
    if kind == "synthetic":
        shape = input_shape or _SYNTHETIC_SHAPE
        sizes = _parse_sizes(name, numbers) if numbers else _choose_sizes(shape)
        if seed < 0:
            raise ConfigError(f"seed is {seed}, expected at least 0")
        return make_synthetic(sizes, shape=shape, classes=classes or _CLASSES, seed=seed)
    if classes is not None and classes < _CLASSES:
        raise ConfigError(f"{name} has {_CLASSES} classes, but the model has {classes} outputs")
    if kind == "digits":
        return _fit(read_digits(), _DIGITS, input_shape, name)
    return _load_files(kind, folder, input_shape)


def _load_files(
    name: str, folder: Path | None, input_shape: Shape | None
) -> tuple[Dataset, Dataset]:
    readers: dict[str, tuple[Callable[[Path], tuple[RawImages, RawImages]], _Scale]] = {
        "mnist": (read_mnist, _MNIST),
        "cifar10": (read_cifar10, _CIFAR10),
    }
    if folder is None:
        raise ConfigError(f"{name} is read from files: name their folder (--data-dir)")
    if not folder.is_dir():
        raise ConfigError(f"the data folder {folder} does not exist or is not a folder")
    read, scale = readers[name]
    return _fit(read(folder), scale, input_shape, name)


def _fit(
    splits: tuple[RawImages, RawImages], scale: _Scale, input_shape: Shape | None, name: str
) -> tuple[Dataset, Dataset]:
    shape = input_shape or scale.shape
    train, test = (
        Dataset(
            PreparedImages(raw.pixels, scale.normalisation, shape, name), raw.labels, _CLASSES, name
        )
        for raw in splits
    )
    return train, test


def _check_model(input_shape: Shape | None, classes: int | None) -> None:
    if input_shape is not None and (len(input_shape) != 3 or min(input_shape) < 1):
        raise ConfigError(
            f"input shape {input_shape}: expected height, width and channels, each at least 1"
        )
    if classes is not None and classes < 1:
        raise ConfigError(f"{classes} classes, expected at least 1")


def _choose_sizes(shape: Shape) -> tuple[int, int]:
    fitting = _SYNTHETIC_NBYTES // (4 * math.prod(shape))
    train, test = _SYNTHETIC_SIZES
    return max(1, min(train, fitting * 4 // 5)), max(1, min(test, fitting // 5))


def _parse_sizes(name: str, numbers: list[str]) -> tuple[int, int]:
    expected = "write synthetic, or synthetic:TRAIN:TEST such as synthetic:4096:1024"
    try:
        train, test = (int(number) for number in numbers)
    except ValueError:
        raise ConfigError(f"data {name!r}: {expected}") from None
    if min(train, test) < 1:
        raise ConfigError(f"data {name!r}: {expected}, each at least 1")
    return train, test


def _describe_unknown(name: str, kind: str) -> str:
    near = get_close_matches(kind, DATASETS, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"unknown data {name!r}{hint}; known: {', '.join(DATASETS)}"
