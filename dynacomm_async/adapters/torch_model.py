"""What the transport has to know of a PyTorch module: its layers, their order, who reads them.

A layer is a module that directly owns trainable parameters; they lie one after another in the
arena. A parameter that several modules own (tied weights) belongs to the first of them. The running
statistics of a normalisation belong to its own layer or, where it has no parameters, to the layer
before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dynacomm_async.adapters.torch_checks import check_parameters
from dynacomm_async.adapters.torch_watch import ForwardPass, has_statistics
from dynacomm_async.errors import ShapeError
from dynacomm_async.wire.grid import LayerSpec

__all__ = ["ROOT", "Decays", "ModelTable", "Norm", "Slot"]

Floats = NDArray[np.float32]

Decays: TypeAlias = Callable[[str, Tensor], bool]
"""From a parameter's name and itself to whether weight decay applies to it."""

ROOT = "(root)"
"""The name of the layer that the outermost module's own parameters make."""

_COMPILED = "_orig_mod"
"""The name under which ``torch.compile`` keeps the module that it was given."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One trainable parameter and its place.

    Attributes:
        name: as in ``model.named_parameters()``.
        parameter: the tensor that the module owns.
        layer: index of its layer.
        place: where it lies in the arena, in floats.
    """

    name: str
    parameter: nn.Parameter
    layer: int
    place: slice


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalisation with running statistics, and their place.

    Attributes:
        name: of the module.
        module: an ``nn.Module`` that has ``running_mean`` and ``running_var``, both (features,).
        layer: the layer whose statistics they are part of.
        place: where they lie among all statistics: the mean, then the variance; in floats.
    """

    name: str
    module: Any
    layer: int
    place: slice


class ModelTable:
    """A module as the transport sees it.

    Args:
        model: parameters must be float32, float16 or bfloat16.
        seen: a forward pass, which gives the order; None: the order of definition.
        decays: which parameters weight decay applies to; None: all, as in PyTorch's optimizers.

    Attributes:
        specs: the layer table.
        slots: the trainable parameters in the order of the arena.
        norms: the normalisations with running statistics, in the order of the statistics.

    Raises:
        ConfigError: a parameter that cannot be transported, by name.
        ShapeError: there is nothing to train.
    """

    def __init__(
        self, model: nn.Module, seen: ForwardPass | None = None, decays: Decays | None = None
    ) -> None:
        check_parameters(model)
        self.model = model
        layers = _list_layers(model)
        if seen is not None:
            layers = _sort_layers(layers, seen)
        self._names = list(layers)
        self.slots: list[Slot] = []
        counts, decaying = [], []
        start = 0
        for index, owned in enumerate(layers.values()):
            decayed = [(n, p) for n, p in owned if decays is None or decays(n, p)]
            kept = {name for name, _ in decayed}
            first = start
            for name, parameter in [*decayed, *((n, p) for n, p in owned if n not in kept)]:
                place = slice(start, start + parameter.numel())
                self.slots.append(Slot(name, parameter, index, place))
                start = place.stop
            counts.append(start - first)
            decaying.append(sum(parameter.numel() for _, parameter in decayed))
        self._layer_of = {slot.parameter: slot.layer for slot in self.slots}
        self.norms, statistics = self._list_norms(seen)
        rows = zip(self._names, counts, decaying, statistics, strict=True)
        self.specs = tuple(LayerSpec(*row) for row in rows)

    def _list_norms(self, seen: ForwardPass | None) -> tuple[list[Norm], list[int]]:
        hosts = self._hosts(seen)
        counts = [0] * len(self._names)
        norms: list[Norm] = []
        start = 0
        for name, module, layer in sorted(hosts, key=lambda host: host[2]):
            place = slice(start, start + 2 * module.running_mean.numel())
            norms.append(Norm(name or ROOT, module, layer, place))
            counts[layer] += place.stop - place.start
            start = place.stop
        return norms, counts

    def _hosts(self, seen: ForwardPass | None) -> list[tuple[str, Any, int]]:
        """Return the normalisations with the layers that their statistics belong to."""
        read = [] if seen is None else [self._layer_of[p] for p in seen.order()]
        hosts = []
        latest = 0
        for name, module in self.model.named_modules():
            own = [self._layer_of[p] for p in _own(module) if p in self._layer_of]
            latest = own[0] if own else latest
            if not has_statistics(module):
                continue
            layer = latest
            if not own and seen is not None and module in seen.calls:
                before = read[: seen.calls[module]]
                layer = before[-1] if before else 0
            hosts.append((name, module, layer))
        return hosts

    def needs(self, seen: ForwardPass | None) -> dict[nn.Module, tuple[int, ...]]:
        """Return which layers must be here before a module is called, in forward order."""
        found: dict[nn.Module, set[int]] = {}
        for module in self.model.modules():
            own = {self._layer_of[p] for p in _own(module) if p in self._layer_of}
            if own:
                found[module] = own
        for norm in self.norms:
            found.setdefault(norm.module, set()).add(norm.layer)
        for module, parameter in {} if seen is None else seen.reads:
            found.setdefault(module, set()).add(self._layer_of[parameter])
        return {module: tuple(sorted(layers)) for module, layers in found.items()}

    def is_order_of(self, seen: ForwardPass) -> bool:
        """Return whether the layers were first read in the order in which the table has them."""
        layers = [self._layer_of[parameter] for parameter in seen.order()]
        first_reads = list(dict.fromkeys(layers))
        return first_reads == sorted(first_reads)

    def initial(self) -> Floats:
        """Return the parameters' values, (n,) float32, a copy."""
        return _joined(slot.parameter for slot in self.slots)

    def initial_statistics(self) -> Floats:
        """Return the running statistics, (m,) float32, a copy."""
        buffers = ((norm.module.running_mean, norm.module.running_var) for norm in self.norms)
        return _joined(buffer for pair in buffers for buffer in pair)

    def kernels(self) -> str:
        """Return what must be the same at all workers beside the table, in a few letters each.

        Names, shapes and types of the trained parameters; the values of frozen ones, which do not
        travel.
        """
        shapes = [(s.name, tuple(s.parameter.shape), str(s.parameter.dtype)) for s in self.slots]
        text = f"torch module {_short_hash(repr(shapes).encode())}"
        frozen = [p for p in self.model.parameters() if p not in self._layer_of]
        if frozen:
            text += f", frozen parameters {_short_hash(_joined(frozen).tobytes())}"
        return text


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in module._parameters.values() if p is not None)


def _list_layers(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Return the trainable parameters by the module that owns them, in order of definition."""
    layers: dict[str, list[tuple[str, nn.Parameter]]] = {}
    taken: set[nn.Parameter] = set()
    for full_path, module in model.named_modules():
        path = _without_compiled(full_path)
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or parameter.numel() == 0:
                continue
            if parameter not in taken:
                taken.add(parameter)
                full_name = f"{path}.{name}" if path else name
                layers.setdefault(path or ROOT, []).append((full_name, parameter))
    if not layers:
        raise ShapeError(
            "the model has no trainable parameters: none at all, or all have requires_grad=False"
        )
    return layers


def _without_compiled(path: str) -> str:
    """Return a module's name as if nothing were compiled, so that workers may differ in that."""
    return ".".join(part for part in path.split(".") if part != _COMPILED)


def _sort_layers(
    layers: dict[str, list[tuple[str, nn.Parameter]]], seen: ForwardPass
) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Put layers in the order in which they were first read; those not read come last."""
    order = seen.order()
    never = len(order)

    def position(name: str) -> int:
        return min(order.get(parameter, never) for _, parameter in layers[name])

    return {name: layers[name] for name in sorted(layers, key=position)}


def _joined(tensors: Iterable[Tensor]) -> Floats:
    parts = [tensor.detach().to("cpu", torch.float32).numpy().ravel() for tensor in tensors]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _short_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
