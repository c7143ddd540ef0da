"""Slices of any size, in any order, at any split of the byte stream: always the same bits."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager
from itertools import repeat

import numpy as np
import pytest

from dynacomm_async.optim import SGD, Constant
from dynacomm_async.ranges import Range
from dynacomm_async.schedule import Estimator, Plan
from dynacomm_async.server import ParameterServer, Training
from dynacomm_async.transport import Address, LoopThread, new_event_loop
from dynacomm_async.transport.memory import memory_pair
from dynacomm_async.wire.grid import LayerSpec
from dynacomm_async.wire.messages import (
    End,
    Gradients,
    Hello,
    Leave,
    Parameters,
    Report,
    Subscription,
)
from dynacomm_async.worker import FixedPlan
from dynacomm_async.worker.board import Board
from dynacomm_async.worker.client import Arenas, Client
from dynacomm_async.worker.line import Line
from dynacomm_async.worker.step import Phase

STEPS = 4
TRAINING = Training(SGD(0.9), Constant(0.05), weight_decay=0.01)
SMALL = (LayerSpec("a", 5, decay=3, statistics=2), LayerSpec("b", 70), LayerSpec("c", 1, decay=1))
ODD_SIZES = (1, 2, 3, 7, 15, 16, 17, 100, 4095, 5000, 65536)


def one_byte(numbers):
    return repeat(1)


def odd_pieces(numbers):
    return iter(lambda: numbers.choice(ODD_SIZES), None)


def serve(toy, *, workers):
    return ParameterServer(
        toy.layers,
        workers=workers,
        steps=STEPS,
        training=TRAINING,
        initial=toy.initial,
        initial_statistics=toy.initial_statistics,
    )


def check_result(toy, n_workers, result):
    parameters, statistics = toy.replay(n_workers, STEPS, TRAINING)
    assert result.parameters.tobytes() == parameters.tobytes()
    assert result.statistics.tobytes() == statistics.tobytes()


@asynccontextmanager
async def splitting(target, make_sizes, numbers):
    """A TCP relay that cuts both streams into pieces; yields its address."""
    tasks = set()

    async def pump(reader, writer, sizes):
        try:
            while data := await reader.read(65536):
                while data:
                    size = next(sizes)
                    writer.write(data[:size])
                    data = data[size:]
                    await writer.drain()
                    await asyncio.sleep(0)  # so that it leaves by itself
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def accept(reader, writer):
        there_reader, there_writer = await asyncio.open_connection(*target)
        for source, sink in ((reader, there_writer), (there_reader, writer)):
            tasks.add(asyncio.create_task(pump(source, sink, make_sizes(numbers))))

    relay = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield Address(*relay.sockets[0].getsockname()[:2])
    finally:
        relay.close()
        await relay.wait_closed()
        await asyncio.gather(*tasks)


def random_plans(numbers):
    def make(grid, estimator):
        n_layers = len(grid.layers)
        pull, push = (
            [cut for cut in range(1, n_layers) if numbers.random() < 0.5] for _ in range(2)
        )
        return FixedPlan(Plan.from_cuts("random", n_layers, pull, push))

    return make


@pytest.mark.parametrize("session_loop", [new_event_loop, asyncio.new_event_loop])
@pytest.mark.parametrize(("layers", "make_sizes"), [(SMALL, one_byte), (None, odd_pieces)])
async def test_plans_and_splits_of_the_stream_do_not_change_a_bit(
    toy, loop_factory, session_loop, layers, make_sizes
):
    toy = toy if layers is None else type(toy)(layers)
    numbers = random.Random(11)
    with LoopThread(session_loop) as io:
        async with (
            serve(toy, workers=2) as server,
            splitting(server.address, make_sizes, numbers) as relay,
        ):
            options = {"plans": random_plans(numbers), "io": io}
            work = [asyncio.to_thread(toy.work, relay, **options) for _ in range(2)]
            ends = await asyncio.gather(*work)
            result = await server.finished()

    check_result(toy, 2, result)
    for end in ends:
        assert end.parameters.tobytes() == result.parameters.tobytes()


def random_slices(n_cells, numbers):
    """All cells in messages of one to three runs, in any order."""
    edges = sorted(numbers.sample(range(1, n_cells), numbers.randint(0, n_cells - 1)))
    runs = [Range(a, b - a) for a, b in zip([0, *edges], [*edges, n_cells], strict=True)]
    numbers.shuffle(runs)
    messages = []
    while runs:
        n = numbers.randint(1, 3)
        messages.append(tuple(sorted(runs[:n])))
        runs = runs[n:]
    return messages


async def work_in_slices(toy, address, connect_raw, numbers):
    """A worker that pulls and pushes random slices, written on nothing but messages."""
    grid = toy.grid

    def subscribe(version):
        slices = tuple(random_slices(grid.n_parameter_cells, numbers))
        return Subscription(version, slices, barrier=numbers.random() < 0.5)

    def floats(ranges):
        return [slice(*grid.floats(*cells)) for cells in ranges]

    async def pull(version):
        missing = grid.n_parameters
        while missing:
            message, payload = await worker.read()
            assert isinstance(message, Parameters)
            assert message.version == version
            values = np.frombuffer(payload, np.float32)
            for part in floats(message.ranges):
                size = part.stop - part.start
                parameters[part], values = values[:size], values[size:]
                missing -= size

    async with connect_raw(address) as worker:
        welcome = await worker.join(grid, subscription=subscribe(0))
        parameters = np.empty(grid.n_parameters, np.float32)
        for step in range(STEPS):
            await pull(step)
            values = toy.contribution(parameters, welcome.slot, step)
            extras = (subscribe(step + 1), Report(toy.loss(welcome.slot, step), 1))
            for ranges in random_slices(grid.n_cells, numbers):
                payload = b"".join(values[part].tobytes() for part in floats(ranges))
                worker.send(Gradients(step, ranges, *extras), payload)
                extras = ()
                await asyncio.sleep(0)
        await pull(STEPS)
        message, _ = await worker.read()
        assert isinstance(message, End)
        worker.send(Leave())
        return parameters


@pytest.mark.parametrize("seed", range(4))
async def test_slices_in_any_order_do_not_change_a_bit(toy, loop_factory, connect_raw, seed):
    numbers = random.Random(seed)
    async with (
        serve(toy, workers=3) as server,
        splitting(server.address, odd_pieces, numbers) as relay,
    ):
        work = [work_in_slices(toy, relay, connect_raw, numbers) for _ in range(3)]
        ends = await asyncio.gather(*work)
        result = await server.finished()

    check_result(toy, 3, result)
    for parameters in ends:
        assert parameters.tobytes() == result.parameters.tobytes()


async def work_in_memory(toy, line, numbers):
    """A worker on the server's own loop: no socket, no thread."""
    grid, arenas, board = toy.grid, Arenas.allocate(toy.grid), Board(len(toy.layers))
    estimator = Estimator([(spec.name, 4 * spec.count) for spec in toy.layers])
    plans = random_plans(numbers)(grid, estimator)
    welcome = await line.greet(Hello())
    slot = welcome.slot
    client = Client(welcome, grid, arenas, board, plans, estimator)
    client.join(line)

    async def woken(register, *key):
        over = asyncio.get_running_loop().create_future()
        register(*key, lambda: over.done() or over.set_result(None))
        await over

    n_layers = len(toy.layers)
    for step in range(STEPS):
        for layer in range(n_layers):
            await woken(board.when, Phase.FORWARD, layer, step)
            assert board.is_granted(Phase.FORWARD, layer, step)
        parameters = arenas.incoming[: grid.n_parameters]
        arenas.outgoing[:] = toy.contribution(parameters, slot, step)
        client.report(step, 0, Report(0.0, 1))
        for layer in reversed(range(n_layers)):
            client.gradient_ready(step, 0, layer)
    await woken(board.when_ended)
    assert board.ended
    await client.leave()
    return arenas.incoming


@pytest.mark.parametrize(("layers", "make_sizes"), [(SMALL, one_byte), (None, odd_pieces)])
async def test_a_run_in_memory_gives_the_same_bits(toy, loop_factory, layers, make_sizes):
    toy = toy if layers is None else type(toy)(layers)
    numbers = random.Random(5)
    lines = []

    def make_line(channel):
        lines.append(Line(channel))
        return lines[-1]

    async with serve(toy, workers=2) as server:
        for _ in range(2):
            memory_pair(server.connect_channel, make_line, piece_nbytes=make_sizes(numbers))
        ends = await asyncio.gather(*(work_in_memory(toy, line, numbers) for line in lines))
        result = await server.finished()

    check_result(toy, 2, result)
    whole = np.concatenate([result.parameters, result.statistics])
    assert [end.tobytes() for end in ends] == [whole.tobytes()] * 2
