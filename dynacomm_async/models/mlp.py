"""A small multilayer perceptron."""

from __future__ import annotations

from dynacomm_async.nn import Dense, Flatten, Network, ReLU

__all__ = ["mlp"]


def mlp(input_shape: tuple[int, ...] = (28, 28, 1), classes: int = 10) -> Network:
    """Two hidden layers of 128 and 64 units: the smallest thing that learns digits well."""
    parts = [
        Flatten(),
        Dense(128),
        ReLU(),
        Dense(64),
        ReLU(),
        Dense(classes, initialiser="xavier"),
    ]
    return Network("mlp", parts, input_shape, classes)
