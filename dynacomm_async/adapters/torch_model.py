"""What the transport has to know of a PyTorch module: its layers, their order, who reads them.

A layer is a module that directly owns trainable parameters; they lie one after another in the
arena. A parameter that several modules own (tied weights) belongs to the first of them. The running
statistics of a normalisation belong to its own layer or, where it has no parameters, to the layer
before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from dynacomm_async.errors import ConfigError, ShapeError
from dynacomm_async.wire.grid import LayerSpec

__all__ = ["Decays", "ForwardPass", "ModelTable", "Norm", "Sample", "Slot", "follow", "try_out"]

Floats = NDArray[np.float32]

Decays: TypeAlias = Callable[[str, Tensor], bool]
"""From a parameter's name and itself to whether weight decay applies to it."""

Sample: TypeAlias = Tensor | Sequence[Any] | Callable[[nn.Module], object]
"""An input, or the positional arguments, or a function that runs a forward pass of the module."""

_ROOT = "(root)"
"""The name of the layer that the outermost module's own parameters make."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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


@dataclass(slots=True)
class ForwardPass:
    """What was seen of a forward pass.

    Attributes:
        reads: which module was being called when a parameter was read; each pair once, in order.
        calls: the normalisations that were called, each with the number of reads before it.
    """

    reads: dict[tuple[nn.Module, nn.Parameter], None] = field(default_factory=dict)
    calls: dict[nn.Module, int] = field(default_factory=dict)

    def order(self) -> dict[nn.Parameter, int]:
        """Return the parameters that were read, each with its position in the order of reading."""
        positions: dict[nn.Parameter, int] = {}
        for _, parameter in self.reads:
            positions.setdefault(parameter, len(positions))
        return positions


class _ReadWatcher(TorchFunctionMode):  # type: ignore[misc, unused-ignore]
    """Sees every function that is given a parameter and makes a tensor of it.

    Questions for a parameter's shape or device make none and do not count.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], on_read: Callable[[Any], None]) -> None:
        super().__init__()
        self._parameters = set(parameters)
        self._on_read = on_read

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(True for _ in _tensors_in(result)):
            for tensor in _tensors_in([args, kwargs or {}]):
                if tensor in self._parameters:
                    self._on_read(tensor)
        return result


def _tensors_in(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors_in(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors_in(value)


@contextmanager
def follow(model: nn.Module) -> Iterator[ForwardPass]:
    """Watch what is read by whom within this block.

    A module reads parameters that are not its own more often than one would think: attention
    computes with those of its output projection and never calls it.
    """
    seen = ForwardPass()
    calling = [model]

    def enter(module: nn.Module, args: object) -> None:
        calling.append(module)
        if _has_statistics(module):
            seen.calls.setdefault(module, len(seen.order()))

    def leave(module: nn.Module, args: object, output: object) -> None:
        calling.pop()

    handles = []
    for module in model.modules():
        if module is not model:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        watched = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with _ReadWatcher(
            watched, lambda parameter: seen.reads.setdefault((calling[-1], parameter))
        ):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def try_out(model: nn.Module, sample: Sample) -> ForwardPass:
    """Run the module once on a sample, without a trace: buffers and random state are put back.

    Parameters of lazy modules get their shapes, which is a trace.
    """
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not is_lazy(buffer)
    ]
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            if any(is_lazy(parameter) for parameter in model.parameters()):
                _run(model, sample)
            with follow(model) as seen:
                _run(model, sample)
    finally:
        for module, name, buffer, before in kept:
            module._buffers[name] = buffer
            with torch.no_grad():
                buffer.copy_(before)
    return seen


def _run(model: nn.Module, sample: Sample) -> None:
    if isinstance(sample, Tensor):
        model(sample)
    elif callable(sample):
        sample(model)
    else:
        model(*sample)


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.running_mean is not None


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
        _check(model)
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
            norms.append(Norm(name or _ROOT, module, layer, place))
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
            if not _has_statistics(module):
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


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"a {type(model).__name__}, expected a torch.nn.Module")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ConfigError(
                f"module {name or _ROOT!r} is a TorchScript module, which runs its parts without "
                "hooks; pass the module that it was made from"
            )
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if is_lazy(parameter):
            raise ConfigError(
                f"parameter {name!r} has no shape yet: pass sample=, or run the module once before"
            )
        if parameter.is_meta:
            raise ConfigError(f"parameter {name!r} is on the meta device, which holds no values")
        if parameter.dtype not in _DTYPES or parameter.layout != torch.strided:
            raise ConfigError(
                f"parameter {name!r} is {parameter.dtype} ({parameter.layout}), expected a dense "
                "float32, float16 or bfloat16 tensor, since float32 is transported; "
                "call model.float(), or freeze the parameter"
            )


def _list_layers(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Return the trainable parameters by the module that owns them, in order of definition."""
    layers: dict[str, list[tuple[str, nn.Parameter]]] = {}
    taken: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or parameter.numel() == 0:
                continue
            if parameter not in taken:
                taken.add(parameter)
                full_name = f"{path}.{name}" if path else name
                layers.setdefault(path or _ROOT, []).append((full_name, parameter))
    if not layers:
        raise ShapeError(
            "the model has no trainable parameters: none at all, or all have requires_grad=False"
        )
    return layers


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
