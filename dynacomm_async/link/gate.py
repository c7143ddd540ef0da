"""Makes a link's faults happen: what each direction of each connection has to pass through.

Faults act on delivery, behind rate and delay, so that a byte count is exact: what came before it
has been handed to the receiver, what comes after has not.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Callable, Sequence
from typing import Final

from dynacomm_async.link.fault import RANDOM_SIZE, Fault

__all__ = ["Faulted", "Gate"]

_MOST_RANDOM_NBYTES: Final = 1460


class Gate:
    """One direction of one connection. ``active``: bytes must go through :meth:`send`."""

    def __init__(self, connection: Faulted, way: str) -> None:
        self.active = False
        self._connection = connection
        self._way = way
        self._shut_until_ns = 0
        self._pieces: Callable[[], int] | None = None
        self._slow_closes: list[Fault] = []

    def shut(self, until_ns: int) -> None:
        """Let nothing through before ``until_ns`` of the link's clock."""
        self.active = True
        self._shut_until_ns = max(self._shut_until_ns, until_ns)

    def slice(self, fault: Fault) -> None:
        """Let bytes through in pieces from now on."""
        self.active = True
        size = fault.size
        assert size is not None
        if size == RANDOM_SIZE:
            draw = random.Random(f"{fault.seed}/{self._connection.number}/{self._way}")
            self._pieces = lambda: draw.randint(1, _MOST_RANDOM_NBYTES)
        else:
            self._pieces = lambda: size

    def close_slowly(self, fault: Fault) -> None:
        """Delay the end of the stream."""
        self._slow_closes.append(fault)

    async def opened(self) -> None:
        """Return when nothing keeps this direction shut."""
        left_ns = self._shut_until_ns - self._connection.now_ns()
        if left_ns > 0:
            await asyncio.sleep(left_ns / 1e9)
            await self.opened()  # it may have been shut again meanwhile

    async def before_end(self) -> None:
        """Return when the end of the stream may be passed on."""
        for fault in self._slow_closes:
            assert fault.for_s is not None
            self._connection.count(fault)
            await asyncio.sleep(fault.for_s)
        await self.opened()

    async def send(self, sink: socket.socket, data: memoryview) -> None:
        """Hand ``data`` to ``sink``; does not return if a fault ends the connection meanwhile.

        Raises:
            OSError: the sink was reset.
        """
        loop = asyncio.get_running_loop()
        while data:
            await self.opened()
            limit = len(data) if self._pieces is None else min(self._pieces(), len(data))
            limit = self._connection.admit(self._way, limit)
            await loop.sock_sendall(sink, data[:limit])
            data = data[limit:]
            if self._connection.fire_due():
                await loop.create_future()  # the connection is being taken down around us
            await asyncio.sleep(0)


class Faulted:
    """One connection as its faults see it.

    Args:
        number: the connection's.
        faults: those of the link.
        now_ns: the link's clock.
        count: is told of each fault that happens.
        end: takes the connection down, in order or (False) by a reset.
    """

    def __init__(
        self,
        number: int,
        faults: Sequence[Fault],
        *,
        now_ns: Callable[[], int],
        count: Callable[[Fault], None],
        end: Callable[[bool], None],
        fire: Callable[[Fault, Faulted], None],
    ) -> None:
        self.number = number
        self.now_ns = now_ns
        self.count = count
        self.ended = False
        self._end = end
        self._fire = fire
        self.gates = {way: Gate(self, way) for way in ("up", "down")}
        self._nbytes = {"up": 0, "down": 0}
        own = [fault for fault in faults if self.concerns(fault)]
        self._due = [(fault, fault.at_nbytes) for fault in own if fault.at_nbytes is not None]
        for gate in self.gates.values():
            gate.active = bool(self._due)
        for fault in own:
            if not fault.triggered:
                self.apply(fault)

    def concerns(self, fault: Fault) -> bool:
        """Whether ``fault`` is about this connection."""
        return fault.connection in (None, self.number)

    def apply(self, fault: Fault) -> None:
        """Let ``fault`` happen to this connection now."""
        if fault.kind in ("reset", "cut"):
            self.ended = True
            self._end(fault.kind == "cut")
        ways = ("up", "down") if fault.way == "both" or fault.kind == "down" else (fault.way,)
        for gate in map(self.gates.__getitem__, ways):
            if fault.kind in ("stall", "down"):
                assert fault.for_s is not None
                gate.shut(self.now_ns() + round(fault.for_s * 1e9))
            elif fault.kind == "slice":
                gate.slice(fault)
            elif fault.kind == "slow-close":
                gate.close_slowly(fault)
        if fault.kind != "slow-close" and fault.kind != "down":
            self.count(fault)

    def admit(self, way: str, nbytes: int) -> int:
        """Return how many of ``nbytes`` may pass before the next fault, and count them."""
        for fault, at_nbytes in self._due:
            if fault.way in (way, "both"):
                nbytes = min(nbytes, max(1, at_nbytes - self._seen(fault)))
        self._nbytes[way] += nbytes
        return nbytes

    def fire_due(self) -> bool:
        """Let faults whose byte count is reached happen; return whether the connection ends."""
        due = [entry for entry in self._due if self._seen(entry[0]) >= entry[1]]
        for fault, at_nbytes in due:
            self._due.remove((fault, at_nbytes))
            if fault.every is not None:
                self._due.append((fault, at_nbytes + int(fault.every)))
            self._fire(fault, self)
        return self.ended

    def _seen(self, fault: Fault) -> int:
        return sum(self._nbytes.values()) if fault.way == "both" else self._nbytes[fault.way]
