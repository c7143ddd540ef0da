"""One training step of a PyTorch module: what its hooks make of it.

Parameters arrive while the module computes, so each layer is waited for right before a module is
called that is known to read it. Who reads what is known from a forward pass that was watched; a
model whose reads follow its data may do otherwise in a later step, with a value that was not here
yet. That is found out when such a value yields a gradient, and refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from time import perf_counter_ns

import torch
from torch import Tensor

from dynacomm_async.adapters.torch_checks import Structure
from dynacomm_async.adapters.torch_places import NormStatistics, Places
from dynacomm_async.errors import LocalProtocolError
from dynacomm_async.worker import Step

__all__ = ["Order", "TorchStep"]


class Order:
    """In which order layers are first used in a step; it must stay.

    Args:
        layers: their names.
    """

    def __init__(self, layers: list[str]) -> None:
        self._layers = layers
        self._positions: dict[int, int] = {}

    def check(self, uses: list[int]) -> None:
        """Compare a step's first uses with those of the steps before; some may be left out.

        Raises:
            LocalProtocolError: the order has changed.
        """
        known = [layer for layer in uses if layer in self._positions]
        for before, after in pairwise(known):
            if self._positions[before] > self._positions[after]:
                raise LocalProtocolError(
                    f"layer {self._layers[before]!r} was used before {self._layers[after]!r}, in "
                    "the first step after it; a model may leave layers out, but must keep their "
                    "order, since transfers are planned by it"
                )
        if len(known) == len(self._positions):
            self._positions = {layer: position for position, layer in enumerate(uses)}


class TorchStep:
    """One training step.

    Attributes:
        index: the version of the parameters that it computes from.
    """

    def __init__(self, step: Step, places: Places, structure: Structure, order: Order) -> None:
        self.index = step.index
        self._step = step
        self._places = places
        self._structure = structure
        self._order = order
        n_layers = len(places.layers)
        self._arrived = [False] * n_layers
        self._n_coming = n_layers  # layers that have not arrived
        self._unread = [False] * n_layers  # arrived when nobody known to read them was left
        self._timed = [False] * n_layers
        self._uses: list[int] = []  # layers in the order of their first use
        self._missing = [len(indices) for indices in places.of_layer]
        self._done = [False] * len(places.parameters)
        self._accumulating = False
        self._in_training_forward = False
        self._forward_over = False
        self._handed_over = False  # anything
        self._norm_uses = dict.fromkeys(places.norms, 0)
        self._gradient_writes = places.gradients_version
        for place in places.parameters:
            place.begin()

    @property
    def abandoned(self) -> bool:
        """Whether the server was restarted and has stepped back: this step is void.

        Whatever the loop's body does for it counts for nothing, and may be left out; its index, or
        an earlier one, comes again, and its batch must too.
        """
        return self._step.abandoned

    def report(self, loss: Tensor | float, images: int = 0) -> None:
        """Tell the server the loss of this worker's batch, and how many samples it had.

        After the forward pass, best before ``backward``: behind it, the report may miss the step's
        first message.
        """
        value = loss.detach().item() if isinstance(loss, Tensor) else float(loss)
        self._step.report(value, images)

    def wait(self) -> None:
        """Block until all parameters are here, for code that reads some outside a module's call.

        Hooks wait only for what modules are known to read while they are called.

        Raises:
            LocalProtocolError: a gradient has been handed over, and with it the right to read.
        """
        self._check_use(range(len(self._missing)))
        self._await_all()

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Within this block backward passes add up their gradients and hand none over.

        The first backward pass outside the block, or else the end of the step, does. Divide the
        losses by the number of passes where the mean is meant.
        """
        self._accumulating = True
        try:
            yield
        finally:
            self._accumulating = False

    # -- what the hooks tell --

    def begin_forward(self) -> None:
        """The whole module is called."""
        self._forward_over = False
        self._in_training_forward = torch.is_grad_enabled()

    def need(self, layers: tuple[int, ...], *, or_more: bool) -> None:
        """Block until the layers are here; all, if nobody knows yet what else is read.

        Nobody does in an evaluation: modules take other paths there, such as attention's fast one.
        """
        if not (torch.is_grad_enabled() or self._in_training_forward):
            self._evaluate()
            return
        self._check_use(layers)
        if or_more:
            self._await_all()
            return
        for layer in layers:
            self._unread[layer] = False
            if not (self._timed[layer] or self._forward_over):
                self._timed[layer] = True
                self._uses.append(layer)
                self._wait(layer)  # here already after an evaluation: starts the clock
            elif not self._arrived[layer]:
                self._wait(layer)
                self._step.forward_done()  # whose time it is cannot be said

    def _evaluate(self) -> None:
        self.wait()
        self._step.forward_done()  # an evaluation is not the step's time

    def _check_use(self, layers: Iterable[int]) -> None:
        for layer in layers:
            if not self._missing[layer]:
                raise LocalProtocolError(
                    f"step {self.index}: layer {self._places.layers[layer]!r} is used after its "
                    "gradient was handed over, when its next values may be coming in; evaluate, "
                    "copy and save at the top of the loop's body, and run all forward passes "
                    "before the last backward pass"
                )

    def _wait(self, layer: int) -> None:
        began_ns = perf_counter_ns()
        self._step.wait(layer)
        self._places.times.waiting_ns += perf_counter_ns() - began_ns
        if not self._arrived[layer]:
            self._arrived[layer] = True
            self._n_coming -= 1
            for index in self._places.of_layer[layer]:
                self._places.parameters[index].take()

    def end_forward(self, *, failed: bool) -> None:
        """The whole module has been called."""
        in_training, self._in_training_forward = self._in_training_forward, False
        if in_training and not failed:
            self._forward_over = True
            if not self._accumulating:
                self._await_rest()
                self._step.begin_wait()  # ends the last layer's time

    def _await_all(self) -> None:
        """Wait for all layers, whoever reads them from now on."""
        self._await_rest()
        self._unread = [False] * len(self._unread)

    def _await_rest(self) -> None:
        """Wait for layers that were not used: no gradient may go before all parameters are here."""
        if not self._n_coming:
            return
        for layer, arrived in enumerate(self._arrived):
            if not arrived:
                self._unread[layer] = True
                self._wait(layer)
                self._step.begin_wait()

    def begin_norm(self, norm: NormStatistics) -> None:
        """A normalisation is called in training."""
        if self._handed_over and not self._norm_uses[norm]:
            raise LocalProtocolError(
                f"step {self.index}: {norm.norm.name!r} normalises a batch after the first "
                "gradient was handed over, and the statistics with it; do all forward passes first "
                "or put the backward passes before it within `with step.accumulate():`"
            )
        norm.lend()

    def end_norm(self, norm: NormStatistics) -> None:
        """It has measured its batch. Behind the first gradient it is a recomputation."""
        if not self._handed_over:
            self._norm_uses[norm] += 1
            norm.add(self._norm_uses[norm])

    def accumulated(self, index: int) -> None:
        """Backward has added a gradient to a parameter's, the last one of this pass."""
        place = self._places.parameters[index]
        layer = place.slot.layer
        if (self._unread[layer] or not self._arrived[layer]) and not self.abandoned:
            raise LocalProtocolError(
                f"step {self.index}: parameter {place.slot.name!r} yields a gradient, and no "
                "module that read it before was called, so its value may have been read before it "
                "was here; call step.wait() before a parameter is read outside its module's call, "
                "or in a call that reads others than in the first step"
            )
        if not self._accumulating:
            self._hand_over(index)

    def finish(self) -> None:
        """The loop's body is done: hand over what has not been.

        Raises:
            LocalProtocolError: there was no gradient at all, the model has changed, or values were
                changed that belong to the session.
        """
        if self.abandoned:
            return
        try:
            self._structure.check()
            for place in self._places.parameters:
                place.check()
        except LocalProtocolError as error:
            raise LocalProtocolError(f"step {self.index}: {error}") from None
        got = any(place.slot.parameter.grad is not None for place in self._places.parameters)
        if not got and not self._handed_over:
            raise LocalProtocolError(
                f"step {self.index} has yielded no gradient: call loss.backward() in the loop's "
                "body, on a loss of what the model returned"
            )
        for index, done in enumerate(self._done):
            if not done:
                self._hand_over(index)
        if self._places.gradients_version != self._gradient_writes:
            raise LocalProtocolError(
                f"step {self.index}: gradients were changed after they had been handed over (by "
                "zero_grad, which is not needed here, or clipping?); to clip them, run backward "
                "within `with step.accumulate():`"
            )
        try:
            self._order.check(self._uses)
        except LocalProtocolError as error:
            raise LocalProtocolError(f"step {self.index}: {error}") from None

    def _hand_over(self, index: int) -> None:
        place = self._places.parameters[index]
        if self._done[index]:
            raise LocalProtocolError(
                f"step {self.index}: parameter {place.slot.name!r} has yielded a gradient twice; "
                "put all backward passes but the last within `with step.accumulate():`"
            )
        if not self._handed_over:
            self._await_rest()
            for norm, uses in self._norm_uses.items():
                if not uses:
                    norm.stay()
            self._handed_over = True
        place.put()
        self._gradient_writes += 1
        self._done[index] = True
        layer = place.slot.layer
        self._missing[layer] -= 1
        if not self._missing[layer]:
            self._step.gradient_ready(layer)
