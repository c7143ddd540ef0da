"""MobileNetV2."""

from __future__ import annotations

from dynacomm_async.nn import (
    BatchNorm,
    Conv2d,
    Dense,
    Dropout,
    GlobalAvgPool,
    Network,
    ReLU,
    Residual,
)
from dynacomm_async.nn.graph import Definition

__all__ = ["mobilenet_v2"]

_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels, blocks, and the stride of the first of them; table 2 of the paper."""


def mobilenet_v2(input_shape: tuple[int, ...] = (224, 224, 3), classes: int = 1000) -> Network:
    """MobileNetV2: 52 convolutions with batch norm and one dense layer, 3.5 million parameters.

    Sandler, Howard, Zhu, Zhmoginov and Chen, "MobileNetV2: Inverted Residuals and Linear
    Bottlenecks" (arXiv 1801.04381). Layers have the names that torchvision gives them.
    """
    parts: list[Definition] = [*_convolve("features.0", 32, 3, stride=2), ReLU(6)]
    before, number = 32, 1
    for expansion, channels, blocks, first in _STAGES:
        for block in range(blocks):
            name, stride = f"features.{number}", first if block == 0 else 1
            if stride == 1 and before == channels:
                parts.append(Residual(_bottleneck("conv", before, expansion, channels), name=name))
            else:
                parts += _bottleneck(f"{name}.conv", before, expansion, channels, stride)
            before, number = channels, number + 1
    parts += [*_convolve(f"features.{number}", 1280, 1), ReLU(6), GlobalAvgPool(), Dropout(0.2)]
    parts.append(Dense(classes, initialiser="xavier", name="classifier.1"))
    return Network("mobilenet_v2", parts, input_shape, classes)


def _bottleneck(
    name: str, before: int, expansion: int, channels: int, stride: int = 1
) -> list[Definition]:
    """Widen, look around channel by channel, narrow; without a ReLU behind the last."""
    wide, number = expansion * before, 0
    parts: list[Definition] = []
    if expansion > 1:
        parts += [*_convolve(f"{name}.0", wide, 1), ReLU(6)]
        number = 1
    parts += [*_convolve(f"{name}.{number}", wide, 3, stride, groups=wide), ReLU(6)]
    parts.append(Conv2d(channels, 1, bias=False, name=f"{name}.{number + 1}"))
    return [*parts, BatchNorm(name=f"{name}.{number + 2}")]


def _convolve(
    name: str, channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[Definition]:
    convolution = Conv2d(
        channels, kernel, stride, kernel // 2, bias=False, groups=groups, name=f"{name}.0"
    )
    return [convolution, BatchNorm(name=f"{name}.1")]
