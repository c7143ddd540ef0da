"""CIFAR-10 from its binary version.

Each file holds 10,000 records of one label byte and 3,072 pixel bytes: the red, green and blue
planes of 32x32. The Python version is a pickle, which may run any code when loaded, so it is
refused.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dynacomm_async.data.dataset import RawImages
from dynacomm_async.errors import ConfigError

__all__ = ["read_cifar10"]

_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_TEST = ("test_batch",)
_SIDE = 32
_RECORD_NBYTES = 1 + 3 * _SIDE * _SIDE
_CLASSES = 10


def read_cifar10(folder: Path, *, records_per_file: int = 10_000) -> tuple[RawImages, RawImages]:
    """Return CIFAR-10's train and test images (n, 32, 32, 3), as views of the files' bytes.

    The files may be in ``folder`` or in its ``cifar-10-batches-bin``.

    Raises:
        ConfigError: a file is missing, has another size, or holds a label above 9.
    """
    place = _find(folder)
    train, test = (_read_files(place, names, records_per_file) for names in (_TRAIN, _TEST))
    return train, test


def _find(folder: Path) -> Path:
    for place in (folder, folder / "cifar-10-batches-bin"):
        if all((place / f"{name}.bin").is_file() for name in _TRAIN + _TEST):
            return place
    for place in (folder, folder / "cifar-10-batches-py"):
        if (place / _TRAIN[0]).is_file():
            raise ConfigError(
                f"{place} holds CIFAR-10 as Python pickles, which are not safe to load: download "
                "the binary version (cifar-10-binary.tar.gz) from "
                "https://www.cs.toronto.edu/~kriz/cifar.html"
            )
    expected = ", ".join(f"{name}.bin" for name in _TRAIN + _TEST)
    raise ConfigError(
        f"the CIFAR-10 files are not all in {folder}: expected {expected} there or in its "
        "cifar-10-batches-bin"
    )


def _read_files(place: Path, names: tuple[str, ...], records: int) -> RawImages:
    data = np.empty((len(names), records, _RECORD_NBYTES), np.uint8)
    for name, part in zip(names, data, strict=True):
        path = place / f"{name}.bin"
        try:
            came = path.stat().st_size
            with path.open("rb") as file:
                read = file.readinto(part.reshape(-1).data) if came == part.size else 0
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
        if came != part.size or read != part.size:
            raise ConfigError(
                f"{path}: {came} bytes, expected {part.size} "
                f"({records} records of {_RECORD_NBYTES})"
            )
        if (label := part[:, 0].max()) >= _CLASSES:
            raise ConfigError(f"{path}: label {label}, expected 0 to {_CLASSES - 1}")
    flat = data.reshape(-1, _RECORD_NBYTES)
    planes = flat[:, 1:].reshape(-1, 3, _SIDE, _SIDE)
    return RawImages(planes.transpose(0, 2, 3, 1), flat[:, 0].astype(np.int64))
