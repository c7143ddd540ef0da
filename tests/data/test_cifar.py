"""CIFAR-10's binary files, written by hand, with fewer records than the real ones."""

from __future__ import annotations

import os

import numpy as np
import pytest

from dynacomm_async.data.cifar import read_cifar10
from dynacomm_async.errors import ConfigError

NAMES = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
RECORDS = 4


def write_cifar(folder):
    """Record by record, as the format's description says; return (label, image) per record."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    written = []
    for name in NAMES:
        data = bytearray()
        for _ in range(RECORDS):
            label, image = int(rng.integers(10)), rng.integers(0, 256, (32, 32, 3), np.uint8)
            data.append(label)
            for channel in range(3):
                data += image[:, :, channel].tobytes()
            written.append((label, image))
        (folder / name).write_bytes(data)
    return written


@pytest.mark.parametrize("place", [".", "cifar-10-batches-bin"])
def test_the_six_files_are_read_as_written(tmp_path, place):
    written = write_cifar(tmp_path / place)
    train, test = read_cifar10(tmp_path, records_per_file=RECORDS)
    assert (len(train.labels), len(test.labels)) == (5 * RECORDS, RECORDS)
    labels = np.concatenate([train.labels, test.labels])
    pixels = np.concatenate([train.pixels, test.pixels])
    for i, (label, image) in enumerate(written):
        assert labels[i] == label
        np.testing.assert_array_equal(pixels[i], image)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_says_which_are_expected(tmp_path, name):
    write_cifar(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(
        ConfigError, match=r"not all in .*: expected data_batch_1\.bin, .*test_batc"
    ):
        read_cifar10(tmp_path, records_per_file=RECORDS)


@pytest.mark.parametrize("name", [NAMES[0], NAMES[3], NAMES[5]])
@pytest.mark.parametrize("nbytes", [0, 1, 3073, 3073 * RECORDS - 1, 3073 * RECORDS + 1])
def test_a_file_of_another_size_is_refused_with_both_numbers(tmp_path, name, nbytes):
    write_cifar(tmp_path)
    os.truncate(tmp_path / name, nbytes)
    with pytest.raises(ConfigError, match=f"{name}: {nbytes} bytes, expected {3073 * RECORDS}"):
        read_cifar10(tmp_path, records_per_file=RECORDS)


def test_a_label_that_is_not_a_class_is_refused(tmp_path):
    write_cifar(tmp_path)
    with (tmp_path / NAMES[2]).open("r+b") as file:
        file.seek(3073)
        file.write(b"\x0a")
    with pytest.raises(ConfigError, match=r"data_batch_3\.bin: label 10, expected 0 to 9"):
        read_cifar10(tmp_path, records_per_file=RECORDS)


@pytest.mark.parametrize("place", [".", "cifar-10-batches-py"])
def test_the_pickled_version_is_refused_with_what_to_download(tmp_path, place):
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "data_batch_1").write_bytes(b"\x80\x02.")
    with pytest.raises(ConfigError, match=r"pickle.*cifar-10-binary\.tar\.gz"):
        read_cifar10(tmp_path)
