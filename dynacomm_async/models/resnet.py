"""Residual networks, for CIFAR and for ImageNet."""

from __future__ import annotations

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

__all__ = ["resnet20", "resnet152"]

_BLOCKS_IN_A_STAGE = 3
_RESNET152_STAGES = ((64, 3), (128, 8), (256, 36), (512, 3))
_EXPANSION = 4


def resnet20(input_shape: tuple[int, ...] = (32, 32, 3), classes: int = 10) -> Network:
    """ResNet-20: 19 convolutions with batch norm and one dense layer, 0.27 million parameters.

    He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), the
    network for CIFAR-10 with n = 3 and shortcuts without parameters.
    """
    parts: list[Definition] = [*_convolve(16, 3), ReLU()]
    before = 16
    for stage, channels in enumerate((16, 32, 64), start=1):
        for block in range(1, _BLOCKS_IN_A_STAGE + 1):
            stride = 1 if channels == before else 2
            shortcut = [] if stride == 1 else [PadShortcut(channels, stride)]
            body = [*_convolve(channels, 3, stride), ReLU(), *_convolve(channels, 3)]
            parts += [Residual(body, shortcut, name=f"stage{stage}.block{block}"), ReLU()]
            before = channels
    parts += [GlobalAvgPool(), Dense(classes, initialiser="xavier")]
    return Network("resnet20", parts, input_shape, classes)


def resnet152(input_shape: tuple[int, ...] = (224, 224, 3), classes: int = 1000) -> Network:
    """ResNet-152: 155 convolutions with batch norm and one dense layer, 60.2 million parameters.

    He, Zhang, Ren and Sun (arXiv 1512.03385): bottleneck blocks, shortcuts with a convolution
    where the shape changes. The stride is in the 3 x 3 convolution, not in the 1 x 1 before it, as
    has become usual.
    """
    parts: list[Definition] = [*_convolve(64, 7, 2), ReLU(), MaxPool(3, 2, padding=1)]
    for stage, (channels, blocks) in enumerate(_RESNET152_STAGES, start=1):
        for block in range(1, blocks + 1):
            stride = 2 if stage > 1 and block == 1 else 1
            shortcut = _convolve(_EXPANSION * channels, 1, stride) if block == 1 else []
            body = _bottleneck(channels, stride)
            parts += [Residual(body, shortcut, name=f"stage{stage}.block{block}"), ReLU()]
    parts += [GlobalAvgPool(), Dense(classes, initialiser="xavier")]
    return Network("resnet152", parts, input_shape, classes)


def _bottleneck(channels: int, stride: int) -> list[Definition]:
    return [
        *(*_convolve(channels, 1), ReLU()),
        *(*_convolve(channels, 3, stride), ReLU()),
        *_convolve(_EXPANSION * channels, 1),
    ]


def _convolve(channels: int, kernel: int, stride: int = 1) -> list[Definition]:
    return [
        Conv2d(channels, kernel, stride=stride, padding=kernel // 2, bias=False),
        BatchNorm(),
    ]
