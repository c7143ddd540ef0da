"""SIGTERM, a second SIGTERM and Ctrl-C, with many workers: nothing of what was trained is lost.

``dynacomm serve`` is a process; its workers are sessions in threads of this process that share
one event loop and live on. The judge is the hash that an undisturbed run of the same command ends
with. ``server.before-rename=hang`` is a disk that stops answering while a checkpoint is saved.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import numpy as np
import pytest

from dynacomm_async.server import Checkpoints
from dynacomm_async.transport import LoopThread, parse_address
from dynacomm_async.wire.messages import Error, Hello
from dynacomm_async.worker import Session

pytestmark = pytest.mark.timing

STEPS = 40
LIMIT_S = 10.0
COMPLAINTS = re.compile("Traceback|destroyed|never awaited|never retrieved|Warning")


class Server:
    """``dynacomm serve`` in a process of its own; ``words`` is what it says on standard error."""

    def __init__(self, process) -> None:
        self.process = process
        self.words = ""
        self._spoke = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    @asynccontextmanager
    async def run(cls, folder, n_workers, listen="127.0.0.1:0", failpoints=""):
        options = ["--model=lenet", "--data=synthetic", "--batch=1", f"--workers={n_workers}"]
        options += [f"--steps={STEPS}", f"--listen={listen}", "--rule=momentum", "--json"]
        options += [f"--checkpoint-dir={folder}", "--checkpoint-every=10", "--resume"]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-X", "dev", "-m", "dynacomm_async.cli.main", "serve", *options),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "DYNACOMM_FAILPOINTS": failpoints},
        )
        server = cls(process)
        try:
            yield server
        finally:
            if process.returncode is None:
                process.kill()
            await server._reading
            await process.communicate()

    async def said(self, pattern):
        """Return the match of what it says, once it has said it."""
        while not (found := re.search(pattern, self.words)):
            assert not self._reading.done(), self.words
            self._spoke.clear()
            await self._spoke.wait()
        return found

    async def address(self):
        return parse_address((await self.said(r"listening on (\S+),"))[1])

    async def ends(self):
        """Return its exit code and what it has printed; it complains of nothing."""
        began = time.monotonic()
        printed = await self.process.stdout.read()
        code = await self.process.wait()
        took_s = time.monotonic() - began
        await self._reading
        assert not COMPLAINTS.search(self.words), self.words
        return code, json.loads(printed) if printed else None, took_s

    async def _read(self):
        while data := await self.process.stderr.read(4096):
            self.words += data.decode()
            self._spoke.set()
        self._spoke.set()


def work(address, io):
    """Be a light worker to the end; return the parameters."""
    with Session(address, strategy="sequential", retry_s=60.0, io=io) as session:
        for step in session.steps():
            numbers = np.random.default_rng((session.welcome.slot, step.index))
            for layer in session.grid.layers:
                step.wait(layer.name)
            session.gradients[:] = numbers.standard_normal(len(session.gradients), np.float32)
            session.gradients[:] += session.parameters
            step.report(0.5, 1)
            for layer in reversed(session.grid.layers):
                step.gradient_ready(layer.name)
        return session.parameters.copy()


async def train_to_the_end(server, ends):
    """Return the hash that server and workers end with."""
    code, printed, _ = await server.ends()
    assert code == 0, server.words
    assert len({parameters.tobytes() for parameters in await ends}) == 1
    return printed["parameters_sha256"]


async def stop_and_go_on(stop, tmp_path, n_workers, failpoints=""):
    """Stop a run, start it again, and compare it with one that nobody stopped."""

    async def start_workers(server):
        address = await server.address()
        pool = ThreadPoolExecutor(n_workers, "light")
        ends = [loop.run_in_executor(pool, work, address, io) for _ in range(n_workers)]
        return address, pool, asyncio.gather(*ends)

    loop = asyncio.get_running_loop()
    with LoopThread() as io:
        async with Server.run(tmp_path / "whole", n_workers) as server:
            _, pool, ends = await start_workers(server)
            expected = await train_to_the_end(server, ends)
            pool.shutdown()
        async with Server.run(tmp_path / "stopped", n_workers, failpoints=failpoints) as server:
            address, pool, ends = await start_workers(server)
            await server.said(r"step \d+/")
            await stop(server, address)
        async with Server.run(tmp_path / "stopped", n_workers, listen=str(address)) as server:
            assert await train_to_the_end(server, ends) == expected
            pool.shutdown()


@pytest.fixture(params=[5, pytest.param(50, marks=[pytest.mark.soak, pytest.mark.timeout(900)])])
def n_workers(request):
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_first_signal_saves_the_last_step_boundary_and_ends_well(tmp_path, n_workers, number):
    async def stop(server, address):
        server.process.send_signal(number)
        code, printed, took_s = await server.ends()
        assert code == 0, server.words
        print(f"{n_workers} workers: stopped at {printed} in {took_s:.2f} s")
        assert took_s < LIMIT_S
        assert printed["drained"] is True
        with Checkpoints(tmp_path / "stopped") as checkpoints:
            assert checkpoints.load().step == printed["steps"] < STEPS

    asyncio.run(stop_and_go_on(stop, tmp_path, n_workers))


@pytest.mark.slow
def test_a_second_signal_does_not_wait_for_a_disk_that_does_not_answer(
    tmp_path, n_workers, connect_raw
):
    async def drains(address):
        async with connect_raw(address) as stranger:
            stranger.send(Hello())
            message, _ = await stranger.read()
            return isinstance(message, Error) and message.code == "server-draining"

    async def stop(server, address):
        server.process.send_signal(signal.SIGTERM)
        while not await drains(address):
            pass
        server.process.send_signal(signal.SIGTERM)
        code, printed, took_s = await server.ends()
        print(f"{n_workers} workers: aborted in {took_s:.2f} s")
        assert (code, printed) == (143, None)
        assert took_s < LIMIT_S

    asyncio.run(stop_and_go_on(stop, tmp_path, n_workers, "server.before-rename=hang@2"))
