"""Sessions whose line is cut, or that begin, at an awkward moment; the other workers are by hand.

A line is cut on the server's side, where the test knows how far the step is.
"""

from __future__ import annotations

import asyncio
import threading

import numpy as np

from dynacomm_async.models import mlp
from dynacomm_async.optim import SGD, Constant
from dynacomm_async.ranges import Range
from dynacomm_async.schedule import Plan
from dynacomm_async.schedule.dispatch import Policy
from dynacomm_async.schedule.plan import PolicyPlan
from dynacomm_async.server import Mode, ParameterServer
from dynacomm_async.server.member import Member
from dynacomm_async.server.store import Training
from dynacomm_async.split import Split
from dynacomm_async.wire.grid import Grid
from dynacomm_async.wire.messages import End, Leave, Parameters
from dynacomm_async.worker import FixedPlan, Session, bind_engine, layer_specs, train

TRAINING = Training(SGD(0.9), Constant(0.05), weight_decay=0.01)


def serve(toy, **options):
    options = {"initial": toy.initial, "initial_statistics": toy.initial_statistics} | options
    return ParameterServer(toy.layers, **{"training": TRAINING, "absence_s": 0.0} | options)


def zeros(grid):
    return np.zeros(grid.n_floats, np.float32)


async def until(condition):
    while not condition():  # noqa: ASYNC110 -- nothing on this loop's side could set an event
        await asyncio.sleep(0)


def cut(server, slot):
    """Abort the connection of a rank."""
    for member in [member for member in server._run.connections if member.slot == slot]:
        member.channel.abort()


async def leave(worker):
    worker.send(Leave())
    await worker.read_to_end()


async def push_on(worker, grid, step):
    """Push zeros from ``step`` on, to the end."""
    while True:
        worker.push(step, zeros(grid), grid)
        while True:
            message, _ = await worker.read()
            if isinstance(message, End):
                await leave(worker)
                return
            if isinstance(message, Parameters):
                break
        if message.version == worker.welcome.steps:
            assert isinstance((await worker.read())[0], End)
            await leave(worker)
            return
        step = message.version


async def test_a_worker_whose_gradients_were_refused_loses_its_line_in_that_step_and_goes_on(
    toy, caplog
):
    go = threading.Event()

    def work(address, makes_poison):
        with Session(address, layers=toy.layers, strategy="layerwise") as session:
            for step in session.steps():
                for spec in toy.layers:
                    step.wait(spec.name)
                made = toy.contribution(session.parameters, session.slot, step.index)
                if step.index == 2:
                    if makes_poison:
                        made[[0, 9000]] = np.nan
                    else:
                        assert go.wait(20)
                session.gradients[:] = made[: toy.grid.n_parameters]
                session.batch_statistics[:] = made[toy.grid.n_parameters :]
                for spec in reversed(toy.layers):
                    step.gradient_ready(spec.name)
            return session.parameters.copy()

    def is_told():
        return any(record.name == "dynacomm_async.worker" for record in caplog.records)

    async with serve(toy, workers=2, steps=4, absence_s=30.0) as server:
        bad = asyncio.create_task(asyncio.to_thread(work, server.address, True))
        await until(lambda: server.members == [0])
        good = asyncio.create_task(asyncio.to_thread(work, server.address, False))
        await until(is_told)
        cut(server, 0)
        await until(lambda: server.members == [1])
        await until(lambda: server.members == [0, 1])
        go.set()
        result = await server.finished()
        replicas = await asyncio.gather(bad, good)
    for parameters in replicas:
        assert parameters.tobytes() == result.parameters.tobytes()
    slots = [{slots for _, slots in record.contributors} for record in result.records]
    assert slots == [{(0, 1)}, {(0, 1)}, {(1,)}, {(0, 1)}]


async def test_a_worker_given_up_within_a_step_and_back_at_the_next_one_leaves_what_it_computes(
    toy, connect_raw
):
    grid, begun, half, hold = toy.grid, [], threading.Event(), threading.Event()
    plan = FixedPlan(Plan.from_cuts("halves", len(toy.layers), [], [1, 2]))
    log, made = [], {}

    def work(address):
        with Session(address, layers=toy.layers, plans=lambda grid, estimator: plan) as session:
            for step in session.steps():
                begun.append((step.life, step.index))
                for spec in toy.layers:
                    step.wait(spec.name)
                noise = toy.noise(session.slot, step.index)
                session.gradients[:] = noise[: grid.n_parameters]
                session.batch_statistics[:] = noise[grid.n_parameters :]
                made[session.slot, step.index] = noise
                for layer, spec in enumerate(reversed(toy.layers)):
                    step.gradient_ready(spec.name)
                    if (step.index, layer) == (2, 1):
                        half.set()
                        assert hold.wait(20)
            return session.parameters.copy()

    mode = Mode(on_leave="shrink")
    async with (
        serve(toy, workers=2, steps=8, mode=mode, on_applied=log.append) as server,
        connect_raw(server.address) as other,
    ):
        await other.join(grid)
        await until(lambda: server.members == [0])
        task = asyncio.create_task(asyncio.to_thread(work, server.address))
        await other.pull()
        for step in range(2):
            other.push(step, zeros(grid), grid)
            await other.pull()
        await asyncio.to_thread(half.wait)
        other.push(2, zeros(grid), grid)
        await until(lambda: log and log[-1].step == 2)  # what both have pushed of it
        cut(server, 1)
        await other.pull()  # version 3, without the rest
        await until(lambda: server.members == [0, 1])  # the worker, which had subscribed to it
        hold.set()
        await push_on(other, grid, 3)
        parameters = await task
        result = await server.finished()
    assert parameters.tobytes() == result.parameters.tobytes()
    assert begun == [(0, 0), (0, 1), (0, 2), *[(1, step) for step in range(4, 8)]]
    made |= {(other.welcome.slot, step): zeros(grid) for step in range(8)}
    expected, _ = toy.replay_log(log, made, TRAINING)
    assert result.parameters.tobytes() == expected.tobytes()


async def test_a_newcomer_cut_off_when_it_begins_above_its_welcome_trains_to_the_end(
    toy, connect_raw, monkeypatch
):
    grid, begin, cuts = toy.grid, Member.begin, []

    def begin_and_lose(member, version):
        begin(member, version)
        if version > 0 and not cuts:
            cuts.append(version)
            member.channel.abort()

    monkeypatch.setattr(Member, "begin", begin_and_lose)
    async with (
        serve(toy, workers=2, steps=4, absence_s=60.0) as server,
        connect_raw(server.address) as other,
    ):
        async with connect_raw(server.address) as gone:
            await gone.join(grid)
            await other.join(grid)
            await gone.pull()
            await other.pull()
            gone.push(0, zeros(grid), grid)
            gone.hang_up()  # all of step 0 is there: a newcomer begins with step 1
            await gone.read_to_end()
        await until(lambda: len(server.members) == 1)
        task = asyncio.create_task(asyncio.to_thread(toy.work, server.address))
        await until(lambda: len(server.members) == 2)
        await push_on(other, grid, 0)
        replica = await task
        result = await server.finished()
    assert cuts == [1]
    assert replica.parameters.tobytes() == result.parameters.tobytes()


async def test_a_newcomer_that_the_last_split_lacks_makes_its_batches_by_its_own(connect_raw):
    network, batches_of = mlp(input_shape=(2, 2, 1)), []
    layers = layer_specs(network)

    def work(address):
        with Session(address, layers) as session:
            engine = bind_engine(session, network, 4)

            def batches(index):
                block = session.split_of(index).block(session.slot, index)
                batches_of.append((index, *block))
                return np.ones((4, 2, 2, 1), np.float32), np.zeros(4, np.int64)

            return len(list(train(session, engine, batches)))

    server = ParameterServer(
        layers,
        workers=3,
        steps=5,
        training=TRAINING,
        initial=network.initialise(1),
        blocks=30,
        mode=Mode(on_leave="shrink"),
        absence_s=0.0,
    )
    async with server:
        async with (
            connect_raw(server.address) as one,
            connect_raw(server.address) as other,
            connect_raw(server.address) as third,
        ):
            grid = Grid(layers)
            for worker in (one, other, third):
                await worker.join(grid)
            for worker in (one, other, third):
                await worker.pull()
            await leave(one)  # its rank is no part of the next splits
            for step in range(2):
                for worker in (other, third):
                    worker.push(step, zeros(grid), grid)
                for worker in (other, third):
                    await worker.pull()
            await leave(other)
            await leave(third)
        assert await asyncio.to_thread(work, server.address) == 3
        await server.finished()
    # Three blocks of step 0, two of step 1: it goes on behind them, alone.
    split = Split(30, (0,), step=2, position=5)
    assert sorted(batches_of) == [(step, *split.block(0, step)) for step in range(2, 5)]


async def test_a_worker_back_within_a_step_still_knows_the_split_of_the_next(toy, connect_raw):
    grid, sessions, seen = toy.grid, [], []
    half, hold = threading.Event(), threading.Event()
    plan = FixedPlan(PolicyPlan("priority", len(toy.layers), Policy(), Policy()))

    def work(address):
        with Session(address, layers=toy.layers, plans=lambda grid, estimator: plan) as session:
            sessions.append(session)
            for step in session.steps():
                seen.append((step.index, step.split))
                if step.index == 1:
                    return
                for spec in toy.layers:
                    step.wait(spec.name)
                for layer, spec in enumerate(reversed(toy.layers)):
                    if layer == 1:
                        half.set()
                        assert hold.wait(20)
                    step.gradient_ready(spec.name)

    options = {"blocks": 30, "mode": Mode(on_leave="shrink"), "absence_s": 30.0}
    async with (
        serve(toy, workers=3, steps=4, **options) as server,
        connect_raw(server.address) as one,
        connect_raw(server.address) as other,
    ):
        await one.join(grid)
        await other.join(grid)
        task = asyncio.create_task(asyncio.to_thread(work, server.address))
        await one.pull()
        await other.pull()
        await leave(other)
        last = Range(*grid.layer_cells(3))
        start, stop = grid.floats(*last)
        one.push(0, zeros(grid)[start:stop], grid, ranges=(last,))
        await asyncio.to_thread(half.wait)
        board = sessions[0].board
        await until(lambda: board.opened == 1)  # the first of version 1, with news of the split
        expected = Split(30, (0, 2), step=1, position=3)
        assert board.split_of(1) == expected
        cut(server, 2)
        await until(lambda: server.members == [0])
        await until(lambda: server.members == [0, 2])
        assert board.split_of(1) == expected
        hold.set()
        rest = zeros(grid)[:start], zeros(grid)[stop:]
        one.push(
            0,
            np.concatenate(rest),
            grid,
            ranges=(Range(0, last.first), Range(sum(last), grid.n_cells - sum(last))),
            subscription=None,
        )
        await task
    assert seen[-1] == (1, expected)
