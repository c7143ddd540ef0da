"""What ``end_to_end.py`` trains: models, their data, and how long their layers compute."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from _torch_models import Transformer, resnet18
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dynacomm_async.adapters.torch import layer_specs

__all__ = ["MODELS", "RATE", "LayerTime", "Task", "build", "imitate", "measure"]

RATE = 0.01
"""The learning rate; plain SGD, the one rule that all of the systems have."""

SEED = 20


class LayerTime(NamedTuple):
    """What a layer is, as far as a link is concerned.

    Attributes:
        name: as in the layer table.
        shapes: of its parameters.
        forward_s: computing time, alone on a core.
        backward_s: likewise.
    """

    name: str
    shapes: list[list[int]]
    forward_s: float
    backward_s: float


@dataclass(frozen=True, slots=True)
class Task:
    """A model and what it is trained on.

    Attributes:
        model: the module; the same values in every process.
        sample: an input, for the order of the layers.
        loss: from a step and a rank to the loss of that worker's batch, of which ``backward`` can
            be called; needs the module to be called, which may be wrapped.
    """

    model: nn.Module
    sample: Tensor
    loss: Callable[[nn.Module, int, int], Tensor]


def _vgg11(width: int, hidden: int) -> nn.Module:
    """VGG-11 for 32x32 images, with its large dense layers (arXiv 1409.1556)."""
    layers: list[nn.Module] = []
    n_in = 3
    for scale, is_pooled in ((1, 1), (2, 1), (4, 0), (4, 1), (8, 0), (8, 1), (8, 0), (8, 1)):
        layers += [nn.Conv2d(n_in, width * scale, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * is_pooled
        n_in = width * scale
    dense = [nn.Linear(n_in, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), *dense, nn.Linear(hidden, 10))


def _images(model: nn.Module, batch: int) -> Task:
    numbers = torch.Generator().manual_seed(SEED)
    images = torch.randn(1024, 3, 32, 32, generator=numbers)
    labels = torch.randint(0, 10, (1024,), generator=numbers)
    images += 0.5 * torch.randn(10, 3, 32, 32, generator=numbers)[labels]

    def loss(module: nn.Module, step: int, rank: int) -> Tensor:
        chosen = _choose(len(images), batch, step, rank)
        return cross_entropy(module(images[chosen]), labels[chosen])

    return Task(model, images[:batch], loss)


def _text(model: nn.Module, batch: int, tokens: int, length: int) -> Task:
    numbers = torch.Generator().manual_seed(SEED)
    text = torch.randint(0, tokens, (1024, length + 1), generator=numbers)

    def loss(module: nn.Module, step: int, rank: int) -> Tensor:
        chosen = text[_choose(len(text), batch, step, rank)]
        return cross_entropy(module(chosen[:, :-1]).flatten(0, 1), chosen[:, 1:].flatten())

    return Task(model, text[:batch, :-1], loss)


def _choose(n: int, batch: int, step: int, rank: int) -> Tensor:
    """Return which samples a worker takes: no worker's batch is another's."""
    numbers = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(0, n, (batch,), generator=numbers)


def _resnet18(batch: int, quick: bool) -> Task:
    return _images(resnet18(8 if quick else 64), batch)


def _vgg(batch: int, quick: bool) -> Task:
    return _images(_vgg11(8, 128) if quick else _vgg11(64, 4096), batch)


def _transformer(batch: int, quick: bool) -> Task:
    tokens, width, blocks, length = (64, 32, 2, 16) if quick else (2048, 256, 6, 64)
    return _text(Transformer(tokens, width, 4, blocks, length), batch, tokens, length)


MODELS: dict[str, Callable[[int, bool], Task]] = {
    "resnet18": _resnet18,
    "vgg11": _vgg,
    "transformer": _transformer,
}
"""From a batch size, and whether it is to be small, to the task."""


def build(name: str, batch: int, *, quick: bool = False) -> Task:
    """Return a task whose model has the same initial values in every process."""
    torch.manual_seed(SEED)
    return MODELS[name](batch, quick)


# -- imitated computing --------------------------------------------------------------------------


class _Pass(torch.autograd.Function):
    """A layer that takes as long as the measured one, the processor idle.

    Its gradient is its own values, a little more at higher ranks, so that losses tell whether
    everybody's gradient has counted.
    """

    @staticmethod
    def forward(ctx: Any, token: Tensor, layer: LayerTime, rank: int, *values: Tensor) -> Tensor:
        time.sleep(layer.forward_s)
        ctx.layer, ctx.rank, ctx.values = layer, rank, values
        return token + 0.5 * values[0].flatten()[:64].square().sum()

    @staticmethod
    def backward(ctx: Any, token: Tensor) -> tuple[Any, ...]:
        began_s = time.perf_counter()
        gradients = [value * (1 + 0.5 * ctx.rank) for value in ctx.values]
        time.sleep(max(0.0, ctx.layer.backward_s - (time.perf_counter() - began_s)))
        return token, None, None, *gradients


class _Layer(nn.Module):
    def __init__(self, layer: LayerTime) -> None:
        super().__init__()
        self.layer = layer
        self.rank = 0
        self.values = nn.ParameterList(torch.randn(*shape) for shape in layer.shapes)
        self._own = list(self.values)

    def forward(self, token: Tensor) -> Tensor:
        return _Pass.apply(token, self.layer, self.rank, *self._own)


def imitate(layers: Sequence[LayerTime]) -> Task:
    """Return a task whose layers take these times without a processor."""
    torch.manual_seed(SEED)
    model = nn.Sequential(*map(_Layer, layers))

    def loss(module: nn.Module, step: int, rank: int) -> Tensor:
        for layer in model:
            layer.rank = rank
        return module(torch.zeros((), requires_grad=True))

    return Task(model, torch.zeros(()), loss)


def measure(task: Task, rounds: int) -> list[LayerTime]:
    """Return how long the layers compute in this process: each one's least of some rounds."""
    specs = layer_specs(task.model, task.sample)
    modules = dict(task.model.named_modules())
    layers = [modules.get(spec.name, task.model) for spec in specs]
    started = [0.0] * len(layers)
    ended = [0.0] * len(layers)

    def call(layer: int) -> Any:
        return lambda module, args: started.__setitem__(layer, time.perf_counter())

    def finish(layer: int) -> Any:
        return lambda parameter: ended.__setitem__(layer, time.perf_counter())

    for layer, module in enumerate(layers):
        module.register_forward_pre_hook(call(layer))
        for parameter in module.parameters(recurse=False):
            parameter.register_post_accumulate_grad_hook(finish(layer))
    forward: list[list[float]] = [[] for _ in layers]
    backward: list[list[float]] = [[] for _ in layers]
    for step in range(rounds + 1):
        task.model.zero_grad()
        loss = task.loss(task.model, step, 0)
        turned = time.perf_counter()
        loss.backward()
        if step == 0:
            continue
        # Attention computes with its output projection and never calls it: that has no time.
        begins = list(accumulate(started, max))
        for layer, (start, end) in enumerate(pairwise([*begins, turned])):
            forward[layer].append(end - start)
        before = turned
        for layer in reversed(range(len(layers))):
            backward[layer].append(max(ended[layer] - before, 0.0))
            before = max(ended[layer], before)
    return [
        LayerTime(
            spec.name,
            [list(parameter.shape) for parameter in module.parameters(recurse=False)],
            min(forwards),
            min(backwards),
        )
        for spec, module, forwards, backwards in zip(specs, layers, forward, backward, strict=True)
    ]
