"""kill -9 a worker in the middle of everything: a new one takes its place, and no bit changes."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from dynacomm_async.optim import SGD, Constant
from dynacomm_async.schedule import Plan
from dynacomm_async.server import ParameterServer, Training
from dynacomm_async.worker import FixedPlan


def one_message(grid, estimator):
    """As the workers in processes have it."""
    return FixedPlan(Plan.from_cuts("one", len(grid.layers), [], []))


TRAINING = Training(SGD(0.9), Constant(0.02), weight_decay=0.01)
LIVING = ["worker.before-push", "worker.after-push", "worker.parameters"]


async def one_life(port, where, count):
    """Start a worker that dies there; return its exit code."""
    environment = dict(os.environ)
    if where is not None:
        environment["DYNACOMM_FAILPOINTS"] = f"{where}=kill@{count}"
    script = str(Path(__file__).parent / "working.py")
    process = await asyncio.create_subprocess_exec(
        sys.executable, script, str(port), env=environment
    )
    try:
        return await process.wait()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def train_through(toy, deaths, *, steps):
    """One worker lives on in a thread, the other dies those deaths."""
    killed: Counter[str] = Counter()

    async with ParameterServer(
        toy.layers,
        workers=2,
        steps=steps,
        training=TRAINING,
        initial=toy.initial,
        initial_statistics=toy.initial_statistics,
    ) as server:
        port = server.address.port
        survivor = asyncio.create_task(
            asyncio.to_thread(toy.work, server.address, plans=one_message)
        )
        code, deaths = -signal.SIGKILL, iter(deaths)
        while code:
            where, count = next(deaths, (None, 0))
            code = await one_life(port, where, count)
            if code == -signal.SIGKILL:
                killed[str(where)] += 1
        await survivor
        result = await server.finished()
    parameters, statistics = toy.replay(2, steps, TRAINING)
    assert result.parameters.tobytes() == parameters.tobytes()
    assert result.statistics.tobytes() == statistics.tobytes()
    return killed


def deaths_of(seed, n):
    numbers = random.Random(seed)
    return [(LIVING[index % len(LIVING)], numbers.randint(1, 12)) for index in range(n)]


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_of_a_push_is_replaced_without_a_trace(toy):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    killed = asyncio.run(train_through(toy, deaths_of(seed, 6), steps=120))
    print(dict(killed))
    assert set(killed) == set(LIVING)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_hundred_workers_killed_are_replaced_without_a_trace(toy):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    killed = asyncio.run(train_through(toy, deaths_of(seed, 102), steps=1400))
    print(dict(killed))
    assert sum(killed.values()) >= 100
