"""Phases say which taps touch which pixels."""

from __future__ import annotations

import numpy as np
import pytest

from dynacomm_async.nn.kernels import input_phases, phase_border, rotate_weights

CASES = [
    (extent, kernel, stride, padding)
    for extent in (1, 2, 5, 8, 9)
    for kernel in (1, 2, 3, 5)
    for stride in (1, 2, 3, 4)
    for padding in range(kernel)
    if extent + 2 * padding >= kernel
]


@pytest.mark.parametrize(("extent", "kernel", "stride", "padding"), CASES)
def test_phases_give_the_gradient_of_a_convolution_in_one_direction(
    extent, kernel, stride, padding
):
    generator = np.random.default_rng(extent * 100 + kernel * 10 + stride)
    outputs = (extent + 2 * padding - kernel) // stride + 1
    weights, gradient = generator.standard_normal(kernel), generator.standard_normal(outputs)
    expected = np.zeros(extent + 2 * padding)
    for output in range(outputs):
        expected[output * stride : output * stride + kernel] += gradient[output] * weights
    expected = expected[padding : padding + extent]

    phases = input_phases(extent, kernel, stride, padding)
    before, behind = phase_border(phases, outputs)
    framed = np.pad(gradient, (before, behind))
    found = np.full(extent, np.nan)
    for phase in phases:
        taps = weights[phase.taps]
        assert len(taps) == phase.reach
        assert len(found[phase.pixels]) == phase.count
        starts = [before + phase.first + pixel for pixel in range(phase.count)]
        found[phase.pixels] = [framed[start : start + phase.reach] @ taps for start in starts]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_rotating_turns_the_window_and_swaps_the_channels():
    weights = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).astype(np.float32)
    out = np.empty((2, 3, 5, 4), np.float32)
    whole = slice(None, None, -1)
    rotate_weights(weights, (whole, whole), out)
    assert out[0, 2, 3, 1] == weights[1, 0, 1, 3]
