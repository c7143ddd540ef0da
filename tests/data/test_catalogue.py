"""Loading by name."""

from __future__ import annotations

import gzip
import os
import struct

import numpy as np
import pytest

from dynacomm_async.data import DATASETS, load
from dynacomm_async.errors import ConfigError


def test_digits_fit_a_models_input_and_are_normalised():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    train, test = load("digits", input_shape=(28, 28, 1), classes=10)
    assert train.images.shape == (1442, 28, 28, 1)
    assert test.images.shape == (355, 28, 28, 1)
    native, _ = load("digits", seed=5)
    assert native.images.shape == (1442, 8, 8, 1)
    assert abs(np.mean(native.images)) < 0.01
    assert abs(np.std(native.images) - 1) < 0.01
    assert (native.name, native.classes) == ("digits", 10)


def test_mnist_is_normalised_by_its_published_constants(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    for split in ("train", "t10k"):
        images = struct.pack(">4I", 0x803, 3, 28, 28) + pixels.tobytes()
        (tmp_path / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2I", 0x801, 3) + bytes([7, 0, 9])
        )
    train, test = load("mnist", folder=tmp_path)
    expected = (pixels / 255 - 0.1307) / 0.3081
    np.testing.assert_allclose(train.images[:][..., 0], expected, atol=2e-3)
    assert test.labels.tolist() == [7, 0, 9]


def test_cifar10_of_full_size_fits_a_smaller_grey_input(tmp_path):
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 10_000 * 3073)
    train, test = load("cifar10", folder=tmp_path, input_shape=(4, 4, 1))
    assert train.images.shape == (50_000, 4, 4, 1)
    assert test.images.shape == (10_000, 4, 4, 1)
    black = np.mean([-0.4914 / 0.2470, -0.4822 / 0.2435, -0.4465 / 0.2616])
    np.testing.assert_allclose(train.images[:], black, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("synthetic", (2048, 512)), ("synthetic:30:7", (30, 7)), (" synthetic:1:1", (1, 1))],
)
def test_synthetic_data_have_the_sizes_of_their_name(name, sizes):
    train, test = load(name, input_shape=(4, 4, 1))
    assert (len(train), len(test)) == sizes


def test_synthetic_data_have_as_many_classes_as_the_model():
    assert load("synthetic:50:5", classes=17)[0].classes == 17
    assert load("synthetic:50:5")[0].classes == 10


def test_large_synthetic_images_come_in_numbers_that_fit_into_memory():
    train, test = load("synthetic", input_shape=(512, 512, 16))
    assert len(train) == 4 * len(test) == 12
    assert train.images.nbytes + test.images.nbytes <= 256 << 20


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("", {}, "unknown data ''; known: digits, mnist, cifar10, synthetic"),
        ("digit", {}, "did you mean digits?"),
        ("imagenet", {}, "known: digits"),
        ("cifar", {}, "did you mean cifar10?"),
        ("digits:3", {}, "unknown data 'digits:3'"),
        ("mnist", {}, "mnist is read from files: name their folder"),
        ("synthetic:3", {}, "synthetic:TRAIN:TEST"),
        ("synthetic:a:b", {}, "synthetic:TRAIN:TEST"),
        ("synthetic:0:1", {}, "each at least 1"),
        ("synthetic:1:2:3", {}, "synthetic:TRAIN:TEST"),
        ("synthetic", {"seed": -1}, "seed is -1"),
        ("synthetic", {"classes": 0}, "0 classes"),
        ("synthetic", {"input_shape": (4, 0, 1)}, r"input shape (4, 0, 1)"),
        ("synthetic", {"input_shape": (4, 4)}, r"input shape (4, 4)"),
        ("digits", {"classes": 9}, "digits has 10 classes, but the model has 9 outputs"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(name, options, message):
    with pytest.raises(ConfigError) as caught:
        load(name, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_folder_that_does_not_exist_is_named(tmp_path, name):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(ConfigError, match=rf"data folder {folder} does not exist"):
            load(name, folder=folder)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_an_empty_folder_says_which_files_are_expected(tmp_path, name):
    with pytest.raises(ConfigError, match=r"expect.*(train-images-idx3-ubyte|data_batch_1\.bin)"):
        load(name, folder=tmp_path)


def test_every_name_is_listed():
    assert DATASETS == ("digits", "mnist", "cifar10", "synthetic")
