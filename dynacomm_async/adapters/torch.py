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
iterator yields next: an index may repeat after a restart of the server, with the same batch. So
must whatever else a step draws: ``torch.manual_seed(step.index)`` for dropout.

How it works: parameters become views of the memory that the session receives into. Before a module
is called, a hook waits for the parameters that it reads; that is all that is waited for, so the
rest arrives while it computes. When backward has accumulated a layer's last gradient, a hook copies
it to the memory that the session sends from (``grad`` is a view of that from then on) and hands it
over. By then no part of the backward pass needs the layer's parameters any more, so their next
values may come in.

What works

- *tied parameters, modules used twice, nested containers, recomputation*
  (``torch.utils.checkpoint``), *autocast* (inside the loop's body or around the loop);
- *compiled modules* (``torch.compile``): in pieces, since hooks run between the modules, so that
  most of what compiling gains is lost;
- *unused parameters, layers left out of a step, gradients cut off by* ``detach``: the gradient is
  zero, handed over at the end of the step. Gradients that the loop's body sets by itself
  (``parameter.grad = ...``) go then, too;
- *frozen parameters and all buffers but running statistics* stay where they are and do not travel.
  That the frozen values are the same everywhere is checked when a worker joins;
- *batch normalisation*: each worker's batch statistics travel with its gradients; the server moves
  the running statistics by the mean of them (``Training.statistics_momentum``, whatever the
  module's own ``momentum``) and sends them at the end of the run. Until then evaluation uses this
  worker's own;
- *gradient accumulation*: ``with step.accumulate():`` around all backward passes but the last;
- *clipping, and scaled losses for float16*: ``with step.accumulate():`` around all of them, then
  clip, or divide the gradients by the scale; they go at the end of the step. Clipping bounds this
  worker's gradient, not the mean;
- *parameters read outside any module's call* (a penalty on weights that the forward pass does not
  use): call ``step.wait()`` before;
- *evaluation, copies* (``deepcopy``, after ``step.wait()``) *and* ``state_dict()``: at the top of
  the loop's body, before ``backward``, and after the loop;
- *float16 and bfloat16 parameters*: they are copied to and fro, and the server's float32 values are
  what counts;
- *parameters on another device* (CUDA, MPS): the same, by copies that block, through ordinary
  memory. Results are those of the device's own arithmetic; layers are timed by when the processor
  gets to them, so plans are worse than they could be. Not tested, for want of a device.

What is refused, by name and with what to do instead: float64, complex, sparse and meta parameters;
a model over several devices; ``DataParallel``, ``DistributedDataParallel``, FSDP, ``DTensor`` and
TorchScript; sparse gradients; an optimizer's step, ``load_state_dict`` and ``model.to`` while the
run goes on; a model that changes its parts, or what is frozen, or the order of its layers; a second
gradient of a parameter in one step; a step without any gradient; a value that is read before it is
here or after it was handed over, where PyTorch lets us see it.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from dynacomm_async.adapters.torch_checks import Structure, check_model
from dynacomm_async.adapters.torch_hooks import Hook, HookTimes, not_compiled
from dynacomm_async.adapters.torch_model import Decays, ModelTable
from dynacomm_async.adapters.torch_places import NormStatistics, Places
from dynacomm_async.adapters.torch_step import Order, TorchStep
from dynacomm_async.adapters.torch_watch import ForwardPass, Sample, follow, try_out
from dynacomm_async.errors import LocalProtocolError
from dynacomm_async.wire.grid import LayerSpec
from dynacomm_async.worker import Session, Whereabouts

__all__ = ["Decays", "HookTimes", "Sample", "TorchSession", "TorchStep", "layer_specs"]

_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules whose parameters belong to a session now."""


def layer_specs(
    model: nn.Module, sample: Sample | None = None, *, decays: Decays | None = None
) -> tuple[LayerSpec, ...]:
    """Return a module's layer table, as :class:`TorchSession` makes it of the same arguments.

    For options by layer name (:class:`dynacomm_async.LayerOptions`), and for servers that are to
    refuse other models from the start.

    Raises:
        ConfigError: a parameter that cannot be transported.
    """
    return _learn(model, sample, decays)[0].specs


def _learn(
    model: nn.Module, sample: Sample | None, decays: Decays | None
) -> tuple[ModelTable, ForwardPass | None]:
    check_model(model)
    seen = None if sample is None else try_out(model, sample)
    return ModelTable(model, seen, decays), seen


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
        times: what hooks, waits and copies have taken so far.

    Raises:
        ConfigError: a module or parameter that cannot be trained, by name.
        LocalProtocolError (on entering): the module belongs to another session.
        DynaCommError (on entering): as :class:`dynacomm_async.Session`.

    Within the block the parameters belong to the session: only between the first use of a layer in
    a step and its gradient are they those of the step. After the run they are the final ones; after
    the block they are the model's own again. After an error they may be of different steps.
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
        self.model = model
        self._table, seen = _learn(model, sample, decays)
        self._needs = self._table.needs(seen)
        self._is_learnt = seen is not None
        self._modules = list(model.modules())  # as they are now
        self._structure = Structure(model)
        self._order = Order([spec.name for spec in self._table.specs])
        self.times = HookTimes()
        self.session = Session(
            address,
            self._table.specs,
            initial=self._table.initial(),
            initial_statistics=self._table.initial_statistics(),
            **{"kernels": self._table.kernels(), **options},
        )
        self._step: TorchStep | None = None
        self._has_ended = False
        self._places: Places | None = None  # while entered
        self._handles: list[Any] = []
        self._learning: tuple[ExitStack, ForwardPass] | None = None

    def __enter__(self) -> TorchSession:
        if any(module in _attached for module in self._modules):
            raise LocalProtocolError(
                "the model, or a part of it, belongs to another session; leave that first"
            )
        self.session.__enter__()
        try:
            self._places = Places(self._table, self.session, self.times)
            _attached.update(self._modules)
            self._hook(self._places)
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
        self.session.close()
        places, self._places = self._places, None
        if places is not None:
            places.leave()
            _attached.difference_update(self._modules)

    @property
    def slot(self) -> int:
        """This worker's rank."""
        return self.session.slot

    @property
    def workers(self) -> int:
        """How many there are."""
        return self.session.workers

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
        places = self._places
        if places is None:
            raise LocalProtocolError("the session is not open: use it inside `with`")
        try:
            for step in self.session.steps():
                torch.clear_autocast_cache()  # narrow copies of values that were another step's
                self._step = TorchStep(step, places, self._structure, self._order)
                yield self._step
                Hook(self._step.finish, self.times)()
                self._step = None
        finally:
            self._step = None
        places.take_results()
        self._has_ended = True

    # -- hooks --

    def _hook(self, places: Places) -> None:
        self._hang(self.model.register_forward_pre_hook, self._before_all)
        for module in self.model.modules():
            self._hang(module.register_forward_pre_hook, self._before)
            self._hang(module.register_state_dict_pre_hook, self._before_saving)
        for norm in places.norms:
            module = norm.norm.module
            self._hang(module.register_forward_pre_hook, self._before_norm(norm))
            self._hang(module.register_forward_hook, self._after_norm(norm), always_call=True)
        self._hang(self.model.register_forward_hook, self._after_all, always_call=True)
        for index, place in enumerate(places.parameters):
            register = place.slot.parameter.register_post_accumulate_grad_hook
            self._hang(register, self._accumulated(index))

    def _hang(
        self, register: Callable[..., Any], call: Callable[..., None], **options: Any
    ) -> None:
        self._handles.append(register(Hook(not_compiled(call), self.times), **options))

    def _current(self) -> TorchStep | None:
        """Return the step under way; None after the last one, when the module is ordinary.

        Raises:
            LocalProtocolError: between steps, when values may be on their way.
        """
        if self._step is None and not self._has_ended:
            raise LocalProtocolError(
                "the model is used outside the loop over session.steps(), when its values may be "
                "on their way; evaluate and save at the top of the loop's body or after its end"
            )
        return self._step

    def _before_all(self, module: nn.Module, args: object) -> None:
        step = self._current()
        if step is None:
            return
        if not self._is_learnt and self._learning is None and torch.is_grad_enabled():
            stack = ExitStack()
            self._learning = stack, stack.enter_context(follow(self.model))
        step.begin_forward()

    def _before(self, module: nn.Module, args: object) -> None:
        step = self._current()
        if step is not None:
            step.need(self._needs.get(module, ()), or_more=not self._is_learnt)

    def _before_saving(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        step = self._current()
        if step is not None:
            step.wait()

    def _after_all(self, module: nn.Module, args: object, output: object) -> None:
        failed = output is None
        learning = self._stop_learning()
        if self._step is None:
            return
        if learning is not None and not failed:
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
        self._step.end_forward(failed=failed)

    def _stop_learning(self) -> ForwardPass | None:
        learning, self._learning = self._learning, None
        if learning is None:
            return None
        stack, seen = learning
        stack.close()
        return seen

    def _before_norm(self, norm: NormStatistics) -> Callable[..., None]:
        def before(module: nn.Module, args: object) -> None:
            if self._step is not None and module.training:
                self._step.begin_norm(norm)

        return before

    def _after_norm(self, norm: NormStatistics) -> Callable[..., None]:
        def after(module: nn.Module, args: object, output: object) -> None:
            if norm.is_lent:
                norm.give_back()
                if self._step is not None and output is not None:
                    self._step.end_norm(norm)

        return after

    def _accumulated(self, index: int) -> Callable[..., None]:
        def accumulated(parameter: Tensor) -> None:
            if self._step is not None:
                self._step.accumulated(index)

        return accumulated
