"""Pairs of channels of every kind, with handlers that record what they are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from itertools import cycle

import pytest

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

WELCOME = Welcome(1, "r", 0, 1, 1, None, 0, 9, False)
JOIN = Join("f", Subscription(0, ((Range(0, 1),),)))
FIRST = Parameters(0, (Range(0, 1),))


class Recorder:
    """A handler that keeps what it is told, checks the handler's contract, and can be awaited.

    Attributes:
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
        assert not self.errors, "placed after the end"
        self.on_place(message)
        if self.views is not None:
            return self.views
        self.payloads.append(bytearray(payload_nbytes))
        return [memoryview(self.payloads[-1])]

    def handle(self, received: Received) -> None:
        assert not self.errors, "handled after the end"
        self.received.append(received)
        self._changed.set()
        self._busy = True
        try:
            self.on_handle(received.message)
        finally:
            self._busy = False

    def lost(self, error: DynaCommError) -> None:
        assert not self._busy, "the end comes on its own, never from inside of handle"
        self.errors.append(error)
        self._changed.set()

    @property
    def messages(self) -> list[Message]:
        return [each.message for each in self.received]

    @property
    def error(self) -> DynaCommError:
        """What ended the channel; there must be just one."""
        [error] = self.errors
        return error

    async def until_received(self, count: int) -> None:
        await self._until(lambda: len(self.received) >= count)

    async def until_lost(self) -> DynaCommError:
        await self._until(lambda: bool(self.errors))
        return self.error

    async def _until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            self._changed.clear()
            await self._changed.wait()


@dataclass
class Pair:
    """Both ends of a connection."""

    server: Channel
    worker: Channel
    at_server: Recorder
    at_worker: Recorder

    async def greet(self) -> None:
        """Make the worker a member, so that gradients and parameters may be sent."""
        for sender, message in [
            (self.worker, Hello()),
            (self.server, WELCOME),
            (self.worker, JOIN),
            (self.server, FIRST),
        ]:
            receiver = self.at_worker if sender is self.server else self.at_server
            before = len(receiver.received)
            await sender.send(message)
            await receiver.until_received(before + 1)
        for recorder in (self.at_server, self.at_worker):
            recorder.received.clear()
            recorder.payloads.clear()

    def end(self, role: Role) -> tuple[Channel, Recorder]:
        if role is Role.SERVER:
            return self.server, self.at_server
        return self.worker, self.at_worker


OpenPair = Callable[[], AbstractAsyncContextManager[Pair]]


@asynccontextmanager
async def open_tcp(host: str = "127.0.0.1") -> AsyncIterator[Pair]:
    accepted: asyncio.Future[Recorder] = asyncio.get_running_loop().create_future()

    def accept(channel: TcpChannel) -> Recorder:
        accepted.set_result(Recorder(channel))
        return accepted.result()

    listener = await listen(accept, Address(host, 0))
    try:
        handlers: list[Recorder] = []

        def begin(channel: TcpChannel) -> Recorder:
            handlers.append(Recorder(channel))
            return handlers[-1]

        worker = await connect(begin, listener.addresses[0])
        at_server = await accepted
        yield Pair(at_server.channel, worker, at_server, handlers[0])
    finally:
        await listener.close()


@asynccontextmanager
async def open_memory(*pieces: int) -> AsyncIterator[Pair]:
    handlers: list[Recorder] = []

    def begin(channel: MemoryChannel) -> Recorder:
        handlers.append(Recorder(channel))
        return handlers[-1]

    sizes = cycle(pieces) if pieces else None
    server, worker = memory_pair(begin, begin, piece_nbytes=sizes)
    yield Pair(server, worker, *handlers)


@asynccontextmanager
async def ended(opened: AbstractAsyncContextManager[Pair]) -> AsyncIterator[Pair]:
    """End both sides at last and check that each was told so once."""
    async with opened as pair:
        try:
            yield pair
        finally:
            pair.server.abort()
            pair.worker.abort()
            for recorder in (pair.at_server, pair.at_worker):
                await recorder.until_lost()
                assert len(recorder.errors) == 1


@pytest.fixture
def open_pair(kind: str) -> OpenPair:
    """``async with open_pair() as pair``: ended, and each end's one loss checked, at the exit."""
    if kind.startswith("tcp"):
        return lambda: ended(open_tcp())
    if kind == "memory":
        return lambda: ended(open_memory())
    return lambda: ended(open_memory(1, 30_011, 2, 7, 65_536))


@pytest.fixture
def open_tcp_pair() -> Callable[..., AbstractAsyncContextManager[Pair]]:
    return lambda host="127.0.0.1": ended(open_tcp(host))


@pytest.fixture
def new_recorder() -> type[Recorder]:
    return Recorder


@pytest.fixture
def handshake() -> tuple[Message, ...]:
    """Hello, welcome, join, first parameters, as sent in turn by worker and server."""
    return Hello(), WELCOME, JOIN, FIRST
