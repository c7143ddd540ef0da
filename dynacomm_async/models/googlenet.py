"""GoogLeNet, the first Inception network."""

from __future__ import annotations

from dynacomm_async.nn import (
    Branches,
    Conv2d,
    Dense,
    Dropout,
    GlobalAvgPool,
    LocalResponseNorm,
    MaxPool,
    Network,
    ReLU,
)
from dynacomm_async.nn.graph import Definition

__all__ = ["googlenet"]

_MODULES = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
"""Channels of 1x1; 3x3 reduced, 3x3; 5x5 reduced, 5x5; 1x1 behind the pooling."""

_POOLED = ("3b", "4e")
"""Behind these the image is halved."""


def googlenet(input_shape: tuple[int, ...] = (224, 224, 3), classes: int = 1000) -> Network:
    """GoogLeNet: 57 convolutions and one dense layer, 7 million parameters.

    Szegedy et al., "Going Deeper with Convolutions" (arXiv 1409.4842): bias, no batch norm, true
    5 x 5 convolutions, and local response normalisation as in the authors' other networks. Left out
    are the auxiliary heads, which serve training only.
    """
    parts: list[Definition] = [
        *_convolve("conv1", 64, 7, stride=2),
        *(_halve(), LocalResponseNorm()),
        *_convolve("conv2_reduce", 64, 1),
        *_convolve("conv2", 192, 3),
        *(LocalResponseNorm(), _halve()),
    ]
    for name, channels in _MODULES.items():
        parts.append(_inception(f"inception{name}", *channels))
        if name in _POOLED:
            parts.append(_halve())
    parts += [GlobalAvgPool(), Dropout(0.4), Dense(classes, initialiser="xavier")]
    return Network("googlenet", parts, input_shape, classes)


def _inception(
    name: str, one: int, reduced3: int, three: int, reduced5: int, five: int, pooled: int
) -> Branches:
    branches = [
        _convolve("1x1", one, 1),
        [*_convolve("3x3_reduce", reduced3, 1), *_convolve("3x3", three, 3)],
        [*_convolve("5x5_reduce", reduced5, 1), *_convolve("5x5", five, 5)],
        [MaxPool(3, 1, padding=1), *_convolve("pool_proj", pooled, 1)],
    ]
    return Branches(branches, name=name)


def _halve() -> MaxPool:
    return MaxPool(3, 2, ceil=True)


def _convolve(name: str, channels: int, kernel: int, stride: int = 1) -> list[Definition]:
    return [Conv2d(channels, kernel, stride, kernel // 2, name=name), ReLU()]
