"""Training a network of the NumPy engine in a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import sleep, thread_time_ns
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.data import Ahead
from dynacomm_async.nn import Engine, Network
from dynacomm_async.split import Split
from dynacomm_async.wire.grid import LayerSpec
from dynacomm_async.worker.session import Session
from dynacomm_async.worker.taken import Step

__all__ = ["BatchSource", "TrainedStep", "bind_engine", "layer_specs", "train"]

Batch: TypeAlias = tuple[NDArray[np.float32], NDArray[np.int64]]

BatchSource: TypeAlias = Callable[[int], Batch]
"""From a step's index to (N, H, W, C) images and (N,) labels, new or never changed; the same for a
repeated step, unless :meth:`Session.split_of` says otherwise by then."""


@dataclass(frozen=True, slots=True)
class TrainedStep:
    """What one step was, seen from the computing thread.

    Attributes:
        index: the step.
        loss: of this worker's batch.
        started_ns: monotonic clock; one step begins where the one before ends.
        compute_ns: time spent computing; the rest was waiting.
    """

    index: int
    loss: float
    started_ns: int
    compute_ns: int


class _StepHooks:
    """Weaves a step's transfers between the engine's layers."""

    def __init__(self, step: Step, engine: Engine, slowdown: float) -> None:
        self._step = step
        self._engine = engine
        self._last = len(engine.network.layers) - 1
        self._slowdown = slowdown
        self._mark_ns = 0

    def before_forward(self, layer: int) -> None:
        self._step.wait(layer)
        self._mark_ns = thread_time_ns()

    def after_forward(self, layer: int) -> None:
        self._idle()
        self._step.forward_done()
        if layer == self._last:
            self._step.report(self._engine.loss, self._engine.batch)

    def before_backward(self, layer: int) -> None:
        """Nothing to wait for: this step's parameters prove that the last gradients have left."""
        self._mark_ns = thread_time_ns()

    def after_backward(self, layer: int) -> None:
        self._idle()
        self._step.gradient_ready(layer)

    def _idle(self) -> None:
        """Let the layer take as long as on a slower device, without using the processor.

        What this thread has computed counts, not what others kept it from computing: that is this
        machine's trouble and would be multiplied.
        """
        if self._slowdown > 1:
            sleep((self._slowdown - 1) * (thread_time_ns() - self._mark_ns) / 1e9)


def layer_specs(network: Network) -> tuple[LayerSpec, ...]:
    """Return a network's layer table for the transport."""
    return tuple(
        LayerSpec(layer.name, layer.count, layer.decay, layer.statistics)
        for layer in network.layers
    )


def bind_engine(
    session: Session, network: Network, batch: int, *, smoothing: float = 0.0, threads: int = 1
) -> Engine:
    """Return an engine that computes in the session's arenas; see :meth:`Network.bind`."""
    return network.bind(
        batch,
        parameters=session.parameters,
        gradients=session.gradients,
        statistics=session.statistics,
        batch_statistics=session.batch_statistics,
        smoothing=smoothing,
        threads=threads,
    )


def train(
    session: Session,
    engine: Engine,
    batches: BatchSource,
    *,
    slowdown: float = 1.0,
    seed: int = 0,
) -> Iterator[TrainedStep]:
    """Train until the run ends; yield each step when it has been computed.

    After a restart of the server some steps are computed, and yielded, again.

    Args:
        batches: called in a thread of its own, a step ahead, as :class:`dynacomm_async.data.Ahead`
            says.
        slowdown: every layer takes this many times as long as it computes, to imitate a slower
            device; the processor is idle for the rest. At least 1.
        seed: of dropout, which follows from it, the step and this worker's slot.

    The caller may stop taking steps for a while, or for good. Between two steps it holds the run
    up, since the others wait for its gradients.

    Raises:
        DynaCommError: what ended the session.
    """

    slot = session.welcome.slot

    def make(index: int) -> tuple[Split | None, Batch | None]:
        split = session.split_of(index)
        is_mine = split is None or slot in split.members
        return split, batches(index) if is_mine else None

    with Ahead(make, session.welcome.steps) as ahead:
        ahead.expect(session.welcome.version)
        for step in session.steps():
            split, batch = ahead.take(step.index)
            if batch is None or split != step.split:  # somebody has come or gone since
                batch = batches(step.index)
            images, labels = batch
            draw = seed, step.index, slot
            with np.errstate(over="ignore", invalid="ignore"):  # the server looks at it
                engine.step(images, labels, _StepHooks(step, engine, slowdown), draw=draw)
            if not step.abandoned:
                yield TrainedStep(step.index, engine.loss, step.started_ns, step.compute_ns)
