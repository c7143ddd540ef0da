"""Dataset: what it holds is checked when it is made."""

from __future__ import annotations

import numpy as np
import pytest

from dynacomm_async.data import Dataset
from dynacomm_async.errors import ShapeError

IMAGES = np.zeros((4, 3, 2, 1), np.float32)
LABELS = np.array([0, 1, 2, 1])


def test_its_length_is_the_number_of_images():
    assert len(Dataset(IMAGES, LABELS, 3, "toy")) == 4


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES.astype(np.float64), LABELS, "images are float64"),
        (IMAGES[..., 0], LABELS, "expected float32 of"),
        (IMAGES, LABELS.astype(np.int32), "labels are int32"),
        (IMAGES, LABELS[:3], "expected int64 of"),
        (IMAGES, LABELS + 1, "labels from 1 to 3, expected 0 to 2"),
        (IMAGES, LABELS - 1, "labels from -1 to 1"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(images, labels, message):
    with pytest.raises(ShapeError, match=message):
        Dataset(images, labels, 3, "toy")
