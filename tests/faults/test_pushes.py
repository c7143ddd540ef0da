"""Connections cut before, inside and after a push: none is lost, doubled, or out of place.

Rounds of (slot, step, cell) are judged by the replay: a push that was lost, or counted twice, or
counted for another step changes its bits.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import tracemalloc
from itertools import repeat

import pytest

from dynacomm_async.errors import ChannelBroken
from dynacomm_async.optim import SGD, Constant
from dynacomm_async.server.server import ParameterServer
from dynacomm_async.server.store import Training
from dynacomm_async.transport import memory_pair
from dynacomm_async.wire.grid import LayerSpec
from dynacomm_async.wire.messages import Gradients
from dynacomm_async.worker.line import Line

TRAINING = Training(SGD(0.9), Constant(0.05))
LAYERS = (LayerSpec("a", 40, decay=2, statistics=3), LayerSpec("b", 4097), LayerSpec("c", 9))


class Faulty(Line):
    """A line that breaks around some of its pushes.

    A quarter breaks before the push, a tenth inside it, a half after it has left: then the server
    has it, and the worker does not know.
    """

    tally: dict[str, int]
    numbers: random.Random
    ends: tuple

    async def send(self, message, payload=(), *, back_to_back=False):
        if not isinstance(message, Gradients):
            return await super().send(message, payload, back_to_back=back_to_back)
        self.tally["pushes"] += 1
        where = self.numbers.choices(["before", "inside", "after", ""], [25, 10, 50, 15])[0]
        if where:
            self.tally[where] += 1
        if where == "before":
            self.channel.abort(ChannelBroken("cut before"))
        if where == "inside":
            asyncio.get_running_loop().call_soon(self._cut)  # when the first piece has gone
        await super().send(message, payload, back_to_back=back_to_back)
        if where == "after":
            self.channel.abort(ChannelBroken("cut after"))
        return None

    def _cut(self):
        for end in self.ends:
            end.abort(ChannelBroken("cut inside"))


class Faults:
    """Opens lines that break."""

    def __init__(self, server, numbers):
        self._server, self._numbers = server, numbers
        self.tally = dict.fromkeys(["pushes", "before", "inside", "after"], 0)

    async def reach(self, make_hello):
        while True:
            line = self._open()
            try:
                return line, await line.greet(make_hello())
            except ChannelBroken:
                await asyncio.sleep(0)

    def _open(self):
        lines = []
        ends = memory_pair(
            self._server.connect_channel,
            lambda channel: lines.append(Faulty(channel)) or lines[-1],
            piece_nbytes=repeat(2000),
        )
        (line,) = lines
        line.tally, line.numbers, line.ends = self.tally, self._numbers, ends
        return line


async def push_through(toy, faults, seed, steps):
    toy, numbers = type(toy)(LAYERS), random.Random(seed)
    async with ParameterServer(
        toy.layers,
        workers=2,
        steps=steps,
        training=TRAINING,
        initial=toy.initial,
        initial_statistics=toy.initial_statistics,
    ) as server:
        faulty = Faults(server, numbers)
        arenas = await asyncio.gather(
            *(faults.work_in_memory(toy, faulty, numbers) for _ in range(2))
        )
        result = await server.finished()
    parameters, statistics = toy.replay(2, steps, TRAINING)
    assert result.parameters.tobytes() == parameters.tobytes()
    for arena in arenas:
        assert arena.tobytes() == parameters.tobytes() + statistics.tobytes()
    return faulty.tally


async def test_pushes_around_which_connections_break_count_once_each(toy, loop_factory, faults):
    tally = await push_through(toy, faults, 7, 30)
    print(tally)
    assert min(tally.values()) > 5


@pytest.fixture
def _unlogged():
    """Pytest keeps every line that is logged."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.soak
@pytest.mark.usefixtures("_unlogged")
@pytest.mark.asyncio
@pytest.mark.timeout(900)
async def test_ten_thousand_pushes_count_once_each_in_memory_that_does_not_grow(toy, faults):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    await push_through(toy, faults, seed, 50)
    gc.collect()
    tracemalloc.start()
    await push_through(toy, faults, seed + 1, 100)
    gc.collect()
    short, _ = tracemalloc.get_traced_memory()
    tally = await push_through(toy, faults, seed + 2, 4500)
    gc.collect()
    long, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(tally, f"memory {short} -> {long} bytes")
    assert tally["pushes"] >= 10_000
    assert long - short < 1 << 20
