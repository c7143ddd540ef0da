"""Softmax cross-entropy."""

from __future__ import annotations

import numpy as np
import pytest

from dynacomm_async.nn.kernels import softmax_cross_entropy


def test_losses_are_minus_the_log_of_the_labels_share():
    logits = np.log(np.array([[1.0, 2.0, 5.0], [4.0, 4.0, 2.0]]))
    losses = softmax_cross_entropy(logits, np.array([2, 0]))
    np.testing.assert_allclose(losses, -np.log([5 / 8, 4 / 10]))


def test_the_gradient_is_that_of_the_mean():
    generator = np.random.default_rng(0)
    logits, labels = generator.standard_normal((4, 5)), generator.integers(0, 5, 4)
    gradient = np.empty_like(logits)
    softmax_cross_entropy(logits, labels, gradient)
    for index in np.ndindex(logits.shape):
        moved = [logits.copy(), logits.copy()]
        moved[0][index] += 1e-6
        moved[1][index] -= 1e-6
        above, below = (softmax_cross_entropy(each, labels).mean() for each in moved)
        assert gradient[index] == pytest.approx((above - below) / 2e-6, abs=1e-8)


def test_logits_far_apart_stay_finite():
    logits = np.array([[1e4, -1e4], [0, 3e38]], np.float32)
    gradient = np.empty_like(logits)
    losses = softmax_cross_entropy(logits, np.array([1, 1]), gradient)
    assert losses.tolist() == [2e4, 0]
    assert np.isfinite(gradient).all()
