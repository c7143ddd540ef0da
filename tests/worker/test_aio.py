"""Sessions for code that awaits: the same run, and nothing left behind when it is cancelled."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from dynacomm_async.errors import ChannelBroken, ConfigError, LocalProtocolError, PeerError
from dynacomm_async.server import ParameterServer, Training
from dynacomm_async.worker import connect

STEPS = 4
TRAINING = Training.plain(0.1)


def serve(toy, *, workers=1, steps=STEPS):
    return ParameterServer(
        toy.layers,
        workers=workers,
        steps=steps,
        training=TRAINING,
        initial=toy.initial,
        initial_statistics=toy.initial_statistics,
    )


async def work(toy, address, n_steps=None):
    async with connect(address, toy.layers) as session:
        n_parameters = toy.grid.n_parameters
        async for step in session.steps():
            if step.index == n_steps:
                return None
            noise = toy.noise(session.slot, step.index)
            for spec in toy.layers:
                values = await step.parameters(spec.name)
                assert np.shares_memory(values, session.parameters)
                part = session.slice_of(spec.name)
                session.gradients[part] = noise[part] * np.float32(0.1) + values * np.float32(1 / 3)
            step.report(toy.loss(session.slot, step.index), 1)
            session.batch_statistics[:] = noise[n_parameters:]
            for spec in reversed(toy.layers):
                step.gradient_ready(spec.name)
        return session.parameters.copy(), session.statistics.copy()


@pytest.mark.parametrize("n_workers", [1, 3])
async def test_workers_that_await_end_with_the_bits_of_a_single_process(
    toy, n_workers, loop_factory
):
    # Server and workers share this loop; the sessions' own threads carry the bytes.
    async with serve(toy, workers=n_workers) as server:
        ends = await asyncio.gather(*(work(toy, server.address) for _ in range(n_workers)))
        result = await server.finished()

    expected, statistics = toy.replay(n_workers, STEPS, TRAINING)
    assert result.parameters.tobytes() == expected.tobytes()
    for parameters, running in ends:
        assert parameters.tobytes() == expected.tobytes()
        assert running.tobytes() == statistics.tobytes()


async def test_a_session_says_who_it_is(toy):
    async with serve(toy) as server, connect(str(server.address)) as session:
        assert (session.slot, session.workers, session.settings) == (0, 1, {})
        assert session.parameters.shape == session.gradients.shape == (toy.grid.n_parameters,)
        assert session.statistics.shape == session.batch_statistics.shape
        assert session.slice_of("tiny") == slice(5000, 5003)


async def test_an_unknown_layer_is_refused(toy):
    async with serve(toy) as server, connect(server.address) as session:
        async for step in session.steps():
            with pytest.raises(ConfigError, match="no layer 'nose'; the model has: front, "):
                await step.parameters("nose")
            break


async def test_a_step_left_incomplete_is_refused(toy):
    async with serve(toy) as server, connect(server.address) as session:
        steps = session.steps()
        await anext(steps)
        with pytest.raises(LocalProtocolError, match="left without the gradients of front, tiny"):
            await anext(steps)


async def test_a_server_that_is_not_there_is_reported(unused_tcp_port):
    with pytest.raises(ChannelBroken, match="no server at"):
        async with connect(f"127.0.0.1:{unused_tcp_port}", {"w": 1}, retry_s=0.1):
            pass


async def test_being_cancelled_while_looking_for_the_server_leaves_nothing_behind(unused_tcp_port):
    async def look():
        async with connect(f"127.0.0.1:{unused_tcp_port}", {"w": 1}):
            raise AssertionError("there is no server")

    looking = asyncio.create_task(look())
    await asyncio.sleep(0.1)
    looking.cancel()
    async with asyncio.timeout(5):  # much less than it would go on looking
        with pytest.raises(asyncio.CancelledError):
            await looking


async def test_being_cancelled_while_waiting_for_parameters_leaves_in_order(toy):
    async with serve(toy, workers=2) as server:  # whose second worker never comes
        working = asyncio.create_task(work(toy, server.address))
        await asyncio.sleep(0.3)
        assert not working.done()
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working


async def test_waiting_ends_when_another_worker_leaves(toy):
    async with serve(toy, workers=2) as server:
        loyal = asyncio.create_task(work(toy, server.address))
        await work(toy, server.address, n_steps=2)
        with pytest.raises(PeerError, match="left in step"):
            await loyal


async def test_waiting_ends_when_the_server_stops(toy):
    async with serve(toy, workers=2) as server:
        working = asyncio.create_task(work(toy, server.address))
        await asyncio.sleep(0.3)
    with pytest.raises(PeerError, match="the server was stopped"):
        await working
