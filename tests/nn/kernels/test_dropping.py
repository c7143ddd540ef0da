"""Factors of dropout, in part as in whole."""

from __future__ import annotations

import numpy as np
import pytest

from dynacomm_async.nn.kernels import draw_factors


@pytest.mark.parametrize("before", [0, 1, 2, 4095, 8191, 8192, 8193, 20_001])
@pytest.mark.parametrize("count", [1, 2, 8191, 8193, 20_000])
def test_a_part_is_drawn_as_if_all_were(before, count):
    whole, part = np.empty(before + count, np.float32), np.empty(count, np.float32)
    draw_factors(whole, 0.4, (1, 2, 3))
    draw_factors(part, 0.4, (1, 2, 3), before)
    assert np.array_equal(part, whole[before:])
    assert set(np.unique(whole)) <= {np.float32(0), np.float32(1 / 0.6)}
