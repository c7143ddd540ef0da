"""VGG-19, and a small network in its manner."""

from __future__ import annotations

from dynacomm_async.nn import Conv2d, Dense, Flatten, MaxPool, Network, ReLU
from dynacomm_async.nn.graph import Definition

__all__ = ["vgg19", "vgg_small"]

_VGG19_STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))


def vgg_small(input_shape: tuple[int, ...] = (32, 32, 3), classes: int = 10) -> Network:
    """64-64-pool-128-128-pool-256-256-pool-fc, all convolutions 3 x 3, for 32 x 32 images.

    After Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
    Recognition" (arXiv 1409.1556): bias, no batch norm.
    """
    parts: list[Definition] = []
    for channels in (64, 128, 256):
        parts += _convolve(channels, 2)
    parts += [Flatten(), Dense(classes, initialiser="xavier")]
    return Network("vgg_small", parts, input_shape, classes)


def vgg19(input_shape: tuple[int, ...] = (224, 224, 3), classes: int = 1000) -> Network:
    """VGG-19: 16 convolutions and three dense layers, 143.7 million parameters.

    Simonyan and Zisserman (arXiv 1409.1556), configuration E. Its dropout, between the dense
    layers, is left out: it has no parameters, and a step here is a function of its images, its
    labels and the parameters alone.
    """
    parts: list[Definition] = []
    for channels, convolutions in _VGG19_STAGES:
        parts += _convolve(channels, convolutions)
    parts += [Flatten(), Dense(4096), ReLU(), Dense(4096), ReLU()]
    parts.append(Dense(classes, initialiser="xavier"))
    return Network("vgg19", parts, input_shape, classes)


def _convolve(channels: int, convolutions: int) -> list[Definition]:
    """Some convolutions 3 x 3 and a pooling."""
    parts: list[Definition] = []
    for _ in range(convolutions - 1):
        parts += [Conv2d(channels, 3, padding=1), ReLU()]
    # Max pooling raises the mean square as much as He's weights would.
    return [*parts, Conv2d(channels, 3, padding=1, initialiser="xavier"), ReLU(), MaxPool(2)]
