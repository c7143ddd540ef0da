"""A server that is told to stop goes back to the last step boundary, saves it, and can go on."""

from __future__ import annotations

import asyncio
import shutil
import threading

import pytest

from dynacomm_async.errors import ConfigError, PeerError
from dynacomm_async.optim import SGD, Adam, Constant
from dynacomm_async.ranges import Range
from dynacomm_async.server import Checkpoints, ParameterServer, Training
from dynacomm_async.wire.messages import Subscription
from dynacomm_async.worker import connect

STEPS = 6
RULES = [SGD(0.9, nesterov=True), Adam()]


def serve(toy, checkpoints, training, *, workers=2, **options):
    options = {"initial": toy.initial, "initial_statistics": toy.initial_statistics} | options
    options = {"layers": toy.layers, "checkpoint_every": 100} | options
    return ParameterServer(
        workers=workers,
        steps=STEPS,
        training=training,
        checkpoints=checkpoints,
        resume=True,
        run="drained",
        **options,
    )


@pytest.mark.parametrize("rule", RULES, ids=["momentum", "adam"])
@pytest.mark.parametrize("strategy", ["joint", "sequential"])
async def test_a_drained_run_goes_on_with_the_bits_of_an_undisturbed_one(
    toy, tmp_path, loop_factory, rule, strategy
):
    """One worker holds step 3 up when the other has pushed all of it."""
    training = Training(rule, Constant(0.02), weight_decay=0.01)
    loop, reached, go = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def hold(session, step):
        if session.welcome.slot == 0 and step == 3 and not go.is_set():
            loop.call_soon_threadsafe(reached.set)
            assert go.wait(20)

    with Checkpoints(tmp_path) as checkpoints:
        async with serve(toy, checkpoints, training) as server:
            address = server.address
            work = [
                asyncio.create_task(asyncio.to_thread(toy.work, address, hold, strategy=strategy))
                for _ in range(2)
            ]
            await reached.wait()
            async with asyncio.timeout(10):
                stood = await server.drain()
            assert stood in (2, 3)
            with pytest.raises(PeerError, match=f"stops at step {stood}") as failure:
                await server.finished()
            assert failure.value.code == "server-draining"
        assert checkpoints.list()[-1].step == stood
        go.set()
        async with serve(toy, checkpoints, training, listen=address) as server:
            replicas = await asyncio.gather(*work)
            result = await server.finished()

    parameters, statistics = toy.replay(2, STEPS, training)
    assert [record.index for record in result.records] == list(range(stood, STEPS))
    for end in (result, *replicas):
        assert end.parameters.tobytes() == parameters.tobytes()
        assert end.statistics.tobytes() == statistics.tobytes()


async def test_workers_of_a_server_that_is_drained_before_training_began_wait_for_the_next_one(
    toy, tmp_path
):
    training = Training(SGD(0.9), Constant(0.02))
    with Checkpoints(tmp_path) as checkpoints:
        async with serve(toy, checkpoints, training) as server:
            address = server.address
            first = asyncio.create_task(asyncio.to_thread(toy.work, address, retry_s=20.0))
            while not server.members:  # noqa: ASYNC110 - nothing tells of a join
                await asyncio.sleep(0)
            assert await server.drain() == 0
        async with serve(toy, checkpoints, training, listen=address) as server:
            while not server.members:  # noqa: ASYNC110 - it comes back before the newcomer
                await asyncio.sleep(0)
            await asyncio.gather(first, asyncio.to_thread(toy.work, address))
            result = await server.finished()
    expected, _ = toy.replay(2, STEPS, training)
    assert result.parameters.tobytes() == expected.tobytes()


async def test_the_step_under_way_is_taken_back_cell_by_cell(toy, tmp_path, connect_raw):
    """Half of a step has been applied: it must not be in the checkpoint."""
    training = Training(SGD(0.9), Constant(0.02))
    grid = toy.grid
    with Checkpoints(tmp_path) as checkpoints:
        async with (
            serve(toy, checkpoints, training, workers=1) as server,
            connect_raw(server.address) as raw,
        ):
            await raw.join(grid)
            raw.push(0, toy.contribution(await raw.pull(), 0, 0), grid)
            parameters = await raw.pull()
            contribution = toy.contribution(parameters, 0, 1)
            (first, count) = half = (0, 4)
            start, stop = grid.floats(first, count)
            cells = Range(*half)
            rest = Range(count, grid.n_parameter_cells - count)
            plan = Subscription(2, ((cells,), (rest,)))
            raw.push(1, contribution[start:stop], grid, ranges=(cells,), subscription=plan)
            assert len(await raw.pull()) == stop - start  # they have been applied
            assert await server.drain() == 1
        state = checkpoints.load()
    assert state.step == 1
    assert state.parameters.tobytes() == toy.replay(1, 1, training)[0].tobytes()


async def test_a_directory_of_another_run_or_without_resume_is_refused(toy, tmp_path):
    training = Training(SGD(0.9), Constant(0.02))
    with Checkpoints(tmp_path) as checkpoints:
        async with serve(toy, checkpoints, training, workers=1) as server:
            await asyncio.to_thread(toy.work, server.address)
            await server.finished()
        with pytest.raises(ConfigError, match="holds checkpoints of an earlier run"):
            async with ParameterServer(
                toy.layers, workers=1, steps=9, initial=toy.initial, checkpoints=checkpoints
            ):
                pass
        with pytest.raises(ConfigError, match="workers 1, not 2"):
            async with serve(toy, checkpoints, training, workers=2):
                pass
        with pytest.raises(ConfigError, match="rule"):
            async with serve(toy, checkpoints, Training(Adam(), Constant(0.1)), workers=1):
                pass


async def test_a_finished_run_that_is_resumed_is_over(toy, tmp_path):
    training = Training(SGD(0.9), Constant(0.02))
    with Checkpoints(tmp_path) as checkpoints:
        async with serve(toy, checkpoints, training, workers=1) as server:
            await asyncio.to_thread(toy.work, server.address)
            await server.finished()
        async with serve(toy, checkpoints, training, workers=1, absence_s=0.1) as server:
            result = await server.finished()
    assert result.steps == STEPS
    assert result.records == ()
    assert result.parameters.tobytes() == toy.replay(1, STEPS, training)[0].tobytes()


async def test_a_step_back_is_a_repeated_index_in_code_that_awaits_and_raises_nothing(
    toy, tmp_path
):
    training = Training(SGD(0.9), Constant(0.02))
    indices, loop = [], asyncio.get_running_loop()
    reached, go = asyncio.Event(), asyncio.Event()

    async def work(address):
        async with connect(address, layers=toy.layers) as session:
            async for step in session.steps():
                indices.append(step.index)
                for spec in toy.layers:
                    await step.parameters(spec.name)
                values = toy.contribution(session.parameters, session.slot, step.index)
                session.gradients[:] = values[: toy.grid.n_parameters]
                session.batch_statistics[:] = values[toy.grid.n_parameters :]
                if step.index == 4 and not go.is_set():
                    reached.set()
                    await go.wait()
                    while not step.abandoned:  # noqa: ASYNC110 -- its thread announces it to no loop
                        await asyncio.sleep(0.001)
                    for spec in toy.layers:
                        await step.parameters(spec.name)
                step.report(0.5)
                for spec in reversed(toy.layers):
                    step.gradient_ready(spec.name)
            return session.parameters.copy()

    with Checkpoints(tmp_path) as checkpoints:
        async with serve(toy, checkpoints, training, workers=1, checkpoint_every=3) as server:
            address = server.address
            task = loop.create_task(work(address))
            await reached.wait()
            await server.drain()
        newest = checkpoints.list()[-1]
        assert newest.step == 4
        shutil.rmtree(newest.path)  # as if it had been killed before
        async with serve(toy, checkpoints, training, workers=1, listen=address) as server:
            go.set()
            parameters = await task
            await server.finished()
    assert indices == [0, 1, 2, 3, 4, 3, 4, 5]
    assert parameters.tobytes() == toy.replay(1, STEPS, training)[0].tobytes()
