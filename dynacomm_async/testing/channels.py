"""Both ends of a connection, in memory or over loopback, with handlers that record.

For what talks over :class:`dynacomm_async.transport.Channel`: the same bytes pass as on a wire, and
in memory they may be cut into pieces of any size, which is what a network does to them.

Example::

    async with open_memory_pair(1, 30_011, 7) as pair:  # pieces of these sizes, in turn
        await pair.greet()
        await pair.worker.send(Gradients(0, (Range(0, 1),)), [memoryview(bytes(16_384))])
        await pair.at_server.until_received(1)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import cycle

from dynacomm_async.errors import DynaCommError
from dynacomm_async.ranges import Range
from dynacomm_async.transport import (
    Address,
    Channel,
    MemoryChannel,
    TcpChannel,
    connect,
    listen,
    memory_pair,
)
from dynacomm_async.wire import (
    Hello,
    Join,
    Message,
    Parameters,
    Received,
    Role,
    Subscription,
    Welcome,
)

__all__ = ["HANDSHAKE", "ChannelPair", "RecordingHandler", "open_memory_pair", "open_tcp_pair"]

HANDSHAKE: tuple[Message, ...] = (
    Hello(),
    Welcome(1, "r", 0, 1, 1, None, 0, 9, False),
    Join("f", Subscription(0, ((Range(0, 1),),))),
    Parameters(0, (Range(0, 1),)),
)
"""What worker and server send in turn until gradients may be sent."""


class RecordingHandler:
    """A handler that keeps what it is told, checks the handler's contract, and can be awaited.

    Attributes:
        channel: the one whose handler this is.
        received: whole messages, in order.
        payloads: their bytes, unless ``views`` says where those go.
        errors: what ended the channel; at most one.
        views: where the next payload goes; by default into fresh memory.
        on_place: called at each place.
        on_handle: called at each message.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.received: list[Received] = []
        self.payloads: list[bytearray] = []
        self.errors: list[DynaCommError] = []
        self.views: list[memoryview] | None = None
        self.on_place: Callable[[Message], None] = lambda message: None
        self.on_handle: Callable[[Message], None] = lambda message: None
        self._busy = False
        self._changed = asyncio.Event()

    def place(self, message: Message, payload_nbytes: int) -> Sequence[memoryview]:
        """See :class:`dynacomm_async.transport.Handler`."""
        assert not self.errors, "placed after the end"
        self.on_place(message)
        if self.views is not None:
            return self.views
        self.payloads.append(bytearray(payload_nbytes))
        return [memoryview(self.payloads[-1])]

    def handle(self, received: Received) -> None:
        """See :class:`dynacomm_async.transport.Handler`."""
        assert not self.errors, "handled after the end"
        self.received.append(received)
        self._changed.set()
        self._busy = True
        try:
            self.on_handle(received.message)
        finally:
            self._busy = False

    def lost(self, error: DynaCommError) -> None:
        """See :class:`dynacomm_async.transport.Handler`."""
        assert not self._busy, "the end comes on its own, never from inside of handle"
        self.errors.append(error)
        self._changed.set()

    @property
    def messages(self) -> list[Message]:
        """What was received, without payloads."""
        return [each.message for each in self.received]

    @property
    def error(self) -> DynaCommError:
        """What ended the channel; there must be just one."""
        [error] = self.errors
        return error

    async def until_received(self, count: int) -> None:
        """Return when so many messages have come in all."""
        await self._until(lambda: len(self.received) >= count)

    async def until_lost(self) -> DynaCommError:
        """Return what ended the channel, once something has."""
        await self._until(lambda: bool(self.errors))
        return self.error

    async def _until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            self._changed.clear()
            await self._changed.wait()


@dataclass
class ChannelPair:
    """Both ends of a connection, and the handler of each."""

    server: Channel
    worker: Channel
    at_server: RecordingHandler
    at_worker: RecordingHandler

    async def greet(self) -> None:
        """Make the worker a member, so that gradients and parameters may be sent."""
        for sender, message in zip((self.worker, self.server) * 2, HANDSHAKE, strict=True):
            receiver = self.at_worker if sender is self.server else self.at_server
            before = len(receiver.received)
            await sender.send(message)
            await receiver.until_received(before + 1)
        for recorder in (self.at_server, self.at_worker):
            recorder.received.clear()
            recorder.payloads.clear()

    def end(self, role: Role) -> tuple[Channel, RecordingHandler]:
        """Return one of the two ends with its handler."""
        if role is Role.SERVER:
            return self.server, self.at_server
        return self.worker, self.at_worker


@asynccontextmanager
async def open_tcp_pair(host: str = "127.0.0.1") -> AsyncIterator[ChannelPair]:
    """Open a connection over loopback. At the exit both ends are told of its end, once each."""
    accepted: asyncio.Future[RecordingHandler] = asyncio.get_running_loop().create_future()
    handlers: list[RecordingHandler] = []

    def accept(channel: TcpChannel) -> RecordingHandler:
        accepted.set_result(RecordingHandler(channel))
        return accepted.result()

    def begin(channel: TcpChannel) -> RecordingHandler:
        handlers.append(RecordingHandler(channel))
        return handlers[-1]

    listener = await listen(accept, Address(host, 0))
    try:
        worker = await connect(begin, listener.addresses[0])
        at_server = await accepted
        pair = ChannelPair(at_server.channel, worker, at_server, handlers[0])
        try:
            yield pair
        finally:
            await _end(pair)
    finally:
        await listener.close()


@asynccontextmanager
async def open_memory_pair(*pieces: int) -> AsyncIterator[ChannelPair]:
    """Open a connection in memory. At the exit both ends are told of its end, once each.

    Args:
        pieces: sizes of the pieces that both streams are cut into, over and over; none: large ones.
    """
    handlers: list[RecordingHandler] = []

    def begin(channel: MemoryChannel) -> RecordingHandler:
        handlers.append(RecordingHandler(channel))
        return handlers[-1]

    sizes = cycle(pieces) if pieces else None
    server, worker = memory_pair(begin, begin, piece_nbytes=sizes)
    pair = ChannelPair(server, worker, *handlers)
    try:
        yield pair
    finally:
        await _end(pair)


async def _end(pair: ChannelPair) -> None:
    pair.server.abort()
    pair.worker.abort()
    for recorder in (pair.at_server, pair.at_worker):
        await recorder.until_lost()
        assert len(recorder.errors) == 1
