"""Inception-v4."""

from __future__ import annotations

from dynacomm_async.nn import (
    AvgPool,
    BatchNorm,
    Branches,
    Conv2d,
    Dense,
    Dropout,
    GlobalAvgPool,
    MaxPool,
    Network,
    ReLU,
)
from dynacomm_async.nn.graph import Definition

__all__ = ["inception_v4"]

_Kernel = int | tuple[int, int]


def inception_v4(input_shape: tuple[int, ...] = (299, 299, 3), classes: int = 1000) -> Network:
    """Inception-v4: 149 convolutions with batch norm and one dense layer, 42.7 million parameters.

    Szegedy, Ioffe, Vanhoucke and Alemi, "Inception-v4, Inception-ResNet and the Impact of Residual
    Connections on Learning" (arXiv 1602.07261). Images are at least 75 x 75.
    """
    parts: list[Definition] = [
        *_stem(),
        *(_module_a(f"a{number}") for number in range(1, 5)),
        _reduction_a(),
        *(_module_b(f"b{number}") for number in range(1, 8)),
        _reduction_b(),
        *(_module_c(f"c{number}") for number in range(1, 4)),
        GlobalAvgPool(),
        Dropout(0.2),
        Dense(classes, initialiser="xavier"),
    ]
    return Network("inception_v4", parts, input_shape, classes)


def _stem() -> list[Definition]:
    long = [*_same(64, 1), *_same(64, (7, 1)), *_same(64, (1, 7)), *_valid(96, 3)]
    return [
        *(*_valid(32, 3, 2), *_valid(32, 3), *_same(64, 3)),
        Branches([[MaxPool(3, 2)], _valid(96, 3, 2)], name="stem1"),
        Branches([[*_same(64, 1), *_valid(96, 3)], long], name="stem2"),
        Branches([_valid(192, 3, 2), [MaxPool(3, 2)]], name="stem3"),
    ]


def _module_a(name: str) -> Branches:
    branches: list[list[Definition]] = [
        _same(96, 1),
        [*_same(64, 1), *_same(96, 3)],
        [*_same(64, 1), *_same(96, 3), *_same(96, 3)],
        [AvgPool(3, 1, padding=1), *_same(96, 1)],
    ]
    return Branches(branches, name=name)


def _reduction_a() -> Branches:
    branches: list[list[Definition]] = [
        _valid(384, 3, 2),
        [*_same(192, 1), *_same(224, 3), *_valid(256, 3, 2)],
        [MaxPool(3, 2)],
    ]
    return Branches(branches, name="reduction_a")


def _module_b(name: str) -> Branches:
    long = [*_same(192, 1), *_same(192, (7, 1)), *_same(224, (1, 7)), *_same(224, (7, 1))]
    branches: list[list[Definition]] = [
        _same(384, 1),
        [*_same(192, 1), *_same(224, (1, 7)), *_same(256, (7, 1))],
        [*long, *_same(256, (1, 7))],
        [AvgPool(3, 1, padding=1), *_same(128, 1)],
    ]
    return Branches(branches, name=name)


def _reduction_b() -> Branches:
    branches: list[list[Definition]] = [
        [*_same(192, 1), *_valid(192, 3, 2)],
        [*_same(256, 1), *_same(256, (1, 7)), *_same(320, (7, 1)), *_valid(320, 3, 2)],
        [MaxPool(3, 2)],
    ]
    return Branches(branches, name="reduction_b")


def _module_c(name: str) -> Branches:
    def fork() -> Branches:
        return Branches([_same(256, (1, 3)), _same(256, (3, 1))])

    branches: list[list[Definition]] = [
        _same(256, 1),
        [*_same(384, 1), fork()],
        [*_same(384, 1), *_same(448, (3, 1)), *_same(512, (1, 3)), fork()],
        [AvgPool(3, 1, padding=1), *_same(256, 1)],
    ]
    return Branches(branches, name=name)


def _same(channels: int, kernel: _Kernel) -> list[Definition]:
    """A convolution that keeps height and width."""
    high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
    return _convolve(Conv2d(channels, kernel, 1, (high // 2, wide // 2), bias=False))


def _valid(channels: int, kernel: int, stride: int = 1) -> list[Definition]:
    """A convolution that stays inside the image."""
    return _convolve(Conv2d(channels, kernel, stride, bias=False))


def _convolve(convolution: Conv2d) -> list[Definition]:
    return [convolution, BatchNorm(epsilon=1e-3), ReLU()]
