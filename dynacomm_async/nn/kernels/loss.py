"""Softmax cross-entropy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["softmax_cross_entropy"]


def softmax_cross_entropy(
    logits: NDArray[Any],
    labels: NDArray[np.int64],
    gradient: NDArray[Any] | None = None,
    *,
    smoothing: float = 0.0,
) -> NDArray[Any]:
    """Return the loss of each image, (N,), for ``logits`` (N, classes).

    With smoothing the target of an image is its label with 1 - smoothing and every class with an
    equal share of the rest (Szegedy et al., "Rethinking the Inception Architecture for Computer
    Vision", arXiv 1512.00567).

    Args:
        logits: not changed.
        labels: (N,), each from 0 to classes - 1.
        gradient: if given, receives the gradient of the mean loss by the logits.
        smoothing: at least 0 and below 1.
    """
    rows = np.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    sums = exponentials.sum(axis=1, keepdims=True)
    if gradient is not None:
        np.divide(exponentials, sums, out=gradient)
        gradient[rows, labels] -= 1 - smoothing
        if smoothing:
            gradient -= smoothing / logits.shape[1]
        gradient *= gradient.dtype.type(1 / len(labels))
    right = shifted[rows, labels]
    if smoothing:
        right = (1 - smoothing) * right + smoothing * shifted.mean(axis=1)
    losses: NDArray[Any] = np.log(sums[:, 0]) - right
    return losses
