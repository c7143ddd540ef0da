"""A worker's place in a run, for code that awaits.

The same session as :class:`~dynacomm_async.worker.session.Session`, I/O thread and all: between
two awaits the caller may compute for as long as it likes without holding up a transfer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.errors import DynaCommError
from dynacomm_async.schedule.account import WorkerReport
from dynacomm_async.worker.metrics import Metrics
from dynacomm_async.worker.reaching import Whereabouts
from dynacomm_async.worker.session import Layers, Session
from dynacomm_async.worker.step import Phase
from dynacomm_async.worker.taken import Step

__all__ = ["AsyncSession", "AsyncStep", "connect"]

Floats = NDArray[np.float32]


def connect(
    address: str | Whereabouts, layers: Layers | None = None, **options: Any
) -> AsyncSession:
    """Return a session to enter with ``async with``.

    Example::

        async with connect("127.0.0.1:7070", layers={"w": 10}) as session:
            async for step in session.steps():
                await step.parameters("w")
                session.gradients[:] = gradient_of(session.parameters)
                step.gradient_ready("w")

    Args:
        address, layers, options: as :class:`~dynacomm_async.worker.session.Session` takes them.

    Raises (on entering):
        DynaCommError: as :class:`~dynacomm_async.worker.session.Session`.
    """
    return AsyncSession(Session(address, layers, **options))


class AsyncSession:
    """See :func:`connect`. The arrays are those of the blocking session, with the same owners.

    Attributes:
        blocking: the session that does the work.
    """

    def __init__(self, blocking: Session) -> None:
        self.blocking = blocking

    async def __aenter__(self) -> AsyncSession:
        entering = asyncio.get_running_loop().run_in_executor(None, self.blocking.__enter__)
        try:
            await asyncio.shield(entering)
        except asyncio.CancelledError:
            # A thread cannot be cancelled, but what it waits for can: it ends soon.
            self.blocking.abandon()
            await asyncio.wait([entering])
            if entering.exception() is None:
                await asyncio.to_thread(self.blocking.close)
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.blocking.close)

    @property
    def slot(self) -> int:
        """This worker's rank."""
        return self.blocking.slot

    @property
    def workers(self) -> int:
        """How many ranks the run has."""
        return self.blocking.workers

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the server told its workers."""
        return self.blocking.settings

    @property
    def parameters(self) -> Floats:
        """(n,) float32, forward order; read-only for the caller."""
        return self.blocking.parameters

    @property
    def statistics(self) -> Floats:
        """(m,) float32 running statistics; filled when the run has ended."""
        return self.blocking.statistics

    @property
    def gradients(self) -> Floats:
        """(n,) float32, written by the caller."""
        return self.blocking.gradients

    @property
    def batch_statistics(self) -> Floats:
        """(m,) float32, written by the caller before its first gradient is ready."""
        return self.blocking.batch_statistics

    @property
    def metrics(self) -> Metrics:
        """Where the time of each step went."""
        return self.blocking.metrics

    async def describe(self) -> WorkerReport:
        """Return what explains how the time was spent; see :meth:`Session.describe`."""
        return await asyncio.to_thread(self.blocking.describe)

    def slice_of(self, layer: str | int) -> slice:
        """Return where a layer lies in ``parameters`` and ``gradients``."""
        return self.blocking.slice_of(layer)

    async def steps(self) -> AsyncIterator[AsyncStep]:
        """Yield the steps until the run ends; see :meth:`Session.steps`."""
        session, board = self.blocking, self.blocking.board
        step: Step | None = None
        while True:
            before = step
            while (step := session.next_step(before)) is None:
                await _woken_by(partial(session.when_next, before))
            if step.index < session.welcome.steps:
                yield AsyncStep(step)
                step.end()
                continue
            if not board.ended:
                await _woken_by(partial(board.when_ended, life=step.life))
            if board.ended:
                return


class AsyncStep:
    """One training step, for code that awaits.

    Attributes:
        blocking: the same step; its ``report`` and ``gradient_ready`` never block.
        index: the version of the parameters that it computes from.
        report: see :meth:`Step.report`.
        gradient_ready: see :meth:`Step.gradient_ready`.
        forward_done: see :meth:`Step.forward_done`.
    """

    def __init__(self, step: Step) -> None:
        self.blocking = step
        self.index = step.index
        self.report = step.report
        self.gradient_ready = step.gradient_ready
        self.forward_done = step.forward_done

    @property
    def abandoned(self) -> bool:
        """See :attr:`Step.abandoned`."""
        return self.blocking.abandoned

    async def parameters(self, layer: str | int) -> Floats:
        """Wait until the layer's parameters have arrived; return the view that holds them.

        Raises:
            DynaCommError: what ended the session.
        """
        step = self.blocking
        session = step.session
        index = session.index_of(layer)
        step.begin_wait()
        board = session.board
        if not step.abandoned and not board.is_granted(Phase.FORWARD, index, step.index):
            await _woken_by(
                lambda call: board.when(Phase.FORWARD, index, step.index, call, step.life)
            )
            board.is_granted(Phase.FORWARD, index, step.index)  # raises what ended it
        step.end_wait(index)
        return session.parameters[session.grid.layer_slice(index)]


async def _woken_by(register: Callable[[Callable[[], None]], None]) -> None:
    """Wait until another thread makes the call that ``register`` is given."""
    loop = asyncio.get_running_loop()
    woken = loop.create_future()

    def wake() -> None:
        if not woken.done():
            woken.set_result(None)

    def call() -> None:
        try:
            loop.call_soon_threadsafe(wake)
        except RuntimeError as error:  # the caller's loop is closed: nobody waits any more
            if not loop.is_closed():
                raise DynaCommError("the waiting loop cannot be woken") from error

    register(call)
    await woken
