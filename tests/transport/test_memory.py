"""What is particular to channels in memory; the contract is in test_channel.py."""

from __future__ import annotations

import random
from itertools import repeat

import pytest

from dynacomm_async.ranges import Range
from dynacomm_async.transport import memory_pair
from dynacomm_async.wire import Gradients, Message, Role


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pieces", ["single bytes", "random"])
async def test_the_stream_may_be_cut_anywhere(
    pieces: str, seed: int, new_recorder: type, handshake: tuple[Message, ...]
) -> None:
    numbers = random.Random(seed)
    sizes = repeat(1) if pieces == "single bytes" else iter(lambda: numbers.randint(1, 900), None)
    recorders = {}

    def begin(role: Role) -> object:
        return lambda channel: recorders.setdefault(role, new_recorder(channel))

    server, worker = memory_pair(begin(Role.SERVER), begin(Role.WORKER), piece_nbytes=sizes)
    for sender, message in zip((worker, server) * 2, handshake, strict=True):
        await sender.send(message)
        receiver = recorders[Role.SERVER if sender is worker else Role.WORKER]
        await receiver.until_received(
            2 if message is handshake[2] or message is handshake[3] else 1
        )
    payloads = [numbers.randbytes(numbers.randint(0, 3000)) for _ in range(5)]
    for step, payload in enumerate(payloads):
        await worker.send(Gradients(step, (Range(0, 1),)), [memoryview(payload)])
    at_server = recorders[Role.SERVER]
    await at_server.until_received(2 + len(payloads))
    assert at_server.payloads[2:] == payloads
    assert [message.step for message in at_server.messages[2:]] == list(range(5))
    worker.abort()
    for recorder in recorders.values():
        await recorder.until_lost()
