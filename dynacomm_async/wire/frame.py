"""The fixed prefix that opens every message.

A message is ``prefix | header | payload``: 24 bytes of prefix, a msgpack header, raw payload bytes.
All numbers are little endian. Only the standard library is needed to walk a stream of messages,
so a relay that counts them does not have to understand them.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from dynacomm_async.errors import RemoteProtocolError

__all__ = [
    "BACK_TO_BACK",
    "HELLO_LIMIT",
    "MAGIC",
    "MAX_HEADER_NBYTES",
    "PREFIX_NBYTES",
    "MessageKind",
    "Prefix",
]

MAGIC = b"DC"
"""The first two bytes of every message."""

BACK_TO_BACK = 0x01
"""Flag: the sender had no idle moment between the message before and this one."""

_KNOWN_FLAGS = BACK_TO_BACK
_LAYOUT = struct.Struct("<2sBBIQQ")

PREFIX_NBYTES = _LAYOUT.size


class MessageKind(IntEnum):
    """What a message is; the table in PROTOCOL.md says who sends it and when."""

    HELLO = 1
    WELCOME = 2
    JOIN = 3
    INITIAL = 4
    PARAMETERS = 5
    GRADIENTS = 6
    HEARTBEAT = 7
    END = 8
    ERROR = 9
    LEAVE = 10
    RESUME = 11
    HAVE = 12
    SKIP = 13
    SUBSCRIBE = 14


HELLO_LIMIT = 4096
"""Bytes of the longest header that a stranger may send."""

MAX_HEADER_NBYTES = dict.fromkeys(MessageKind, 1 << 20) | {
    MessageKind.HELLO: HELLO_LIMIT,
    MessageKind.HEARTBEAT: 256,
    MessageKind.END: 256,
    MessageKind.ERROR: 4096,
    MessageKind.LEAVE: 256,
    MessageKind.SKIP: 4096,
}
"""Bytes of the longest header of each kind. One mebibyte holds a plan of 35,000 segments."""

_KINDS = {int(kind): kind for kind in MessageKind}


class Prefix(NamedTuple):
    """The decoded prefix.

    Attributes:
        kind: what the message is.
        flags: bit set; see :data:`BACK_TO_BACK`.
        header_nbytes: length of the msgpack header that follows.
        payload_nbytes: length of the raw payload after the header.
        step: the step (for gradients) or version (for parameters) it belongs to, else 0.
    """

    kind: MessageKind
    flags: int
    header_nbytes: int
    payload_nbytes: int
    step: int

    def pack(self) -> bytes:
        """Return the 24 bytes of this prefix."""
        return _LAYOUT.pack(
            MAGIC, self.kind, self.flags, self.header_nbytes, self.payload_nbytes, self.step
        )

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview, offset: int = 0) -> Prefix:
        """Decode 24 bytes of ``data`` at ``offset``.

        Raises:
            RemoteProtocolError: not a message of this protocol (wrong magic, kind or flags), or a
                header over the limit of its kind.
        """
        magic, kind, flags, header_nbytes, payload_nbytes, step = _LAYOUT.unpack_from(data, offset)
        if magic != MAGIC:
            raise RemoteProtocolError(
                f"not a dynacomm message: it begins with {magic!r}, expected {MAGIC!r}"
            )
        known = _KINDS.get(kind)
        if known is None:
            raise RemoteProtocolError(
                f"unknown message kind {kind}, expected 1 to {max(MessageKind)}"
            )
        if flags & ~_KNOWN_FLAGS:
            raise RemoteProtocolError(f"unknown flags {flags:#04x} in a {known.name} message")
        if header_nbytes > MAX_HEADER_NBYTES[known]:
            raise RemoteProtocolError(
                f"{known.name} declares a header of {header_nbytes} bytes, "
                f"expected at most {MAX_HEADER_NBYTES[known]}"
            )
        return cls(known, flags, header_nbytes, payload_nbytes, step)
