"""One cell of ``end_to_end.py``: systems on a shaped network, measured in turns."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import IO, Any

sys.path.append(str(Path(__file__).parents[1]))
import train_several_machines as several

from dynacomm_async.errors import DynaCommError

__all__ = ["Failure", "Measured", "System", "measure_all", "profile"]

_MEMBER = str(Path(__file__).with_name("_end_to_end_member.py"))

_STEP_LIMIT_S = 120.0
"""A step that takes longer hangs."""

_START_LIMIT_S = 120.0

_LINE_NBYTES = 1 << 20

_CALM, _CALM_S, _CALM_NBYTES = 3, 0.1, 32 * 1024
"""So many times in a row so little has moved in so many seconds: only heartbeats have."""

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Failure(DynaCommError):
    """A system did not run."""


@dataclass(frozen=True, slots=True)
class System:
    """What trains.

    Attributes:
        name: as in the tables.
        kind: ``ours``, ``ddp`` or ``flower``.
        variant: our strategy, or the size of DDP's buckets.
        warmup: steps before the first that counts: until it knows its costs, or buckets.
    """

    name: str
    kind: str
    variant: str
    warmup: int

    @classmethod
    def named(cls, name: str) -> System:
        """Return the system of a name such as ``joint``, ``ddp:25`` or ``flower``."""
        kind, _, variant = name.partition(":")
        if kind == "ddp":
            return cls(name, kind, variant or "default", 3)
        if kind == "flower":
            return cls(name, kind, "", 1)
        return cls(name, "ours", name, 6)  # three that measure, the rest for the first plans


@dataclass(slots=True)
class Measured:
    """What was seen of a system in the blocks that count.

    Attributes:
        step_s: the steps' durations at the first worker, without the first of each block.
        losses: mean loss of the workers by step, from the first.
        cpu_worker_s: processor time of a worker in a step.
        cpu_server_s: of the server.
        peak_worker_nbytes: greatest resident memory of a worker.
        peak_server_nbytes: of the server.
        up_nbytes: what a worker's interface sent in a step.
        down_nbytes: what it received.
        server_up_nbytes: what the server's interface received.
        server_down_nbytes: what it sent.
        explanation: where the first worker's time went, in the words of our library.
    """

    step_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    cpu_worker_s: float = 0.0
    cpu_server_s: float = 0.0
    peak_worker_nbytes: int = 0
    peak_server_nbytes: int = 0
    up_nbytes: float = 0.0
    down_nbytes: float = 0.0
    server_up_nbytes: float = 0.0
    server_down_nbytes: float = 0.0
    explanation: str = ""

    @property
    def median_s(self) -> float:
        """The median step."""
        return statistics.median(self.step_s)


class _Member:
    """A process on one of the machines."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, words: IO[bytes]) -> None:
        self._name = name
        self._process = process
        self._words = words

    @classmethod
    async def start(cls, machine: Sequence[str], spec: Mapping[str, Any]) -> _Member:
        words = TemporaryFile()  # noqa: SIM115 -- closed with the process
        process = await asyncio.create_subprocess_exec(
            *machine,
            sys.executable,
            _MEMBER,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=words,
            limit=_LINE_NBYTES,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "eth0"},
        )
        member = cls(f"{spec['name']}, {spec['role']} {spec['rank']}", process, words)
        member.tell(json.dumps(spec))
        return member

    def tell(self, line: str) -> None:
        """Write it a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())

    async def hear(self) -> dict[str, Any]:
        """Return what it says next.

        Raises:
            Failure: it ended instead.
        """
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            if line.startswith(b"{"):  # libraries print, too
                found: dict[str, Any] = json.loads(line)
                return found
        await self._process.wait()
        raise Failure(f"{self._name}: ended early: {self.last_words()}")

    def last_words(self) -> str:
        """Return the last line that it wrote to its standard error."""
        self._words.seek(0)
        lines = self._words.read().decode(errors="replace").strip().split("\n")
        return lines[-1] or "no word"

    def cpu_s(self) -> float:
        """Return the processor time that it has taken so far, of all its threads."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text()
        fields = stat.rpartition(")")[2].split()
        return _TICK_S * (int(fields[11]) + int(fields[12]))

    def peak_nbytes(self) -> int:
        """Return the most memory that it has had resident."""
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
        return 0

    async def __aenter__(self) -> _Member:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        self._words.close()


def _interface_nbytes() -> dict[str, tuple[int, int]]:
    """Return what each port of the switch has received from its machine, and sent to it."""
    found = {}
    for line in Path("/proc/net/dev").read_text().splitlines()[2:]:
        name, _, numbers = line.partition(":")
        columns = numbers.split()
        found[name.strip()] = int(columns[0]), int(columns[8])
    return found


async def _quiet() -> None:
    """Return when nothing is on its way any more: what a block has left over is part of it."""
    before, calm = _interface_nbytes(), 0
    while calm < _CALM:
        await asyncio.sleep(_CALM_S)
        after = _interface_nbytes()
        moved = sum(sum(after[port]) - sum(before[port]) for port in before)
        calm = calm + 1 if moved < _CALM_NBYTES else 0
        before = after


class _Team:
    """A system's processes, and what was measured of them."""

    def __init__(self, system: System, workers: list[_Member], server: _Member | None) -> None:
        self.system = system
        self._workers = workers
        self._server = server
        self.found = Measured()
        self._counted = 0

    @classmethod
    async def start(
        cls,
        system: System,
        spec: Mapping[str, Any],
        machines: Sequence[Sequence[str]],
        stack: AsyncExitStack,
    ) -> _Team:
        """Start the server, wait until it listens, start the workers, wait until all are there."""
        spec = {**spec, "system": system.kind, "variant": system.variant, "name": system.name}
        server = None
        if system.kind != "ddp":
            server = await stack.enter_async_context(
                await _Member.start(machines[0], {**spec, "role": "server", "rank": 0})
            )
            await server.hear()
        workers = [
            await stack.enter_async_context(
                await _Member.start(machine, {**spec, "role": "worker", "rank": rank})
            )
            for rank, machine in enumerate(machines[1:])
        ]
        team = cls(system, workers, server)
        await team._hear_all(_START_LIMIT_S)
        await _quiet()
        return team

    async def run(self, steps: int, *, is_counted: bool) -> None:
        """Let it train so many steps."""
        server_cpu_s = self._server.cpu_s() if self._server else 0.0
        cpu_s = sum(worker.cpu_s() for worker in self._workers)
        before = _interface_nbytes()
        for worker in self._workers:
            worker.tell(str(steps))
        reports = await self._hear_all(_STEP_LIMIT_S * steps)
        self._tell(reports[0]["steps_s"], is_counted=is_counted)
        losses = zip(*(report["losses"] for report in reports), strict=True)
        self.found.losses += [statistics.fmean(step) for step in losses]
        await _quiet()
        if not is_counted:
            return
        found, n_workers = self.found, len(self._workers)
        found.step_s += reports[0]["steps_s"][1:]
        after = _interface_nbytes()
        cpu_s = sum(worker.cpu_s() for worker in self._workers) - cpu_s
        ports = [f"port{number + 2}" for number in range(n_workers)]
        up, down = (sum(after[p][way] - before[p][way] for p in ports) for way in (0, 1))
        server_up, server_down = (after["port1"][way] - before["port1"][way] for way in (1, 0))
        self._counted, done = self._counted + steps, self._counted
        for name, value in (
            ("cpu_worker_s", cpu_s / n_workers),
            ("cpu_server_s", self._server.cpu_s() - server_cpu_s if self._server else 0.0),
            ("up_nbytes", up / n_workers),
            ("down_nbytes", down / n_workers),
            ("server_up_nbytes", server_up),
            ("server_down_nbytes", server_down),
        ):
            setattr(found, name, (getattr(found, name) * done + value) / self._counted)
        found.explanation = reports[0]["explanation"]
        found.peak_worker_nbytes = max(worker.peak_nbytes() for worker in self._workers)
        found.peak_server_nbytes = self._server.peak_nbytes() if self._server else 0

    def _tell(self, steps_s: Sequence[float], *, is_counted: bool) -> None:
        """Say how long steps took, for who waits: a cell takes minutes."""
        seconds = " ".join(f"{step_s:.2f}" for step_s in steps_s)
        what = "counted, but for the first" if is_counted else "to settle"
        print(f"{self.system.name}: steps of {seconds} s ({what})", file=sys.stderr, flush=True)

    async def _hear_all(self, limit_s: float) -> list[dict[str, Any]]:
        try:
            async with asyncio.timeout(limit_s):
                return await self._first_to_fail()
        except TimeoutError:
            raise Failure(f"{self.system.name}: nothing was heard for {limit_s:.0f} s") from None

    async def _first_to_fail(self) -> list[dict[str, Any]]:
        """Hear all workers; the first that has ended instead is why, and no other is awaited."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(worker.hear()) for worker in self._workers]
        except* Failure as group_of:
            raise group_of.exceptions[0] from None
        return [task.result() for task in tasks]


async def profile(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``layers`` and ``cpu_s`` of a model, measured alone."""
    spec = {**spec, "role": "profile", "name": "profile", "rank": 0, "rounds": 5}
    async with await _Member.start((), spec) as member, asyncio.timeout(_START_LIMIT_S):
        return await member.hear()


async def measure_all(
    systems: Sequence[System],
    spec: Mapping[str, Any],
    rate: str,
    server_rate: str,
    blocks: Sequence[int],
    congestion: str | None = None,
) -> dict[str, Measured]:
    """Return what was measured of each system on one network.

    Args:
        systems: take turns.
        spec: what every process is told.
        rate: of each worker's link, each way.
        server_rate: of the server's.
        blocks: how many steps each takes in a turn; one more is taken, which does not count.
        congestion: which congestion control all use; None: this machine's.

    Raises:
        Failure: a system did not run.
    """
    machines = several.build_network(spec["workers"] + 1, rate, server_rate, congestion)
    async with AsyncExitStack() as stack:
        teams = []
        for number, system in enumerate(systems):
            steps = system.warmup + sum(blocks) + len(blocks) + 1  # the last is never asked for
            own = {
                **spec,
                "steps": steps,
                "port": 7070 + number,
                "host": f"{several.NETWORK}.1",
                "first_worker": f"{several.NETWORK}.2",
            }
            teams.append(await _Team.start(system, own, machines, stack))
            await teams[-1].run(system.warmup, is_counted=False)
        for steps in blocks:
            for team in teams:
                await team.run(steps + 1, is_counted=True)
        return {team.system.name: team.found for team in teams}
