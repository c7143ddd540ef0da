"""kill -9 a server without a common step: what it has applied is a history that can be replayed.

Each life of the server appends its updates to a log. A life that begins with a checkpoint takes
back what came after that; the checkpoint itself says how many updates of cells it holds. The judge
replays what is left of the log in plain NumPy, from what each worker has computed, and looks for
anything that was applied twice, or too far ahead of the slowest worker.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time

import numpy as np
import pytest

from dynacomm_async.failpoints import FAILPOINTS
from dynacomm_async.ranges import Range
from dynacomm_async.server import Applied

PLACES = [name for name in FAILPOINTS if name.startswith("server.")] + ["outside"]
N_WORKERS = 3
EARLY = {"server.greeted": 3, "server.after-have": 3}
SELDOM = {"server.before-save", "server.snapshot", "server.before-rename", "server.after-rename"}


class History(dict):
    """What each worker has computed, however often: lists by slot and step, with the time."""

    def __setitem__(self, key, values):
        super().setdefault(key, []).append((time.monotonic_ns(), values))

    def before(self, slot, step, moment_ns):
        return max((of, id(values), values) for of, values in self[slot, step] if of < moment_ns)[2]


def read_log(path):
    """The updates that count: those of a life, up to where the next one begins."""
    entries = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if isinstance(row, dict):
            n, kept = row["begins_with"], []
            while n:
                kept.append(entries[len(kept)])
                n -= kept[-1][0].cells.count
                assert n >= 0, "a checkpoint ends inside an update"
            entries = kept
        else:
            step, first, count, slot, moment_ns = row
            entries.append((Applied(step, Range(first, count), (slot,)), moment_ns))
    return [applied for applied, _ in entries], [moment_ns for _, moment_ns in entries]


def leads(log, n_cells):
    done = dict.fromkeys(range(N_WORKERS), 0)
    for step, cells, (slot,), _ in log:
        yield step - min(done.values()) // n_cells
        done[slot] += cells.count


def judge(toy, folder, steps, bound, history, training):
    log, moments = read_log(folder / "log")
    parameters, statistics = toy.replay_log(
        log, lambda slot, step, place: history.before(slot, step, moments[place]), training
    )
    with np.load(folder / "result.npz") as result:
        assert result["parameters"].tobytes() == parameters.tobytes()
        assert result["statistics"].tobytes() == statistics.tobytes()
    applied = sum(cells.count for _, cells, _, _ in log)
    assert applied == N_WORKERS * steps * toy.grid.n_cells, "nothing is missing"
    assert max(leads(log, toy.grid.n_cells)) <= bound


def deaths_of(numbers, places):
    """Yield places, each with the time of coming there that is to be the last."""
    for where in places:
        most = EARLY.get(where, 2 if where in SELDOM else 60)
        yield (
            where,
            numbers.randint(1, most),
            numbers.random() / 100 if where == "outside" else None,
        )


async def train_through(toy, lives, deaths, history):
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(lives.work(toy, N_WORKERS, made=history, retry_s=60.0))
        for death in deaths:
            if not lives.finished:
                await lives.live(*death)
        await lives.live_to_the_end()


def run(toy, tmp_path, faults, hits, *, bound, steps, places):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    numbers, history = random.Random(seed), History()
    lives = faults.ServerLives(
        toy, tmp_path, hits, workers=N_WORKERS, steps=steps, every=3, staleness=str(bound)
    )
    asyncio.run(train_through(toy, lives, deaths_of(numbers, places), history))
    judge(toy, tmp_path, steps, bound, history, faults.TRAINING)
    print(f"killed {dict(lives.killed)}")
    print(f"from a death to the end of the next step: at most {max(lives.recovery_s):.1f} s")
    return lives


@pytest.mark.slow
@pytest.mark.parametrize("bound", [1, math.inf])
def test_a_stale_server_that_is_killed_applies_nothing_twice(toy, tmp_path, faults, hits, bound):
    """The short form: some places each."""
    places = ["outside", "server.after-apply", "server.after-push", "server.snapshot"]
    lives = run(toy, tmp_path, faults, hits, bound=bound, steps=120, places=places)
    assert lives.killed.total() == len(places)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("bound", [0, 1, 3, math.inf])
def test_a_stale_server_that_is_killed_a_hundred_times_applies_nothing_twice(
    toy, tmp_path, faults, hits, bound
):
    """The long form: each place twice at every bound."""
    lives = run(toy, tmp_path, faults, hits, bound=bound, steps=1200, places=2 * PLACES)
    assert lives.killed.total() >= 2 * len(PLACES) - 1
    assert max(lives.recovery_s) <= 5.0
