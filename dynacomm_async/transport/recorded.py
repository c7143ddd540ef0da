"""A channel and its handler with a recorder in between: who uses them notices nothing of it.

Nothing but these two knows how to record messages, so without a recorder none of it is on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic_ns

from dynacomm_async.errors import DynaCommError
from dynacomm_async.recording import Cells, ConnectionLog, Passed, Recorder
from dynacomm_async.transport.channel import Channel, Handler
from dynacomm_async.wire.decoder import Received
from dynacomm_async.wire.messages import (
    End,
    Gradients,
    Initial,
    Join,
    Message,
    Parameters,
    Welcome,
)

__all__ = ["RecordedChannel", "RecordedHandler"]


class _Log:
    """Writes one connection's messages into a recorder."""

    def __init__(self, channel: Channel, recorder: Recorder) -> None:
        self._channel = channel
        self._recorder = recorder
        self._connection: ConnectionLog | None = None

    def take(
        self, message: Message, sent: bool, start_ns: int, end_ns: int, payload_nbytes: int
    ) -> None:
        connection = self._connection
        if connection is None:  # only now: a channel learns who its peer is when it is connected
            connection = self._recorder.open_connection(peer=self._channel.peer)
            self._connection = connection
        if isinstance(message, Welcome):
            connection.run, connection.slot = message.run, message.slot
            connection.term = message.term
        step, cells = _content(message)
        self._recorder.add(
            Passed(
                connection.number,
                sent,
                message.kind.name,
                step,
                start_ns,
                end_ns,
                payload_nbytes,
                cells,
            )
        )


class RecordedChannel:
    """A :class:`~dynacomm_async.transport.channel.Channel` that takes down what is sent.

    Args:
        channel: the one that does the work.
        recorder: gets every message.
    """

    def __init__(self, channel: Channel, recorder: Recorder) -> None:
        self._channel = channel
        self._log = _Log(channel, recorder)
        self.turn_deaf: Callable[[], None] = channel.turn_deaf
        self.limit_silence: Callable[[float], None] = channel.limit_silence

    @property
    def peer(self) -> str:
        """Who is at the other end, for people."""
        return self._channel.peer

    async def send(
        self, message: Message, payload: Sequence[memoryview] = (), *, back_to_back: bool = False
    ) -> None:
        """See :meth:`dynacomm_async.transport.channel.Channel.send`."""
        start_ns = monotonic_ns()
        await self._channel.send(message, payload, back_to_back=back_to_back)
        self._log.take(message, True, start_ns, monotonic_ns(), sum(map(len, payload)))

    def limit_ahead(self, nbytes: int | None) -> None:
        """See :meth:`dynacomm_async.transport.channel.Channel.limit_ahead`."""
        self._channel.limit_ahead(nbytes)

    @property
    def received_nbytes(self) -> int:
        """See :meth:`dynacomm_async.transport.channel.Channel.received_nbytes`."""
        return self._channel.received_nbytes

    def abort(self, error: DynaCommError | None = None) -> None:
        """See :meth:`dynacomm_async.transport.channel.Channel.abort`."""
        self._channel.abort(error)

    async def close(self) -> None:
        """See :meth:`dynacomm_async.transport.channel.Channel.close`."""
        await self._channel.close()

    def handler(self, inner: Handler) -> RecordedHandler:
        """Return a handler that takes down what arrives, for the same connection."""
        return RecordedHandler(inner, self._log)


class RecordedHandler:
    """A :class:`~dynacomm_async.transport.channel.Handler` that takes down what arrives.

    Args:
        inner: the handler that does the work.
    """

    def __init__(self, inner: Handler, log: _Log) -> None:
        self._inner = inner
        self._log = log
        self._payload_nbytes = 0

    def place(self, message: Message, payload_nbytes: int) -> Sequence[memoryview]:
        """See :meth:`dynacomm_async.transport.channel.Handler.place`."""
        self._payload_nbytes = payload_nbytes
        return self._inner.place(message, payload_nbytes)

    def handle(self, received: Received) -> None:
        """See :meth:`dynacomm_async.transport.channel.Handler.handle`."""
        arrival = received.arrival
        self._log.take(
            received.message, False, arrival.first_ns, arrival.last_ns, self._payload_nbytes
        )
        self._inner.handle(received)

    def lost(self, error: DynaCommError) -> None:
        """See :meth:`dynacomm_async.transport.channel.Handler.lost`."""
        self._inner.lost(error)


def _content(message: Message) -> tuple[int, Cells]:
    """Return the step that a message belongs to, as its prefix says, and its cells."""
    if isinstance(message, Gradients):
        return message.step, message.ranges
    if isinstance(message, Parameters):
        return message.version, message.ranges
    if isinstance(message, Initial):
        return 0, message.ranges
    if isinstance(message, Join):
        return message.subscription.version, ()
    if isinstance(message, Welcome | End):
        return message.version, ()
    return 0, ()
