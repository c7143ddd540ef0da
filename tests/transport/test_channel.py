"""The contract that every channel keeps: TCP on both loops, and memory in pieces of any size."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from itertools import pairwise
from typing import Any

import pytest

from dynacomm_async.errors import (
    ChannelBroken,
    ChannelClosed,
    ChannelError,
    ConfigError,
    LocalProtocolError,
    PeerError,
    RemoteProtocolError,
)
from dynacomm_async.ranges import Range
from dynacomm_async.transport import new_event_loop
from dynacomm_async.wire import (
    End,
    Error,
    Gradients,
    Heartbeat,
    Hello,
    Leave,
    Message,
    Parameters,
    Role,
)

OpenPair = Callable[[], AbstractAsyncContextManager[Any]]

KINDS = {
    "tcp-default": new_event_loop,
    "tcp-stock": asyncio.new_event_loop,
    "memory": new_event_loop,
    "memory-crumbs": asyncio.new_event_loop,
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def loop_factory(kind: str) -> Callable[[], asyncio.AbstractEventLoop]:
    return KINDS[kind]


PUSH = Gradients(0, (Range(0, 1),))
HUGE_NBYTES = 64 << 20


def make_payload(nbytes: int, seed: int = 0) -> memoryview:
    return memoryview(random.Random(seed).randbytes(nbytes))


async def test_messages_arrive_in_order(open_pair: OpenPair) -> None:
    sent = [Heartbeat(i, False, i) for i in range(200)]
    async with open_pair() as pair:
        await pair.greet()
        for message in sent:
            await pair.worker.send(message)
        await pair.at_server.until_received(len(sent))
        assert pair.at_server.messages == sent


@pytest.mark.parametrize("sender", Role)
async def test_payloads_land_bit_for_bit_in_the_memory_that_was_placed(
    open_pair: OpenPair, sender: Role
) -> None:
    message = PUSH if sender is Role.WORKER else Parameters(1, (Range(0, 1),))
    sizes = [0, 1, 4095, 4096, 4097, (256 << 10) - 1, 256 << 10, (256 << 10) + 1, 3 << 20]
    async with open_pair() as pair:
        await pair.greet()
        channel, recorder = pair.end(sender)[0], pair.end(sender.other)[1]
        for count, nbytes in enumerate(sizes, 1):
            payload, memory = make_payload(nbytes, seed=nbytes), bytearray(nbytes + 2)
            recorder.views = [memoryview(memory)[1:-1]]
            await channel.send(message, [payload])
            await recorder.until_received(count)
            assert memory == b"\0" + payload + b"\0"


async def test_a_payload_of_several_views_lands_in_several_places(open_pair: OpenPair) -> None:
    payload, memory = make_payload(700_000), bytearray(700_000)
    edges = [0, 1, 1, 5000, 300_000, 300_007, 700_000]
    targets = [0, 10, 400_000, 400_000, 700_000]
    async with open_pair() as pair:
        await pair.greet()
        pair.at_server.views = [memoryview(memory)[a:b] for a, b in pairwise(targets)]
        views = [payload[a:b] for a, b in pairwise(edges)]
        await pair.worker.send(PUSH, views)
        await pair.at_server.until_received(1)
        assert memory == payload


async def test_both_directions_carry_at_once(open_pair: OpenPair) -> None:
    up, down = make_payload(2 << 20, seed=1), make_payload(2 << 20, seed=2)
    async with open_pair() as pair:
        await pair.greet()
        await asyncio.gather(
            pair.worker.send(PUSH, [up]), pair.server.send(Parameters(1, (Range(0, 1),)), [down])
        )
        await pair.at_server.until_received(1)
        await pair.at_worker.until_received(1)
        assert (pair.at_server.payloads, pair.at_worker.payloads) == ([up], [down])


async def test_two_senders_at_once_keep_their_messages_whole(open_pair: OpenPair) -> None:
    sizes = [10, 600_000, 5000, 300_000, 0, 4097] * 2

    async with open_pair() as pair:
        await pair.greet()

        async def send_all(step: int) -> None:
            for nbytes in sizes:
                await pair.worker.send(
                    Gradients(step, (Range(0, 1),)), [memoryview(bytes([step]) * nbytes)]
                )

        await asyncio.gather(send_all(1), send_all(2))
        await pair.at_server.until_received(2 * len(sizes))
        steps = [message.step for message in pair.at_server.messages]
        for step in (1, 2):
            own = [p for s, p in zip(steps, pair.at_server.payloads, strict=True) if s == step]
            assert own == [bytes([step]) * nbytes for nbytes in sizes]


async def test_the_receiver_learns_whether_the_sender_was_idle(open_pair: OpenPair) -> None:
    async with open_pair() as pair:
        await pair.greet()
        for back_to_back in (False, True):
            await pair.worker.send(PUSH, [memoryview(b"abc")], back_to_back=back_to_back)
        await pair.at_server.until_received(2)
        arrivals = [received.arrival for received in pair.at_server.received]
        assert [arrival.back_to_back for arrival in arrivals] == [False, True]
        assert all(0 < each.first_nbytes <= each.nbytes for each in arrivals)
        assert all(0 < each.first_ns <= each.last_ns for each in arrivals)
        assert arrivals[0].last_ns <= arrivals[1].last_ns


async def test_a_misused_channel_goes_on(open_pair: OpenPair) -> None:
    async with open_pair() as pair:
        with pytest.raises(LocalProtocolError, match="may not send GRADIENTS"):
            await pair.worker.send(PUSH, [memoryview(b"abc")])
        await pair.worker.send(Hello())
        await pair.at_server.until_received(1)
        assert pair.at_server.messages == [Hello()]


async def test_each_end_knows_who_is_at_the_other(open_pair: OpenPair) -> None:
    async with open_pair() as pair:
        assert pair.server.peer
        assert pair.worker.peer != pair.server.peer


# -- ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sender", "last"), [(Role.WORKER, Leave()), (Role.SERVER, End(9))], ids=["leave", "end"]
)
async def test_closing_after_the_last_word_is_an_end_in_order_for_both(
    open_pair: OpenPair, sender: Role, last: Message
) -> None:
    async with open_pair() as pair:
        await pair.greet()
        (channel, recorder), (_, other) = pair.end(sender), pair.end(sender.other)
        await channel.send(last)
        await channel.close()
        assert isinstance(recorder.error, ChannelClosed)
        assert isinstance(await other.until_lost(), ChannelClosed)
        assert other.messages == [last]


@pytest.mark.parametrize("closer", Role)
async def test_closing_without_a_word_breaks_the_channel_of_the_other(
    open_pair: OpenPair, closer: Role
) -> None:
    async with open_pair() as pair:
        await pair.greet()
        (channel, recorder), (_, other) = pair.end(closer), pair.end(closer.other)
        await channel.close()
        assert isinstance(recorder.error, ChannelClosed)
        assert isinstance(await other.until_lost(), ChannelBroken)


async def test_what_was_sent_before_closing_still_arrives(open_pair: OpenPair) -> None:
    payload = make_payload(3 << 20)
    async with open_pair() as pair:
        await pair.greet()
        await pair.worker.send(PUSH, [payload])
        await pair.worker.send(Leave())
        await pair.worker.close()
        await pair.at_server.until_lost()
        assert pair.at_server.messages == [PUSH, Leave()]
        assert pair.at_server.payloads[0] == payload


async def test_ending_twice_is_ending_once(open_pair: OpenPair) -> None:
    async with open_pair() as pair:
        await pair.worker.close()
        await pair.worker.close()
        pair.worker.abort()
        pair.worker.abort()
        await pair.at_server.until_lost()


async def test_an_abort_inside_a_message_leaves_nothing_of_it_at_the_other_side(
    open_pair: OpenPair,
) -> None:
    payload = memoryview(bytes(HUGE_NBYTES))
    async with open_pair() as pair:
        await pair.greet()
        pair.at_server.on_place = lambda message: pair.worker.abort()
        with pytest.raises(ChannelClosed):
            await pair.worker.send(PUSH, [payload])
        assert isinstance(await pair.at_server.until_lost(), ChannelBroken)
        assert pair.at_server.messages == []


async def test_a_send_cancelled_inside_a_message_aborts_the_channel(open_pair: OpenPair) -> None:
    payload = memoryview(bytes(HUGE_NBYTES))
    async with open_pair() as pair:
        await pair.greet()
        sending = asyncio.create_task(pair.worker.send(PUSH, [payload]))
        pair.at_server.on_place = lambda message: sending.cancel() and None
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert isinstance(await pair.at_server.until_lost(), ChannelBroken)
        assert isinstance(await pair.at_worker.until_lost(), ChannelClosed)
        assert pair.at_server.messages == []


async def test_a_send_cancelled_before_its_turn_leaves_the_channel_alone(
    open_pair: OpenPair,
) -> None:
    payload = make_payload(3 << 20)
    async with open_pair() as pair:
        await pair.greet()
        first = asyncio.create_task(pair.worker.send(PUSH, [payload]))
        second = asyncio.create_task(pair.worker.send(PUSH, [payload]))
        pair.at_server.on_place = lambda message: second.cancel() and None
        await first
        with pytest.raises(asyncio.CancelledError):
            await second
        pair.at_server.on_place = lambda message: None
        await pair.worker.send(Heartbeat(1, False, 0))
        await pair.at_server.until_received(2)
        assert pair.at_server.messages == [PUSH, Heartbeat(1, False, 0)]


@pytest.mark.parametrize("sender", Role)
async def test_an_error_reaches_the_other_side_with_its_code(
    open_pair: OpenPair, sender: Role
) -> None:
    async with open_pair() as pair:
        await pair.greet()
        (channel, recorder), (_, other) = pair.end(sender), pair.end(sender.other)
        await channel.send(Error("run-full", "no place left"))
        error = await other.until_lost()
        assert isinstance(error, PeerError)
        assert (error.code, str(error)) == ("run-full", "no place left")
        assert other.messages == []
        assert isinstance(await recorder.until_lost(), ChannelClosed)


async def test_an_error_is_heard_by_a_sender_in_the_middle_of_a_message(
    open_pair: OpenPair,
) -> None:
    payload = memoryview(bytes(HUGE_NBYTES))
    said: list[asyncio.Task[None]] = []
    async with open_pair() as pair:
        await pair.greet()

        def complain(message: Message) -> None:
            error = Error("worker-lost", "worker 1 was lost")
            said.append(asyncio.create_task(pair.server.send(error)))

        pair.at_server.on_place = complain
        with pytest.raises(PeerError, match="worker 1 was lost"):
            await pair.worker.send(PUSH, [payload])
        await asyncio.gather(*said)
        assert isinstance(await pair.at_worker.until_lost(), PeerError)
        assert isinstance(await pair.at_server.until_lost(), ChannelClosed)
        assert pair.at_server.messages == []


async def test_a_message_that_may_not_come_ends_the_channel(open_pair: OpenPair) -> None:
    def refuse(message: Message) -> None:
        raise RemoteProtocolError("not this one")

    async with open_pair() as pair:
        await pair.greet()
        pair.at_server.on_place = refuse
        with suppress(ChannelBroken):  # it may learn of the end while it sends
            await pair.worker.send(PUSH, [memoryview(b"abc")])
        error = await pair.at_server.until_lost()
        assert isinstance(error, RemoteProtocolError)
        assert str(error) == "not this one"
        assert pair.at_server.messages == []
        assert isinstance(await pair.at_worker.until_lost(), ChannelBroken)


async def test_a_handler_that_raises_ends_the_channel_with_that(open_pair: OpenPair) -> None:
    def refuse(message: Message) -> None:
        raise ConfigError("cannot work")

    async with open_pair() as pair:
        await pair.greet()
        pair.at_server.on_handle = refuse
        await pair.worker.send(Heartbeat(1, False, 0))
        assert isinstance(await pair.at_server.until_lost(), ConfigError)
        assert isinstance(await pair.at_worker.until_lost(), ChannelBroken)


async def test_a_handler_that_aborts_is_handed_nothing_more(open_pair: OpenPair) -> None:
    async with open_pair() as pair:
        await pair.greet()
        pair.at_server.on_handle = lambda message: pair.server.abort()
        sending = [pair.worker.send(Heartbeat(i, False, 0)) for i in range(3)]
        results = await asyncio.gather(*sending, return_exceptions=True)
        assert all(result is None or isinstance(result, ChannelError) for result in results)
        assert isinstance(await pair.at_server.until_lost(), ChannelClosed)
        assert pair.at_server.messages == [Heartbeat(0, False, 0)]


async def test_a_send_after_the_end_raises_what_ended_the_channel(open_pair: OpenPair) -> None:
    async with open_pair() as pair:
        await pair.greet()
        await pair.server.send(Error("worker-lost", "worker 1 was lost"))
        await pair.at_worker.until_lost()
        await pair.at_server.until_lost()
        for _ in range(2):
            with pytest.raises(PeerError, match="worker 1 was lost"):
                await pair.worker.send(PUSH)
            with pytest.raises(ChannelClosed):
                await pair.server.send(Heartbeat(1, False, 0))
    async with open_pair() as pair:
        await pair.greet()
        await pair.server.close()
        await pair.at_worker.until_lost()
        with pytest.raises(ChannelBroken):
            await pair.worker.send(PUSH, [memoryview(b"abc")])
        with pytest.raises(ChannelClosed):
            await pair.server.send(Heartbeat(1, False, 0))


async def test_whoever_waits_for_a_turn_is_told_of_the_end(open_pair: OpenPair) -> None:
    payload = memoryview(bytes(HUGE_NBYTES))
    async with open_pair() as pair:
        await pair.greet()
        pair.at_server.on_place = lambda message: pair.server.abort()
        results = await asyncio.gather(
            *(pair.worker.send(PUSH, [payload]) for _ in range(3)), return_exceptions=True
        )
        assert [type(result) for result in results] == [ChannelBroken] * 3
