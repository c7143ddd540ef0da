"""Plans without a barrier on the wire: the same results, and front layers that overtake."""

from __future__ import annotations

import asyncio
import random
import threading
from dataclasses import replace

import numpy as np
import pytest

from dynacomm_async.optim import SGD, Constant
from dynacomm_async.ranges import CELL_NBYTES, Range
from dynacomm_async.schedule import Plan
from dynacomm_async.schedule.dispatch import Policy
from dynacomm_async.schedule.plan import PolicyPlan
from dynacomm_async.server import ParameterServer, Training
from dynacomm_async.wire.grid import Grid, LayerSpec
from dynacomm_async.wire.messages import End, Gradients, Parameters
from dynacomm_async.worker import FixedPlan, Session

TRAINING = Training(SGD(0.9), Constant(0.05))
STEPS = 4

CELLS = Policy(cap_nbytes=1)
PLANS = {
    "cell by cell": PolicyPlan("a", 4, CELLS, CELLS),
    "everything that is ready": PolicyPlan("b", 4, Policy(), Policy()),
    "two cells, waiting for more": PolicyPlan(
        "c", 4, Policy(2 * CELL_NBYTES, CELL_NBYTES), Policy(2 * CELL_NBYTES, 3 * CELL_NBYTES)
    ),
    "whole layers": PolicyPlan("d", 4, Policy(1, 0, True), Policy(None, 0, True)),
    "one layer at a time": PolicyPlan("e", 4, Policy(CELL_NBYTES, 0, False, True), Policy()),
    "segments as early as possible": replace(Plan.from_cuts("f", 4, [1, 2, 3], [2]), barrier=False),
}


def serve(toy, workers):
    return ParameterServer(
        toy.layers,
        workers=workers,
        steps=STEPS,
        training=TRAINING,
        initial=toy.initial,
        initial_statistics=toy.initial_statistics,
    )


async def check_against_replay(toy, plans_of):
    """Train with a plan for each worker; every copy of the parameters is the replay's."""
    async with serve(toy, len(plans_of)) as server:
        replicas = await asyncio.gather(
            *(
                asyncio.to_thread(toy.work, server.address, plans=lambda *_, p=plans: p)
                for plans in plans_of
            )
        )
        result = await server.finished()
    parameters, statistics = toy.replay(len(plans_of), STEPS, TRAINING)
    for end in (*replicas, result):
        assert end.parameters.tobytes() == parameters.tobytes()
        assert end.statistics.tobytes() == statistics.tobytes()


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("name", PLANS)
async def test_without_a_barrier_every_bit_of_the_result_is_the_same(toy, name, workers):
    await check_against_replay(toy, [FixedPlan(PLANS[name]) for _ in range(workers)])


async def test_workers_with_different_plans_that_change_still_agree(toy):
    class Changing(FixedPlan):
        """Another plan for every step."""

        def __init__(self, seed):
            super().__init__(n_layers=4)
            self._random = random.Random(seed)

        def _choose(self, step):
            return self._random.choice([*PLANS.values(), Plan.from_cuts("barrier", 4, [2], [1])])

    await check_against_replay(toy, [Changing(seed) for seed in range(3)])


WIDE = Grid([LayerSpec("front", 10), LayerSpec("back", 400 * CELL_NBYTES // 4)])


async def test_a_front_gradient_overtakes_what_waits_of_the_layers_behind_it(listen_raw):
    ready = threading.Event()
    plan = PolicyPlan("by hand", 2, CELLS, Policy(2 * CELL_NBYTES))

    def work(address):
        with Session(address, plans=lambda *_: FixedPlan(plan)) as session:
            for step in session.steps():
                step.wait("front")
                step.wait("back")
                step.gradient_ready("back")
                step.gradient_ready("front")
                ready.set()

    async with listen_raw() as server:
        work_done = asyncio.create_task(asyncio.to_thread(work, server.address))
        peer = await server.greet(WIDE)
        peer.send(Parameters(0, (Range(0, 401),)), bytes(4 * WIDE.n_parameters))
        await asyncio.to_thread(ready.wait)
        sent = []
        while sum(cells.count for message in sent for cells in message.ranges) < 401:
            message, _ = await peer.read()
            assert isinstance(message, Gradients)
            sent.append(message)
        first_policy = sent[0].subscription.policy
        assert first_policy is not None
        assert first_policy.cap_nbytes == 1
        assert all(message.subscription is None for message in sent[1:])
        front = next(place for place, m in enumerate(sent) if m.ranges[0] == Range(0, 1))
        # Nothing was read while both became ready, so what left before it was in the buffers.
        assert front < len(sent) - 1
        peer.send(
            Parameters(1, (Range(0, 401),)), np.zeros(WIDE.n_parameters, np.float32).tobytes()
        )
        peer.send(End(1))
        await peer.read_to_end()
        await work_done
