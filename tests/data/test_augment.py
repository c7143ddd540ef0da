from __future__ import annotations

import numpy as np
import pytest

from dynacomm_async.data import Augmentation, parse_augmentation
from dynacomm_async.errors import ConfigError


def _images(n: int, size: int = 9) -> np.ndarray:
    rng = np.random.default_rng(5)
    return rng.standard_normal((n, size, size, 2)).astype(np.float32)


@pytest.mark.parametrize(("kind", "mode"), [("shift", "edge"), ("crop", "constant")])
def test_every_result_is_the_image_at_one_of_the_allowed_places_and_all_occur(kind, mode):
    images = _images(400)
    most = 2
    moved = Augmentation(**{kind: most}).take(images, np.arange(400), seed=3, epoch=1)
    seen = set()
    padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), mode=mode)
    for index in range(400):
        matches = {
            (dy, dx)
            for dy in range(2 * most + 1)
            for dx in range(2 * most + 1)
            if np.array_equal(moved[index], padded[index, dy : dy + 9, dx : dx + 9])
        }
        assert len(matches) == 1, f"image {index} is not a moved copy of itself"
        seen |= matches
    assert len(seen) == 25


def test_about_half_of_the_images_are_mirrored_and_the_others_left_alone():
    images = _images(1000)
    flipped = Augmentation(flip=True).take(images, np.arange(1000), seed=3, epoch=1)
    same = np.array([np.array_equal(*pair) for pair in zip(flipped, images, strict=True)])
    assert np.array_equal(flipped[~same], images[~same, :, ::-1])
    assert 440 < same.sum() < 560


def test_an_image_is_cropped_before_it_is_mirrored():
    images, indices = _images(50), np.arange(50)
    both = Augmentation(crop=3, flip=True).take(images, indices, seed=0, epoch=2)
    cropped = Augmentation(crop=3).take(images, indices, seed=0, epoch=2)
    assert np.array_equal(both, Augmentation(flip=True).take(cropped, indices, seed=0, epoch=2))


def test_an_image_may_be_cropped_by_more_than_its_size():
    moved = Augmentation(crop=32).take(_images(100, size=3), np.arange(100), seed=0, epoch=0)
    assert (moved == 0).all(axis=(1, 2, 3)).sum() > 50


@pytest.mark.parametrize("how", ["shift:3", "crop:3", "flip", "shift:1,crop:2,flip"])
def test_a_change_depends_on_seed_epoch_and_image_but_not_on_the_batch_it_is_in(how):
    images, augmentation = _images(64), parse_augmentation(how)
    before = images.copy()
    whole = augmentation.take(images, np.arange(64), seed=0, epoch=0)
    part = augmentation.take(images, np.arange(40, 50), seed=0, epoch=0)
    assert np.array_equal(whole[40:50], part)
    assert np.array_equal(images, before)
    for seed, epoch in ((1, 0), (0, 1)):
        other = augmentation.take(images, np.arange(64), seed=seed, epoch=epoch)
        assert not np.array_equal(whole, other)


def test_augmentations_are_read_as_they_are_written():
    assert parse_augmentation("none") == Augmentation()
    assert parse_augmentation("shift:2") == Augmentation(shift=2)
    assert parse_augmentation("crop:4,flip") == Augmentation(crop=4, flip=True)
    assert parse_augmentation("flip,shift:1") == Augmentation(shift=1, flip=True)


def test_none_leaves_the_images_as_they_are():
    images, indices = _images(9), np.array([4, 2, 2])
    assert np.array_equal(Augmentation().take(images, indices, seed=1, epoch=1), images[indices])


@pytest.mark.parametrize(
    "text",
    [
        *("", "shift", "shift:", "shift:0", "shift:-1", "shift:x", "shift:33", "flip:1"),
        *("crop", "turn", "flip,flip", "crop:1,crop:2", "none,flip", "flip,", "crop:٣"),
    ],
)
def test_other_augmentations_are_refused_in_one_sentence(text: str):
    with pytest.raises(ConfigError, match="expected none, or shift:PIXELS, crop:PIXELS"):
        parse_augmentation(text)
