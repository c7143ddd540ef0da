"""PyTorch models that benchmarks and tests train."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Transformer", "resnet18"]


class _Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., arXiv 1512.03385)."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(n_out)
        self.second = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(n_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or n_in != n_out:
            project = nn.Conv2d(n_in, n_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        return torch.relu(y + self.shortcut(x))


def resnet18(width: int = 64, classes: int = 10) -> nn.Module:
    """Return ResNet-18 for 32x32 images: a 3x3 stem without pooling, four stages of two blocks."""
    stages: list[nn.Module] = []
    n_in = width
    for stage in range(4):
        n_out = width << stage
        stages += [_Residual(n_in, n_out, 1 if stage == 0 else 2), _Residual(n_out, n_out, 1)]
        n_in = n_out
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        *stages,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(n_in, classes),
    )


class Transformer(nn.Module):
    """A small causal language model with tied embeddings (Vaswani et al., arXiv 1706.03762).

    From (N, T) token ids to (N, T, tokens) logits.
    """

    def __init__(
        self, tokens: int = 64, width: int = 32, heads: int = 4, blocks: int = 2, length: int = 16
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.place = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                heads,
                4 * width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = self.embed(ids) + self.place[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        for block in self.blocks:
            x = block(x, src_mask=mask)
        return self.head(self.norm(x))
