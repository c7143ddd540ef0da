"""The I/O side of a session: against a real server, over streams cut into any pieces."""

from __future__ import annotations

import asyncio
import random
from itertools import repeat

import pytest

from dynacomm_async.errors import ChannelBroken, LocalProtocolError, PeerError
from dynacomm_async.optim import SGD, Constant
from dynacomm_async.schedule import Plan
from dynacomm_async.schedule.estimator import Estimator
from dynacomm_async.server.server import ParameterServer
from dynacomm_async.server.store import Training
from dynacomm_async.transport import memory_pair
from dynacomm_async.wire.grid import LayerSpec
from dynacomm_async.wire.messages import Hello, Report
from dynacomm_async.worker.board import Board
from dynacomm_async.worker.client import Arenas, Client
from dynacomm_async.worker.line import Line
from dynacomm_async.worker.planning import FixedPlan
from dynacomm_async.worker.step import Compute, Phase

TRAINING = Training(SGD(0.9), Constant(0.05), weight_decay=0.01)
LAYERS = (
    LayerSpec("a", 5, decay=2, statistics=3),
    LayerSpec("b", 4097, decay=4097),
    LayerSpec("c", 1),
    LayerSpec("d", 700, decay=1),
)


def random_sizes(seed):
    numbers = random.Random(seed)
    while True:
        yield numbers.choice([1, 2, 3, 23, 24, 25, 100, 4096, numbers.randint(1, 20_000)])


def random_plan(numbers, n_layers):
    pull, push = ([cut for cut in range(1, n_layers) if numbers.random() < 0.5] for _ in range(2))
    return FixedPlan(Plan.from_cuts("random", n_layers, pull, push))


async def granted(board, phase, layer, step):
    """Wait on the loop until a layer may be computed."""
    event = asyncio.Event()
    board.when(phase, layer, step, event.set)
    await event.wait()
    assert board.is_granted(phase, layer, step)


async def work(toy, line, numbers):
    """Be a worker on the loop that the line runs on; gradients are ready in any order."""
    n_layers, n_parameters = len(toy.layers), toy.grid.n_parameters
    welcome = await line.greet(Hello())
    arenas, board = Arenas.allocate(toy.grid), Board(n_layers)
    estimator = Estimator([(spec.name, 4 * spec.count) for spec in toy.layers])
    plans = random_plan(numbers, n_layers)
    await line.measure_round_trip()
    client = Client(welcome, toy.grid, arenas, board, plans, estimator)
    client.join(line)
    for step in range(welcome.steps):
        for layer in range(n_layers):
            await granted(board, Phase.FORWARD, layer, step)
        client.report(step, 0, Report(toy.loss(welcome.slot, step), 1))
        values = toy.contribution(arenas.incoming[:n_parameters], welcome.slot, step)
        arenas.outgoing[:] = values
        for layer in numbers.sample(range(n_layers), n_layers):
            client.gradient_ready(step, 0, layer)
            for _ in range(numbers.randint(0, 3)):
                await asyncio.sleep(0)
    ended = asyncio.Event()
    board.when_ended(ended.set)
    await ended.wait()
    assert board.ended
    await client.leave()
    return arenas.incoming


@pytest.mark.parametrize(
    "sizes",
    [repeat(1), random_sizes(1), random_sizes(2), repeat(4096), repeat(1 << 20)],
    ids=["1 byte", "random", "random again", "4096 bytes", "whole"],
)
async def test_any_split_of_the_stream_and_any_cuts_give_the_bits_of_a_single_process(
    toy, loop_factory, sizes
):
    toy, numbers = type(toy)(LAYERS), random.Random(3)
    server = ParameterServer(
        toy.layers,
        workers=2,
        steps=2,
        training=TRAINING,
        initial=toy.initial,
        initial_statistics=toy.initial_statistics,
    )
    async with server:
        lines = []
        for _ in range(2):
            _, channel = memory_pair(
                server.connect_channel,
                lambda channel: lines.append(Line(channel)) or lines[-1],
                piece_nbytes=sizes,
            )
            assert lines[-1].channel is channel
        ends = await asyncio.gather(*(work(toy, line, numbers) for line in lines))
        result = await server.finished()

    parameters, statistics = toy.replay(2, 2, TRAINING)
    assert result.parameters.tobytes() == parameters.tobytes()
    assert result.statistics.tobytes() == statistics.tobytes()
    for arena in ends:
        assert arena.tobytes() == parameters.tobytes() + statistics.tobytes()


async def test_the_round_trip_is_measured_before_the_join(toy):
    async with ParameterServer(toy.layers, workers=1, steps=1, initial=toy.initial) as server:
        lines = []
        memory_pair(
            server.connect_channel, lambda channel: lines.append(Line(channel)) or lines[-1]
        )
        await lines[0].greet(Hello())
        await lines[0].measure_round_trip()
        assert lines[0].round_trip_ns > 0
        await lines[0].say_goodbye()


async def test_a_refusal_is_raised_by_the_greeting_with_its_code(toy):
    async with ParameterServer(toy.layers, workers=1, steps=1, initial=toy.initial) as server:
        lines = []
        memory_pair(
            server.connect_channel, lambda channel: lines.append(Line(channel)) or lines[-1]
        )
        with pytest.raises(PeerError, match=r"run is .*, not 'another'") as failure:
            await lines[0].greet(Hello(run="another"))
        assert failure.value.code == "run-mismatch"
        await lines[0].say_goodbye()


# -- the board -----------------------------------------------------------------------------------


def test_a_grant_is_for_one_phase_one_layer_and_one_step_since_steps_may_repeat():
    board = Board(2)
    board.grant([Compute(Phase.FORWARD, 1)], 3)

    assert board.is_granted(Phase.FORWARD, 1, 3)
    assert not board.is_granted(Phase.FORWARD, 1, 2)
    assert not board.is_granted(Phase.FORWARD, 1, 4)
    assert not board.is_granted(Phase.FORWARD, 0, 3)
    assert not board.is_granted(Phase.BACKWARD, 1, 3)


def test_who_waits_for_a_grant_is_called_once_and_nobody_else_is():
    board, calls = Board(2), []
    board.when(Phase.FORWARD, 0, 1, lambda: calls.append("first"))
    board.when(Phase.FORWARD, 0, 1, lambda: calls.append("second"))
    board.when(Phase.BACKWARD, 0, 1, lambda: calls.append("backward"))
    board.when(Phase.FORWARD, 1, 1, lambda: calls.append("other layer"))
    board.when_ended(lambda: calls.append("end"))

    board.grant([Compute(Phase.FORWARD, 0)], 1)
    board.grant([Compute(Phase.FORWARD, 0)], 1)
    assert calls == ["first", "second"]
    board.when(Phase.FORWARD, 0, 1, lambda: calls.append("at once"))
    assert calls[2:] == ["at once"]
    board.grant([Compute(Phase.FORWARD, 1)], 1)
    board.grant([Compute(Phase.BACKWARD, 0)], 1)
    assert calls[3:] == ["other layer", "backward"]


def test_all_that_one_arrival_grants_is_granted_before_anybody_is_woken():
    board, seen = Board(1), []
    board.when(Phase.FORWARD, 0, 0, lambda: seen.append(board.is_granted(Phase.BACKWARD, 0, 0)))
    board.grant([Compute(Phase.FORWARD, 0), Compute(Phase.BACKWARD, 0)], 0)

    assert seen == [True]


@pytest.mark.parametrize("error", [None, ChannelBroken("lost")])
def test_the_end_wakes_everybody_once_and_whoever_comes_later_at_once(error):
    board, calls = Board(1), []
    board.when(Phase.FORWARD, 0, 0, lambda: calls.append("waits"))
    board.when_ended(lambda: calls.append("end"))
    board.end(error)
    board.end(LocalProtocolError("a second end does not count"))
    board.when(Phase.BACKWARD, 0, 0, lambda: calls.append("late"))
    board.when_ended(lambda: calls.append("late end"))

    assert calls == ["waits", "end", "late", "late end"]
    if error is None:
        assert board.ended
    else:
        with pytest.raises(ChannelBroken, match="lost"):
            board.ended  # noqa: B018 -- a property that raises
        with pytest.raises(ChannelBroken, match="lost"):
            board.is_granted(Phase.FORWARD, 0, 0)


def test_what_was_granted_stays_so_after_a_loss():
    board = Board(1)
    board.grant([Compute(Phase.FORWARD, 0)], 0)
    board.end(ChannelBroken("lost"))

    assert board.is_granted(Phase.FORWARD, 0, 0)
