"""Softmax cross-entropy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["softmax_cross_entropy"]


def softmax_cross_entropy(
    logits: NDArray[Any], labels: NDArray[np.int64], gradient: NDArray[Any] | None = None
) -> NDArray[Any]:
    """Return the loss of each image, (N,), for ``logits`` (N, classes).

    Args:
        logits: not changed.
        labels: (N,), each from 0 to classes - 1.
        gradient: if given, receives the gradient of the mean loss by the logits.
    """
    rows = np.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    sums = exponentials.sum(axis=1, keepdims=True)
    if gradient is not None:
        np.divide(exponentials, sums, out=gradient)
        gradient[rows, labels] -= 1
        gradient *= gradient.dtype.type(1 / len(labels))
    losses: NDArray[Any] = np.log(sums[:, 0]) - shifted[rows, labels]
    return losses
