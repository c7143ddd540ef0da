"""Decoder and session states together, one end of a connection."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import pytest

from dynacomm_async.errors import LocalProtocolError, PeerError, RemoteProtocolError
from dynacomm_async.ranges import Range
from dynacomm_async.wire import (
    BACK_TO_BACK,
    PREFIX_NBYTES,
    Connection,
    End,
    Error,
    Gradients,
    Heartbeat,
    Hello,
    Join,
    Leave,
    Message,
    MessageKind,
    Parameters,
    Prefix,
    Received,
    Role,
    Subscription,
    Welcome,
)

WELCOME = Welcome(1, "r", 0, 1, 1, None, 0, 1, False)
JOIN = Join("f", Subscription(0, ((Range(0, 1),),)))
PARAMETERS = Parameters(0, (Range(0, 1),))
GRADIENTS = Gradients(0, (Range(0, 1),))


class Side:
    """A connection that keeps what it receives."""

    def __init__(self, role: Role) -> None:
        self.memory = bytearray(100_000)
        self.connection = Connection(role, self.place)
        self.placed: list[Message] = []

    def place(self, message: Message, payload_nbytes: int) -> Sequence[memoryview]:
        self.placed.append(message)
        return [memoryview(self.memory)[:payload_nbytes]]

    def take(self, data: bytes) -> list[Message]:
        received: list[Received] = []
        while data:
            buffer = self.connection.get_buffer()
            n = min(len(buffer), len(data))
            buffer[:n] = data[:n]
            data = data[n:]
            self.connection.buffer_updated(n, 0)
            while (message := self.connection.next_message()) is not None:
                received.append(message)
        return [each.message for each in received]


@pytest.fixture
def ends() -> dict[Role, Side]:
    return {role: Side(role) for role in Role}


def say(ends: dict[Role, Side], sender: Role, message: Message, payload: bytes = b"") -> None:
    data = ends[sender].connection.send(message, len(payload)) + payload
    assert ends[sender.other].take(data) == [message]


@pytest.fixture
def members(ends: dict[Role, Side]) -> dict[Role, Side]:
    say(ends, Role.WORKER, Hello())
    say(ends, Role.SERVER, WELCOME)
    say(ends, Role.WORKER, JOIN)
    say(ends, Role.SERVER, PARAMETERS, b"abcd")
    return ends


def test_two_ends_understand_each_other_up_to_the_end(members: dict[Role, Side]) -> None:
    assert bytes(members[Role.WORKER].memory[:4]) == b"abcd"
    say(members, Role.WORKER, GRADIENTS, b"efgh")
    say(members, Role.SERVER, Heartbeat(1, False, 0))
    say(members, Role.SERVER, End(1))
    say(members, Role.WORKER, Leave())
    assert all(end.connection.ended_in_order for end in members.values())


def test_back_to_back_is_said_in_the_prefix(members: dict[Role, Side]) -> None:
    connection = members[Role.WORKER].connection
    assert Prefix.unpack(connection.send(GRADIENTS, 4)).flags == 0
    assert Prefix.unpack(connection.send(GRADIENTS, 4, back_to_back=True)).flags == BACK_TO_BACK


def test_what_may_not_be_sent_now_is_refused_and_changes_nothing(ends: dict[Role, Side]) -> None:
    with pytest.raises(LocalProtocolError, match="may not send GRADIENTS"):
        ends[Role.WORKER].connection.send(GRADIENTS, 0)
    say(ends, Role.WORKER, Hello())


def test_a_header_that_the_other_side_would_refuse_is_not_sent(ends: dict[Role, Side]) -> None:
    with pytest.raises(LocalProtocolError, match=r"HELLO has a header .* at most 4096"):
        ends[Role.WORKER].connection.send(Hello(run="r" * 5000), 0)
    say(ends, Role.WORKER, Hello())


def test_a_message_out_of_turn_is_refused_before_its_header_costs_memory(
    ends: dict[Role, Side],
) -> None:
    prefix = Prefix(MessageKind.GRADIENTS, 0, 1 << 20, 2**40, 0).pack()
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError, match="state 'new' may not send GRADIENTS"):
            ends[Role.SERVER].take(prefix)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000
    assert ends[Role.SERVER].placed == []


def test_an_error_is_raised_with_its_code(members: dict[Role, Side]) -> None:
    data = members[Role.SERVER].connection.send(Error("worker-lost", "worker 1 was lost"), 0)
    with pytest.raises(PeerError, match="worker 1 was lost") as caught:
        members[Role.WORKER].take(data)
    assert caught.value.code == "worker-lost"
    assert members[Role.WORKER].connection.ended_in_order


@pytest.mark.parametrize("n_before", [0, 5, PREFIX_NBYTES + 1, 60, 50_000])
def test_who_has_said_an_error_hears_nothing_more_and_complains_of_nothing(
    members: dict[Role, Side], n_before: int
) -> None:
    server = members[Role.SERVER]
    stream = members[Role.WORKER].connection.send(GRADIENTS, 80_000) + bytes(80_000)
    assert server.take(stream[:n_before]) == []
    server.connection.send(Error("worker-lost", "worker 1 was lost"), 0)
    assert server.take(stream[n_before:] + b"whatever comes" * 10_000) == []
    assert server.connection.ended_in_order


def test_a_stream_cut_off_inside_the_last_message_did_not_end_in_order(
    members: dict[Role, Side],
) -> None:
    data = members[Role.SERVER].connection.send(End(1), 40) + bytes(40)
    worker = members[Role.WORKER]
    assert worker.take(data[:-1]) == []
    assert not worker.connection.ended_in_order
    assert worker.take(data[-1:]) == [End(1)]
    assert worker.connection.ended_in_order


def test_a_stream_that_just_stops_did_not_end_in_order(members: dict[Role, Side]) -> None:
    assert not any(end.connection.ended_in_order for end in members.values())
