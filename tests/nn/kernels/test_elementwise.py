"""Groups cover a batch once, whatever an image's size."""

from __future__ import annotations

import numpy as np
import pytest

from dynacomm_async.nn.kernels import elementwise, image_groups, line_groups

SHAPES = [(7, 5), (7, 4, 3, 2), (3, 11, 5, 8), (2, 3, 100, 9), (1, 1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("floats", [1, 50, 130, 100_000])
def test_groups_cover_a_batch_once_and_the_first_is_the_largest(shape, floats, monkeypatch):
    monkeypatch.setattr(elementwise, "GROUP_FLOATS", floats)
    for groups in (image_groups(shape), line_groups(shape)):
        seen = np.zeros(shape, int)
        for where in groups:
            seen[where] += 1
        assert (seen == 1).all()
        assert seen[groups[0]].size == max(seen[where].size for where in groups)
    unit = shape[2:] if len(shape) > 2 else shape[1:]  # a line is not cut
    assert seen[groups[0]].size <= max(floats, np.prod(unit))
