"""Made-up data: deterministic, balanced, and learnable."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from dynacomm_async.data.synthetic import make_synthetic


def make(seed=0, shape=(12, 10, 2), classes=5, sizes=(200, 100)):
    return make_synthetic(sizes, shape=shape, classes=classes, seed=seed)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    (a, a_test), (b, b_test), (c, _) = make(0), make(0), make(1)
    assert a.images.tobytes() == b.images.tobytes()
    assert a_test.images.tobytes() == b_test.images.tobytes()
    assert a.images.tobytes() != c.images.tobytes()


def test_the_bits_are_those_of_every_other_machine_and_version():
    train, test = make()
    digest = hashlib.sha256(
        train.images.astype("<f4").tobytes() + test.images.astype("<f4").tobytes()
    )
    assert digest.hexdigest()[:16] == "648aa924a665301b"


def test_train_and_test_images_differ():
    train, test = make(sizes=(100, 100))
    assert not (train.images == test.images).all(axis=(1, 2, 3)).any()


def test_more_test_images_do_not_change_the_training_images():
    assert make(sizes=(50, 10))[0].images.tobytes() == make(sizes=(50, 99))[0].images.tobytes()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 4), (32, 32, 3)])
def test_any_shape_can_be_made_with_values_around_zero(shape):
    train, test = make(shape=shape, sizes=(300, 7))
    assert train.images.shape == (300, *shape)
    assert test.images.shape == (7, *shape)
    assert abs(train.images.mean()) < 1
    assert 0.4 < train.images.std() < 1.6


def test_classes_are_equally_frequent():
    train, _ = make(classes=7, sizes=(100, 10))
    counts = np.bincount(train.labels, minlength=7)
    assert counts.max() - counts.min() <= 1


def test_the_nearest_class_mean_tells_test_images_apart():
    train, test = make(shape=(16, 16, 1), classes=10, sizes=(500, 200))
    means = np.stack([train.images[train.labels == label].mean(axis=0) for label in range(10)])
    distance = ((test.images[:, None] - means) ** 2).sum(axis=(2, 3, 4))
    assert (distance.argmin(axis=1) == test.labels).mean() > 0.95
