"""kill -9 the server, anywhere and again and again: training ends with the undisturbed bits.

The server is a process of its own with checkpoints, the workers are threads that live on. Each
life of the server ends at a named failpoint, or at a random moment. The judge is a replay in plain
NumPy.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest

from dynacomm_async.failpoints import FAILPOINTS
from dynacomm_async.optim import SGD, StepDecay
from dynacomm_async.server import Training
from dynacomm_async.transport import Address

# The same as in serving.py, which runs as a program.
TRAINING = Training(SGD(0.9, nesterov=True), StepDecay(0.05, 4, 0.5), weight_decay=0.01)
SERVER = [name for name in FAILPOINTS if name.startswith("server.")]
N_WORKERS = 3


class Lives:
    """A server that is started again whenever it is killed."""

    def __init__(self, toy, folder: Path, *, steps: int, every: int) -> None:
        self.folder = folder
        self.port = 0
        self.told = {
            "folder": str(folder),
            "layers": [astuple(spec) for spec in toy.layers],
            "workers": N_WORKERS,
            "steps": steps,
            "every": every,
        }
        np.savez(folder / "initial.npz", parameters=toy.initial, statistics=toy.initial_statistics)
        self.killed: Counter[str] = Counter()
        self.recovery_s: list[float] = []
        self.finished = False

    async def live(self, where: str, count: int) -> None:
        """Start, and be killed at a place, or after ``count`` steps and a moment."""
        environment = dict(os.environ)
        if where != "random":
            environment["DYNACOMM_FAILPOINTS"] = f"{where}=kill@{count}"
        self.told["port"] = self.port
        began = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(Path(__file__).parent / "serving.py"),
            json.dumps(self.told),
            stdout=asyncio.subprocess.PIPE,
            env=environment,
        )
        assert process.stdout is not None
        try:
            n_steps = 0
            async for line in process.stdout:
                if line.startswith(b"listening"):
                    self.port = int(line.split()[1])
                    self.told["port"] = self.port
                    self.listening.set()
                    continue
                n_steps += 1
                if n_steps == 1:
                    self.recovery_s.append(time.monotonic() - began)
                if where == "random" and n_steps == count:
                    await asyncio.sleep(random.random() / 100)  # the moment is the fault
                    process.kill()
            code = await process.wait()
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if code == 0:
            self.finished = True
        else:
            assert code == -signal.SIGKILL, f"the server ended with {code}"
            self.killed[where] += 1

    listening: asyncio.Event


async def train_through(toy, folder, deaths, *, steps, every):
    """Let the server die those deaths while three workers train; return what was seen."""
    lives = Lives(toy, folder, steps=steps, every=every)
    lives.listening = asyncio.Event()
    work: list[asyncio.Task] = []

    async def start_workers():
        await lives.listening.wait()
        address = Address("127.0.0.1", lives.port)
        ends = [asyncio.to_thread(toy.work, address, retry_s=20.0) for _ in range(N_WORKERS)]
        return await asyncio.gather(*ends)

    work.append(asyncio.create_task(start_workers()))
    for where, count in deaths:
        if not lives.finished:
            await lives.live(where, count)
    while not lives.finished:
        await lives.live("random", 10**9)
    replicas = await work[0]
    with np.load(folder / "result.npz") as result:
        parameters, statistics = toy.replay(N_WORKERS, steps, TRAINING)
        assert result["parameters"].tobytes() == parameters.tobytes()
        assert result["statistics"].tobytes() == statistics.tobytes()
    for replica in replicas:
        assert replica.parameters.tobytes() == parameters.tobytes()
        assert replica.statistics.tobytes() == statistics.tobytes()
    return lives


def random_deaths(seed, n):
    numbers = random.Random(seed)
    places = [*SERVER, "random"]
    numbers.shuffle(places)
    places.sort(key=lambda where: where == "server.after-have")  # nobody comes back to a first life
    few = {"server.greeted": 3, "server.before-save": 2, "server.snapshot": 2}
    for index in range(n):
        where = places[index % len(places)]
        if where == "server.after-have":
            yield where, numbers.randint(1, N_WORKERS)
        elif where in few:
            yield where, numbers.randint(1, few[where])
        else:
            yield where, numbers.randint(1, 20)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_server_killed_at_every_failpoint_loses_nothing(toy, tmp_path):
    """The short form: each place once."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    deaths = list(random_deaths(seed, len(SERVER) + 1))
    lives = asyncio.run(train_through(toy, tmp_path, deaths, steps=300, every=3))
    print(f"killed {dict(lives.killed)}, first step after {max(lives.recovery_s):.1f} s at most")
    assert set(lives.killed) == {*SERVER, "random"}


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_server_killed_a_hundred_times_loses_nothing(toy, tmp_path):
    """The long form: a hundred deaths, each place at least five times."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    deaths = list(random_deaths(seed, 110))
    lives = asyncio.run(train_through(toy, tmp_path, deaths, steps=1500, every=3))
    print(f"killed {dict(lives.killed)}, first step after {max(lives.recovery_s):.1f} s at most")
    assert sum(lives.killed.values()) >= 100
    assert set(lives.killed) == {*SERVER, "random"}
    assert min(lives.killed.values()) >= 5
