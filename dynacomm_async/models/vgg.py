"""VGG-11, -16 and -19, and a small network in their manner.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition"
(arXiv 1409.1556): bias, no batch norm. Layers of the large ones have the names that torchvision
gives them.
"""

from __future__ import annotations

from collections.abc import Sequence

from dynacomm_async.nn import Conv2d, Dense, Dropout, Flatten, MaxPool, Network, ReLU
from dynacomm_async.nn.graph import Definition

__all__ = ["vgg11", "vgg16", "vgg19", "vgg_small"]

_STAGES = (64, 128, 256, 512, 512)


def vgg_small(input_shape: tuple[int, ...] = (32, 32, 3), classes: int = 10) -> Network:
    """64-64-pool-128-128-pool-256-256-pool-fc, all convolutions 3 x 3, for 32 x 32 images."""
    parts: list[Definition] = []
    for channels in (64, 128, 256):
        parts += [Conv2d(channels, 3, padding=1), ReLU()]
        # Max pooling raises the mean square as much as He's weights would.
        parts += [Conv2d(channels, 3, padding=1, initialiser="xavier"), ReLU(), MaxPool(2)]
    parts += [Flatten(), Dense(classes, initialiser="xavier")]
    return Network("vgg_small", parts, input_shape, classes)


def vgg11(input_shape: tuple[int, ...] = (224, 224, 3), classes: int = 1000) -> Network:
    """VGG-11 (configuration A): 8 convolutions, three dense layers, 132.9 million parameters."""
    return _large("vgg11", (1, 1, 2, 2, 2), input_shape, classes)


def vgg16(input_shape: tuple[int, ...] = (224, 224, 3), classes: int = 1000) -> Network:
    """VGG-16 (configuration D): 13 convolutions, three dense layers, 138.4 million parameters."""
    return _large("vgg16", (2, 2, 3, 3, 3), input_shape, classes)


def vgg19(input_shape: tuple[int, ...] = (224, 224, 3), classes: int = 1000) -> Network:
    """VGG-19 (configuration E): 16 convolutions, three dense layers, 143.7 million parameters."""
    return _large("vgg19", (2, 2, 4, 4, 4), input_shape, classes)


def _large(name: str, stages: Sequence[int], input_shape: tuple[int, ...], classes: int) -> Network:
    """A network for ImageNet with so many convolutions in each stage."""
    parts: list[Definition] = []
    for channels, convolutions in zip(_STAGES, stages, strict=True):
        for left in reversed(range(convolutions)):
            # As in the small one: the last is in front of the pooling.
            start, place = "he" if left else "xavier", f"features.{len(parts)}"
            parts.append(Conv2d(channels, 3, padding=1, initialiser=start, name=place))
            parts.append(ReLU())
        parts.append(MaxPool(2))
    parts += [Flatten(), Dense(4096, name="classifier.0"), ReLU(), Dropout()]
    parts += [Dense(4096, name="classifier.3"), ReLU(), Dropout()]
    parts.append(Dense(classes, initialiser="xavier", name="classifier.6"))
    return Network(name, parts, input_shape, classes)
