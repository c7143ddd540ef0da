"""MNIST from its four IDX files, gzipped or not.

An IDX file is two zero bytes, a type code (8: unsigned byte), the number of dimensions, each
dimension as a big-endian 32-bit number, then the elements in row-major order.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.data.dataset import RawImages
from dynacomm_async.errors import ConfigError

__all__ = ["read_idx", "read_mnist"]

_FILES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
_SIDE = 28
_CLASSES = 10
_CHUNK_NBYTES = 1 << 20


def read_mnist(folder: Path) -> tuple[RawImages, RawImages]:
    """Return MNIST's train and test images (n, 28, 28, 1) from ``folder`` or its ``MNIST/raw``.

    Other data in the same files and sizes (Fashion-MNIST) work too.

    Raises:
        ConfigError: a file is missing, cut off, too long, of another format or inconsistent.
    """
    train, test = (_read_pair(folder, images, labels) for images, labels in _FILES)
    return train, test


def _read_pair(folder: Path, images: str, labels: str) -> RawImages:
    image_path, label_path = _find(folder, images), _find(folder, labels)
    pixels, classes = read_idx(image_path, 3), read_idx(label_path, 1)
    if pixels.shape[1:] != (_SIDE, _SIDE) or not len(pixels):
        raise ConfigError(
            f"{image_path}: {len(pixels)} images of {pixels.shape[1]}x{pixels.shape[2]} pixels, "
            f"expected at least one of {_SIDE}x{_SIDE}"
        )
    if len(classes) != len(pixels):
        raise ConfigError(
            f"{label_path}: {len(classes)} labels, expected {len(pixels)} as in {image_path.name}"
        )
    if classes.max() >= _CLASSES:
        raise ConfigError(f"{label_path}: label {classes.max()}, expected 0 to {_CLASSES - 1}")
    return RawImages(pixels[..., None], classes.astype(np.int64))


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder, folder / "MNIST" / "raw"):
        for path in (candidate / name, candidate / f"{name}.gz"):
            if path.is_file():
                return path
    expected = ", ".join(name for pair in _FILES for name in pair)
    raise ConfigError(f"{name} is not in {folder}: mnist expects {expected} there (or as .gz)")


def read_idx(path: Path, n_dims: int) -> NDArray[np.uint8]:
    """Return the bytes of an IDX file as an array of ``n_dims`` dimensions.

    Nothing is allocated for elements that the file does not hold.

    Raises:
        ConfigError: unreadable, not IDX, another type or number of dimensions, too short or long.
    """
    try:
        with cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            return _read_array(path, file, n_dims)
    except EOFError:
        raise ConfigError(f"{path}: the gzip stream is cut off; download it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(f"{path}: not a sound gzip file ({error})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read_array(path: Path, file: BinaryIO, n_dims: int) -> NDArray[np.uint8]:
    header = file.read(4 + 4 * n_dims)
    magic = bytes((0, 0, 8, n_dims))
    if header[:4] != magic:
        raise ConfigError(
            f"{path}: begins with {header[:4].hex(' ') or 'nothing'}, expected {magic.hex(' ')} "
            f"(IDX, unsigned bytes, {n_dims} dimensions)"
        )
    if len(header) < 4 + 4 * n_dims:
        raise ConfigError(f"{path}: ends after {len(header)} bytes, within its header")
    dims = struct.unpack_from(f">{n_dims}I", header, 4)
    expected = int(np.prod(dims, dtype=object))
    data = bytearray()
    while len(data) <= expected and (chunk := file.read(_CHUNK_NBYTES)):
        data += chunk
    if len(data) != expected:
        came = "more" if len(data) > expected else str(len(header) + len(data))
        raise ConfigError(
            f"{path}: holds {came} bytes, expected {len(header) + expected} for dimensions {dims}"
        )
    return np.frombuffer(data, np.uint8).reshape(dims)
