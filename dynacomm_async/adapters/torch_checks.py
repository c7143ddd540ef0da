"""What the adapter cannot train, said by name before a run, and what must not change during one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dynacomm_async.errors import ConfigError, LocalProtocolError

__all__ = ["Structure", "check_devices", "check_model", "check_parameters"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_WRAPPERS = {
    "DataParallel": "computes with copies on other devices that nobody waits for",
    "DistributedDataParallel": "averages gradients over a network of its own",
    "FullyShardedDataParallel": "keeps only a part of each parameter",
    "FSDPModule": "keeps only a part of each parameter",
}


def check_model(model: nn.Module) -> None:
    """Refuse what is no module, or has modules that cannot be trained.

    Raises:
        ConfigError: the sentence names the module and says what to do.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"a {type(model).__name__}, expected a torch.nn.Module")
    for name, module in model.named_modules():
        who = f"module {name!r}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise ConfigError(
                f"{who} is a TorchScript module, which runs its parts without "
                "hooks; pass the module that it was made from"
            )
        kinds = {kind.__name__ for kind in type(module).__mro__ if _is_pytorchs(kind)}
        for kind in sorted(kinds & set(_WRAPPERS)):
            raise ConfigError(
                f"{who} is a {kind}, which {_WRAPPERS[kind]}; pass the module that it was made "
                "from, and start one worker for each device"
            )


def _is_pytorchs(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torch"


def check_parameters(model: nn.Module) -> None:
    """Refuse trainable parameters that cannot be transported. See :func:`check_model`.

    Raises:
        ConfigError: the sentence names the parameter and says what to do.
    """
    check_model(model)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    for name, parameter in trained:
        if is_lazy(parameter):
            raise ConfigError(
                f"parameter {name!r} has no shape yet: pass sample=, or run the module once before"
            )
        if parameter.is_meta:
            raise ConfigError(
                f"parameter {name!r} is on the meta device, which holds no values; call "
                "model.to_empty(device='cpu') and initialise it"
            )
        if is_traceable_wrapper_subclass(parameter):
            raise ConfigError(
                f"parameter {name!r} is a {type(parameter).__name__}, which has no memory of its "
                "own; expected an ordinary tensor (a DTensor's worker is the whole group: use one "
                "device for each worker)"
            )
        if parameter.dtype not in _DTYPES or parameter.layout != torch.strided:
            raise ConfigError(
                f"parameter {name!r} is {parameter.dtype} ({parameter.layout}), expected a dense "
                "float32, float16 or bfloat16 tensor, since float32 is transported; "
                "call model.float(), or freeze the parameter"
            )
    check_devices(trained)
    _check_aliases(trained)


def check_devices(trained: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Refuse a model of several devices, each of which has a thread for its backward pass.

    Raises:
        ConfigError: the sentence names a parameter on each.
    """
    first: dict[torch.device, str] = {}
    for name, parameter in trained:
        first.setdefault(parameter.device, name)
    if len(first) > 1:
        places = ", ".join(f"{name!r} on {device}" for device, name in first.items())
        raise ConfigError(
            f"the model is spread over devices ({places}), whose gradients would come in several "
            "threads at once; expected all trainable parameters on one"
        )


def _check_aliases(trained: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Two parameters of one memory would be parted, as each gets a place of its own."""
    owners: dict[tuple[torch.device, int], tuple[str, nn.Parameter]] = {}
    for name, parameter in trained:
        if parameter.numel() == 0:
            continue
        where = parameter.device, parameter.data_ptr()
        other, owner = owners.setdefault(where, (name, parameter))
        if owner is not parameter:
            raise ConfigError(
                f"parameters {other!r} and {name!r} are two that share their memory; to tie them, "
                "let both modules have the same parameter (a.weight = b.weight)"
            )


class Structure:
    """Which modules and parameters a model has and which are trained, to see whether that stays."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            (name, module, _kept(module._modules), _kept(module._parameters))
            for name, module in model.named_modules()
        ]
        self._trained = [(n, p, p.requires_grad) for n, p in model.named_parameters()]

    def check(self) -> None:
        """Make sure that the model is what it was. About 50 us for 40 modules.

        Raises:
            LocalProtocolError: the sentence says what has changed.
        """
        for name, module, children, parameters in self._modules:
            for kept, now in ((children, module._modules), (parameters, module._parameters)):
                if len(kept) != len(now) or any(now.get(key) is not own for key, own in kept):
                    raise LocalProtocolError(
                        f"the parts of module {name or type(module).__name__!r} have changed "
                        "since the run began, and new ones would not train; change a model before "
                        "TorchSession is made of it"
                    )
        for name, parameter, was_trained in self._trained:
            if parameter.requires_grad != was_trained:
                change = "was frozen" if was_trained else "began to be trained"
                raise LocalProtocolError(
                    f"parameter {name!r} {change} during the run, which the server cannot know; "
                    "set requires_grad before TorchSession is made, or end the run and begin "
                    "another from its parameters"
                )


def _kept(parts: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(parts.items())
