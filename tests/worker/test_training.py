"""Training a network of the engine in a session."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import numpy as np
import pytest

from dynacomm_async.errors import PeerError
from dynacomm_async.models import lenet, mlp, resnet20
from dynacomm_async.optim import SGD, Constant
from dynacomm_async.schedule import Plan
from dynacomm_async.server import ParameterServer, Training
from dynacomm_async.worker import FixedPlan, Session, bind_engine, layer_specs, train

STEPS, BATCH = 5, 4


def batch_of(network, slot, step):
    rng = np.random.default_rng((slot, step))
    images = rng.standard_normal((BATCH, *network.input_shape)).astype(np.float32)
    return images, rng.integers(0, network.classes, BATCH)


def serve(network, *, workers=1, steps=STEPS):
    return ParameterServer(
        layer_specs(network),
        workers=workers,
        steps=steps,
        training=Training(SGD(0.9), Constant(0.05)),
        initial=network.initialise(1),
        initial_statistics=network.initial_statistics(),
    )


def work(network, address, n_steps=None):
    """Train to the end, or for a number of steps; returns what was yielded."""
    with Session(address, layer_specs(network), retry_s=10) as session:
        engine = bind_engine(session, network, BATCH)
        slot = session.welcome.slot
        steps = []
        for step in train(session, engine, lambda index: batch_of(network, slot, index)):
            steps.append(step)
            if len(steps) == n_steps:
                break
        return steps, session.parameters.copy(), session.statistics.copy()


def replay(network):
    """One worker's training, in plain NumPy."""
    engine = network.bind(BATCH)
    engine.parameters[:] = network.initialise(1)
    velocity = np.zeros_like(engine.parameters)
    losses = []
    for step in range(STEPS):
        losses.append(engine.step(*batch_of(network, 0, step)))
        velocity = velocity * np.float32(0.9) + engine.gradients
        engine.parameters -= velocity * np.float32(0.05)
    return engine.parameters, losses


@pytest.mark.parametrize("model", [lenet, resnet20])
def test_the_layer_table_is_the_networks(model):
    network = model()
    specs = layer_specs(network)
    assert [spec.name for spec in specs] == [layer.name for layer in network.layers]
    assert sum(spec.count for spec in specs) == network.parameters
    assert sum(spec.statistics for spec in specs) == network.statistics


async def test_the_engine_computes_in_the_sessions_memory():
    network = mlp()
    async with serve(network) as server:

        def check():
            with Session(server.address, layer_specs(network)) as session:
                engine = bind_engine(session, network, BATCH)
                assert np.shares_memory(engine.parameters, session.parameters)
                assert np.shares_memory(engine.gradients, session.gradients)

        await asyncio.to_thread(check)


async def test_steps_are_those_of_a_single_process():
    network = lenet()
    async with serve(network) as server:
        steps, parameters, _ = await asyncio.to_thread(work, network, server.address)
        result = await server.finished()

    expected, losses = replay(network)
    assert [step.index for step in steps] == list(range(STEPS))
    assert [step.loss for step in steps] == losses == result.losses
    assert parameters.tobytes() == result.parameters.tobytes() == expected.tobytes()


async def test_a_step_begins_where_the_one_before_ended_and_computing_fits_into_it():
    network = lenet()
    async with serve(network) as server:
        steps, _, _ = await asyncio.to_thread(work, network, server.address)

    for step, after in pairwise(steps):
        assert 0 < step.compute_ns < after.started_ns - step.started_ns


async def test_batches_are_asked_for_by_step_in_order_from_the_first():
    network = mlp()
    asked = []

    def run(address):
        with Session(address, layer_specs(network)) as session:
            engine = bind_engine(session, network, BATCH)

            def batches(index):
                asked.append(index)
                return batch_of(network, 0, index)

            return len(list(train(session, engine, batches)))

    async with serve(network) as server:
        assert await asyncio.to_thread(run, server.address) == STEPS
    assert asked == list(range(STEPS))


async def test_leaving_in_the_middle_ends_the_run_for_the_others():
    network = mlp()
    async with serve(network, workers=2, steps=1000) as server:
        loyal = asyncio.create_task(asyncio.to_thread(work, network, server.address))
        await asyncio.to_thread(work, network, server.address, 2)
        for waiting in (server.finished(), loyal):
            with pytest.raises(PeerError, match="left in step"):
                await waiting


async def test_one_image_too_few_is_the_callers_fault_and_leaves_nothing_behind():
    network = mlp()

    def run(address):
        with Session(address, layer_specs(network)) as session:
            engine = bind_engine(session, network, BATCH)
            images, labels = batch_of(network, 0, 0)
            with pytest.raises(ValueError, match="images have shape"):
                list(train(session, engine, lambda index: (images[1:], labels[1:])))

    async with serve(network) as server:
        await asyncio.to_thread(run, server.address)


@pytest.mark.parametrize("cuts", [[], [1], [1, 2, 3, 4], [4]])
async def test_plans_do_not_change_the_result(cuts):
    network = lenet()
    plan = Plan.from_cuts("own", len(network.layers), cuts, cuts)

    def run(address):
        specs = layer_specs(network)
        with Session(address, specs, plans=lambda grid, estimator: FixedPlan(plan)) as session:
            engine = bind_engine(session, network, BATCH)
            for _ in train(session, engine, lambda index: batch_of(network, 0, index)):
                pass
            return session.parameters.copy()

    async with serve(network) as server:
        parameters = await asyncio.to_thread(run, server.address)
    assert parameters.tobytes() == replay(network)[0].tobytes()
