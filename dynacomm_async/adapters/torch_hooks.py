"""Hooks as the adapter hangs them on modules and parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

import torch

__all__ = ["Hook", "HookTimes", "not_compiled"]


@dataclass(slots=True)
class HookTimes:
    """What a session has taken of the thread that computes so far, beside PyTorch's own work.

    Attributes:
        hooks_ns: in hooks and between steps, without the two below.
        waiting_ns: for parameters on their way.
        copying_ns: gradients to where they are sent from, statistics, and values of parameters
            that cannot be views.
    """

    hooks_ns: int = 0
    waiting_ns: int = 0
    copying_ns: int = 0


class Hook:
    """A call that says how long it took. A copy of it (by ``deepcopy`` or ``pickle``) does nothing.

    So a module may be copied or saved while it trains: its copy belongs to no session.

    Args:
        call: what to do.
        times: where the time is added, less what is added for waiting and copying meanwhile.
    """

    def __init__(self, call: Callable[..., Any], times: HookTimes) -> None:
        self._call = call
        self._times = times

    def __call__(self, *args: Any) -> None:
        times = self._times
        before_ns = times.waiting_ns + times.copying_ns
        began_ns = perf_counter_ns()
        try:
            self._call(*args)
        finally:
            other_ns = times.waiting_ns + times.copying_ns - before_ns
            times.hooks_ns += perf_counter_ns() - began_ns - other_ns

    def __reduce__(self) -> Any:
        return _NoHook, ()


class _NoHook:
    """What a copied hook is."""

    def __call__(self, *args: Any) -> None:
        """Do nothing."""


def not_compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the call such that ``torch.compile`` runs it between compiled parts, as it is.

    Only where a compiler has been loaded, since loading one takes seconds.
    """
    if "torch._dynamo" not in sys.modules:
        return call
    disable: Callable[..., Callable[..., Any]] = torch.compiler.disable
    return disable(call)
