"""The engine's networks as PyTorch modules, for benchmarks that compare the two."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["NETS"]


def lenet() -> nn.Module:
    """LeNet-5 for 1x28x28, as ``dynacomm_async.models`` defines it."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def vgg_small() -> nn.Module:
    """64-64-pool-128-128-pool-256-256-pool-fc for 3x32x32."""
    parts: list[nn.Module] = []
    for before, channels in pairwise((3, 64, 128, 256)):
        parts += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
        parts += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(4096, 10))


class _Residual(nn.Module):
    """body(x) + shortcut(x), with a ReLU behind if ``rectified``."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, rectified: bool) -> None:
        super().__init__()
        self.body, self.shortcut, self.rectified = body, shortcut, rectified

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x) + self.shortcut(x)
        return torch.relu(y) if self.rectified else y


class _Pad(nn.Module):
    """Every second pixel, new channels filled with zeros: He's option A."""

    def forward(self, x: Tensor) -> Tensor:
        extra = x.shape[1] // 2
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, extra, extra))


def _normed(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    convolution = nn.Conv2d(before, after, kernel, stride, kernel // 2, 1, groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after))


def resnet20() -> nn.Module:
    """ResNet-20 for 3x32x32 with shortcuts without parameters."""
    parts: list[nn.Module] = [_normed(3, 16, 3), nn.ReLU()]
    before = 16
    for channels in (16, 32, 64):
        for _ in range(3):
            stride = 1 if channels == before else 2
            body = nn.Sequential(
                _normed(before, channels, 3, stride), nn.ReLU(), _normed(channels, channels, 3)
            )
            parts.append(_Residual(body, nn.Identity() if stride == 1 else _Pad(), True))
            before = channels
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 with 1000 classes; dropout in front of the last layer."""
    parts: list[nn.Module] = [_normed(3, 32, 3, 2), nn.ReLU6()]
    before = 32
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)]
    stages += [(6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for expansion, channels, blocks, first in stages:
        for block in range(blocks):
            stride, wide = first if block == 0 else 1, expansion * before
            body: list[nn.Module] = [_normed(before, wide, 1), nn.ReLU6()] if expansion > 1 else []
            body += [_normed(wide, wide, 3, stride, wide), nn.ReLU6(), _normed(wide, channels, 1)]
            whole = nn.Sequential(*body)
            skips = stride == 1 and before == channels
            parts.append(_Residual(whole, nn.Identity(), False) if skips else whole)
            before = channels
    parts += [_normed(before, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*parts, nn.Dropout(0.2), nn.Linear(1280, 1000))


NETS: dict[str, Callable[[], nn.Module]] = {
    "lenet": lenet,
    "vgg_small": vgg_small,
    "resnet20": resnet20,
    "mobilenet_v2": mobilenet_v2,
}
"""By the names of ``dynacomm_async.models``."""
