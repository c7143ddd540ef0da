"""kill -9 a worker, and now and then the server: a new worker takes over, and no bit changes.

Two workers live on in threads; the third is a process that dies at one failpoint after the other,
and another process takes its place. The server is a process too, so that workers lose it, come
back to it, and step back with it. The judge is a replay in plain NumPy.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter

import pytest

from dynacomm_async.failpoints import FAILPOINTS
from dynacomm_async.schedule import Plan
from dynacomm_async.worker import FixedPlan

WORKER = [name for name in FAILPOINTS if name.startswith("worker.")]
NEEDS_A_LOSS = {"worker.lost", "worker.before-resume", "worker.rolled-back"}
N_WORKERS = 3
FULL = 3
"""Exit code of a worker whose predecessor's place is not free yet."""


def one_message(grid, estimator):
    """As the workers in processes have it."""
    return FixedPlan(Plan.from_cuts("one", len(grid.layers), [], []))


async def die(lives, faults, hits, where, count):
    """Be the third worker until it is dead."""
    code = FULL
    while code == FULL:
        async with faults.WorkerLife(lives.address, hits, where, count) as life:
            if await life.said() and where in NEEDS_A_LOSS:
                lives.kill()
            code = await life.ended()
            why = await life.complaint()
    assert code == -signal.SIGKILL, f"a worker that was to die at {where} ended with {code}: {why}"


async def train_through(toy, lives, faults, hits, deaths):
    """Let the third worker die those deaths; return how often it did where."""
    killed: Counter[str] = Counter()
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(lives.live_to_the_end())
        work = tasks.create_task(lives.work(toy, N_WORKERS - 1, plans=one_message, retry_s=60.0))
        await lives.listening.wait()
        for where, count in deaths:
            await die(lives, faults, hits, where, count)
            killed[where] += 1
        code = FULL
        while code == FULL:
            async with faults.WorkerLife(lives.address, hits) as life:
                code = await life.ended()
        assert code == 0
        replicas = await work
        await serving
    lives.check(toy, replicas)
    print(f"workers killed: {dict(killed)}, server killed: {lives.killed.total()} times")
    return killed


def deaths_of(seed, n):
    numbers = random.Random(seed)
    for index in range(n):
        where = WORKER[index % len(WORKER)]
        yield where, 1 if where in NEEDS_A_LOSS else numbers.randint(1, 12)


@pytest.mark.slow
def test_a_worker_killed_at_every_failpoint_is_replaced_without_a_trace(
    toy, tmp_path, faults, hits
):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    lives = faults.ServerLives(toy, tmp_path, hits, workers=N_WORKERS, steps=300, every=3)
    deaths = deaths_of(seed, len(WORKER))
    killed = asyncio.run(train_through(toy, lives, faults, hits, deaths))
    assert set(killed) == set(WORKER)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_hundred_workers_killed_are_replaced_without_a_trace(toy, tmp_path, faults, hits):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    before = hits.counts
    lives = faults.ServerLives(toy, tmp_path, hits, workers=N_WORKERS, steps=4000, every=3)
    deaths = deaths_of(seed, 17 * len(WORKER))
    killed = asyncio.run(train_through(toy, lives, faults, hits, deaths))
    fired = hits.counts - before
    assert killed == {name: fired[name] for name in WORKER}
    assert killed.total() >= 100
    assert min(killed[name] for name in WORKER) >= 5
