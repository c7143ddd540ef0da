"""The decoder: any split of the stream gives the same messages, and nothing else gets in."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import cycle, repeat
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from dynacomm_async.errors import RemoteProtocolError
from dynacomm_async.ranges import Range
from dynacomm_async.wire import (
    BACK_TO_BACK,
    MAGIC,
    MAX_HEADER_NBYTES,
    PREFIX_NBYTES,
    Arrival,
    Decoder,
    End,
    Gradients,
    Heartbeat,
    Hello,
    Initial,
    Leave,
    Message,
    MessageKind,
    Parameters,
    Prefix,
    Received,
    Subscription,
    Welcome,
    encode,
)

Feed = Callable[..., list[Received]]
Destinations = Callable[..., Any]

LONG_PLAN = Subscription(1, tuple((Range(i, 1),) for i in range(2000)))
CONVERSATION: list[tuple[Message, bytes]] = [
    (Hello(1, "run", None), b""),
    (Initial((Range(0, 2),)), random.Random(1).randbytes(20_000)),
    (Gradients(0, (Range(0, 1),), LONG_PLAN), random.Random(2).randbytes(5_000)),
    (Heartbeat(1, False, 10**15), b""),
    (Gradients(0, (Range(1, 1),)), b"x"),
    (Parameters(7, (Range(0, 1),)), b""),
    (Parameters(7, (Range(0, 1),)), random.Random(3).randbytes(4096)),
    (End(8), b"statistics"),
    (Leave(), b""),
]
STREAM = b"".join(encode(message, len(payload)) + payload for message, payload in CONVERSATION)


def head(kind: MessageKind, header_nbytes: int, payload_nbytes: int = 0) -> bytes:
    return struct.pack("<2sBBIQQ", MAGIC, kind, 0, header_nbytes, payload_nbytes, 0)


def check(received: list[Received], payloads: list[bytearray]) -> None:
    assert [each.message for each in received] == [message for message, _ in CONVERSATION]
    assert [bytes(payload) for payload in payloads] == [payload for _, payload in CONVERSATION]


SIZES = (1, 2, 7, 23, 24, 25, 101, 4093, 4096, 8191)
SPLITS: dict[str, Callable[[], Iterator[int]]] = {
    "whole": lambda: iter(()),
    **{f"pieces of {n}": lambda n=n: repeat(n) for n in SIZES},
    "one byte, then much": lambda: cycle([1, 5000]),
}  # fmt: skip


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("cuts", [(), (0,), (1,), (0, 3, 0, 4, 0)], ids=str)
def test_messages_do_not_depend_on_how_the_stream_is_split(
    split: str, cuts: tuple[int, ...], destination: Destinations, feed_decoder: Feed
) -> None:
    target = destination(cuts)
    decoder = Decoder(target.place)
    check(feed_decoder(decoder, STREAM, SPLITS[split]()), target.payloads)
    assert not decoder.inside_message


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.lists(st.integers(1, 6000), max_size=40))
def test_random_messages_at_random_splits_arrive_whole(
    messages: st.SearchStrategy[Message],
    destination: Destinations,
    feed_decoder: Feed,
    data: st.DataObject,
    pieces: list[int],
) -> None:
    sent = data.draw(st.lists(st.tuples(messages, st.binary(max_size=300)), max_size=5))
    stream = b"".join(encode(message, len(payload)) + payload for message, payload in sent)
    target = destination(data.draw(st.lists(st.integers(0, 50), max_size=4)))
    received = feed_decoder(Decoder(target.place), stream, pieces)
    assert [each.message for each in received] == [message for message, _ in sent]
    assert [bytes(payload) for payload in target.payloads] == [payload for _, payload in sent]


def test_a_payload_is_written_into_the_very_memory_that_was_placed() -> None:
    memory = bytearray(b"-" * 100)
    views = [memoryview(memory)[60:90], memoryview(memory)[10:15]]
    decoder = Decoder(lambda message, nbytes: views)
    stream = encode(Gradients(0, (Range(0, 1),)), 35)
    decoder.get_buffer()[: len(stream)] = stream
    decoder.buffer_updated(len(stream), 0)
    assert decoder.next_message() is None
    for n in (30, 5):
        buffer = decoder.get_buffer()
        assert buffer.obj is memory, "no memory lies between the socket and the destination"
        assert len(buffer) == n
        buffer[:] = bytes(range(n))
        decoder.buffer_updated(n, 0)
    received = decoder.next_message()
    assert received is not None
    expected = b"-" * 10 + bytes(range(5)) + b"-" * 45 + bytes(range(30)) + b"-" * 10
    assert bytes(memory) == expected


def test_a_message_is_handled_before_the_next_header_is_looked_at() -> None:
    placed: list[Message] = []

    def place(message: Message, nbytes: int) -> list[memoryview]:
        placed.append(message)
        return []

    decoder = Decoder(place)
    stream = encode(Heartbeat(1, False, 0)) + encode(Heartbeat(2, False, 0))
    decoder.get_buffer()[: len(stream)] = stream
    decoder.buffer_updated(len(stream), 0)
    assert decoder.next_message() is not None
    assert [message.number for message in placed] == [1]  # type: ignore[union-attr]
    assert decoder.next_message() is not None
    assert decoder.next_message() is None


@pytest.mark.parametrize("kind", MessageKind)
def test_a_header_over_its_limit_is_refused_before_anything_is_allocated(
    kind: MessageKind, feed_decoder: Feed
) -> None:
    limit = MAX_HEADER_NBYTES[kind]
    decoder = Decoder(lambda message, nbytes: [])
    tracemalloc.start()
    try:
        for nbytes in (limit + 1, 2**32 - 1):
            expected = f"{kind.name} declares a header of {nbytes} bytes, expected at most {limit}"
            with pytest.raises(RemoteProtocolError, match=expected):
                feed_decoder(Decoder(lambda message, nbytes: []), head(kind, nbytes))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 256 * 1024
    feed_decoder(decoder, head(kind, limit))
    assert decoder.inside_message


def test_strangers_can_make_the_server_hold_four_kibibytes() -> None:
    assert MAX_HEADER_NBYTES[MessageKind.HELLO] == 4096


@pytest.mark.parametrize("declared", [0, 1, 15, 17, 2**40, 2**64 - 1])
def test_a_payload_that_does_not_match_the_place_for_it_is_refused(
    declared: int, feed_decoder: Feed
) -> None:
    memory = bytearray(16)
    decoder = Decoder(lambda message, nbytes: [memoryview(memory)])
    stream = encode(Gradients(0, (Range(0, 1),)), declared) + bytes(32)
    with pytest.raises(
        RemoteProtocolError,
        match=f"GRADIENTS declares a payload of {declared} bytes, expected 16",
    ):
        feed_decoder(decoder, stream)
    assert memory == bytes(16)


def test_a_payload_that_nobody_wants_is_refused(feed_decoder: Feed) -> None:
    with pytest.raises(
        RemoteProtocolError, match="LEAVE declares a payload of 9 bytes, expected 0"
    ):
        feed_decoder(Decoder(lambda message, nbytes: []), encode(Leave(), 9))


def test_what_place_refuses_is_refused(feed_decoder: Feed) -> None:
    def place(message: Message, nbytes: int) -> list[memoryview]:
        raise RemoteProtocolError("not now")

    with pytest.raises(RemoteProtocolError, match="not now"):
        feed_decoder(Decoder(place), encode(Leave()))


def test_a_message_is_admitted_once_and_before_its_header_is_waited_for(feed_decoder: Feed) -> None:
    admitted: list[Prefix] = []
    decoder = Decoder(lambda message, nbytes: [], admitted.append)
    stream = encode(Hello())
    feed_decoder(decoder, stream[:PREFIX_NBYTES])
    assert admitted == [Prefix.unpack(stream)]
    assert len(feed_decoder(decoder, stream[PREFIX_NBYTES:] + stream, repeat(1))) == 2
    assert admitted == [Prefix.unpack(stream)] * 2


@pytest.mark.parametrize("seed", range(3))
def test_the_end_of_the_stream_inside_a_message_shows(
    seed: int, destination: Destinations, feed_decoder: Feed
) -> None:
    ends, position = {0}, 0
    for message, payload in CONVERSATION:
        position += len(encode(message, len(payload))) + len(payload)
        ends.add(position)
    numbers = random.Random(seed)
    for end in [*ends, *numbers.sample(range(len(STREAM)), 100)]:
        decoder = Decoder(destination().place)
        feed_decoder(decoder, STREAM[:end], repeat(numbers.randint(1, 9000)))
        assert decoder.inside_message is (end not in ends)


class Clocked:
    """Feeds a decoder with bytes at given times."""

    def __init__(self) -> None:
        self.memory = bytearray(1 << 16)
        self.decoder = Decoder(lambda message, nbytes: [memoryview(self.memory)[:nbytes]])

    def feed(self, data: bytes, now_ns: int) -> list[Arrival]:
        arrivals = []
        while data:
            buffer = self.decoder.get_buffer()
            n = min(len(buffer), len(data))
            buffer[:n] = data[:n]
            data = data[n:]
            self.decoder.buffer_updated(n, now_ns)
            while (received := self.decoder.next_message()) is not None:
                arrivals.append(received.arrival)
        return arrivals


HEAD = encode(Gradients(0, (Range(0, 1),)), 10_000)
WHOLE_NBYTES = len(HEAD) + 10_000


def test_an_arrival_tells_the_first_piece_from_the_rest() -> None:
    clocked = Clocked()
    assert clocked.feed(HEAD + bytes(1000), 5_000_000) == []
    assert clocked.feed(bytes(4000), 6_000_000) == []
    [arrival] = clocked.feed(bytes(5000), 9_000_000)
    assert arrival == Arrival(WHOLE_NBYTES, len(HEAD) + 1000, 5_000_000, 9_000_000, False)


def test_what_a_full_buffer_left_behind_belongs_to_the_first_piece_however_late_it_is_read() -> (
    None
):
    clocked = Clocked()
    nbytes = 60_000
    head = encode(Gradients(0, (Range(0, 4),)), nbytes)
    full = len(clocked.decoder.get_buffer()) - len(head)
    clocked.feed(head + bytes(full), 5_000_000)
    clocked.feed(bytes(9000), 5_400_000)
    clocked.feed(bytes(5000), 5_400_001)
    [arrival] = clocked.feed(bytes(nbytes - full - 14_000), 9_000_000)
    assert arrival == Arrival(
        len(head) + nbytes, len(head) + full + 9000, 5_000_000, 9_000_000, False
    )


def test_a_header_in_two_pieces_counts_from_the_second() -> None:
    clocked = Clocked()
    clocked.feed(HEAD[:30], 1_000_000)
    clocked.feed(HEAD[30:] + bytes(500), 4_000_000)
    [arrival] = clocked.feed(bytes(9500), 9_000_000)
    assert arrival == Arrival(WHOLE_NBYTES, len(HEAD) + 500, 4_000_000, 9_000_000, False)


def test_a_message_in_one_piece_has_no_rest() -> None:
    clocked = Clocked()
    small = encode(Gradients(0, (Range(0, 1),)), 100, BACK_TO_BACK) + bytes(100)
    [first, second] = clocked.feed(small + small, 7_000_000)
    assert first == second == Arrival(len(small), len(small), 7_000_000, 7_000_000, True)


def test_a_message_that_began_with_the_end_of_another_counts_from_there() -> None:
    clocked = Clocked()
    clocked.feed(HEAD + bytes(1000), 1_000_000)
    [first] = clocked.feed(bytes(9000) + HEAD + bytes(100), 3_000_000)
    [second] = clocked.feed(bytes(9900), 8_000_000)
    assert first.last_ns == 3_000_000
    assert second == Arrival(WHOLE_NBYTES, len(HEAD) + 100, 3_000_000, 8_000_000, False)


@pytest.mark.parametrize("seed", range(4))
def test_garbage_and_mutated_streams_raise_the_documented_error_only(
    seed: int, destination: Destinations, feed_decoder: Feed
) -> None:
    numbers = random.Random(seed)
    welcome = encode(Welcome(1, "r", 0, 1, 2, None, 0, 9, False, {"a": [1, 2]}))
    streams = [STREAM[: len(STREAM) // 8], welcome, HEAD, encode(Hello()), encode(Leave())]
    for _ in range(5000):
        if numbers.random() < 0.4:
            stream = numbers.randbytes(numbers.randint(1, 200))
            if numbers.random() < 0.7:  # past the magic, to where it hurts
                stream = MAGIC + bytes([numbers.randint(1, 10), numbers.randint(0, 1)]) + stream
        else:
            mutated = bytearray(numbers.choice(streams))
            for _ in range(numbers.randint(1, 5)):
                mutated[numbers.randrange(min(len(mutated), 300))] = numbers.randrange(256)
            stream = bytes(mutated)

        def place(message: Message, nbytes: int) -> list[memoryview]:
            if nbytes > 100_000:
                raise RemoteProtocolError("too much")
            return [memoryview(bytearray(nbytes))]

        try:
            for received in feed_decoder(Decoder(place), stream, repeat(numbers.randint(1, 500))):
                assert received.message.kind in MessageKind
        except RemoteProtocolError:
            pass  # the one error that a stream may cause


def test_a_long_header_makes_room_for_itself_only():
    landed = memoryview(bytearray(1 << 18))
    decoder = Decoder(lambda message, nbytes: [landed] if nbytes else [])
    usual = len(decoder.get_buffer())
    text = "x" * (4 * usual)
    message = Welcome(1, "run", 0, 1, 1, None, 0, 1, False, {"text": text})
    for data in (encode(message), encode(Gradients(0, (Range(0, 1),)), 1 << 18)):
        for start in range(0, len(data), 1000):
            piece = data[start : start + 1000]
            while piece:
                buffer = decoder.get_buffer()
                n = min(len(buffer), len(piece))
                buffer[:n] = piece[:n]
                decoder.buffer_updated(n, 0)
                piece = piece[n:]
                decoder.next_message()
    assert len(decoder.get_buffer()) == 1 << 18, "the payload goes into place, not into scratch"
