"""Processes that die by kill -9 and are started again: a server of the toy model, and a worker.

Each life is armed with one failpoint, or killed from outside. What died where is taken from the
process's exit code and from the line that the failpoint itself leaves in ``hits`` before it fires.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

import numpy as np

from dynacomm_async.failpoints import FAILPOINTS
from dynacomm_async.optim import SGD, StepDecay
from dynacomm_async.server import Training
from dynacomm_async.transport import Address

HERE = Path(__file__).parent
TRAINING = Training(SGD(0.9, nesterov=True), StepDecay(0.05, 4, 0.5), weight_decay=0.01)
"""The same as in serving.py, which runs as a program."""

OUTSIDE = "outside"
"""Not a failpoint: the process is killed from outside."""


class Hits:
    """How often each failpoint has fired, from the file that they write to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def counts(self) -> Counter[str]:
        """By name."""
        lines = self.path.read_text().split() if self.path.exists() else []
        return Counter(lines)

    def environment(self, where: str, count: int) -> dict[str, str]:
        """Return that of a process that dies when it is at ``where`` for the ``count``-th time."""
        environment = {**os.environ, "DYNACOMM_FAILPOINTS_LOG": str(self.path)}
        if where in FAILPOINTS:
            environment["DYNACOMM_FAILPOINTS"] = f"{where}=kill@{count}"
        return environment


async def _reap(process) -> None:
    with suppress(ProcessLookupError):
        process.kill()
    await process.wait()


class ServerLives:
    """A server with checkpoints that is started again whenever it is killed.

    Attributes:
        port: where it listens in every life; there once ``listening`` is set.
        killed: how often it died, by place.
        recovery_s: from each death to the end of the next step.
        finished: whether the run has ended, and ``result.npz`` is in the folder.
    """

    def __init__(
        self, toy, folder: Path, hits: Hits, *, workers, steps, every, inside=(), **told
    ) -> None:
        self.folder = folder
        self.inside = inside
        self.port = 0
        self.listening = asyncio.Event()
        self.killed: Counter[str] = Counter()
        self.recovery_s: list[float] = []
        self.finished = False
        self.n_steps = 0
        self._hits = hits
        self._died_at: float | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._told = {
            "folder": str(folder),
            "layers": [astuple(spec) for spec in toy.layers],
            "workers": workers,
            "steps": steps,
            "every": every,
            **told,
        }
        np.savez(folder / "initial.npz", parameters=toy.initial, statistics=toy.initial_statistics)

    @property
    def address(self) -> Address:
        """Where it listens."""
        return Address("127.0.0.1", self.port)

    async def live(self, where: str = OUTSIDE, count: int = 0, moment_s: float | None = None):
        """Start, and be killed at a failpoint, or ``moment_s`` after ``count`` steps, or not."""
        self._process = process = await asyncio.create_subprocess_exec(
            *self.inside,
            sys.executable,
            str(HERE / "serving.py"),
            json.dumps({**self._told, "port": self.port}),
            stdout=asyncio.subprocess.PIPE,
            env=self._hits.environment(where, count),
        )
        try:
            n_steps = 0
            async for line in process.stdout:
                if line.startswith(b"listening"):
                    self.port = int(line.split()[1])
                    self.listening.set()
                    continue
                n_steps += 1
                self.n_steps += 1
                if self._died_at is not None:
                    self.recovery_s.append(time.monotonic() - self._died_at)
                    self._died_at = None
                if moment_s is not None and n_steps == count:
                    await asyncio.sleep(moment_s)  # the moment is the fault
                    self.kill()
            code = await process.wait()
        finally:
            await _reap(process)
        if code == 0:
            self.finished = True
            return
        assert code == -signal.SIGKILL, f"the server ended with {code}"
        self.killed[where] += 1
        self._died_at = time.monotonic()

    def kill(self) -> None:
        """Kill it from outside, if it lives."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()

    def stop(self) -> None:
        """Have it stop where it is, without a word (SIGSTOP)."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    @property
    def pid(self) -> int:
        """Of the process that lives."""
        assert self._process is not None
        return self._process.pid

    async def live_to_the_end(self) -> None:
        """Come back after every death until the run has ended."""
        while not self.finished:
            await self.live()

    def check(self, toy, replicas=()) -> None:
        """Judge the result by a replay in plain NumPy."""
        workers, steps = self._told["workers"], self._told["steps"]
        parameters, statistics = toy.replay(workers, steps, TRAINING)
        with np.load(self.folder / "result.npz") as result:
            assert result["parameters"].tobytes() == parameters.tobytes()
            assert result["statistics"].tobytes() == statistics.tobytes()
        for replica in replicas:
            assert replica.parameters.tobytes() == parameters.tobytes()
            assert replica.statistics.tobytes() == statistics.tobytes()

    async def work(self, toy, n_workers: int, **options):
        """Be so many workers that live on, in threads; return what they end with."""
        await self.listening.wait()
        ends = [asyncio.to_thread(toy.work, self.address, **options) for _ in range(n_workers)]
        return await asyncio.gather(*ends)


class WorkerLife:
    """One worker of the toy model in a process of its own, as an async context manager.

    Args:
        address: the server's.
        hits: counts failpoints.
        where, count: the failpoint that it dies at.
        inside: the beginning of a command that runs the rest of it elsewhere.
        told: see working.py.

    Attributes:
        process: it.
    """

    def __init__(self, address, hits, where=OUTSIDE, count=0, *, inside=(), **told) -> None:
        self._command = [*inside, sys.executable, str(HERE / "working.py"), str(address)]
        self._command.append(json.dumps(told))
        self._environment = hits.environment(where, count)
        self.process: asyncio.subprocess.Process

    async def __aenter__(self) -> WorkerLife:
        self.process = await asyncio.create_subprocess_exec(
            *self._command,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._environment,
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()
        await self.process.communicate()

    async def said(self, awaited: str | None = None) -> str:
        """Return its next line, or pass over lines up to one; empty when it has ended."""
        while line := (await self.process.stdout.readline()).decode():
            if awaited in (None, line.strip()):
                return line.strip()
        return ""

    async def ended(self) -> int:
        """Read what it says to the end, and return its exit code."""
        while await self.said():
            pass
        return await self.process.wait()

    async def complaint(self) -> str:
        """Return what it has said on standard error, once it has ended."""
        return (await self.process.stderr.read()).decode()
