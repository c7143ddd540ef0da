"""Residual networks, for CIFAR and for ImageNet.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385). Layers
have the names that torchvision gives them.
"""

from __future__ import annotations

from collections.abc import Sequence

from dynacomm_async.nn import (
    BatchNorm,
    Conv2d,
    Dense,
    GlobalAvgPool,
    MaxPool,
    Network,
    PadShortcut,
    ReLU,
    Residual,
)
from dynacomm_async.nn.graph import Definition

__all__ = ["resnet18", "resnet20", "resnet50", "resnet152"]

_BLOCKS_IN_A_STAGE = 3
_STAGES = (64, 128, 256, 512)
_EXPANSION = 4


def resnet20(input_shape: tuple[int, ...] = (32, 32, 3), classes: int = 10) -> Network:
    """ResNet-20: 19 convolutions with batch norm and one dense layer, 0.27 million parameters.

    The paper's network for CIFAR-10 with n = 3 and shortcuts without parameters.
    """
    parts: list[Definition] = [*_convolve("1", 16, 3), ReLU()]
    before = 16
    for stage, channels in enumerate((16, 32, 64), start=1):
        for block in range(_BLOCKS_IN_A_STAGE):
            stride = 1 if channels == before else 2
            shortcut = [] if stride == 1 else [PadShortcut(channels, stride)]
            body = _basic(channels, stride)
            parts += [Residual(body, shortcut, name=f"layer{stage}.{block}"), ReLU()]
            before = channels
    parts += [GlobalAvgPool(), Dense(classes, initialiser="xavier", name="fc")]
    return Network("resnet20", parts, input_shape, classes)


def resnet18(input_shape: tuple[int, ...] = (224, 224, 3), classes: int = 1000) -> Network:
    """ResNet-18: 20 convolutions with batch norm and one dense layer, 11.7 million parameters."""
    return _large("resnet18", (2, 2, 2, 2), False, input_shape, classes)


def resnet50(input_shape: tuple[int, ...] = (224, 224, 3), classes: int = 1000) -> Network:
    """ResNet-50: 53 convolutions with batch norm and one dense layer, 25.6 million parameters."""
    return _large("resnet50", (3, 4, 6, 3), True, input_shape, classes)


def resnet152(input_shape: tuple[int, ...] = (224, 224, 3), classes: int = 1000) -> Network:
    """ResNet-152: 155 convolutions with batch norm and one dense layer, 60.2 million parameters."""
    return _large("resnet152", (3, 8, 36, 3), True, input_shape, classes)


def _large(
    name: str, stages: Sequence[int], deep: bool, input_shape: tuple[int, ...], classes: int
) -> Network:
    """A network for ImageNet with so many blocks in each stage, bottlenecks if ``deep``.

    Shortcuts have a convolution where the shape changes. The stride of a bottleneck is in the
    3 x 3 convolution, not in the 1 x 1 before it, as has become usual.
    """
    parts: list[Definition] = [*_convolve("1", 64, 7, 2), ReLU(), MaxPool(3, 2, padding=1)]
    before = 64
    for stage, (channels, blocks) in enumerate(zip(_STAGES, stages, strict=True), start=1):
        for block in range(blocks):
            stride = 2 if stage > 1 and block == 0 else 1
            after = _EXPANSION * channels if deep else channels
            body = _bottleneck(channels, stride) if deep else _basic(channels, stride)
            shortcut = [] if (before, stride) == (after, 1) else _project(after, stride)
            parts += [Residual(body, shortcut, name=f"layer{stage}.{block}"), ReLU()]
            before = after
    parts += [GlobalAvgPool(), Dense(classes, initialiser="xavier", name="fc")]
    return Network(name, parts, input_shape, classes)


def _basic(channels: int, stride: int) -> list[Definition]:
    return [*_convolve("1", channels, 3, stride), ReLU(), *_convolve("2", channels, 3)]


def _bottleneck(channels: int, stride: int) -> list[Definition]:
    return [
        *(*_convolve("1", channels, 1), ReLU()),
        *(*_convolve("2", channels, 3, stride), ReLU()),
        *_convolve("3", _EXPANSION * channels, 1),
    ]


def _convolve(number: str, channels: int, kernel: int, stride: int = 1) -> list[Definition]:
    padding = kernel // 2
    return [
        Conv2d(channels, kernel, stride, padding, bias=False, name=f"conv{number}"),
        BatchNorm(name=f"bn{number}"),
    ]


def _project(channels: int, stride: int) -> list[Definition]:
    return [
        Conv2d(channels, 1, stride, bias=False, name="downsample.0"),
        BatchNorm(name="downsample.1"),
    ]
