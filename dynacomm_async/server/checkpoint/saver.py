"""Saves checkpoints in a thread: neither event loop nor training waits for a disk."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from dynacomm_async.server.checkpoint.state import CheckpointState

__all__ = ["Saver"]

_log = logging.getLogger("dynacomm_async.server")


class _Saves(Protocol):
    def save(self, state: CheckpointState) -> Path: ...


class Saver:
    """Saves one state at a time; of those that arrive meanwhile only the newest one.

    A failure is logged as an error and counted, and training may go on: the next state is tried
    like any other, and the log says so when one is saved again. Memory: the state being saved and
    at most one that waits.

    Args:
        checkpoints: where to; only the saver's thread uses it until :meth:`close`.
        on_saved: called in the saver's thread with the step and path of each finished checkpoint.

    Attributes:
        failures: how many saves have failed.
        failures_in_a_row: of these, how many since the last good one.
        last_error: why the last save failed, in a sentence; None if it did not.
        saved_step: step of the newest finished checkpoint, or None.
        replaced: states that were never saved because a newer one came while they waited.
    """

    def __init__(
        self, checkpoints: _Saves, *, on_saved: Callable[[int, Path], None] | None = None
    ) -> None:
        self._checkpoints = checkpoints
        self._on_saved = on_saved
        self.failures = 0
        self.failures_in_a_row = 0
        self.last_error: str | None = None
        self.saved_step: int | None = None
        self.replaced = 0
        self._change = threading.Condition()
        self._waiting: CheckpointState | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._save_all, name="checkpoints", daemon=True)
        self._thread.start()

    def offer(self, state: CheckpointState) -> None:
        """Have a state saved. Returns at once, from any thread.

        Its arrays must not change any more: see :meth:`CheckpointState.copy`.

        Raises:
            RuntimeError: the saver has been closed.
        """
        with self._change:
            if self._closing:
                raise RuntimeError("the saver has been closed")
            self.replaced += self._waiting is not None
            self._waiting = state
            self._change.notify_all()

    def close(self, limit_s: float | None = None) -> bool:
        """Save what still waits, then end. Blocks: call it in a thread when there is a loop.

        Args:
            limit_s: how long to wait at most; None: as long as it takes.

        Returns:
            Whether everything has ended and the last save did not fail. A thread that is still
            stuck in a disk after the limit does not keep the process alive.
        """
        with self._change:
            self._closing = True
            self._change.notify_all()
        self._thread.join(limit_s)
        return not self._thread.is_alive() and self.last_error is None

    def _save_all(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting is not None or self._closing)
                state, self._waiting = self._waiting, None
            if state is None:
                return
            self._save(state)
            del state  # or it would be held until the next one comes

    def _save(self, state: CheckpointState) -> None:
        try:
            path = self._checkpoints.save(state)
            if self._on_saved is not None:
                self._on_saved(state.step, path)
        except Exception as error:  # whatever it is, the next state must find a thread
            self.failures += 1
            self.failures_in_a_row += 1
            # Not the error: its traceback would keep the state alive.
            self.last_error = str(error) or type(error).__name__
            _log.error(
                "the checkpoint of step %d was not saved (failure %d in a row): %s",
                state.step,
                self.failures_in_a_row,
                self.last_error,
            )
        else:
            if self.failures_in_a_row:
                _log.warning(
                    "the checkpoint of step %d was saved: the disk works again after %d failures",
                    state.step,
                    self.failures_in_a_row,
                )
            self.failures_in_a_row = 0
            self.last_error = None
            self.saved_step = state.step
