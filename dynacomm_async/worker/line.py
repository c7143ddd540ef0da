"""One connection of a worker to its server, from hello to the end of it.

A membership may outlive many connections; :class:`~dynacomm_async.worker.client.Client` is what
lasts, and a line hands on to it what comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from time import monotonic_ns
from typing import Protocol

from dynacomm_async.errors import DynaCommError, RemoteProtocolError
from dynacomm_async.recording import ClockOffset, Recorder
from dynacomm_async.transport import Channel
from dynacomm_async.transport.pulse import Pulse
from dynacomm_async.wire.decoder import Received
from dynacomm_async.wire.messages import Error, Heartbeat, Hello, Leave, Message, Welcome

__all__ = ["Line", "Owner"]

_PINGS = 5
"""Round trips that are timed before training; the shortest counts."""

_GOODBYE_S = 0.5
"""How long a goodbye may take before the connection is just dropped."""


class Owner(Protocol):
    """Whose messages come over a line."""

    def place(self, message: Message) -> Sequence[memoryview]:
        """Return where a payload goes; raises RemoteProtocolError."""
        ...

    def take(self, received: Received) -> None:
        """Take a complete message."""
        ...

    def line_lost(self, line: Line, error: DynaCommError) -> None:
        """The line is over."""
        ...


class Line:
    """A channel handler. All methods belong to the event loop's thread.

    Args:
        channel: to the server.
        recorder: takes down how the two clocks differ.

    Attributes:
        channel: as given.
        round_trip_ns: the shortest of those measured.
        error: why it is over; None while it is not.
        answer: a heartbeat that is to be sent; the newest question's, older ones are moot.
        on_answer: called when there is one.
    """

    def __init__(self, channel: Channel, recorder: Recorder | None = None) -> None:
        loop = asyncio.get_running_loop()
        self.channel = channel
        self.round_trip_ns = 0
        self.error: DynaCommError | None = None
        self.answer: Heartbeat | None = None
        self.on_answer: Callable[[], None] = lambda: None
        self._recorder = recorder
        self._owner: Owner | None = None
        self._pulse: Pulse | None = None
        self._sending = False
        self._welcome: asyncio.Future[Welcome] = loop.create_future()
        self._pong: asyncio.Future[Heartbeat] | None = None
        self._over: asyncio.Future[None] = loop.create_future()

    async def greet(self, hello: Hello) -> Welcome:
        """Say hello; return the welcome.

        Raises:
            PeerError: the server refuses, and says why.
            ChannelError: the connection was lost.
        """
        await self.channel.send(hello)
        return await self._welcome

    async def measure_round_trip(self) -> None:
        """Time a few heartbeats; the shortest is the round trip, and relates the two clocks."""
        trips = []
        for number in range(1, _PINGS + 1):
            self._pong = asyncio.get_running_loop().create_future()
            started_ns = monotonic_ns()
            await self.channel.send(Heartbeat(number, False, started_ns))
            answer = await self._pong
            ended_ns = monotonic_ns()
            trips.append((ended_ns - started_ns, answer.clock_ns - (started_ns + ended_ns) // 2))
        self.round_trip_ns, offset_ns = min(trips)
        if self._recorder is not None:
            self._recorder.clock_offset = ClockOffset(offset_ns, -(-self.round_trip_ns // 2))

    def attach(self, owner: Owner, silence_ms: int) -> None:
        """From now on messages go to ``owner``, and silence ends the line (0: it does not)."""
        self._owner = owner
        if silence_ms:
            self._pulse = Pulse(self.channel, silence_ms / 1000, self._beat)

    async def send(
        self, message: Message, payload: Sequence[memoryview] = (), *, back_to_back: bool = False
    ) -> None:
        """See :meth:`dynacomm_async.transport.channel.Channel.send`."""
        self._sending = True
        await self.channel.send(message, payload, back_to_back=back_to_back)
        self._sending = False
        if self._pulse is not None:
            self._pulse.sent()

    async def say_goodbye(self) -> None:
        """Go, in order if that can be had at once; the connection is closed afterwards."""
        try:
            async with asyncio.timeout(_GOODBYE_S):
                if self.error is None:
                    await self.channel.send(Leave())
                # The server hangs up then. Closing here, with parameters still coming in, would
                # reset the connection, and the goodbye could be lost with it.
                await asyncio.shield(self._over)
        except (DynaCommError, TimeoutError):
            self.channel.abort()  # it is over already, or nobody reads what we send

    # -- the channel's handler --

    def place(self, message: Message, payload_nbytes: int) -> Sequence[memoryview]:
        """Say where a payload goes."""
        if isinstance(message, Welcome | Heartbeat | Error):
            return ()
        if self._owner is None:
            raise RemoteProtocolError(f"{message.kind.name} to a worker that has not joined")
        return self._owner.place(message)

    def handle(self, received: Received) -> None:
        """Take a complete message."""
        message = received.message
        if self._pulse is not None:
            self._pulse.heard()
        if isinstance(message, Heartbeat):
            if not message.reply:
                self._say(Heartbeat(message.number, True, monotonic_ns()))
            elif self._pong is not None and not self._pong.done():
                self._pong.set_result(message)
        elif isinstance(message, Welcome):
            if not self._welcome.done():
                self._welcome.set_result(message)
        else:
            assert self._owner is not None, "asked for a place before"
            self._owner.take(received)

    def lost(self, error: DynaCommError) -> None:
        """The channel is over."""
        self.error = error
        if self._pulse is not None:
            self._pulse.stop()
        self._over.set_result(None)
        for waiting in (self._welcome, self._pong):
            if waiting is not None and not waiting.done():
                waiting.set_exception(error)
                waiting.exception()
        if self._owner is not None:
            self._owner.line_lost(self, error)

    def _beat(self) -> None:
        """Nothing has been sent for a while: say that this end is there."""
        if not self._sending and self.answer is None:
            self._say(Heartbeat(0, True, monotonic_ns()))

    def _say(self, answer: Heartbeat) -> None:
        self.answer = answer
        self.on_answer()
