"""One direction of one connection, from reading to delivery.

``take`` reads and reserves time on the medium; ``give`` delivers each part when its last byte has
passed and the delay is over. Three rules make the emulation honest:

- *No faster than the link drains.* The next piece is read when the last one's turn has begun, so
  one piece waits in this process; the rest stays with the sender, which feels the back-pressure.
  What is in flight in the delay is not limited: a long path must reach its full rate.
- *Late wake-ups do not add up.* When ``take`` gets to run only after the medium has become free,
  bytes that are there (or come at once, now that there is room) are taken to have come that much
  earlier, so the medium goes on without a gap.
- *A receiver that does not read stops the link*, once a few pieces are overdue.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections import deque
from typing import Final, NamedTuple

from dynacomm_async.link.counters import Tally
from dynacomm_async.link.gate import Gate
from dynacomm_async.link.medium import Medium, Rates
from dynacomm_async.link.walk import MessageWalk
from dynacomm_async.recording import Carried, ConnectionLog, Recorder
from dynacomm_async.wire.frame import PREFIX_NBYTES, Prefix

__all__ = ["PIECE_NS", "Clock", "Endpoint", "Flow", "FlowLog"]

PIECE_NS: Final = 1_000_000
"""A piece is about this long on the medium: short beside a message, long beside a wake-up."""

_MIN_PIECE_NBYTES: Final = 4 * 1024
_MAX_PIECE_NBYTES: Final = 256 * 1024
_CREDIT_NS: Final = 20_000_000
"""How late a wake-up may be without the medium losing time (a stopped process is not late)."""

_REFILL_NS: Final = 1_000_000
"""A sender that was held up only by this process being late needs no longer to go on."""

_LEAD_NS: Final = 250_000
"""Parts this near are reserved at once: a timer for each small message would cost more."""

_OVERDUE_PIECES: Final = 4


class Clock:
    """Nanoseconds since the link started.

    Attributes:
        origin_ns: when that was, on the process's monotonic clock.
    """

    def __init__(self) -> None:
        self.origin_ns = time.monotonic_ns()

    def now_ns(self) -> int:
        """Return the time since the clock was made."""
        return time.monotonic_ns() - self.origin_ns

    async def wait_until(self, at_ns: int) -> None:
        """Return as soon as the loop can after ``at_ns``; does not yield if that has passed."""
        left_ns = at_ns - self.now_ns()
        if left_ns > 0:
            await asyncio.sleep(left_ns / 1e9)


class Endpoint:
    """One socket of a connection. ``broken``: it failed, so an end of its stream is no end."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.broken = False

    def abort(self) -> None:
        """Close with a reset, so that the other side does not take it for an orderly end."""
        linger = struct.pack("ii", 1, 0)
        with self.sock as sock:
            if sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


class FlowLog:
    """Takes down when the messages of one direction of one connection were on the medium.

    Args:
        recorder: gets every message that has been delivered.
        connection: the recorder's entry.
        up: whether the direction leads to the server.
    """

    def __init__(self, recorder: Recorder, connection: ConnectionLog, *, up: bool) -> None:
        self._recorder = recorder
        self._connection = connection
        self._up = up
        self._start_ns = 0

    def begin(self, start_ns: int) -> None:
        """A message begins to occupy the medium."""
        self._start_ns = start_ns

    def end(self, message: Prefix, end_ns: int) -> Carried:
        """Its last byte is through; return the entry, to be completed on delivery."""
        return Carried(
            self._connection.number,
            self._up,
            message.kind.name,
            message.step,
            self._start_ns,
            end_ns,
            0,
            PREFIX_NBYTES + message.header_nbytes + message.payload_nbytes,
        )

    def deliver(self, carried: Carried, origin_ns: int, delivered_ns: int) -> None:
        """Its last byte was handed to the receiver; all times count from ``origin_ns``."""
        self._recorder.add(
            carried._replace(
                start_ns=origin_ns + carried.start_ns,
                end_ns=origin_ns + carried.end_ns,
                delivered_ns=origin_ns + delivered_ns,
            )
        )


class _Parcel(NamedTuple):
    """Bytes under way.

    Attributes:
        due_ns: when they are to be delivered.
        data: the bytes.
        returns: the buffer that is free again once they are delivered.
        carried: the message that ends with them, where somebody records it.
    """

    due_ns: int
    data: memoryview
    returns: bytearray | None
    carried: Carried | None


def _piece_limit(rates: Rates, now_ns: int) -> int:
    """Return how many bytes to read at a time at the rate of ``now_ns``."""
    nbytes = rates.nbytes_in(PIECE_NS, now_ns)
    return int(min(max(nbytes, _MIN_PIECE_NBYTES), _MAX_PIECE_NBYTES))


class Flow:
    """Carries bytes from ``source`` to ``sink`` over ``medium``; see the module's docstring.

    Run :meth:`take` and :meth:`give` together; both return after the end of the source's stream
    has been passed on. Either raises when the connection is lost: abort both endpoints then.
    """

    def __init__(
        self,
        source: Endpoint,
        sink: Endpoint,
        *,
        clock: Clock,
        medium: Medium,
        rates: Rates,
        delay_ns: int,
        walk: MessageWalk,
        gate: Gate,
        tallies: tuple[Tally, ...],
        log: FlowLog | None = None,
    ) -> None:
        self._source = source
        self._sink = sink
        self._clock = clock
        self._medium = medium
        self._rates = rates
        self._delay_ns = delay_ns
        self._walk = walk
        self._gate = gate
        self._tallies = tallies
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._start_ns = self._end_ns = clock.now_ns()
        self._parcels: deque[_Parcel] = deque()
        self._ended_ns: int | None = None
        self._arrived = asyncio.Event()
        self._delivered = asyncio.Event()
        self._spare: list[bytearray] = []

    async def take(self) -> None:
        """Read the source to its end and put what it says on the medium.

        Raises:
            OSError: the source was reset; the parts that came before have had time to arrive.
            RemoteProtocolError: not dynacomm traffic, and the walk is strict.
        """
        while True:
            # The turn also keeps an unlimited link from starving the rest of the loop.
            await asyncio.sleep(0)
            await self._clock.wait_until(self._start_ns - _LEAD_NS)
            held = await self._wait_for_sink()
            buffer = self._spare.pop() if self._spare else bytearray(_MAX_PIECE_NBYTES)
            limit = _piece_limit(self._rates, self._clock.now_ns())
            looked_ns = self._clock.now_ns()
            try:
                nbytes = await self._read(memoryview(buffer)[:limit])
            except OSError:
                await self._clock.wait_until(self._flight_end_ns())
                await self._gate.opened()
                raise
            if nbytes == 0:
                break
            late_ns = 0 if held else looked_ns - self._end_ns
            await self._send(buffer, nbytes, self._arrival_ns(looked_ns, late_ns))
        if self._source.broken:
            await self._clock.wait_until(self._flight_end_ns())
            await self._gate.opened()
            raise ConnectionResetError("the source was reset")
        self._ended_ns = self._flight_end_ns()
        self._arrived.set()

    async def give(self) -> None:
        """Deliver every part when it is due, then the end of the stream.

        Raises:
            OSError: the sink was reset.
        """
        try:
            while True:
                while self._parcels:
                    await self._clock.wait_until(self._parcels[0].due_ns)
                    await self._deliver(self._parcels[0])
                    self._recycle(self._parcels.popleft())
                if self._ended_ns is not None:
                    break
                self._arrived.clear()
                await self._arrived.wait()
            await self._clock.wait_until(self._ended_ns)
            await self._gate.before_end()
            self._sink.sock.shutdown(socket.SHUT_WR)
        except OSError:
            # The kernel tells a failure once: the other direction would read an orderly end.
            self._sink.broken = True
            await self._clock.wait_until(self._clock.now_ns() + self._delay_ns)
            raise

    async def _wait_for_sink(self) -> bool:
        held = False
        while self._overdue():
            held = True
            self._delivered.clear()
            await self._delivered.wait()
        return held

    def _overdue(self) -> bool:
        now_ns = self._clock.now_ns()
        left_nbytes = _OVERDUE_PIECES * _piece_limit(self._rates, now_ns)
        for parcel in self._parcels:
            if parcel.due_ns > now_ns:
                return False
            left_nbytes -= len(parcel.data)
            if left_nbytes < 0:
                return True
        return False

    async def _read(self, into: memoryview) -> int:
        try:
            return self._source.sock.recv_into(into)
        except (BlockingIOError, InterruptedError):
            return await self._loop.sock_recv_into(self._source.sock, into)

    def _arrival_ns(self, looked_ns: int, late_ns: int) -> int:
        now_ns = self._clock.now_ns()
        if late_ns <= 0 or now_ns - looked_ns > _REFILL_NS:
            return now_ns
        return now_ns - min(late_ns, _CREDIT_NS)

    async def _send(self, buffer: bytearray, nbytes: int, arrival_ns: int) -> None:
        returns: bytearray | None = buffer
        data = memoryview(buffer)[:nbytes]
        if nbytes * 4 <= len(buffer):
            # Little would hold a whole buffer for as long as the delay lasts.
            data, returns = memoryview(bytes(data)), None
            self._spare.append(buffer)
        offset = 0
        for part in self._walk.advance(data):
            await self._clock.wait_until(self._start_ns - _LEAD_NS)
            self._start_ns, self._end_ns = self._medium.reserve(
                arrival_ns, part.nbytes, int(part.begins), self._rates
            )
            carried = None
            if part.begins and self._log is not None:
                self._log.begin(self._start_ns)
            if part.ended is not None:
                for tally in self._tallies:
                    tally.add(part.ended)
                if self._log is not None:
                    carried = self._log.end(part.ended, self._end_ns)
            end = offset + part.nbytes
            self._post(data[offset:end], returns if end == nbytes else None, carried)
            offset = end

    def _post(self, data: memoryview, returns: bytearray | None, carried: Carried | None) -> None:
        self._parcels.append(_Parcel(self._end_ns + self._delay_ns, data, returns, carried))
        self._arrived.set()

    async def _deliver(self, parcel: _Parcel) -> None:
        if self._gate.active:
            await self._gate.send(self._sink.sock, parcel.data)
        else:
            await self._hand_over(parcel.data)
        if self._log is not None and parcel.carried is not None:
            self._log.deliver(parcel.carried, self._clock.origin_ns, self._clock.now_ns())

    async def _hand_over(self, data: memoryview) -> None:
        try:
            sent = self._sink.sock.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        if sent < len(data):
            await self._loop.sock_sendall(self._sink.sock, data[sent:])

    def _recycle(self, parcel: _Parcel) -> None:
        if parcel.returns is not None and len(self._spare) < _OVERDUE_PIECES:
            self._spare.append(parcel.returns)
        self._delivered.set()

    def _flight_end_ns(self) -> int:
        """Return when what the source says now, if only that it ends, reaches the sink."""
        return max(self._end_ns, self._clock.now_ns()) + self._delay_ns
