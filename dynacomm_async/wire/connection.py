"""One end of one connection, sans-IO: decoder and session states together."""

from __future__ import annotations

from collections.abc import Sequence

from dynacomm_async.errors import LocalProtocolError, PeerError
from dynacomm_async.wire.codec import encode
from dynacomm_async.wire.decoder import Decoder, Place, Received
from dynacomm_async.wire.frame import BACK_TO_BACK, MAX_HEADER_NBYTES, PREFIX_NBYTES, Prefix
from dynacomm_async.wire.messages import Error, Message
from dynacomm_async.wire.states import Role, SessionStates, State

__all__ = ["Connection"]

_SINK_NBYTES = 64 * 1024


class Connection:
    """What one end may send and receives; bytes in, messages out, and the other way round.

    Once it has sent an error it is deaf: what was under way in the other direction is read and
    dropped, so that it neither counts as a fault nor keeps the error from being heard.

    Args:
        role: which end this is.
        place: where payloads go; see :data:`dynacomm_async.wire.decoder.Place`. It is asked only
            about messages that the session states allow.
    """

    def __init__(self, role: Role, place: Place) -> None:
        self._states = SessionStates(role)
        self._place = place
        self._decoder = Decoder(self._place_admitted, self._admit)
        self._sink: memoryview | None = None  # where bytes go that nobody wants any more
        self.get_buffer = self._decoder.get_buffer
        self.buffer_updated = self._decoder.buffer_updated

    @property
    def ended_in_order(self) -> bool:
        """Whether either side has said that it is done, and no message is cut off."""
        if self._sink is not None:
            return True
        ended = State.ENDED in (self._states.ours, self._states.theirs)
        return ended and not self._decoder.inside_message

    @property
    def missing_nbytes(self) -> int:
        """Bytes that the payload under way still lacks; 0 where nothing is to be waited for."""
        return 0 if self._sink is not None else self._decoder.missing_nbytes

    def send(self, message: Message, payload_nbytes: int, *, back_to_back: bool = False) -> bytes:
        """Return prefix and header to write before the payload.

        Raises:
            LocalProtocolError: this end may not send that now, or the header is over its limit;
                nothing has changed.
        """
        head = encode(message, payload_nbytes, BACK_TO_BACK if back_to_back else 0)
        nbytes, limit = len(head) - PREFIX_NBYTES, MAX_HEADER_NBYTES[message.kind]
        if nbytes > limit:
            raise LocalProtocolError(
                f"{message.kind.name} has a header of {nbytes} bytes, expected at most {limit}"
            )
        self._states.send(message.kind)
        if isinstance(message, Error):
            self.turn_deaf()
        return head

    def next_message(self) -> Received | None:
        """Return the next complete message, or None where more bytes are needed.

        Raises:
            PeerError: the other side sent an error; carries its code and text.
            RemoteProtocolError: see :meth:`Decoder.next_message`.
        """
        if self._sink is not None:
            return None
        received = self._decoder.next_message()
        if received is not None and isinstance(received.message, Error):
            raise PeerError(received.message.code, received.message.text)
        return received

    def _admit(self, prefix: Prefix) -> None:
        self._states.check_receive(prefix.kind)

    def _place_admitted(self, message: Message, payload_nbytes: int) -> Sequence[memoryview]:
        self._states.receive(message.kind)
        return self._place(message, payload_nbytes)

    def turn_deaf(self) -> None:
        """Drop whatever comes from now on: this end has decided to end the connection."""
        sink = self._sink = memoryview(bytearray(_SINK_NBYTES))
        self.get_buffer = lambda: sink
        self.buffer_updated = lambda nbytes, now_ns: None
