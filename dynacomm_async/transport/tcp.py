"""Channels over TCP.

Received bytes go straight into the destination that the decoder lends out, sent bytes leave from
the caller's memory. Traps that this module is built around:

- ``get_buffer`` must never return an empty buffer, and views are bytes: the stock loop loses
  data of wider memoryviews without an error (cpython#135862).
- The loops send what the memory holds when they get to it, so it must not change before.
- The stock loop of Python 3.11 copies what it cannot send at once, and the ``writelines`` of 3.12
  and 3.13 knows no flow control. Large payloads are therefore written piece by piece, each after
  the one before has (nearly) left.
- Priority is lost on what already sits in a socket buffer, so the kernel is told to take little
  more than it can send (TCP_NOTSENT_LOWAT), and the loop's own buffer is small. Little is a matter
  of time: a few milliseconds' worth, which on a fast link are megabytes and save it wake-ups.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from dynacomm_async.addresses import Address, check_listen
from dynacomm_async.errors import (
    ChannelBroken,
    ChannelClosed,
    ConfigError,
    DynaCommError,
)
from dynacomm_async.transport.channel import Handler
from dynacomm_async.wire.connection import Connection
from dynacomm_async.wire.messages import Message
from dynacomm_async.wire.states import Role

try:
    import fcntl
    import termios
except ImportError:  # Windows; a gulp under way is not seen there before it is whole
    _FIONREAD = 0
else:
    _FIONREAD = termios.FIONREAD

__all__ = [
    "TcpChannel",
    "TcpListener",
    "allowed_congestion",
    "check_congestion",
    "connect",
    "describe_failure",
    "listen",
]

_ALLOWED_CONGESTION = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")

HIGH_WATER_NBYTES = 64 * 1024
"""What the loop may hold back before :meth:`TcpChannel.send` waits."""

NOTSENT_S = 0.005
"""What the kernel may hold that it has not sent yet, as time on the link."""

LEAST_AHEAD_NBYTES = 16 * 1024
"""The least that :meth:`TcpChannel.limit_ahead` leaves: a wake-up's worth on a fast link."""

LEAST_NOTSENT_NBYTES, MOST_NOTSENT_NBYTES = 128 * 1024, 4 * 1024 * 1024
"""The same in bytes: at first and on slow links, and where several GB/s ask for fewer wake-ups."""

GULP_NBYTES, _LEAST_GULP_NBYTES = 256 * 1024, 4 * 1024
"""A payload under way is taken in gulps of this size; the last one is what is left of it.

Each wake-up takes the interpreter from the thread that computes, and a slow link would cause one
for every few packets. Only Linux is known to wake up whoever waits for more than its buffers hold.
"""

_MAY_GULP = sys.platform == "linux"

_TIMED_NBYTES = 256 * 1024
"""Payloads from this size on tell how fast the link is."""

SILENCE_S = 30.0
"""How long a peer may acknowledge nothing before its connection counts as lost, by default."""

PIECE_NBYTES = 1024 * 1024
"""Payloads are handed to the loop in pieces of this size: the longest that one write may take."""

COPIED_PIECE_NBYTES = 256 * 1024
"""The same for loops that may copy what they are handed."""

JOINED_NBYTES = 4 * 1024
"""Payloads up to this size are copied behind their header: that is cheaper than a second buffer."""

_TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25 if hasattr(socket, "TCP_INFO") else 0)

_TCP_CONGESTION = getattr(socket, "TCP_CONGESTION", 0)

HandlerFactory = Callable[["TcpChannel"], Handler]


class TcpChannel(asyncio.BufferedProtocol):
    """A :class:`~dynacomm_async.transport.channel.Channel` over one TCP connection."""

    def __init__(self, role: Role, handler_factory: HandlerFactory) -> None:
        self._handler = handler_factory(self)
        self._connection = Connection(role, self._handler.place)
        self._transport: asyncio.Transport | None = None
        self._lock = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._paused = True  # the loop holds us back; at first, because there is no transport yet
        self._waiters: list[asyncio.Future[None]] = []  # sends that wait until it does no more
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._error: DynaCommError | None = None
        self._closing = False
        self._piece_nbytes = COPIED_PIECE_NBYTES
        self._socket: socket.socket
        self._notsent_nbytes = 0
        self._ahead_nbytes: int | None = None
        self._high_water_nbytes = HIGH_WATER_NBYTES
        self._gulp_nbytes = 1
        self._received_nbytes = 0
        self._queued = 0  # sends that wait for their turn, or are in the middle of a large message
        self.peer = "nobody yet"

    # -- called by the event loop --

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport over and set its buffers up for late binding."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=HIGH_WATER_NBYTES)
        if type(transport).__module__.startswith("uvloop"):
            self._piece_nbytes = PIECE_NBYTES
        peer = transport.get_extra_info("peername")
        self.peer = str(Address(*peer[:2])) if peer else "a vanished peer"
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._limit_notsent(LEAST_NOTSENT_NBYTES)
        self.limit_silence(SILENCE_S)
        self.resume_writing()
        if self._closing:  # so soon
            self._transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Lend out the memory that the next bytes belong into."""
        return self._connection.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Take in received bytes and hand complete messages on."""
        connection = self._connection
        self._received_nbytes += nbytes
        connection.buffer_updated(nbytes, time.monotonic_ns())
        try:
            while not self._closing and (received := connection.next_message()) is not None:
                self._handler.handle(received)
        except DynaCommError as error:
            self._fail(error)
            return
        missing = connection.missing_nbytes
        wanted = min(missing, GULP_NBYTES) if _MAY_GULP and missing >= _LEAST_GULP_NBYTES else 1
        if wanted != self._gulp_nbytes:
            self._gulp(wanted)

    def _gulp(self, nbytes: int) -> None:
        """Be woken when so many bytes are there, not for each piece of a slow link."""
        self._gulp_nbytes = nbytes
        if self._socket.fileno() >= 0:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, nbytes)

    def eof_received(self) -> None:
        """The other side sends no more; the transport closes itself."""

    def pause_writing(self) -> None:
        """The loop holds enough: the next piece waits."""
        self._paused = True

    def resume_writing(self) -> None:
        """What the loop held is (nearly) gone."""
        self._paused = False
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():  # its send may have been cancelled
                waiter.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Say why it is over, to the handler and to whoever waits."""
        if self._error is None:
            self._error = self._reason(exc)
        self.resume_writing()
        if not self._over.done():
            self._over.set_result(None)
        self._handler.lost(self._error)

    # -- the channel --

    async def send(
        self, message: Message, payload: Sequence[memoryview] = (), *, back_to_back: bool = False
    ) -> None:
        """See :meth:`dynacomm_async.transport.channel.Channel.send`."""
        nbytes = sum(map(len, payload))
        if nbytes <= self._piece_nbytes and not (self._queued or self._paused):
            if self._error is not None:
                raise self._error
            self._send_whole(message, payload, nbytes, back_to_back)
            if self._paused:
                started = time.monotonic()
                await self._drain()
                self._take_time(nbytes, time.monotonic() - started)
            return
        self._queued += 1
        try:
            async with self._lock:
                await self._drain()
                started = time.monotonic()
                if nbytes <= self._piece_nbytes:
                    self._send_whole(message, payload, nbytes, back_to_back)
                    await self._drain()
                else:
                    head = self._connection.send(message, nbytes, back_to_back=back_to_back)
                    await self._send_pieces(head, payload)
                self._take_time(nbytes, time.monotonic() - started)
        finally:
            self._queued -= 1

    def _take_time(self, nbytes: int, elapsed_s: float) -> None:
        """Adapt what the kernel may hold to the speed at which a payload has left."""
        if nbytes < _TIMED_NBYTES or elapsed_s <= 0:
            return
        fitting = round(nbytes / elapsed_s * NOTSENT_S)
        limit = min(max(fitting, LEAST_NOTSENT_NBYTES), MOST_NOTSENT_NBYTES)
        # One slow send may be this process's own doing: only a collapse lowers the limit.
        if not self._notsent_nbytes / 8 < limit < 2 * self._notsent_nbytes:
            self._limit_notsent(limit)

    def _limit_notsent(self, nbytes: int) -> None:
        self._notsent_nbytes = nbytes
        self._apply_limits()

    def limit_ahead(self, nbytes: int | None) -> None:
        """See :meth:`dynacomm_async.transport.channel.Channel.limit_ahead`."""
        # Half of it in the kernel, so that with what the loop holds it is about a message.
        ahead = None if nbytes is None else max(nbytes // 2, LEAST_AHEAD_NBYTES)
        if ahead != self._ahead_nbytes and self._transport is not None:
            self._ahead_nbytes = ahead
            high = HIGH_WATER_NBYTES if ahead is None else min(HIGH_WATER_NBYTES, ahead)
            self._high_water_nbytes = high
            self._transport.set_write_buffer_limits(high=high)
            self._apply_limits()

    def _apply_limits(self) -> None:
        nbytes = self._notsent_nbytes
        if self._ahead_nbytes is not None:
            nbytes = min(nbytes, self._ahead_nbytes)
        if _TCP_NOTSENT_LOWAT and self._socket.fileno() >= 0:
            self._socket.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, nbytes)

    def _send_whole(
        self, message: Message, payload: Sequence[memoryview], nbytes: int, back_to_back: bool
    ) -> None:
        transport = self._transport
        assert transport is not None
        head = self._connection.send(message, nbytes, back_to_back=back_to_back)
        if nbytes <= JOINED_NBYTES:
            transport.write(b"".join((head, *payload)))
        else:
            transport.writelines((head, *payload))
            self._pause_if_forgotten(transport)

    def _pause_if_forgotten(self, transport: asyncio.Transport) -> None:
        """Make up for a ``writelines`` that does not pause its protocol: setting limits does."""
        if not self._paused and transport.get_write_buffer_size() > self._high_water_nbytes:
            transport.set_write_buffer_limits(high=self._high_water_nbytes)

    async def _send_pieces(self, head: bytes, payload: Sequence[memoryview]) -> None:
        transport = self._transport
        assert transport is not None
        size = self._piece_nbytes
        try:
            for view in payload:
                for start in range(0, len(view), size):
                    piece = view[start : start + size]
                    if head:
                        transport.writelines((head, piece))
                        self._pause_if_forgotten(transport)
                        head = b""
                    else:
                        transport.write(piece)
                    if self._paused or self._error is not None:
                        await self._drain()
        except asyncio.CancelledError:
            self.abort()
            raise

    async def _drain(self) -> None:
        """Wait until the loop takes more.

        Raises:
            DynaCommError: what ended the channel.
        """
        if self._paused:
            waiter = self._loop.create_future()
            self._waiters.append(waiter)
            await waiter
        if self._error is not None:
            raise self._error

    @property
    def received_nbytes(self) -> int:
        """See :meth:`dynacomm_async.transport.channel.Channel.received_nbytes`."""
        # A gulp under way waits in the kernel until it is whole.
        return self._received_nbytes + _waiting_nbytes(self._socket)

    def limit_silence(self, limit_s: float) -> None:
        """See :meth:`dynacomm_async.transport.channel.Channel.limit_silence`."""
        if self._socket.fileno() >= 0:
            _notice_vanished_peers(self._socket, limit_s)

    def use_congestion(self, name: str) -> None:
        """Have a TCP congestion control govern what is sent from now on.

        Raises:
            ConfigError: no such control may be chosen; the channel is aborted.
        """
        if self._socket.fileno() >= 0:  # else it is over already
            try:
                _use_congestion(self._socket, name)
            except ConfigError:
                self.abort()
                raise

    def turn_deaf(self) -> None:
        """See :meth:`dynacomm_async.transport.channel.Channel.turn_deaf`."""
        self._connection.turn_deaf()

    async def close(self) -> None:
        """See :meth:`dynacomm_async.transport.channel.Channel.close`."""
        self._closing = True
        if self._transport is not None:
            self._transport.close()
            await asyncio.shield(self._over)

    def abort(self, error: DynaCommError | None = None) -> None:
        """See :meth:`dynacomm_async.transport.channel.Channel.abort`."""
        if self._error is None:
            self._error = error
        self._closing = True
        if self._transport is not None:
            self._transport.abort()

    def _fail(self, error: DynaCommError) -> None:
        if self._error is None:
            self._error = error
        if self._transport is not None:
            self._transport.abort()

    def _reason(self, exc: Exception | None) -> DynaCommError:
        if self._closing or self._connection.ended_in_order:
            return ChannelClosed(f"the connection to {self.peer} was closed")
        detail = f": {describe_failure(exc)}" if isinstance(exc, OSError) else ""
        return ChannelBroken(f"the connection to {self.peer} was lost{detail}")


def _waiting_nbytes(sock: socket.socket) -> int:
    """Return how much has arrived that nobody has read yet, where the system tells."""
    count = array("i", [0])
    if _FIONREAD and sock.fileno() >= 0:
        with contextlib.suppress(OSError):
            fcntl.ioctl(sock.fileno(), _FIONREAD, count)
    return count[0]


def _notice_vanished_peers(sock: socket.socket, limit_s: float) -> None:
    """Have the kernel give up on a peer that takes nothing, or says nothing to keepalive probes.

    What counts is progress: a slow link that moves at all is never given up.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", max(1, round(limit_s / 3))),
        ("TCP_KEEPINTVL", max(1, round(limit_s / 6))),
        ("TCP_KEEPCNT", 4),
        ("TCP_USER_TIMEOUT", max(1, round(1000 * limit_s))),
    ):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class TcpListener:
    """Accepts connections until it is closed.

    Attributes:
        addresses: what it listens on, ports filled in.
    """

    def __init__(self, server: asyncio.Server) -> None:
        self._server = server
        self.addresses = [Address(*sock.getsockname()[:2]) for sock in server.sockets]

    async def close(self) -> None:
        """Accept no more; connections that exist go on."""
        try:
            if isinstance(self._server, asyncio.Server):
                # What the stock loop has accepted it serves a turn later. Closed before that, it
                # would forget the connection, open, and the peer would wait for an answer.
                loop = asyncio.get_running_loop()
                for sock in self._server.sockets:
                    loop.remove_reader(sock.fileno())
                await asyncio.sleep(0)
        finally:
            self._server.close()


def check_congestion(name: str) -> None:
    """Make sure that this process may choose a TCP congestion control by this name.

    Raises:
        ConfigError: it may not, or the system has none of this name.
    """
    try:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    except OSError:  # a machine without IPv4
        sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    with sock:
        _use_congestion(sock, name)


def _use_congestion(sock: socket.socket, name: str) -> None:
    if not _TCP_CONGESTION:
        raise ConfigError(
            f"congestion control {name!r}: this system lets no program choose one; leave it out"
        )
    try:
        if "\0" in name:  # the kernel would read on no further
            raise UnicodeError("a NUL")
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_CONGESTION, name.encode("ascii"))
    except (OSError, UnicodeError) as error:
        why = "not allowed" if getattr(error, "errno", 0) == errno.EPERM else "no such control"
        allowed = allowed_congestion()
        choose = f"choose one of {', '.join(allowed)} (" if allowed else "see ("
        raise ConfigError(
            f"congestion control {name!r}: {why}; {choose}sysctl "
            "net.ipv4.tcp_allowed_congestion_control)"
        ) from error


def allowed_congestion() -> list[str]:
    """Return the names that any process may choose; none where the system does not tell."""
    try:
        return _ALLOWED_CONGESTION.read_text().split()
    except OSError:
        return []


async def listen(
    handler_factory: HandlerFactory,
    address: Address,
    *,
    insecure: bool = False,
    congestion: str | None = None,
) -> TcpListener:
    """Accept connections at ``address`` (port 0: the kernel chooses), one channel each.

    Args:
        handler_factory: makes the handler of a channel.
        address: where.
        insecure: other machines may reach it.
        congestion: which control governs what is sent; None: the system's default.

    Raises:
        ConfigError: the address is in use or not this machine's, or it can be reached from other
            machines and ``insecure`` was not given; or no such control may be chosen.
    """
    check_listen(address, insecure=insecure)
    if congestion is not None:
        check_congestion(congestion)
    loop = asyncio.get_running_loop()
    try:
        server = await loop.create_server(
            lambda: TcpChannel(Role.SERVER, handler_factory),
            address.host,
            address.port,
            reuse_address=True,
            backlog=1024,
        )
    except (OSError, UnicodeError) as error:
        why = describe_failure(error)
        raise ConfigError(
            f"cannot listen on {address}: {why}; choose another --listen HOST:PORT"
        ) from error
    if congestion is not None:
        for sock in server.sockets:
            _use_congestion(sock, congestion)  # those that it accepts inherit it
    return TcpListener(server)


async def connect(
    handler_factory: HandlerFactory, address: Address, *, congestion: str | None = None
) -> TcpChannel:
    """Open a worker's connection to a server; ``congestion`` as in :func:`listen`.

    Raises:
        ConfigError: no such congestion control may be chosen.
        ChannelBroken: nobody answers there.
    """
    loop = asyncio.get_running_loop()
    try:
        _, channel = await loop.create_connection(
            lambda: TcpChannel(Role.WORKER, handler_factory), address.host, address.port
        )
    except (OSError, UnicodeError) as error:  # a name that cannot be one is a UnicodeError
        raise ChannelBroken(f"cannot connect to {address}: {describe_failure(error)}") from error
    if congestion is not None:
        channel.use_congestion(congestion)
    return channel


def describe_failure(error: OSError | UnicodeError) -> str:
    """Say what is wrong in the system's words: those of the stock loop hide the reason."""
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return getattr(error, "strerror", None) or str(error)
