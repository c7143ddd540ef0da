"""MNIST's IDX files, written by hand."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest

from dynacomm_async.data.idx import read_idx, read_mnist
from dynacomm_async.errors import ConfigError

NAMES = {
    "train-images-idx3-ubyte": "images",
    "train-labels-idx1-ubyte": "labels",
    "t10k-images-idx3-ubyte": "images",
    "t10k-labels-idx1-ubyte": "labels",
}


def make_idx(array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_mnist(folder, *, zipped=False, sizes=(7, 3)):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = {}
    for i, (name, kind) in enumerate(NAMES.items()):
        shape = (sizes[i // 2], 28, 28) if kind == "images" else (sizes[i // 2],)
        arrays[name] = rng.integers(0, 256 if kind == "images" else 10, shape)
        data = make_idx(arrays[name])
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / name).write_bytes(data)
    return arrays


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("place", [".", "MNIST/raw"])
def test_the_four_files_are_read_as_written(tmp_path, zipped, place):
    arrays = list(write_mnist(tmp_path / place, zipped=zipped).values())
    train, test = read_mnist(tmp_path)
    np.testing.assert_array_equal(train.pixels[..., 0], arrays[0])
    np.testing.assert_array_equal(train.labels, arrays[1])
    np.testing.assert_array_equal(test.pixels[..., 0], arrays[2])
    np.testing.assert_array_equal(test.labels, arrays[3])


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named_with_all_that_are_expected(tmp_path, name):
    write_mnist(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ConfigError) as caught:
        read_mnist(tmp_path)
    assert str(caught.value).startswith(f"{name} is not in {tmp_path}")
    assert all(expected in str(caught.value) for expected in NAMES)


@pytest.mark.parametrize("kept", [0, 3, 4, 10, 15])
def test_a_file_cut_within_its_header_is_refused(tmp_path, kept):
    path = tmp_path / "images"
    path.write_bytes(make_idx(np.zeros((2, 28, 28)))[:kept])
    with pytest.raises(ConfigError, match=r"images: (begins with|ends after \d+ bytes, within)"):
        read_idx(path, 3)


@pytest.mark.parametrize("kept", [16, 17, 800, 16 + 2 * 784 - 1])
def test_a_file_cut_within_its_data_is_refused_with_both_numbers(tmp_path, kept):
    path = tmp_path / "images"
    path.write_bytes(make_idx(np.zeros((2, 28, 28)))[:kept])
    with pytest.raises(ConfigError, match=f"images: holds {kept} bytes, expected 1584"):
        read_idx(path, 3)


@pytest.mark.parametrize("extra", [1, 5_000_000])
def test_a_file_with_more_than_it_declares_is_refused(tmp_path, extra):
    path = tmp_path / "labels"
    path.write_bytes(make_idx(np.zeros(20)) + bytes(extra))
    with pytest.raises(ConfigError, match="labels: holds more bytes, expected 28"):
        read_idx(path, 1)


def test_absurd_dimensions_are_refused_without_allocating_for_them(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(bytes((0, 0, 8, 3)) + b"\xff" * 12 + bytes(100))
    with pytest.raises(ConfigError, match=f"holds 116 bytes, expected {16 + (2**32 - 1) ** 3}"):
        read_idx(path, 3)


@pytest.mark.parametrize(
    ("magic", "shown"),
    [((0, 0, 8, 1), "00 00 08 01"), ((0, 0, 13, 3), "00 00 0d 03"), ((31, 139, 8, 8), "1f 8b")],
)
def test_a_wrong_magic_is_shown_beside_the_expected_one(tmp_path, magic, shown):
    path = tmp_path / "images"
    path.write_bytes(bytes(magic) + make_idx(np.zeros((2, 28, 28)))[4:])
    with pytest.raises(ConfigError, match=f"begins with {shown}.* expected 00 00 08 03"):
        read_idx(path, 3)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.99])
def test_a_cut_off_gzip_file_is_refused(tmp_path, fraction):
    data = gzip.compress(make_idx(np.random.default_rng(0).integers(0, 256, (50, 28, 28))))
    path = tmp_path / "images.gz"
    path.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(ConfigError, match=r"images\.gz: "):
        read_idx(path, 3)


def test_a_damaged_gzip_file_is_refused(tmp_path):
    data = bytearray(gzip.compress(make_idx(np.random.default_rng(0).integers(0, 9, (50, 28, 28)))))
    path = tmp_path / "images.gz"
    for position in (0, 5, 12, len(data) // 2, len(data) - 6):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            array = read_idx(path, 3)
        except ConfigError as error:
            assert "images.gz: " in str(error)  # noqa: PT017 - not every flipped byte matters
        else:
            assert array.shape == (50, 28, 28)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("train-labels-idx1-ubyte", np.zeros(6), "6 labels, expected 7 as in train-images"),
        ("train-labels-idx1-ubyte", np.full(7, 10), "label 10, expected 0 to 9"),
        ("t10k-images-idx3-ubyte", np.zeros((3, 28, 27)), "3 images of 28x27 pixels"),
        ("t10k-images-idx3-ubyte", np.zeros((0, 28, 28)), "0 images of 28x28 pixels"),
    ],
)
def test_files_that_do_not_fit_each_other_are_refused(tmp_path, name, array, message):
    write_mnist(tmp_path)
    (tmp_path / name).write_bytes(make_idx(array))
    with pytest.raises(ConfigError, match=message):
        read_mnist(tmp_path)
