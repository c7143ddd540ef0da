"""What the event loop tells the thread that computes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dynacomm_async.errors import DynaCommError
from dynacomm_async.schedule.costs import Costs
from dynacomm_async.split import Split
from dynacomm_async.wire.messages import Timing
from dynacomm_async.worker.step import Compute, Phase

__all__ = ["Board", "Course"]

_KEPT_TIMINGS = 4
"""Versions for which the server's words are kept; those of two may be here at once."""

_KEPT_SPLITS = 2
"""Earlier splits that steps under way may still be divided by."""


class Course(NamedTuple):
    """A stretch of steps, one after the other.

    Attributes:
        life: how often training has stepped back, or over steps; what belongs to an earlier life
            is void.
        first: the step that it began with; None while nobody knows.
    """

    life: int
    first: int | None


class Board:
    """Which layer may be computed, whether training has stepped back, and the end.

    Written by the loop, read by any thread. ``granted[phase][layer]`` is the step for which the
    layer may be computed, -1 at first. Steps may repeat: only the very same one counts.

    Args:
        n_layers: layers of the model.
        first: the step that training begins with; None while nobody knows.

    Attributes:
        course: where training stands.
        opened: the newest version of which parameters have begun to arrive; -1: of none.
        error: what ended the session; None while it goes on, and after the end of the run.
        costs: the newest cost table; None while not known. Written by the loop.
    """

    def __init__(self, n_layers: int, first: int | None = 0) -> None:
        self._lock = threading.Lock()
        self._n_layers = n_layers
        self._granted = {phase: [-1] * n_layers for phase in Phase}
        self._waiting: list[tuple[Phase, int, int, Callable[[], None]]] = []
        self._watching: list[tuple[Callable[[], bool], Callable[[], None]]] = []
        self._ended = False
        self.course = Course(0, first)
        self.opened = -1
        self._splits: tuple[Split, ...] = ()  # ascending; replaced as a whole
        self.error: DynaCommError | None = None
        self.costs: Costs | None = None
        self._timings: deque[tuple[int, Timing]] = deque(maxlen=_KEPT_TIMINGS)

    def note_timing(self, version: int, timing: Timing) -> None:
        """Keep what came with the parameters of a version."""
        self._timings.append((version, timing))

    def timing_of(self, version: int) -> Timing | None:
        """Return what came with the parameters of one of the last versions, if anything did."""
        return next((timing for of, timing in self._timings.copy() if of == version), None)

    def split_of(self, step: int) -> Split | None:
        """Return among whom the data of a step are divided, as far as is known; None: all."""
        splits = self._splits
        return next((split for split in reversed(splits) if split.step <= step), None)

    def divide(self, split: Split | None, *, keep_later: bool = False) -> None:
        """Take note of among whom the data are divided.

        Args:
            split: as the server says.
            keep_later: keep what is known of steps behind it; else nothing that was known counts.
        """
        if split is None:
            self._splits = ()
            return
        later = [known for known in self._splits if known.step > split.step]
        self._splits = (split, *later) if keep_later else (split,)

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

    def when_true(self, condition: Callable[[], bool], call: Callable[[], None]) -> None:
        """Call ``call`` once, on the loop or now, when a condition on what this board says holds,
        or when all is over."""
        with self._lock:
            if not self.is_over and not condition():
                self._watching.append((condition, call))
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

    def open(self, version: int, split: Split | None = None) -> None:
        """Parameters of a version begin to arrive, with news of the split, perhaps."""
        with self._lock:
            self.opened = version
            if split is not None:
                self._splits = (*self._splits[-_KEPT_SPLITS:], split)
            due = self._take_watching()
        for call in due:
            call()

    def settle(self, step: int) -> None:
        """Training begins, here, with ``step``, whatever was thought."""
        if self.course.first is not None:
            if self.course.first != step:
                self.step_back(step)
            return
        with self._lock:
            self.course = Course(self.course.life, step)
            due = self._take_watching()
        for call in due:
            call()

    def step_back(self, step: int | None) -> None:
        """Training goes on with another step (None: nobody knows yet); whoever waits is woken."""
        with self._lock:
            # First: whoever reads without the lock that a grant is gone must see why, too.
            self.course = Course(self.course.life + 1, step)
            self._granted = {phase: [-1] * self._n_layers for phase in Phase}
            self._timings.clear()
            self.opened = -1
            waiting, self._waiting = self._waiting, []
            due = self._take_watching()
        for call in (*(entry[3] for entry in waiting), *due):
            call()

    def _take_watching(self) -> list[Callable[[], None]]:
        """Return whom to call, who watch no longer."""
        due = [entry for entry in self._watching if self.is_over or entry[0]()]
        for entry in due:
            self._watching.remove(entry)
        return [call for _, call in due]

    def end(self, error: DynaCommError | None) -> None:
        """All is over, in order (None) or by an error; whoever waits is woken."""
        with self._lock:
            if self.is_over:
                return
            self._ended = error is None
            self.error = error
            waiting, self._waiting = self._waiting, []
            due = self._take_watching()
        for call in (*(entry[3] for entry in waiting), *due):
            call()

    @property
    def is_over(self) -> bool:
        """Whether the session has ended, one way or the other."""
        return self._ended or self.error is not None
