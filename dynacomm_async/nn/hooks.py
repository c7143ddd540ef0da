"""The points at which a step calls back, so that transfer can be woven between the layers."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Hooks"]


class Hooks(Protocol):
    """Called on the thread that computes, with the index of a scheduled layer.

    One step calls ``before_forward(l)``, ``after_forward(l)`` for l = 0 ... L - 1, each once and in
    this order, then ``before_backward(l)``, ``after_backward(l)`` for l = L - 1 ... 0. What a hook
    raises ends the step and reaches the caller; the engine can be used again.
    """

    def before_forward(self, layer: int) -> None:
        """Nothing has read the layer's parameters yet; when this returns they are read."""

    def after_forward(self, layer: int) -> None:
        """The layer's activations are done; backward will read its parameters again."""

    def before_backward(self, layer: int) -> None:
        """When this returns, the layer's gradients are overwritten and its parameters read."""

    def after_backward(self, layer: int) -> None:
        """All gradients of the layer are final, and this step reads its parameters no more.

        The gradients may leave and the parameters may be overwritten.
        """
