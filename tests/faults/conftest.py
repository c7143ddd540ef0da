"""Workers in memory whose connections break wherever a test wants them to; processes to kill.

``hits`` counts the failpoints that have fired, and the end of the report lists them. With
``DYNACOMM_FAILPOINTS_LOG`` set the count goes on from one test run to the next.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from dynacomm_async.errors import ChannelBroken
from dynacomm_async.failpoints import FAILPOINTS
from dynacomm_async.schedule import Plan
from dynacomm_async.schedule.dispatch import Policy
from dynacomm_async.schedule.estimator import Estimator
from dynacomm_async.schedule.plan import PolicyPlan
from dynacomm_async.transport import memory_pair
from dynacomm_async.wire.messages import Hello, Report
from dynacomm_async.worker.board import Board
from dynacomm_async.worker.client import Arenas, Client
from dynacomm_async.worker.line import Line
from dynacomm_async.worker.planning import FixedPlan, Plans
from dynacomm_async.worker.step import Phase


class Breaking:
    """Connections in memory, each of which is cut when it has carried so many bytes.

    Args:
        server: whoever takes connections in.
        budgets: bytes that the next connection carries, both ways together, and one more than
            that is lost; None: no limit.
        numbers: into what pieces the streams are cut.

    Attributes:
        cuts: connections that were cut.
    """

    def __init__(self, server, budgets: Iterator[int | None], numbers: random.Random) -> None:
        self._server = server
        self._budgets = budgets
        self._numbers = numbers
        self.cuts = 0

    def open(self) -> Line:
        lines, ends = [], []

        def pieces():
            left = next(self._budgets)
            while True:
                piece = self._numbers.choice([1, 24, 100, 4096, 1 << 14])
                if left is None or piece <= left:
                    left = None if left is None else left - piece
                    yield piece
                    continue
                if left:
                    yield left
                self.cuts += 1
                for end in ends:
                    end.abort(ChannelBroken("cut"))
                left = None

        ends += memory_pair(
            self._server.connect_channel,
            lambda channel: lines.append(Line(channel)) or lines[-1],
            piece_nbytes=pieces(),
        )
        return lines[-1]

    async def reach(self, make_hello):
        while True:
            line = self.open()
            try:
                return line, await line.greet(make_hello())
            except ChannelBroken:
                await asyncio.sleep(0)


def random_plans(numbers: random.Random, n_layers: int) -> Plans:
    """Cuts of its own for each worker, with a barrier or without, or a policy."""
    if numbers.random() < 0.5:

        def policy() -> Policy:
            cap = numbers.choice([None, 1, 5000, 20_000])
            return Policy(cap, numbers.choice([0, 9000]), numbers.random() < 0.3)

        return FixedPlan(PolicyPlan("random", n_layers, policy(), policy()))
    pull, push = ([cut for cut in range(1, n_layers) if numbers.random() < 0.5] for _ in range(2))
    return FixedPlan(Plan.from_cuts("random", n_layers, pull, push))


async def granted(board, phase, layer, step, life):
    event = asyncio.Event()
    board.when(phase, layer, step, event.set, life)
    await event.wait()
    return board.is_granted(phase, layer, step)


async def work_in_memory(toy, breaking, numbers):
    """Be a worker on the loop to the end, across breaks and steps back; return its arena."""
    n_layers, n_parameters = len(toy.layers), toy.grid.n_parameters
    line, welcome = await breaking.reach(Hello)
    arenas, board = Arenas.allocate(toy.grid), Board(n_layers, welcome.version)
    estimator = Estimator([(spec.name, 4 * spec.count) for spec in toy.layers])
    plans = random_plans(numbers, n_layers)
    client = Client(welcome, toy.grid, arenas, board, plans, estimator, reach=breaking.reach)
    client.join(line)
    slot, (life, step) = welcome.slot, board.course
    try:
        while not board.ended:
            if life != board.course.life:
                life, step = board.course
            if step == welcome.steps:
                over = asyncio.Event()
                board.when_ended(over.set, life)
                await over.wait()
                continue
            for layer in range(n_layers):
                await granted(board, Phase.FORWARD, layer, step, life)
            if life != board.course.life:
                continue
            client.report(step, life, Report(toy.loss(slot, step), 1))
            arenas.outgoing[:] = toy.contribution(arenas.incoming[:n_parameters], slot, step)
            for layer in numbers.sample(range(n_layers), n_layers):
                client.gradient_ready(step, life, layer)
                for _ in range(numbers.randint(0, 3)):
                    await asyncio.sleep(0)
            step += 1
    finally:
        await client.leave()
    return np.copy(arenas.incoming)


def _load(name: str) -> ModuleType:
    """Import a file of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


killing = _load("killing")


@pytest.fixture
def faults():
    return SimpleNamespace(
        Breaking=Breaking,
        work_in_memory=work_in_memory,
        ServerLives=killing.ServerLives,
        WorkerLife=killing.WorkerLife,
        TRAINING=killing.TRAINING,
    )


_HITS = pytest.StashKey[object]()


@pytest.fixture(scope="session")
def hits(request, tmp_path_factory):
    """What the failpoints of all tests have counted."""
    path = os.environ.get("DYNACOMM_FAILPOINTS_LOG")
    where = Path(path) if path else tmp_path_factory.mktemp("failpoints") / "hits"
    request.config.stash[_HITS] = found = killing.Hits(where)
    return found


def pytest_terminal_summary(terminalreporter, config):
    found = config.stash.get(_HITS, None)
    counts = None if found is None else found.counts
    if counts:
        terminalreporter.section("failpoints that have fired")
        for name in FAILPOINTS:
            terminalreporter.write_line(f"{counts[name]:5}  {name}")
