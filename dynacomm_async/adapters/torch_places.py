"""Where a module's values lie in a session's arenas: parameters, gradients, running statistics."""

from __future__ import annotations

from time import perf_counter_ns
from typing import Any

import torch
from torch import Tensor

from dynacomm_async.adapters.torch_hooks import HookTimes
from dynacomm_async.adapters.torch_model import ModelTable, Norm, Slot
from dynacomm_async.errors import ConfigError, LocalProtocolError
from dynacomm_async.worker import Session

__all__ = ["NormStatistics", "Place", "Places"]


class Places:
    """All of a module's values that travel, bound to the arenas of a session.

    Attributes:
        layers: names of the layers.
        parameters: the trained parameters, in the order of the arena.
        of_layer: for each layer, which of ``parameters`` are its own.
        norms: the normalisations with running statistics.
        times: where copying is accounted for.
    """

    def __init__(self, table: ModelTable, session: Session, times: HookTimes) -> None:
        values = torch.from_numpy(session.parameters)
        self._gradients = torch.from_numpy(session.gradients)
        statistics = torch.from_numpy(session.statistics)
        of_batch = torch.from_numpy(session.batch_statistics)
        self.times = times
        self.layers = [spec.name for spec in table.specs]
        self.parameters = [Place(slot, values, self._gradients, times) for slot in table.slots]
        self.norms = [NormStatistics(norm, statistics, of_batch, times) for norm in table.norms]
        self.of_layer: list[list[int]] = [[] for _ in self.layers]
        for index, slot in enumerate(table.slots):
            self.of_layer[slot.layer].append(index)

    @property
    def gradients_version(self) -> int:
        """How often the memory that gradients are sent from was written through PyTorch."""
        return int(self._gradients._version)

    def take_results(self) -> None:
        """Take the final values over into the module."""
        for place in self.parameters:
            place.take()
        for norm in self.norms:
            norm.take()

    def leave(self) -> None:
        """Give the module memory of its own again."""
        for place in self.parameters:
            place.leave()


class Place:
    """A parameter and its views of the arenas."""

    def __init__(self, slot: Slot, values: Tensor, gradients: Tensor, times: HookTimes) -> None:
        self.slot = slot
        parameter = slot.parameter
        self._times = times
        self._value = values[slot.place].view(parameter.shape)
        self._gradient = gradients[slot.place].view(parameter.shape)
        self._is_view = parameter.dtype == torch.float32 and parameter.device.type == "cpu"
        if self._is_view:
            parameter.data = self._value
        self._memory = parameter.data_ptr()
        self._version = parameter._version

    def leave(self) -> None:
        """Give the parameter memory of its own, with the value that it has."""
        self.slot.parameter.grad = None
        if self._is_view:
            self.slot.parameter.data = self._value.clone()

    def begin(self) -> None:
        """A step begins."""
        self.slot.parameter.grad = None

    def take(self) -> None:
        """The value has arrived."""
        if not self._is_view:
            began_ns = perf_counter_ns()
            self.slot.parameter.data.copy_(self._value)
            self._times.copying_ns += perf_counter_ns() - began_ns

    def put(self) -> None:
        """Write the gradient to where it is sent from; zeros if there is none.

        Raises:
            ConfigError: it is sparse.
        """
        began_ns = perf_counter_ns()
        gradient = self.slot.parameter.grad
        if gradient is None:
            self._gradient.zero_()
        elif gradient.layout != torch.strided:
            raise ConfigError(
                f"the gradient of {self.slot.name!r} is sparse, expected a dense one: "
                "make the embedding with sparse=False"
            )
        else:
            self._gradient.copy_(gradient.detach())
            if self._is_view:
                self.slot.parameter.grad = self._gradient
        self._times.copying_ns += perf_counter_ns() - began_ns

    def check(self) -> None:
        """Make sure that nobody but the session has written the value, or moved it.

        Raises:
            LocalProtocolError: somebody has.
        """
        parameter = self.slot.parameter
        if parameter.data_ptr() != self._memory:
            raise LocalProtocolError(
                f"parameter {self.slot.name!r} was moved or converted during the run (model.to, "
                "model.half, a new parameter.data); do so before TorchSession is made of the model"
            )
        if parameter._version != self._version:
            raise LocalProtocolError(
                f"parameter {self.slot.name!r} was changed here (by an optimizer, or "
                "load_state_dict?); the server updates the parameters, by its training= argument, "
                "and values are loaded before TorchSession is made of the model"
            )


class NormStatistics:
    """A normalisation, and where its batch's statistics go.

    While it is called in training it is lent other buffers and a momentum of 1, so that it leaves
    the statistics of this batch in them.
    """

    def __init__(
        self, norm: Norm, statistics: Tensor, batch_statistics: Tensor, times: HookTimes
    ) -> None:
        self.norm = norm
        self._times = times
        self._own: Any = (norm.module.running_mean, norm.module.running_var)
        self._own_momentum = norm.module.momentum
        self._measured: Any = ()
        self._final = statistics[norm.place].view(2, -1)
        self._of_batch = batch_statistics[norm.place].view(2, -1)
        self.is_lent = False

    def lend(self) -> None:
        """Let the module measure."""
        self._own = (self.norm.module.running_mean, self.norm.module.running_var)
        self._own_momentum = self.norm.module.momentum
        # New ones each time: autograd keeps those of a use until its backward pass.
        self._measured = tuple(torch.zeros_like(buffer) for buffer in self._own)
        self._set(self._measured, 1.0)
        self.is_lent = True

    def give_back(self) -> None:
        """Give the module its own buffers back."""
        self._set(self._own, self._own_momentum)
        self.is_lent = False

    def _set(self, buffers: Any, momentum: Any) -> None:
        module = self.norm.module
        module._buffers["running_mean"], module._buffers["running_var"] = buffers
        module.momentum = momentum

    def add(self, uses: int) -> None:
        """Take in what was measured: the mean of all uses in a step, and this worker's own."""
        began_ns = perf_counter_ns()
        momentum = self._own_momentum
        if momentum is None:  # a plain mean over all batches
            momentum = 1 / max(1, int(self.norm.module.num_batches_tracked))
        with torch.no_grad():
            for row, measured, own in zip(self._of_batch, self._measured, self._own, strict=True):
                if uses == 1:
                    row.copy_(measured)
                else:
                    row.mul_((uses - 1) / uses).add_(measured.to(row), alpha=1 / uses)
                own.data.lerp_(measured, momentum)
        self._times.copying_ns += perf_counter_ns() - began_ns

    def stay(self) -> None:
        """It has measured nothing in this step: what is sent moves nothing."""
        with torch.no_grad():
            for row, own in zip(self._of_batch, self._own, strict=True):
                row.copy_(own)

    def take(self) -> None:
        """The final running statistics have arrived."""
        with torch.no_grad():
            for row, own in zip(self._final, self._own, strict=True):
                own.copy_(row)
