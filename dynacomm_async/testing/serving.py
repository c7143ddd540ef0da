"""A parameter server for tests that block: on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from dynacomm_async.server import ParameterServer, RunResult
from dynacomm_async.transport import Address, LoopThread
from dynacomm_async.wire.grid import LayerSpec

__all__ = ["RunningServer"]


class RunningServer:
    """A server that runs while its ``with`` block does, on a port of the kernel's choice.

    Example::

        with RunningServer({"w": 10}, workers=1, steps=3, initial=zeros) as server:
            train_against(server.address)
            assert server.result().steps == 3

    Args:
        layers, options: what :class:`dynacomm_async.ParameterServer` takes.

    Attributes:
        server: the server itself; its methods belong to the event loop's thread.
    """

    def __init__(
        self, layers: Mapping[str, int] | Iterable[LayerSpec] | None, **options: Any
    ) -> None:
        self._layers = layers
        self._options = options
        self._io = LoopThread()
        self.server: ParameterServer

    def __enter__(self) -> RunningServer:
        self._io.__enter__()
        try:
            self._io.submit(self._start()).result()
        except BaseException:
            self._io.__exit__()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._io.submit(self.server.__aexit__(exc_type, exc, traceback)).result()
        finally:
            self._io.__exit__()

    @property
    def address(self) -> Address:
        """Where workers connect to."""
        return self.server.address

    def result(self, timeout_s: float = 30.0) -> RunResult:
        """Wait for the end of the run.

        Raises:
            PeerError: the run failed.
            TimeoutError: it has not ended in time.
        """
        future = self._io.submit(asyncio.wait_for(self.server.finished(), timeout_s))
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise TimeoutError(f"the run has not ended within {timeout_s:g} s") from None

    async def _start(self) -> None:
        self.server = ParameterServer(self._layers, **self._options)
        await self.server.__aenter__()
