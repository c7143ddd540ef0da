"""From a stream of bytes to messages, sans-IO, with payloads landing where they belong.

The decoder lends out memory to be filled (:meth:`Decoder.get_buffer`): a small scratch buffer
while it waits for a prefix and header, the payload's own destination afterwards. So a payload is
received into place and never copied, except for the few bytes that came along with the header.

Nothing is decoded before :meth:`Decoder.next_message` asks for it, so a message is fully handled
before the header of the next one is looked at. Limits are checked on declared lengths, before
anything is allocated or placed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from dynacomm_async.errors import RemoteProtocolError
from dynacomm_async.wire.codec import decode
from dynacomm_async.wire.frame import BACK_TO_BACK, PREFIX_NBYTES, Prefix
from dynacomm_async.wire.messages import Message

__all__ = ["Admit", "Arrival", "Decoder", "Place", "Received"]

_SCRATCH_NBYTES = 16 * 1024

Place = Callable[[Message, int], Sequence[memoryview]]
"""``place(message, payload_nbytes)`` returns the writable byte views that the payload goes into.

Called once a header is complete, also where the payload is empty. It raises
:class:`RemoteProtocolError` where the message must not come now or does not fit.
"""

Admit = Callable[[Prefix], None]
"""``admit(prefix)`` raises :class:`RemoteProtocolError` where such a message must not come now.

Called once a prefix is complete, before its header is waited for, so that a header costs nothing
unless its message is welcome.
"""


class Arrival(NamedTuple):
    """When a message came in, as the receiver saw it (nanoseconds of its monotonic clock).

    Attributes:
        nbytes: the whole message: prefix, header and payload.
        first_nbytes: how much of it was there at ``first_ns``.
        first_ns: when its first piece was read. A read that fills its buffer leaves bytes behind,
            so what the next one finds belongs to the same piece, however late it is read.
        last_ns: when its last byte was read.
        back_to_back: the sender had something to send all the time since the message before.
    """

    nbytes: int
    first_nbytes: int
    first_ns: int
    last_ns: int
    back_to_back: bool

    def observation(self, previous_ns: int) -> tuple[int, int, int] | None:
        """What this says of the link: ``elapsed = messages * overhead + nbytes / rate``.

        Args:
            previous_ns: when the last byte of the message before was read; 0: there was none.

        Returns:
            ``(nbytes, elapsed_ns, messages)``, or None where it came in one piece and says nothing.
        """
        if self.back_to_back and previous_ns:
            return self.nbytes, self.last_ns - previous_ns, 1
        if self.nbytes > self.first_nbytes:
            return self.nbytes - self.first_nbytes, self.last_ns - self.first_ns, 0
        return None


class Received(NamedTuple):
    """A complete message; its payload lies where ``place`` said."""

    message: Message
    arrival: Arrival


class Decoder:
    """Cuts a stream into messages and has payloads written into place.

    Args:
        place: says where each payload goes.
        admit: refuses messages by their prefix; by default none.
    """

    def __init__(self, place: Place, admit: Admit | None = None) -> None:
        self._place = place
        self._admit = admit
        self._scratch = memoryview(bytearray(_SCRATCH_NBYTES))
        self._start = 0  # scratch[start:end] has been received and not yet decoded
        self._end = 0
        self._prefix: Prefix | None = None  # the message under way, once its prefix is there
        self._message: Message | None = None  # and once its header is
        self._views: list[memoryview] = []  # destinations still to be filled, the next one last
        self._first_ns = 0
        self._first_nbytes = 0
        self._filled = False  # every read since the message's first filled its buffer
        self._now_ns = 0

    def get_buffer(self) -> memoryview:
        """Return where the next bytes of the stream go: never empty, valid until the update."""
        if self._views:
            return self._views[-1]
        return self._scratch[self._end :]

    def buffer_updated(self, nbytes: int, now_ns: int) -> None:
        """Take note that ``nbytes`` were written into the buffer that was last lent out.

        Call :meth:`next_message` until it returns None before the next :meth:`get_buffer`.
        """
        self._now_ns = now_ns
        if self._views:
            view = self._views[-1]
            if self._filled:
                self._first_nbytes += nbytes
                self._filled = nbytes == len(view)
            if nbytes == len(view):
                self._views.pop()
            else:
                self._views[-1] = view[nbytes:]
        else:
            self._end += nbytes
            self._filled = self._end == len(self._scratch)

    @property
    def missing_nbytes(self) -> int:
        """Bytes that the payload under way still lacks; 0 between payloads."""
        return sum(map(len, self._views))

    @property
    def inside_message(self) -> bool:
        """Whether the stream stands inside a message: its end now would lose one."""
        return self._message is not None or self._end > self._start

    def next_message(self) -> Received | None:
        """Return the next complete message, or None where more bytes are needed.

        Raises:
            RemoteProtocolError: the stream is not one of this protocol, a declared length is over
                its limit, or ``admit`` or ``place`` refused. The decoder must not be used any more.
        """
        if self._message is None and not self._begin_message():
            return None
        if self._views:
            return None
        message, prefix = self._message, self._prefix
        assert message is not None
        assert prefix is not None
        self._message = self._prefix = None
        arrival = Arrival(
            PREFIX_NBYTES + prefix.header_nbytes + prefix.payload_nbytes,
            self._first_nbytes,
            self._first_ns,
            self._now_ns,
            bool(prefix.flags & BACK_TO_BACK),
        )
        return Received(message, arrival)

    def _begin_message(self) -> bool:
        """Decode prefix and header if they are there, and place the payload."""
        available = self._end - self._start
        if available < PREFIX_NBYTES:
            self._make_room(PREFIX_NBYTES)
            return False
        prefix = self._prefix
        if prefix is None:
            prefix = self._prefix = self._read_prefix()
        head_nbytes = PREFIX_NBYTES + prefix.header_nbytes
        if available < head_nbytes:
            self._make_room(head_nbytes)
            return False
        start = self._start
        head_end = start + head_nbytes
        message = decode(prefix, self._scratch[start + PREFIX_NBYTES : head_end])
        views = self._place(message, prefix.payload_nbytes)
        self._first_nbytes = min(available, head_nbytes + prefix.payload_nbytes)
        self._first_ns = self._now_ns
        self._start = head_end
        self._spill(views, prefix)
        self._message = message
        return True

    def _read_prefix(self) -> Prefix:
        prefix = Prefix.unpack(self._scratch, self._start)
        if self._admit is not None:
            self._admit(prefix)
        return prefix

    def _spill(self, views: Sequence[memoryview], prefix: Prefix) -> None:
        """Move payload bytes that came with the header; keep what is still to be filled."""
        placed = sum(map(len, views))
        if placed != prefix.payload_nbytes:
            raise RemoteProtocolError(
                f"{prefix.kind.name} declares a payload of {prefix.payload_nbytes} bytes, "
                f"expected {placed}"
            )
        start, end = self._start, self._end
        rest = self._views
        for view in views:
            nbytes = len(view)
            if nbytes <= end - start:
                view[:] = self._scratch[start : start + nbytes]
                start += nbytes
            else:
                if start < end:
                    view[: end - start] = self._scratch[start:end]
                    view = view[end - start :]
                    start = end
                rest.append(view)
        rest.reverse()
        if start == end:
            start = end = 0
            if len(self._scratch) > _SCRATCH_NBYTES:  # a long header made it grow
                self._scratch = memoryview(bytearray(_SCRATCH_NBYTES))
        self._start, self._end = start, end

    def _make_room(self, nbytes: int) -> None:
        """Let ``nbytes`` from the start of the message fit into the scratch buffer."""
        pending = self._scratch[self._start : self._end]
        if nbytes > len(self._scratch):
            self._scratch = memoryview(bytearray(nbytes))
            self._scratch[: len(pending)] = pending
        elif self._start + nbytes > len(self._scratch):
            self._scratch[: len(pending)] = bytes(pending)
        else:
            return
        self._end -= self._start
        self._start = 0
