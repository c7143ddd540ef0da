"""What every channel promises: messages in order, whole or not at all.

A channel joins a :class:`~dynacomm_async.wire.connection.Connection` to something that carries
bytes. It knows no layers and no plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dynacomm_async.errors import DynaCommError
from dynacomm_async.wire.decoder import Received
from dynacomm_async.wire.messages import Message

__all__ = ["Channel", "Handler"]


class Handler(Protocol):
    """What a channel calls, always on its event loop, never concurrently."""

    def place(self, message: Message, payload_nbytes: int) -> Sequence[memoryview]:
        """Return the writable byte views for a payload; see ``wire.decoder.Place``."""
        ...

    def handle(self, received: Received) -> None:
        """Take a complete message; its payload is where :meth:`place` said.

        Raising any :class:`DynaCommError` here ends the channel with that error.
        """
        ...

    def lost(self, error: DynaCommError) -> None:
        """The channel is over. Called exactly once, after the last :meth:`handle`.

        It is called by the loop, never from inside another of the channel's or handler's methods.

        ``error`` says why: ``ChannelClosed`` (in order), ``ChannelBroken``, ``PeerError`` (the
        other side said why), or ``RemoteProtocolError`` (the other side broke the rules).
        """
        ...


class Channel(Protocol):
    """One end of a connection."""

    @property
    def peer(self) -> str:
        """Who is at the other end, for people."""
        ...

    @property
    def received_nbytes(self) -> int:
        """How much has come in so far, also of messages that are not whole yet."""
        ...

    async def send(
        self,
        message: Message,
        payload: Sequence[memoryview] = (),
        *,
        back_to_back: bool = False,
    ) -> None:
        """Send one message; return when (nearly) all of it has left this process.

        Late binding rests on this: what to send next is decided when this returns, so it must
        return neither long before the bytes have left nor as late as their delivery.

        The payload's memory must not change before the other side has it. In synchronous
        training causality sees to that: what overwrites it can only be computed from its arrival.

        Cancelled while it waits for its turn, it has sent nothing. Cancelled inside a message, it
        aborts the channel: half a message cannot be taken back.

        Args:
            message: what to send; calls are served one at a time, in order.
            payload: byte views, sent one behind the other without a copy.
            back_to_back: there was no idle moment since the message before.

        Raises:
            LocalProtocolError: not allowed now; nothing was sent, the channel goes on.
            DynaCommError: what ended the channel (see :meth:`Handler.lost`).
        """
        ...

    def limit_ahead(self, nbytes: int | None) -> None:
        """Keep no more than about so much in buffers that has not left: about one message.

        What sits in a buffer cannot be overtaken any more. None: a few milliseconds' worth, which
        costs fewer wake-ups.
        """
        ...

    def turn_deaf(self) -> None:
        """Drop whatever arrives from now on; sending goes on, for a last :class:`Error`."""
        ...

    async def close(self) -> None:
        """End the channel after what has been sent, wait until it is over. Idempotent."""
        ...

    def limit_silence(self, limit_s: float) -> None:
        """Have the system give up a peer that acknowledges nothing for so long.

        The system sees only whether the peer's system is there; see
        :class:`~dynacomm_async.transport.pulse.Pulse` for the peer itself.
        """
        ...

    def abort(self, error: DynaCommError | None = None) -> None:
        """End the channel now; unsent bytes are dropped. Idempotent.

        Args:
            error: why, for :meth:`Handler.lost`; by default it was closed.
        """
        ...
