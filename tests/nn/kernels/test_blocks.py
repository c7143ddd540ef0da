"""Blocks cover a convolution exactly, and fit their workspace."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from dynacomm_async.nn.kernels import blocks, columns_needed, plan_blocks

extents = st.integers(1, 9)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 4),
    output=st.tuples(extents, extents),
    channels=st.integers(1, 7),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    floats=st.sampled_from([1, 40, 300, 100_000]),
    unit=st.sampled_from([1, 1, 2]),
)
def test_blocks_hold_what_each_output_pixel_sees(
    batch, output, channels, kernel, stride, floats, unit
):
    if output[0] % unit:
        unit = 1
    shape = [batch, *((o - 1) * s + k for o, s, k in zip(output, stride, kernel, strict=True))]
    x = np.random.default_rng(0).standard_normal((*shape, channels)).astype(np.float32)
    inner = kernel[0] * kernel[1] * channels
    seen = np.zeros((batch, *output), int)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "COLUMN_FLOATS", floats)
        patch.setattr(blocks, "LEAST_ROWS", 1)
        workspace = np.empty(columns_needed(batch, output, inner, unit=unit), np.float32)
        planned = plan_blocks(x, kernel, stride, workspace, unit=unit)
    for block in planned:
        seen[block.images, block.lines] += 1
        assert (block.lines.stop - block.lines.start) % unit == 0
        block.fill()
        pixels = [
            (n, h, w)
            for n in range(batch)[block.images]
            for h in range(output[0])[block.lines]
            for w in range(output[1])
        ]
        assert block.rows == len(pixels)
        for row, (n, h, w) in zip(block.matrix, pixels, strict=True):
            top, left = h * stride[0], w * stride[1]
            window = x[n, top : top + kernel[0], left : left + kernel[1]]
            assert np.array_equal(row, window.ravel())
    assert (seen == 1).all()


def test_a_block_aims_at_the_usual_size_but_keeps_enough_pixels():
    x = np.zeros((4, 34, 34, 64), np.float32)
    workspace = np.empty(columns_needed(4, (32, 32), 576), np.float32)
    rows = [block.rows for block in plan_blocks(x, (3, 3), (1, 1), workspace)]
    assert max(rows) * 576 <= blocks.COLUMN_FLOATS
    assert sum(rows) == 4 * 32 * 32
    x = np.zeros((32, 10, 10, 512), np.float32)
    workspace = np.empty(columns_needed(32, (8, 8), 4608), np.float32)
    assert {block.rows for block in plan_blocks(x, (3, 3), (1, 1), workspace)} == {256}
