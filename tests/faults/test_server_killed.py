"""kill -9 the server, anywhere and again and again: training ends with the undisturbed bits.

The server is a process of its own with checkpoints, the three workers are threads that live on.
Each life of the server ends at a named failpoint, or at a random moment. The judge is a replay in
plain NumPy.
"""

from __future__ import annotations

import asyncio
import random
import statistics

import pytest

from dynacomm_async.failpoints import FAILPOINTS

SERVER = [name for name in FAILPOINTS if name.startswith("server.")]
RANDOM = "outside"
N_WORKERS = 3
RECOVERY_S = 5.0

FEW = {
    "server.greeted": N_WORKERS,
    "server.after-have": N_WORKERS,
    "server.before-save": 2,
    "server.snapshot": 2,
    "server.before-rename": 2,
    "server.after-rename": 2,
}
"""How often a life comes to a place at least, where that is less than twenty times."""


def deaths_of(seed, n):
    """Yield places in turns, each with the time of coming there that is to be the last."""
    numbers = random.Random(seed)
    places = [*SERVER, RANDOM]
    numbers.shuffle(places)
    places.sort(key=lambda where: where == "server.after-have")  # nobody comes back to a first life
    for index in range(n):
        where = places[index % len(places)]
        count = numbers.randint(1, FEW.get(where, 20))
        yield where, count, numbers.random() / 100 if where == RANDOM else None


async def train_through(toy, lives, deaths):
    """Let the server die those deaths while three workers train."""
    async with asyncio.TaskGroup() as tasks:
        work = tasks.create_task(lives.work(toy, N_WORKERS, retry_s=60.0))
        for death in deaths:
            if not lives.finished:
                await lives.live(*death)
        await lives.live_to_the_end()
    lives.check(toy, work.result())
    middle, longest = statistics.median(lives.recovery_s), max(lives.recovery_s)
    print(f"killed {dict(lives.killed)}")
    print(f"from a death to the end of the next step: {middle:.1f} s, at most {longest:.1f} s")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_server_killed_at_every_failpoint_loses_nothing(toy, tmp_path, faults, hits):
    """The short form: each place once."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    lives = faults.ServerLives(toy, tmp_path, hits, workers=N_WORKERS, steps=300, every=3)
    asyncio.run(train_through(toy, lives, deaths_of(seed, len(SERVER) + 1)))
    assert set(lives.killed) == {*SERVER, RANDOM}


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_server_killed_a_hundred_times_loses_nothing(toy, tmp_path, faults, hits):
    """The long form: more than a hundred deaths, each place at least five times."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    before = hits.counts
    lives = faults.ServerLives(toy, tmp_path, hits, workers=N_WORKERS, steps=2000, every=3)
    asyncio.run(train_through(toy, lives, deaths_of(seed, 8 * (len(SERVER) + 1))))
    assert lives.killed.total() >= 100
    assert max(lives.recovery_s) <= RECOVERY_S
    fired = hits.counts - before
    assert {name: lives.killed[name] for name in SERVER} == {name: fired[name] for name in SERVER}
    assert min(fired[name] for name in SERVER) >= 5
