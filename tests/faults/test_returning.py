"""A former member returns: stopped, replaced under its rank, and woken up, again and again.

Two processes take turns. The one that has the place is stopped in the middle of a step; when its
silence has been noticed the other gets the place; then the first goes on as if nothing had been.
It has to hear by name that its membership is over, and waits for its next turn. Nothing of what it
sends in its old term may count: its gradients are those of another model, the judge is a replay in
plain NumPy.
"""

from __future__ import annotations

import asyncio
import random
import signal

import pytest

from dynacomm_async.optim import SGD, Constant
from dynacomm_async.schedule import Plan
from dynacomm_async.server import ParameterServer, Training
from dynacomm_async.worker import FixedPlan

TRAINING = Training(SGD(0.9), Constant(0.02), weight_decay=0.01)
HEARTBEAT_S = 0.5


def one_message(grid, estimator):
    return FixedPlan(Plan.from_cuts("one", len(grid.layers), [], []))


async def take_turns(toy, faults, hits, numbers, n_returns):
    """Let a former member return so many times; return the server's result and the survivor's."""
    again, loop, placed = ["term-outdated", "run-full"], asyncio.get_running_loop(), asyncio.Event()

    def plans(grid, estimator):
        loop.call_soon_threadsafe(placed.set)  # it has been welcomed
        return one_message(grid, estimator)

    async with ParameterServer(
        toy.layers,
        workers=2,
        steps=100 * n_returns,
        training=TRAINING,
        initial=toy.initial,
        initial_statistics=toy.initial_statistics,
        heartbeat_s=HEARTBEAT_S,
        absence_s=60.0,
    ) as server:
        steady = asyncio.create_task(
            asyncio.to_thread(toy.work, server.address, plans=plans, retry_s=60.0)
        )
        await placed.wait()
        async with (
            faults.WorkerLife(server.address, hits, again=again, spoilt=True) as one,
            faults.WorkerLife(server.address, hits, again=again, spoilt=True) as other,
        ):
            first = asyncio.create_task(one.said())
            second = asyncio.create_task(other.said())
            done, _ = await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
            inside, outside = (one, other) if first in done else (other, one)
            said = second if first in done else first
            for _ in range(n_returns):
                for _ in range(numbers.randint(0, 3)):
                    assert (await inside.said()).isdecimal()
                await asyncio.sleep(numbers.random() / 200)  # the moment is the fault
                inside.process.send_signal(signal.SIGSTOP)
                assert (await said).isdecimal(), "it has begun a step in the other's place"
                inside.process.send_signal(signal.SIGCONT)
                assert await inside.said("term-outdated"), "it has ended otherwise"
                inside, outside = outside, inside
                said = asyncio.create_task(outside.said())
            assert await inside.ended() == 0
            said.cancel()
            await asyncio.gather(said, return_exceptions=True)
        return await server.finished(), await steady


async def judge(toy, faults, hits, n_returns):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    result, survivor = await take_turns(toy, faults, hits, random.Random(seed), n_returns)
    parameters, statistics = toy.replay(2, 100 * n_returns, TRAINING)
    for end in (result, survivor):
        assert end.parameters.tobytes() == parameters.tobytes()
        assert end.statistics.tobytes() == statistics.tobytes()
    print(f"{n_returns} returns, each refused by name")


@pytest.mark.slow
def test_a_former_member_that_returns_is_refused_by_name_and_changes_nothing(toy, faults, hits):
    asyncio.run(judge(toy, faults, hits, 5))


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_hundred_returns_change_nothing(toy, faults, hits):
    asyncio.run(judge(toy, faults, hits, 200))
