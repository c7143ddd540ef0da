"""What the event loop tells the thread that computes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dynacomm_async.errors import DynaCommError
from dynacomm_async.schedule.costs import Costs
from dynacomm_async.wire.messages import Timing
from dynacomm_async.worker.step import Compute, Phase

__all__ = ["Board", "Course"]

_KEPT_TIMINGS = 4
"""Versions for which the server's words are kept; those of two may be here at once."""


class Course(NamedTuple):
    """A stretch of steps without a step back.

    Attributes:
        life: how often training has stepped back; what belongs to an earlier life is void.
        first: the step that it began with.
    """

    life: int
    first: int


class Board:
    """Which layer may be computed, whether training has stepped back, and the end.

    Written by the loop, read by any thread. ``granted[phase][layer]`` is the step for which the
    layer may be computed, -1 at first. Steps may repeat: only the very same one counts.

    Args:
        n_layers: layers of the model.
        first: the step that training begins with.

    Attributes:
        course: where training stands.
        error: what ended the session; None while it goes on, and after the end of the run.
        costs: the newest cost table; None while not known. Written by the loop.
    """

    def __init__(self, n_layers: int, first: int = 0) -> None:
        self._lock = threading.Lock()
        self._n_layers = n_layers
        self._granted = {phase: [-1] * n_layers for phase in Phase}
        self._waiting: list[tuple[Phase, int, int, Callable[[], None]]] = []
        self._ended = False
        self.course = Course(0, first)
        self.error: DynaCommError | None = None
        self.costs: Costs | None = None
        self._timings: deque[tuple[int, Timing]] = deque(maxlen=_KEPT_TIMINGS)

    def note_timing(self, version: int, timing: Timing) -> None:
        """Keep what came with the parameters of a version."""
        self._timings.append((version, timing))

    def timing_of(self, version: int) -> Timing | None:
        """Return what came with the parameters of one of the last versions, if anything did."""
        return next((timing for of, timing in self._timings.copy() if of == version), None)

    def is_granted(self, phase: Phase, layer: int, step: int) -> bool:
        """Return whether the layer may be computed now.

        Raises:
            DynaCommError: what ended the session.
        """
        if self._granted[phase][layer] == step:
            return True
        if self.error is not None:
            raise self.error
        return False

    @property
    def ended(self) -> bool:
        """Whether the run has ended in order.

        Raises:
            DynaCommError: it has ended otherwise.
        """
        if not self._ended and self.error is not None:
            raise self.error
        return self._ended

    def when(
        self, phase: Phase, layer: int, step: int, call: Callable[[], None], life: int = 0
    ) -> None:
        """Call ``call`` once, on the loop or now: when the layer is granted in this life, when that
        life is past, or when all is over."""
        with self._lock:
            waits = self._granted[phase][layer] != step and life == self.course.life
            if waits and not self.is_over:
                self._waiting.append((phase, layer, step, call))
                return
        call()

    def when_ended(self, call: Callable[[], None], life: int = 0) -> None:
        """Call ``call`` once, on the loop or now: when all is over, or this life is past."""
        with self._lock:
            if life == self.course.life and not self.is_over:
                self._waiting.append((Phase.FORWARD, -1, 0, call))
                return
        call()

    def grant(self, computes: Sequence[Compute], step: int) -> None:
        """The layers may be computed: all are granted before anybody is woken.

        One by one would be a race: the last forward wakes a thread, which may be done with it and
        hand the first gradient over before the loop has come to grant the backward.
        """
        granted = {(compute.phase, compute.layer) for compute in computes}
        with self._lock:
            for phase, layer in granted:
                self._granted[phase][layer] = step
            due = [entry for entry in self._waiting if entry[:2] in granted and entry[2] == step]
            for entry in due:
                self._waiting.remove(entry)
        for entry in due:
            entry[3]()

    def step_back(self, step: int) -> None:
        """Training goes on with ``step``, which has been before; whoever waits is woken."""
        with self._lock:
            self._granted = {phase: [-1] * self._n_layers for phase in Phase}
            self._timings.clear()
            self.course = Course(self.course.life + 1, step)
            waiting, self._waiting = self._waiting, []
        for entry in waiting:
            entry[3]()

    def end(self, error: DynaCommError | None) -> None:
        """All is over, in order (None) or by an error; whoever waits is woken."""
        with self._lock:
            if self.is_over:
                return
            self._ended = error is None
            self.error = error
            waiting, self._waiting = self._waiting, []
        for entry in waiting:
            entry[3]()

    @property
    def is_over(self) -> bool:
        """Whether the session has ended, one way or the other."""
        return self._ended or self.error is not None
