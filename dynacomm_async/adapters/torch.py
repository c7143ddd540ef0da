"""Train any PyTorch module over a parameter server, in a few added lines.

Example::

    model = make_model()
    with TorchSession("127.0.0.1:7070", model, sample=images) as session:
        for step in session.steps():
            images, labels = batch(step.index, session.slot, session.workers)
            loss = cross_entropy(model(images), labels)
            loss.backward()
            step.report(loss, len(images))

There is no optimizer in the loop: the server has the update rule
(:class:`dynacomm_async.Training`), and ``ParameterServer(None, ...)`` takes the layers and the
initial values from the worker of rank 0. The batch is a function of ``step.index``, not what an
iterator yields next: an index may repeat after a restart of the server, with the same batch.

How it works: parameters become views of the memory that the session receives into. Before a module
is called, a hook waits for the parameters that it reads; that is all that is waited for, so the
rest arrives while it computes. When backward has accumulated a layer's last gradient, a hook copies
it to the memory that the session sends from (``grad`` is a view of that from then on) and hands it
over. By then no part of the backward pass needs the layer's parameters any more, so their next
values may come in.

What is done about

- *tied parameters, modules used twice, recomputation* (``torch.utils.checkpoint``): they work;
- *unused parameters*: their gradient is zero, handed over at the end of the step;
- *frozen parameters and all buffers but running statistics*: they stay where they are and do not
  travel. That the frozen values are the same everywhere is checked when a worker joins;
- *batch normalisation*: each worker's batch statistics travel with its gradients; the server moves
  the running statistics by the mean of them (``Training.statistics_momentum``, whatever the
  module's own ``momentum``) and sends them at the end of the run. Until then evaluation uses this
  worker's own;
- *gradient accumulation*: ``with step.accumulate():`` around all backward passes but the last;
- *clipping*: around all of them, then clip; what was accumulated goes at the end of the step. It
  bounds this worker's gradient, not the mean;
- *compiled modules* (``torch.compile``): they work, in pieces, since hooks run between the layers;
- *parameters that are read outside any module's call*: call ``step.wait()`` before;
- *evaluation*: at the top of the loop's body, before ``backward``, and after the loop;
- *float16 and bfloat16 parameters, and those on other devices*: they are copied to and fro, and the
  server's float32 values are what counts. Other types are refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from dynacomm_async.adapters.torch_model import (
    Decays,
    ForwardPass,
    ModelTable,
    Norm,
    Sample,
    Slot,
    follow,
    try_out,
)
from dynacomm_async.errors import ConfigError, LocalProtocolError
from dynacomm_async.wire.grid import LayerSpec
from dynacomm_async.worker import Session, Step, Whereabouts

__all__ = ["Decays", "Sample", "TorchSession", "TorchStep", "layer_specs"]


def layer_specs(
    model: nn.Module, sample: Sample | None = None, *, decays: Decays | None = None
) -> tuple[LayerSpec, ...]:
    """Return a module's layer table, as :class:`TorchSession` makes it of the same arguments.

    For options by layer name (:class:`dynacomm_async.LayerOptions`), and for servers that are to
    refuse other models from the start.

    Raises:
        ConfigError: a parameter that cannot be transported.
    """
    seen = None if sample is None else try_out(model, sample)
    return ModelTable(model, seen, decays).specs


class TorchSession:
    """One worker's membership of a run that trains a module. A context manager.

    Args:
        address: the server's, as :class:`dynacomm_async.Session` takes it.
        model: the module; its values are the initial ones if this worker gets rank 0 and the server
            has none. They are taken now.
        sample: an input (or a tuple of arguments, or a function that is given the module) for a
            forward pass from which the order of the layers is learnt; nothing of that pass stays.
            Must be given by all workers or by none, since their layer tables must be the same: the
            server refuses others. None: layers in the order of definition; what reads which is
            learnt in the first step.
        decays: from a parameter's name and itself to whether weight decay applies; None: always.
        options: what :class:`dynacomm_async.Session` takes beside layers and initial values.

    Attributes:
        model: the module.
        session: the session underneath (``metrics``, ``describe()``, ``welcome``).

    Raises:
        ConfigError: a parameter that cannot be transported, by name.
        DynaCommError (on entering): as :class:`dynacomm_async.Session`.

    Within the block the parameters belong to the session: only between the first use of a layer in
    a step and its gradient are they those of the step. After the run they are the final ones, and
    stay the model's. After an error they may be of different steps.
    """

    def __init__(
        self,
        address: str | Whereabouts,
        model: nn.Module,
        sample: Sample | None = None,
        *,
        decays: Decays | None = None,
        **options: Any,
    ) -> None:
        seen = None if sample is None else try_out(model, sample)
        self.model = model
        self._table = ModelTable(model, seen, decays)
        self._needs = self._table.needs(seen)
        self._is_learnt = seen is not None
        self.session = Session(
            address,
            self._table.specs,
            initial=self._table.initial(),
            initial_statistics=self._table.initial_statistics(),
            **{"kernels": self._table.kernels(), **options},
        )
        self._step: TorchStep | None = None
        self._places: list[_Place] = []
        self._norms: list[_NormStatistics] = []
        self._reference: dict[int, int] = {}  # layer to its position among a step's waits
        self._handles: list[Any] = []
        self._learning: tuple[ExitStack, ForwardPass] | None = None
        self._gradients: Tensor

    def __enter__(self) -> TorchSession:
        self.session.__enter__()
        try:
            self._bind()
            self._hook()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the run; the module is an ordinary one again. Idempotent."""
        self._step = None
        self._stop_learning()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for place in self._places:
            place.slot.parameter.grad = None
        self.session.close()

    @property
    def slot(self) -> int:
        """This worker's rank."""
        return self.session.welcome.slot

    @property
    def workers(self) -> int:
        """How many there are."""
        return self.session.welcome.workers

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the server told its workers."""
        return self.session.settings

    def steps(self) -> Iterator[TorchStep]:
        """Yield the steps until the run ends. An index may repeat after a server's restart.

        Afterwards the module holds the final parameters and running statistics.

        Raises:
            DynaCommError: what ended the session before.
            LocalProtocolError: the loop's body did something that cannot be; the text says what.
        """
        try:
            for step in self.session.steps():
                self._step = TorchStep(self, step)
                yield self._step
                self._step.finish()
                self._step = None
        finally:
            self._step = None
        self._take_results()

    # -- arenas --

    def _bind(self) -> None:
        parameters = torch.from_numpy(self.session.parameters)
        statistics = torch.from_numpy(self.session.statistics)
        batch_statistics = torch.from_numpy(self.session.batch_statistics)
        self._gradients = torch.from_numpy(self.session.gradients)
        self._places = [_Place(slot, parameters, self._gradients) for slot in self._table.slots]
        self._norms = [
            _NormStatistics(norm, statistics, batch_statistics) for norm in self._table.norms
        ]
        self._of_layer: list[list[int]] = [[] for _ in self._table.specs]
        for index, place in enumerate(self._places):
            self._of_layer[place.slot.layer].append(index)

    def _take_results(self) -> None:
        for place in self._places:
            place.take()
        for norm in self._norms:
            norm.take()

    # -- hooks --

    def _hook(self) -> None:
        handles = self._handles
        handles.append(self.model.register_forward_pre_hook(self._before_all))
        for module in self.model.modules():
            handles.append(module.register_forward_pre_hook(self._before))
        for norm in self._norms:
            module = norm.norm.module
            handles.append(module.register_forward_pre_hook(self._before_norm(norm)))
            handles.append(module.register_forward_hook(self._after_norm(norm), always_call=True))
        handles.append(self.model.register_forward_hook(self._after_all, always_call=True))
        for index, place in enumerate(self._places):
            parameter = place.slot.parameter
            handles.append(parameter.register_post_accumulate_grad_hook(self._accumulated(index)))

    def _before_all(self, module: nn.Module, args: object) -> None:
        if self._step is None:
            return
        if not self._is_learnt and self._learning is None and torch.is_grad_enabled():
            stack = ExitStack()
            self._learning = stack, stack.enter_context(follow(self.model))
        self._step.begin_forward()

    def _before(self, module: nn.Module, args: object) -> None:
        if self._step is not None:
            self._step.need(self._needs.get(module, ()), or_more=not self._is_learnt)

    def _after_all(self, module: nn.Module, args: object, output: object) -> None:
        learning = self._stop_learning()
        if self._step is None or output is None:
            return
        if learning is not None:
            self._needs = self._table.needs(learning)
            self._is_learnt = True
            if not self._table.is_order_of(learning):
                warnings.warn(
                    "the model's layers are not computed in the order in which they are defined, "
                    "so that less of the communication can be hidden; pass sample= to learn the "
                    "order before the run",
                    RuntimeWarning,
                    stacklevel=2,
                )
        self._step.end_forward()

    def _stop_learning(self) -> ForwardPass | None:
        learning, self._learning = self._learning, None
        if learning is None:
            return None
        stack, seen = learning
        stack.close()
        return seen

    def _before_norm(self, norm: _NormStatistics) -> Any:
        def before(module: nn.Module, args: object) -> None:
            if self._step is not None and module.training:
                self._step.begin_norm(norm)

        return before

    def _after_norm(self, norm: _NormStatistics) -> Any:
        def after(module: nn.Module, args: object, output: object) -> None:
            if norm.is_lent:
                norm.give_back()
                if self._step is not None and output is not None:
                    self._step.end_norm(norm)

        return after

    def _accumulated(self, index: int) -> Any:
        def accumulated(parameter: Tensor) -> None:
            if self._step is not None:
                self._step.accumulated(index)

        return accumulated

    # -- for its steps --

    def _check_order(self, step: int, waits: list[int]) -> None:
        """Compare the order of a step's first uses with that of the step before.

        Raises:
            LocalProtocolError: it has changed.
        """
        known = [layer for layer in waits if layer in self._reference]
        for before, after in pairwise(known):
            if self._reference[before] > self._reference[after]:
                names = [spec.name for spec in self._table.specs]
                raise LocalProtocolError(
                    f"step {step}: layer {names[before]!r} was used before {names[after]!r}, in "
                    "the first step after it; a model may leave layers out, but must keep their "
                    "order, since transfers are planned by it"
                )
        if len(known) == len(self._reference):
            self._reference = {layer: position for position, layer in enumerate(waits)}


class TorchStep:
    """One training step.

    Attributes:
        index: the version of the parameters that it computes from.
    """

    def __init__(self, owner: TorchSession, step: Step) -> None:
        self.index = step.index
        self._owner = owner
        self._step = step
        n_layers = len(owner._table.specs)
        self._names = [spec.name for spec in owner._table.specs]
        self._arrived = [False] * n_layers
        self._timed = [False] * n_layers
        self._waits: list[int] = []  # layers in the order of their first use
        self._missing = [len(indices) for indices in owner._of_layer]
        self._done = [False] * len(owner._places)
        self._accumulating = False
        self._forward_over = False
        self._handed_over = False  # anything
        self._uses = dict.fromkeys(owner._norms, 0)
        self._gradient_writes = owner._gradients._version
        for place in owner._places:
            place.begin()

    def report(self, loss: Tensor | float, images: int = 0) -> None:
        """Tell the server the loss of this worker's batch, and how many samples it had.

        After the forward pass, best before ``backward``: behind it, the report may miss the step's
        first message.
        """
        value = loss.detach().item() if isinstance(loss, Tensor) else float(loss)
        self._step.report(value, images)

    def wait(self) -> None:
        """Block until all parameters are here, for code that reads some outside a module's call.

        Hooks wait only for what modules read while they are called.
        """
        self._await_rest()

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

    def need(self, layers: tuple[int, ...], *, or_more: bool) -> None:
        """Block until the layers are here; all, if nobody knows yet what else is read."""
        self._check_use(layers)
        if or_more:
            self._await_rest()
            return
        training = torch.is_grad_enabled() and not self._forward_over
        for layer in layers:
            if training and not self._timed[layer]:
                self._timed[layer] = True
                self._waits.append(layer)
                self._step.wait(layer)  # here already after an evaluation: starts the clock
                self._take(layer)
            elif not self._arrived[layer]:
                self._step.wait(layer)
                self._step.forward_done()  # an evaluation is not the step's time
                self._take(layer)

    def _check_use(self, layers: Iterable[int]) -> None:
        for layer in layers:
            if not self._missing[layer]:
                raise LocalProtocolError(
                    f"step {self.index}: layer {self._names[layer]!r} is used after its gradient "
                    "was handed over, when its next values may be coming in; evaluate at the top "
                    "of the loop's body, and run all forward passes before the last backward pass"
                )

    def _take(self, layer: int) -> None:
        if not self._arrived[layer]:
            self._arrived[layer] = True
            for index in self._owner._of_layer[layer]:
                self._owner._places[index].take()

    def end_forward(self) -> None:
        """The whole module has been called."""
        if torch.is_grad_enabled():
            self._forward_over = True
            if not self._accumulating:
                self._await_rest()
                self._step.begin_wait()  # ends the last layer's time

    def _await_rest(self) -> None:
        """Wait for layers that were not used: no gradient may go before all parameters are here."""
        for layer, arrived in enumerate(self._arrived):
            if not arrived:
                self._step.wait(layer)
                self._step.begin_wait()
                self._take(layer)

    def begin_norm(self, norm: _NormStatistics) -> None:
        """A normalisation is called in training."""
        if self._handed_over and not self._uses[norm]:
            raise LocalProtocolError(
                f"step {self.index}: {norm.norm.name!r} normalises a batch after the first "
                "gradient was handed over, and the statistics with it; do all forward passes first "
                "or put the backward passes before it within `with step.accumulate():`"
            )
        norm.lend()

    def end_norm(self, norm: _NormStatistics) -> None:
        """It has measured its batch. Behind the first gradient it is a recomputation."""
        if not self._handed_over:
            self._uses[norm] += 1
            norm.add(self._uses[norm])

    def accumulated(self, index: int) -> None:
        """Backward has added a gradient to a parameter's, the last one of this pass."""
        if not self._accumulating:
            self._hand_over(index)

    def finish(self) -> None:
        """The loop's body is done: hand over what has not been.

        Raises:
            LocalProtocolError: there was no gradient at all, or values were changed that belong to
                the session.
        """
        places = self._owner._places
        got = any(place.slot.parameter.grad is not None for place in places)
        if not got and not self._handed_over:
            raise LocalProtocolError(
                f"step {self.index} has yielded no gradient: call loss.backward() in the loop's "
                "body, on a loss of what the model returned"
            )
        for index, done in enumerate(self._done):
            if not done:
                self._hand_over(index)
        if self._owner._gradients._version != self._gradient_writes:
            raise LocalProtocolError(
                f"step {self.index}: gradients were changed after they had been handed over; to "
                "clip them, run backward within `with step.accumulate():`"
            )
        for place in places:
            place.check(self.index)
        self._owner._check_order(self.index, self._waits)

    def _hand_over(self, index: int) -> None:
        place = self._owner._places[index]
        if self._done[index]:
            raise LocalProtocolError(
                f"step {self.index}: parameter {place.slot.name!r} has yielded a gradient twice; "
                "put all backward passes but the last within `with step.accumulate():`"
            )
        if not self._handed_over:
            self._await_rest()
            for norm, uses in self._uses.items():
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


class _Place:
    """A parameter and its views of the arenas."""

    def __init__(self, slot: Slot, parameters: Tensor, gradients: Tensor) -> None:
        self.slot = slot
        parameter = slot.parameter
        self._value = parameters[slot.place].view(parameter.shape)
        self._gradient = gradients[slot.place].view(parameter.shape)
        self._is_view = parameter.dtype == torch.float32 and parameter.device.type == "cpu"
        if self._is_view:
            parameter.data = self._value
        self._version = parameter._version

    def begin(self) -> None:
        """A step begins."""
        self.slot.parameter.grad = None

    def take(self) -> None:
        """The value has arrived."""
        if not self._is_view:
            self.slot.parameter.data.copy_(self._value)

    def put(self) -> None:
        """Write the gradient to where it is sent from."""
        gradient = self.slot.parameter.grad
        if gradient is None:
            self._gradient.zero_()
            return
        if gradient.layout != torch.strided:
            raise ConfigError(
                f"the gradient of {self.slot.name!r} is sparse, expected a dense one: "
                "make the embedding with sparse=False"
            )
        self._gradient.copy_(gradient.detach())
        if self._is_view:
            self.slot.parameter.grad = self._gradient

    def check(self, step: int) -> None:
        """Make sure that nobody but the session has written the value.

        Raises:
            LocalProtocolError: somebody has.
        """
        if self.slot.parameter._version != self._version:
            raise LocalProtocolError(
                f"step {step}: parameter {self.slot.name!r} was changed here (by an optimizer?); "
                "the server updates the parameters, by its training= argument"
            )


class _NormStatistics:
    """A normalisation, and where its batch's statistics go.

    While it is called in training it is lent other buffers and a momentum of 1, so that it leaves
    the statistics of this batch in them.
    """

    def __init__(self, norm: Norm, statistics: Tensor, batch_statistics: Tensor) -> None:
        self.norm = norm
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
