"""Finding the server, at first and again: attempts with growing pauses until patience is over."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import TypeAlias

from dynacomm_async.errors import ChannelBroken, PeerError
from dynacomm_async.recording import Recorder
from dynacomm_async.transport import Address, Channel, connect, describe_failure
from dynacomm_async.transport.channel import Handler
from dynacomm_async.transport.recorded import RecordedChannel
from dynacomm_async.wire.messages import Hello, Welcome
from dynacomm_async.worker.line import Line

__all__ = ["Reacher", "Whereabouts"]

_log = logging.getLogger("dynacomm_async.worker.connection")

Whereabouts: TypeAlias = Address | Callable[[], Address]
"""Where a server is, or a function that finds out. It is called in a thread of its own before each
attempt to connect, may block for some seconds, and raises ChannelBroken while nobody knows."""

_GREETING_S = 30.0
"""How long a server may take to answer a hello; slow links have a part in it."""

_LEAST_ATTEMPT_S = 1.0
"""How long one attempt to connect may take, at least."""

_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0

_NOT_YET = {"place-kept"}
"""Refusals that ask for another attempt."""

_TOO_SLOW = {"hello-timeout", "server-draining", *_NOT_YET}
"""Refusals that say nothing against another attempt of a member."""


class Reacher:
    """Connects a worker to its server.

    Args:
        server: where it is.
        retry_s: how long to try.
        recorder: takes down what passes over the connections.
        congestion: which TCP congestion control governs what is sent; None: the system's default.
    """

    def __init__(
        self,
        server: Whereabouts,
        retry_s: float,
        recorder: Recorder | None = None,
        congestion: str | None = None,
    ) -> None:
        self._server = server
        self._address = None if callable(server) else server  # the latest known
        self._retry_s = retry_s
        self._recorder = recorder
        self._congestion = congestion

    async def reach(self, make_hello: Callable[[], Hello]) -> tuple[Line, Welcome]:
        """Connect and be welcomed, for the first time.

        Raises:
            PeerError: the server refuses; ``code`` and text say why.
            ChannelBroken: no server answers in time.
            TimeoutError: something accepts the connection but never answers.
        """
        return await self._try(make_hello, first=True)

    async def reach_again(self, make_hello: Callable[[], Hello]) -> tuple[Line, Welcome]:
        """Connect and be welcomed after a loss: at once, and then with growing pauses.

        Raises:
            PeerError: the server refuses; ``code`` and text say why.
            ChannelBroken: no server answers in time.
        """
        return await self._try(make_hello, first=False)

    async def _try(self, make_hello: Callable[[], Hello], first: bool) -> tuple[Line, Welcome]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._retry_s
        pause, is_told = _PAUSE_S, not first  # that it is lost has been told
        while True:
            try:
                return await self._attempt(make_hello(), max(deadline - loop.time(), 0.0))
            except TimeoutError:
                failure: Exception = TimeoutError(
                    f"{self._address} accepts connections but has not answered for "
                    f"{_GREETING_S:g} s: is it a dynacomm server?"
                )
                if first:
                    raise failure from None
            except ChannelBroken as error:
                failure = error
            except PeerError as error:
                if error.code not in (_NOT_YET if first else _TOO_SLOW):
                    raise
                failure = error
            why, where = _describe(failure), self._address or "an unknown address"
            if loop.time() + pause > deadline:
                raise ChannelBroken(
                    f"no server at {where} (tried for {self._retry_s:g} s: {why}); "
                    "start it, or check --server HOST:PORT"
                    if first
                    else f"the connection to {where} was lost, and there is no way back "
                    f"(tried for {self._retry_s:g} s: {why}); once the server is there again, "
                    "start the worker anew"
                ) from failure
            if not is_told:
                _log.info("cannot join at %s yet (%s); trying for %g s", where, why, self._retry_s)
                is_told = True
            # Many workers lose one server at the same moment.
            await asyncio.sleep(pause if first else pause * (0.5 + random.random() / 2))
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _attempt(self, hello: Hello, limit_s: float) -> tuple[Line, Welcome]:
        address = await self._locate()
        line = await self._connect(address, max(limit_s, _LEAST_ATTEMPT_S))
        try:
            async with asyncio.timeout(_GREETING_S):
                return line, await line.greet(hello)
        except BaseException:
            line.channel.abort()
            raise

    async def _locate(self) -> Address:
        if callable(self._server):
            self._address = await asyncio.to_thread(self._server)
        assert self._address is not None
        return self._address

    async def _connect(self, address: Address, limit_s: float) -> Line:
        lines: list[Line] = []  # a loop may make one before it knows that nobody answers

        def make_line(channel: Channel) -> Handler:
            if self._recorder is None:
                lines.append(Line(channel))
                return lines[-1]
            recorded = RecordedChannel(channel, self._recorder)
            lines.append(Line(recorded, self._recorder))
            return recorded.handler(lines[-1])

        try:
            async with asyncio.timeout(limit_s):
                await connect(make_line, address, congestion=self._congestion)
        except TimeoutError:
            text = f"it does not answer within {limit_s:.3g} s"
            raise ChannelBroken(text) from None
        return lines[-1]


def _describe(failure: Exception) -> str:
    """Say why an attempt failed, without its address, in the system's words."""
    cause = failure.__cause__
    if isinstance(cause, OSError | UnicodeError):
        return describe_failure(cause)
    return str(cause or failure)
