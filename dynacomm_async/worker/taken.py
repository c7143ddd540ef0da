"""One training step, as the thread that computes sees it."""

from __future__ import annotations

import threading
from time import monotonic_ns
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.errors import LocalProtocolError
from dynacomm_async.recording import Computed
from dynacomm_async.wire.messages import Report
from dynacomm_async.worker.step import Phase

if TYPE_CHECKING:
    from dynacomm_async.worker.session import Session

__all__ = ["Step"]

Floats = NDArray[np.float32]

_LEAST_WAIT_NS = 10_000
"""Shorter waits are not recorded: the parameters were there."""


class Step:
    """One training step, for the computing thread.

    Attributes:
        session: the one it belongs to.
        index: the version of the parameters that it computes from.
        split: among whom the data of the step are divided, where that changes when workers come
            and go; None: among all ranks.
        life: how often training had stepped back when it began.
        started_ns: monotonic clock, when the step was begun.
    """

    def __init__(self, session: Session, index: int, life: int = 0) -> None:
        n_layers = len(session.grid.layers)
        self.index = index
        self.life = life
        self.split = session.board.split_of(index)
        self.started_ns = monotonic_ns()
        self.session = session
        self._forward_ns = [0] * n_layers
        self._backward_ns = [0] * n_layers
        self._stalled_ns = 0  # waiting for parameters
        self._ready = [False] * n_layers  # gradients handed over
        self._current: int | None = None  # the layer whose forward is being computed
        self._mark_ns = self.started_ns
        self._recorder = session.recorder

    @property
    def abandoned(self) -> bool:
        """Whether this step is void: the server was restarted and has stepped back, has made the
        step without this worker, or has given its place up meanwhile.

        Its methods do nothing then, and return at once; parameters may be those of any step. The
        next step says where training stands.
        """
        return self.session.board.course.life != self.life

    def wait(self, layer: str | int) -> None:
        """Block until the layer's parameters have arrived.

        Raises:
            DynaCommError: what ended the session.
        """
        index = self.session.index_of(layer)
        self.begin_wait()
        board = self.session.board
        if not self.abandoned and not board.is_granted(Phase.FORWARD, index, self.index):
            landed = threading.Event()
            board.when(Phase.FORWARD, index, self.index, landed.set, self.life)
            landed.wait()
            board.is_granted(Phase.FORWARD, index, self.index)  # raises what ended the session
        self.end_wait(index)

    def parameters(self, layer: str | int) -> Floats:
        """Block until the layer's parameters have arrived; return the view that holds them.

        Raises:
            DynaCommError: what ended the session.
        """
        self.wait(layer)
        return self.session.parameters[self.session.slice_of(layer)]

    def forward_done(self) -> None:
        """Stop the clock of the layer whose forward was being computed; idempotent."""
        if self._current is not None:
            now_ns = monotonic_ns()
            self._forward_ns[self._current] += now_ns - self._mark_ns
            self._record("forward", self._current, self._mark_ns, now_ns)
            self._current = None

    def begin_wait(self) -> None:
        """Stop the clock of the layer that was computed, start that of waiting."""
        self.forward_done()
        self._mark_ns = monotonic_ns()

    def end_wait(self, layer: int) -> None:
        """Stop the clock of waiting, start that of a layer whose parameters are here."""
        now_ns = monotonic_ns()
        self._stalled_ns += now_ns - self._mark_ns
        if now_ns - self._mark_ns >= _LEAST_WAIT_NS:
            self._record("wait", layer, self._mark_ns, now_ns)
        self._current = layer
        self._mark_ns = now_ns

    def report(self, loss: float, images: int = 0) -> None:
        """Tell the server the loss of this worker's batch; call it when the forward is done."""
        self.forward_done()
        report = Report(float(loss), int(images))
        self.session.post(self.session.client.report, self.index, self.life, report)
        self._mark_ns = monotonic_ns()

    def gradient_ready(self, layer: str | int) -> None:
        """Hand a layer's gradient over; returns at once.

        Its gradient must not be written, nor its parameters read, before the next step's
        :meth:`wait` on the layer returns.

        Raises:
            LocalProtocolError: it was handed over before in this step, or parameters of the step
                are still on their way (every gradient needs the whole forward pass).
            DynaCommError: what ended the session.
        """
        session = self.session
        index = session.index_of(layer)
        now_ns = monotonic_ns()
        granted = session.board.is_granted(Phase.BACKWARD, index, self.index)
        if self.abandoned:
            return
        if not granted:
            raise LocalProtocolError(
                f"step {self.index}: the gradient of layer {layer!r} is ready before all "
                "parameters have arrived; wait for every layer first"
            )
        if self._ready[index]:
            raise LocalProtocolError(
                f"step {self.index}: the gradient of layer {layer!r} is ready twice"
            )
        self._ready[index] = True
        if self._current is not None:
            # Nobody said where the forward ended: of this layer's time a third, as is usual.
            turned_ns = self._mark_ns + (now_ns - self._mark_ns) // 3
            self._forward_ns[self._current] += turned_ns - self._mark_ns
            self._record("forward", self._current, self._mark_ns, turned_ns)
            self._mark_ns = turned_ns
            self._current = None
        self._backward_ns[index] += now_ns - self._mark_ns
        self._record("backward", index, self._mark_ns, now_ns)
        session.post(session.client.gradient_ready, self.index, self.life, index)
        if all(self._ready):
            session.post(session.client.step_computed, self._forward_ns, self._backward_ns)
        self._mark_ns = monotonic_ns()

    def _record(
        self,
        what: Literal["forward", "backward", "wait"],
        layer: int,
        start_ns: int,
        end_ns: int,
    ) -> None:
        if self._recorder is not None:
            self._recorder.add(Computed(what, self.index, layer, start_ns, end_ns))

    @property
    def compute_ns(self) -> int:
        """What computing took so far, without waits."""
        return sum(self._forward_ns) + sum(self._backward_ns)

    def end(self) -> None:
        """Make sure that the step was finished, and account for its time.

        Raises:
            LocalProtocolError: gradients are missing.
        """
        if self.abandoned:
            return
        self._check_complete()
        session = self.session
        session.metrics.add(
            self.index,
            session.plans.plan_of(self.index),
            session.plans.costs or session.board.costs,
            session.board.timing_of(self.index),
            step_ns=monotonic_ns() - self.started_ns,
            compute_ns=self.compute_ns,
            stalled_ns=self._stalled_ns,
        )

    def _check_complete(self) -> None:
        layers = zip(self.session.grid.layers, self._ready, strict=True)
        missing = [spec.name for spec, ready in layers if not ready]
        if missing:
            raise LocalProtocolError(
                f"step {self.index} was left without the gradients of {', '.join(missing)}"
            )
