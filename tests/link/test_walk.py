from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from dynacomm_async.errors import RemoteProtocolError
from dynacomm_async.link import MessageWalk, Part
from dynacomm_async.wire.frame import PREFIX_NBYTES, MessageKind, Prefix

_PREFIXES = st.builds(
    Prefix,
    kind=st.sampled_from(MessageKind),
    flags=st.just(0),
    header_nbytes=st.integers(0, 30),
    payload_nbytes=st.integers(0, 60),
    step=st.integers(0, 2**64 - 1),
)


def _bytes_of(message: Prefix) -> bytes:
    return message.pack() + bytes(message.header_nbytes + message.payload_nbytes)


def _walk(walk: MessageWalk, pieces: list[bytes]) -> list[Part]:
    return [part for piece in pieces for part in walk.advance(memoryview(piece))]


@settings(max_examples=150, derandomize=True)
@given(st.lists(_PREFIXES, max_size=6), st.lists(st.integers(1, 40), min_size=1, max_size=10))
def test_every_split_of_a_stream_gives_the_same_messages(
    messages: list[Prefix], sizes: list[int]
) -> None:
    stream = b"".join(map(_bytes_of, messages))
    pieces, offset = [], 0
    while offset < len(stream):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(stream[offset : offset + size])
        offset += size
    parts = _walk(MessageWalk(strict=True), pieces)
    assert [part.ended for part in parts if part.ended] == messages
    assert sum(part.begins for part in parts) == len(messages)
    assert sum(part.nbytes for part in parts) == len(stream)
    assert all(part.nbytes > 0 for part in parts)


def test_parts_are_cut_at_message_boundaries() -> None:
    first = Prefix(MessageKind.GRADIENTS, 0, 3, 10, 7)
    second = Prefix(MessageKind.HEARTBEAT, 0, 0, 0, 0)
    data = memoryview(_bytes_of(first) + _bytes_of(second) + b"DC")
    assert list(MessageWalk(strict=True).advance(data)) == [
        Part(PREFIX_NBYTES + 13, True, first),
        Part(PREFIX_NBYTES, True, second),
        Part(2, True, None),
    ]


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.0\r\n", b"D?", b"\0", bytes(100)])
def test_garbage_is_refused_as_soon_as_it_shows(garbage: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        _walk(MessageWalk(strict=True), [garbage])


def test_garbage_is_refused_one_byte_at_a_time() -> None:
    walk = MessageWalk(strict=True)
    assert len(_walk(walk, [b"D"])) == 1
    with pytest.raises(RemoteProtocolError, match="it begins with b'DX'"):
        _walk(walk, [b"X"])


def test_the_messages_before_garbage_are_still_given() -> None:
    message = Prefix(MessageKind.END, 0, 1, 0, 2)
    parts = MessageWalk(strict=True).advance(memoryview(_bytes_of(message) + b"garbage"))
    assert next(parts).ended == message
    with pytest.raises(RemoteProtocolError):
        next(parts)


def test_a_walk_that_is_not_strict_passes_garbage_and_all_that_follows() -> None:
    message = _bytes_of(Prefix(MessageKind.END, 0, 1, 0, 2))
    walk = MessageWalk(strict=False)
    parts = _walk(walk, [message + b"DCgar", b"b" * 40, message])
    assert [part.ended is not None for part in parts] == [True, False, False, False]
    assert sum(part.nbytes for part in parts) == 2 * len(message) + 45
