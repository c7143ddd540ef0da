from __future__ import annotations

import numpy as np
import pytest

from dynacomm_async.data import parse_shift, shift_images
from dynacomm_async.errors import ConfigError


def _images(n: int, size: int = 9) -> np.ndarray:
    rng = np.random.default_rng(5)
    return rng.standard_normal((n, size, size, 2)).astype(np.float32)


def test_every_result_is_the_image_at_one_of_the_allowed_shifts_and_all_shifts_occur():
    images = _images(400)
    most = 2
    shifted = shift_images(images, np.arange(400), most=most, seed=3, epoch=1)
    seen = set()
    padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    for index in range(400):
        matches = {
            (dy, dx)
            for dy in range(2 * most + 1)
            for dx in range(2 * most + 1)
            if np.array_equal(shifted[index], padded[index, dy : dy + 9, dx : dx + 9])
        }
        assert len(matches) == 1, f"image {index} is not a shifted copy of itself"
        seen |= matches
    assert len(seen) == 25


def test_a_shift_depends_on_seed_epoch_and_image_but_not_on_the_batch_it_is_in():
    images = _images(64)
    indices = np.arange(64)
    whole = shift_images(images, indices, most=3, seed=0, epoch=0)
    part = shift_images(images[40:50], indices[40:50], most=3, seed=0, epoch=0)
    assert np.array_equal(whole[40:50], part)
    for seed, epoch in ((1, 0), (0, 1)):
        other = shift_images(images, indices, most=3, seed=seed, epoch=epoch)
        assert not np.array_equal(whole, other)


def test_augmentations_are_read_as_they_are_written():
    assert parse_shift("none") == 0
    assert parse_shift("shift:2") == 2


@pytest.mark.parametrize("text", ["", "shift", "shift:", "shift:0", "shift:-1", "shift:x", "flip"])
def test_other_augmentations_are_refused_in_one_sentence(text: str):
    with pytest.raises(ConfigError, match="expected none or shift:PIXELS"):
        parse_shift(text)
