"""Channels within one event loop: the same bytes as on the wire, without sockets.

For tests and for a server and workers in one process. The stream can be cut into pieces of any
size, which is what a network does to it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from time import monotonic_ns

from dynacomm_async.errors import ChannelBroken, ChannelClosed, DynaCommError
from dynacomm_async.transport.channel import Handler
from dynacomm_async.wire.connection import Connection
from dynacomm_async.wire.messages import Message
from dynacomm_async.wire.states import Role

__all__ = ["MemoryChannel", "memory_pair"]


class MemoryChannel:
    """One end of :func:`memory_pair`; a :class:`~dynacomm_async.transport.channel.Channel`."""

    def __init__(
        self,
        role: Role,
        handler_factory: Callable[[MemoryChannel], Handler],
        pieces: Iterator[int],
    ) -> None:
        self.peer = f"the {role.other.value} in memory"
        self._handler = handler_factory(self)
        self._connection = Connection(role, self._handler.place)
        self._pieces = pieces
        self._other: MemoryChannel | None = None
        self._lock = asyncio.Lock()
        self._inbox: deque[memoryview | None] = deque()  # None is the end of the stream
        self._error: DynaCommError | None = None
        self.received_nbytes = 0

    async def send(
        self, message: Message, payload: Sequence[memoryview] = (), *, back_to_back: bool = False
    ) -> None:
        """See :meth:`dynacomm_async.transport.channel.Channel.send`."""
        async with self._lock:
            if self._error is not None:
                raise self._error
            nbytes = sum(map(len, payload))
            head = self._connection.send(message, nbytes, back_to_back=back_to_back)
            try:
                await self._send_pieces((memoryview(head), *payload))
            except asyncio.CancelledError:
                self.abort()
                raise

    async def _send_pieces(self, views: Sequence[memoryview]) -> None:
        for view in views:
            while len(view):
                n = next(self._pieces)
                self._post(view[:n])
                view = view[n:]
                await asyncio.sleep(0)
                if self._error is not None:
                    raise self._error

    def limit_ahead(self, nbytes: int | None) -> None:
        """Nothing to limit: it holds one piece."""

    def limit_silence(self, limit_s: float) -> None:
        """No system lies between the two ends."""

    def turn_deaf(self) -> None:
        """See :meth:`dynacomm_async.transport.channel.Channel.turn_deaf`."""
        self._connection.turn_deaf()

    async def close(self) -> None:
        """See :meth:`dynacomm_async.transport.channel.Channel.close`."""
        self.abort()
        await asyncio.sleep(0)

    def abort(self, error: DynaCommError | None = None) -> None:
        """See :meth:`dynacomm_async.transport.channel.Channel.abort`."""
        self._end(error or ChannelClosed(f"the connection to {self.peer} was closed"))

    def _post(self, piece: memoryview | None) -> None:
        other = self._other
        if other is not None:
            other._inbox.append(piece)
            asyncio.get_running_loop().call_soon(other._deliver)

    def _deliver(self) -> None:
        piece = self._inbox.popleft()
        if self._error is not None:
            return
        if piece is None:
            in_order = self._connection.ended_in_order
            kind = ChannelClosed if in_order else ChannelBroken
            self._end(kind(f"the connection to {self.peer} was {'closed' if in_order else 'lost'}"))
            return
        try:
            self._take(piece)
        except DynaCommError as error:
            self._end(error)

    def _take(self, piece: memoryview) -> None:
        while len(piece) and self._error is None:
            buffer = self._connection.get_buffer()
            n = min(len(buffer), len(piece))
            buffer[:n] = piece[:n]
            piece = piece[n:]
            self.received_nbytes += n
            self._connection.buffer_updated(n, monotonic_ns())
            while self._error is None and (received := self._connection.next_message()):
                self._handler.handle(received)

    def _end(self, error: DynaCommError) -> None:
        if self._error is None:
            self._error = error
            self._post(None)
            asyncio.get_running_loop().call_soon(self._handler.lost, error)


def memory_pair(
    server_handler: Callable[[MemoryChannel], Handler],
    worker_handler: Callable[[MemoryChannel], Handler],
    *,
    piece_nbytes: Iterable[int] | None = None,
) -> tuple[MemoryChannel, MemoryChannel]:
    """Return the server's and the worker's end of a new connection.

    Args:
        piece_nbytes: endless sizes of the pieces that both streams are cut into, in turn.
    """
    pieces = iter(piece_nbytes or repeat(1 << 20))
    server = MemoryChannel(Role.SERVER, server_handler, pieces)
    worker = MemoryChannel(Role.WORKER, worker_handler, pieces)
    server._other, worker._other = worker, server
    return server, worker
