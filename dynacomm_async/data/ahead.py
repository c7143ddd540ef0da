"""Batches that are ready when a step begins: made in a thread of their own, one step ahead."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

__all__ = ["Ahead"]

Batch = TypeVar("Batch")


class Ahead(Generic[Batch]):
    """Makes the batch of the next step while the caller computes with this step's.

    A context manager; when the block is left, its thread has ended. One thread at a time may use
    it.

    Args:
        make: from a step's index to its batch, a function of the index alone. Called in the thread,
            once at a time, with whole numbers below ``end``; what it returns must not change when
            it is called again.
        end: how many steps there are; nothing is made for any behind them.
    """

    def __init__(self, make: Callable[[int], Batch], end: int) -> None:
        self._make = make
        self._end = end
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="next batch")
        self._step = -1
        self._next: Future[Batch] | None = None  # the batch of that step

    def __enter__(self) -> Ahead[Batch]:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def expect(self, step: int) -> None:
        """Begin to make the batch of ``step``, unless that is under way; returns at once."""
        if step != self._step and step < self._end:
            self._step, self._next = step, self._pool.submit(self._make, step)

    def take(self, step: int) -> Batch:
        """Return the batch of ``step``, and begin with the one behind it.

        Waits only where the batch is not ready: the first time, where steps go back, and where
        making one takes longer than computing with it. What ``make`` raises is raised here.
        """
        self.expect(step)
        assert self._next is not None, "steps are below the end"
        batch = self._next.result()
        self.expect(step + 1)
        return batch
