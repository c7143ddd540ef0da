"""Something that lives on an event loop, for tests that block: in a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from dynacomm_async.transport import LoopThread

__all__ = ["Threaded"]

T = TypeVar("T", bound=AbstractAsyncContextManager[Any])
R = TypeVar("R")


class Threaded(Generic[T]):
    """An async context manager that is entered and left on a loop in a thread, by ``with``.

    Args:
        make: makes it; called on the loop, when entering.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._inner: T | None = None  # from entering on
        self._io: LoopThread | None = None  # while entered

    @property
    def inner(self) -> T:
        """What was made; its methods belong to the loop's thread.

        Raises:
            RuntimeError: nothing was made yet.
        """
        if self._inner is None:
            raise RuntimeError(self._not_running)
        return self._inner

    def __enter__(self) -> Self:
        io = LoopThread().__enter__()
        try:
            io.submit(self._enter()).result()
        except BaseException:
            io.__exit__()
            raise
        self._io = io
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        io, self._io = self._thread, None
        try:
            io.submit(self._leave(exc_type, exc, traceback)).result()
        finally:
            io.__exit__()

    @property
    def _thread(self) -> LoopThread:
        if self._io is None:
            raise RuntimeError(self._not_running)
        return self._io

    @property
    def _not_running(self) -> str:
        return f"the {type(self).__name__} is not running: use it inside `with`"

    def call(self, function: Callable[..., R], *args: Any) -> R:
        """Call a function on the loop's thread and return what it returns."""

        async def called() -> R:
            return function(*args)

        return self._thread.submit(called()).result()

    def wait(self, make_awaitable: Callable[[], Any], timeout_s: float) -> Any:
        """Await something on the loop and return what it gives.

        Raises:
            TimeoutError: not in time.
        """

        async def awaited() -> Any:
            async with asyncio.timeout(timeout_s):
                return await make_awaitable()

        return self._thread.submit(awaited()).result()

    async def _enter(self) -> None:
        self._inner = self._make()
        await self._inner.__aenter__()

    async def _leave(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.inner.__aexit__(exc_type, exc, traceback)
