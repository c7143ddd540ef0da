"""Threads that compute shards of one batch side by side.

Each shard is a run of the batch's images with arrays of its own. All shards run the same operators
in the same order and meet where they depend on each other: between scheduled layers, where hooks
are called and gradients added up, and in batch norm, whose statistics are those of the whole batch.
Sums are always taken in the order of the shards, so the result does not depend on which thread is
faster; NumPy releases the interpreter's lock while it computes, so the threads do run side by side.

Threads live as long as one call: starting one costs less than a tenth of a millisecond, and nobody
has to close anything.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Crew", "Member"]

Array = NDArray[Any]


class _Left(Exception):
    """Another thread of the crew has failed; this one has nothing to say about it."""


class Crew:
    """Runs a function once for each shard, the first on the calling thread.

    Args:
        batch: images of the whole batch.
        count: shards, at most as many as images.

    Attributes:
        members: one for each shard, which cut the batch as evenly as can be.
    """

    def __init__(self, batch: int, count: int = 1) -> None:
        ends = [batch * (index + 1) // count for index in range(count)]
        slices = [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        self.members = tuple(Member(self, index, part) for index, part in enumerate(slices))
        self.batch = batch
        self.tables: dict[str, Array] = {}
        self._failures: list[BaseException] = []
        self._broken = False
        self._arrived: list[threading.Lock] = []
        self._may_go: list[threading.Lock] = []

    def run(self, work: Callable[[Member], None]) -> None:
        """Call ``work`` for every member; return, or raise what one of them raised, when all ended.

        Each must meet the others equally often.
        """
        first, *others = self.members
        if not others:
            work(first)
            return
        self._failures, self._broken = [], False
        self._arrived = [_closed_lock() for _ in others]
        self._may_go = [_closed_lock() for _ in others]
        threads = [
            threading.Thread(
                target=self._help, args=(work, member), name=f"shard {member.index}", daemon=True
            )
            for member in others
        ]
        started: list[threading.Thread] = []
        try:
            for thread in threads:
                thread.start()
                started.append(thread)
            work(first)
        except _Left:
            pass
        except BaseException:
            self._break()
            raise
        finally:
            for thread in started:
                thread.join()
        if self._failures:
            raise self._failures[0]

    def meet(self, index: int, alone: Callable[[], None] | None = None) -> None:
        """Wait until all have come; then the first calls ``alone``, and all go on."""
        if len(self.members) == 1:
            if alone is not None:
                alone()
            return
        if self._broken:
            raise _Left
        if index == 0:
            for lock in self._arrived:
                lock.acquire()
            if self._broken:
                raise _Left
            if alone is not None:
                alone()
            for lock in self._may_go:
                _open(lock)
            return
        _open(self._arrived[index - 1])
        self._may_go[index - 1].acquire()
        if self._broken:
            raise _Left

    def _help(self, work: Callable[[Member], None], member: Member) -> None:
        try:
            work(member)
        except _Left:
            self._break()
        except BaseException as error:
            self._failures.append(error)
            self._break()

    def _break(self) -> None:
        """Let everyone who waits, or comes to wait, leave."""
        self._broken = True
        # Whoever passes a lock finds the crew broken, behind it or at the next meeting.
        for lock in (*self._arrived, *self._may_go):
            _open(lock)


class Member:
    """One shard's place in its crew.

    Attributes:
        index: of the shard.
        images: which of the batch.
        batch: how many those are.
    """

    def __init__(self, crew: Crew, index: int, images: slice) -> None:
        self._crew = crew
        self.index = index
        self.images = images
        self.batch = images.stop - images.start

    @property
    def whole_batch(self) -> int:
        """Images of all shards."""
        return self._crew.batch

    @property
    def is_alone(self) -> bool:
        """There are no other shards."""
        return len(self._crew.members) == 1

    def table(self, use: str, count: int, dtype: Any) -> Array:
        """An array (shards, count), the same for all members that name the same use."""
        found = self._crew.tables.get(use)
        if found is None:
            found = self._crew.tables[use] = np.empty((len(self._crew.members), count), dtype)
        return found

    def add_up(self, own: Array, table: Array) -> None:
        """Replace ``own`` (count,) by the sum of all members' in the order of the shards.

        All must call it with their own array and the same table, which must not be used a second
        time before they have met in between.
        """
        if self.is_alone:
            return
        table[self.index] = own
        self.meet()
        np.add.reduce(table, axis=0, out=own)

    def meet(self, alone: Callable[[], None] | None = None) -> None:
        """Wait for the other members; see :meth:`Crew.meet`."""
        self._crew.meet(self.index, alone)


def _closed_lock() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


def _open(lock: threading.Lock) -> None:
    """Let one pass; nothing happens where it is open already."""
    with suppress(RuntimeError):
        lock.release()
