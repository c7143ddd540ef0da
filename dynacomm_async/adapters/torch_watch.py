"""What a forward pass does with a module's parameters, watched from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

__all__ = ["ForwardPass", "Sample", "follow", "has_statistics", "try_out"]

Sample: TypeAlias = Tensor | Sequence[Any] | Callable[[nn.Module], object]
"""An input, or the positional arguments, or a function that runs a forward pass of the module."""


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
        if has_statistics(module):
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


def has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.running_mean is not None
