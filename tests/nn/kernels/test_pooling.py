"""Pooling against a loop over windows."""

from __future__ import annotations

import numpy as np
import pytest

from dynacomm_async.nn.kernels import (
    clipped_taps,
    maximum_steps,
    pool_maximum,
    unpool_maximum,
    window_taps,
)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 2), (1, 4)])
def test_the_first_maximum_of_each_window_gets_its_gradient(size):
    generator = np.random.default_rng(0)
    # Few values, so that most windows hold a tie.
    x = generator.integers(0, 3, (2, 6, 8, 3)).astype(np.float32)
    output = (6 // size[0], 8 // size[1])
    gradient = generator.standard_normal((2, *output, 3)).astype(np.float32)
    expected_maxima, expected = np.empty_like(gradient), np.zeros_like(x)
    for n, h, w, c in np.ndindex(gradient.shape):
        top, left = h * size[0], w * size[1]
        window = x[n, top : top + size[0], left : left + size[1], c]
        expected_maxima[n, h, w, c] = window.max()
        i, j = np.unravel_index(window.argmax(), window.shape)
        expected[n, top + i, left + j, c] = gradient[n, h, w, c]

    taps = window_taps(x, size, size, output)
    maxima, found = np.empty_like(gradient), np.full_like(x, np.nan)
    pool_maximum(taps, maxima)
    mask = np.empty(gradient.shape, bool)
    unpool_maximum(taps, maxima, gradient, mask, window_taps(found, size, size, output))
    assert np.array_equal(maxima, expected_maxima)
    assert np.array_equal(found, expected)
    assert not gradient.any()


@pytest.mark.parametrize("padding", [(0, 0), (1, 0), (1, 2)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
@pytest.mark.parametrize("output", [(2, 2), (3, 4)])
def test_positions_of_windows_over_the_edge_are_those_inside_the_image(padding, stride, output):
    size = (3, 4)
    x = np.arange(2 * 6 * 7 * 3).reshape(2, 6, 7, 3)
    seen = {}
    for tap in clipped_taps(x, size, stride, padding, output):
        numbers = np.arange(output[0] * output[1]).reshape(1, *output, 1)[tap.where]
        for number, pixels in zip(numbers.ravel(), tap.view[0, ..., 0].ravel(), strict=True):
            seen.setdefault(number, []).append(pixels)
    for h, w in np.ndindex(output):
        top, left = h * stride[0] - padding[0], w * stride[1] - padding[1]
        inside = x[0, max(top, 0) : top + size[0], max(left, 0) : left + size[1], 0]
        assert seen.get(h * output[1] + w, []) == inside.ravel().tolist()


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize(
    ("extent", "size", "stride", "padding", "count"),
    [
        (6, 1, 1, 0, 6),
        (7, 2, 2, 0, 3),
        (7, 2, 2, 0, 4),  # the last window reaches over the edge
        (8, 3, 2, 1, 4),
        (8, 3, 2, 1, 5),
        (5, 3, 1, 1, 5),
        (2, 4, 1, 2, 2),
        (1, 3, 1, 1, 1),
        (4, 2, 3, 1, 2),  # no position lies inside for both windows
    ],
)
def test_maxima_in_one_direction(axis, extent, size, stride, padding, count):
    shape, result = [2, 3, 3, 4], [2, 3, 3, 4]
    shape[axis], result[axis] = extent, count
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    out = np.full(result, np.nan, np.float32)
    for first, second, target in maximum_steps(x, out, axis, size, stride, padding):
        np.maximum(first, second, out=target)
    for index in range(count):
        seen = range(max(0, index * stride - padding), min(extent, index * stride - padding + size))
        expected = x.take(seen, axis).max(axis)
        assert np.array_equal(out.take(index, axis), expected)
