"""Finding the messages in a stream of bytes, at any split, without understanding them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from dynacomm_async.errors import RemoteProtocolError
from dynacomm_async.wire.frame import MAGIC, PREFIX_NBYTES, Prefix

__all__ = ["MessageWalk", "Part"]


class Part(NamedTuple):
    """Bytes of one message that arrived together.

    Attributes:
        nbytes: how many, at least 1.
        begins: whether the message begins with them.
        ended: the message's prefix where they are its last bytes, else None.
    """

    nbytes: int
    begins: bool
    ended: Prefix | None


class MessageWalk:
    """Cuts a stream at its message boundaries.

    Args:
        strict: whether to refuse what is not dynacomm traffic; otherwise such a stream is passed
            from there on as parts that neither begin nor end a message.
    """

    def __init__(self, *, strict: bool) -> None:
        self._strict = strict
        self._opaque = False
        self._head = bytearray()
        self._prefix: Prefix | None = None
        self._left_nbytes = 0

    def advance(self, data: memoryview) -> Iterator[Part]:
        """Yield the parts of ``data`` in order; together they are all of it.

        Nothing is kept of ``data`` itself. The iterator must be exhausted before the next call.

        Raises:
            RemoteProtocolError: (strict) not dynacomm traffic. Earlier parts have been yielded.
        """
        offset = 0
        while offset < len(data):
            try:
                part = self._opaque_part(data, offset) if self._opaque else self._part(data, offset)
            except RemoteProtocolError:
                if self._strict:
                    raise
                self._opaque = True
                continue
            offset += part.nbytes
            yield part

    def _opaque_part(self, data: memoryview, offset: int) -> Part:
        return Part(len(data) - offset, begins=False, ended=None)

    def _part(self, data: memoryview, offset: int) -> Part:
        begins = self._prefix is None and not self._head
        head_nbytes = 0
        if self._prefix is None:
            head_nbytes = self._take_head(data[offset:])
        if self._prefix is None:
            return Part(head_nbytes, begins, None)
        body_nbytes = min(self._left_nbytes, len(data) - offset - head_nbytes)
        self._left_nbytes -= body_nbytes
        ended = None if self._left_nbytes else self._prefix
        if ended is not None:
            self._prefix = None
        return Part(head_nbytes + body_nbytes, begins, ended)

    def _take_head(self, data: memoryview) -> int:
        nbytes = min(PREFIX_NBYTES - len(self._head), len(data))
        self._head += data[:nbytes]
        if len(self._head) < PREFIX_NBYTES:
            # Whoever says something shorter than a prefix and waits must not go unnoticed.
            if not self._head.startswith(MAGIC[: len(self._head)]):
                raise RemoteProtocolError(
                    f"not a dynacomm message: it begins with {bytes(self._head[:2])!r}, "
                    f"expected {MAGIC!r}"
                )
            return nbytes
        self._prefix = Prefix.unpack(self._head)
        self._head.clear()
        self._left_nbytes = self._prefix.header_nbytes + self._prefix.payload_nbytes
        return nbytes
