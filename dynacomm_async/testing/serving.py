"""A parameter server for tests that block: on an event loop in a thread of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dynacomm_async.server import ParameterServer, RunResult
from dynacomm_async.testing.threaded import Threaded
from dynacomm_async.transport import Address
from dynacomm_async.wire.grid import LayerSpec

__all__ = ["RunningServer"]


class RunningServer(Threaded[ParameterServer]):
    """A server that runs while its ``with`` block does, on a port of the kernel's choice.

    Example::

        with RunningServer({"w": 10}, workers=1, steps=3, initial=zeros) as server:
            train_against(server.address)
            assert server.result().steps == 3

    Args:
        layers, options: what :class:`dynacomm_async.ParameterServer` takes.
    """

    def __init__(
        self, layers: Mapping[str, int] | Iterable[LayerSpec] | None, **options: Any
    ) -> None:
        super().__init__(lambda: ParameterServer(layers, **options))

    @property
    def server(self) -> ParameterServer:
        """The server itself; its methods belong to the event loop's thread."""
        return self.inner

    @property
    def address(self) -> Address:
        """Where workers connect to."""
        return self.inner.address

    def result(self, timeout_s: float = 30.0) -> RunResult:
        """Wait for the end of the run.

        Raises:
            PeerError: the run failed.
            TimeoutError: it has not ended in time.
        """
        try:
            result: RunResult = self.wait(self.inner.finished, timeout_s)
        except TimeoutError:
            raise TimeoutError(f"the run has not ended within {timeout_s:g} s") from None
        return result
