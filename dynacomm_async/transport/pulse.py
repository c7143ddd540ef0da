"""Both ends of a connection say that they are there, and notice when the other does not.

An idle end sends a heartbeat for each third of the limit, unasked: so nobody waits for an answer,
which would have to queue behind whatever is under way the other way round. Each end watches only
what it receives. Progress counts as life, one cell of a message under way for each limit, so a
link may become as slow as it likes; a transfer as a whole has no limit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dynacomm_async.errors import ChannelBroken
from dynacomm_async.transport.channel import Channel
from dynacomm_async.wire.grid import CELL_NBYTES

__all__ = ["Pulse"]

_LOOKS = 6
"""How often a limit is looked at while it passes: silence is noticed after 1.2 of it at most."""


class Pulse:
    """Watches one connection and keeps it heard, until it is stopped. Times are monotonic.

    Args:
        channel: what to watch; it is ended with :class:`ChannelBroken` when nothing comes.
        limit_s: how long that may be.
        beat: called when nothing has been sent for a third of the limit; has a heartbeat sent.
    """

    def __init__(self, channel: Channel, limit_s: float, beat: Callable[[], None]) -> None:
        self._channel = channel
        self._limit_s = limit_s
        self._beat = beat
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._sent_at = self._loop.time()
        self._heard_nbytes = channel.received_nbytes
        channel.limit_silence(limit_s)
        self._timer = self._loop.call_later(limit_s / _LOOKS, self._look)

    def heard(self) -> None:
        """A whole message has come in."""
        self._heard_at = self._loop.time()

    def sent(self) -> None:
        """Something has been sent, or is being sent."""
        self._sent_at = self._loop.time()

    def stop(self) -> None:
        """Watch no more. Idempotent."""
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        # While this process was kept from running it could not hear either.
        self._heard_at += max(0.0, now - self._timer.when())
        nbytes = self._channel.received_nbytes
        if nbytes >= self._heard_nbytes + CELL_NBYTES:
            self._heard_nbytes = nbytes
            self._heard_at = now
        if now - self._heard_at > self._limit_s:
            self._channel.abort(
                ChannelBroken(
                    f"the connection to {self._channel.peer} was lost: nothing has come over it "
                    f"for {self._limit_s:g} s"
                )
            )
            return
        if now - self._sent_at >= self._limit_s / 3:
            self._sent_at = now
            self._beat()
        self._timer = self._loop.call_later(self._limit_s / _LOOKS, self._look)
