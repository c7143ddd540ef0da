"""Shared by all tests: leak checks, a runner for coroutine tests, a toy model with its replay.

- No test may leave anything behind: a thread of ours, a child process, an open socket or, in a
  coroutine test, a task. What existed before the test does not count.
- An event loop complains of exceptions that nobody took in its log: that fails a test too.
- ``async def`` tests without the ``asyncio`` marker run on the library's own event loop (uvloop
  where it exists), or on the loop of the ``loop_factory`` fixture if they ask for that: then
  once on each kind of loop. They have 30 s.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import logging
import os
import shutil
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

# As the command line sets it, before NumPy is loaded: more BLAS threads than one fight with ours.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest
from numpy.typing import NDArray

from dynacomm_async.optim import UpdateRule
from dynacomm_async.ranges import Range
from dynacomm_async.server.results import Applied, StepRecord
from dynacomm_async.server.store import Training
from dynacomm_async.transport import Address, new_event_loop
from dynacomm_async.wire.codec import decode, encode
from dynacomm_async.wire.frame import PREFIX_NBYTES, Prefix
from dynacomm_async.wire.grid import Grid, LayerSpec
from dynacomm_async.wire.messages import (
    PROTOCOL_VERSION,
    Gradients,
    Heartbeat,
    Hello,
    Join,
    Message,
    Parameters,
    Report,
    Subscription,
    Welcome,
)
from dynacomm_async.worker.session import Session

pytest_plugins = ["dynacomm_async.testing.fixtures"]

Floats = NDArray[np.float32]

_PATIENCE_S = 2.0
"""How long what is on its way out may take to be gone."""

_TEST_S = 30.0

_OWN_THREADS = ("dynacomm", "checkpoints", "plan search")
"""How the names of the package's threads begin; the loops' own executors keep theirs."""


# -- leaks ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    before = _things()
    yield
    deadline = time.monotonic() + _PATIENCE_S
    while left := _things() - before:
        if time.monotonic() > deadline:
            pytest.fail(f"left behind: {', '.join(sorted(left))}")
        gc.collect()  # a socket in a cycle is closed by it, with a ResourceWarning of its own
        time.sleep(0.02)


class _Complaints(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))


@pytest.fixture(autouse=True)
def _no_complaints(_no_leaks: None) -> Iterator[None]:
    complaints, logger = _Complaints(), logging.getLogger("asyncio")
    logger.addHandler(complaints)
    yield
    gc.collect(0)  # a task that failed unseen says so when it is collected
    logger.removeHandler(complaints)
    if complaints.texts:
        pytest.fail("an event loop complained: " + "\n".join(complaints.texts))


def _things() -> set[str]:
    threads = {
        f"thread {thread.name} ({thread.ident})"
        for thread in threading.enumerate()
        if thread.name.startswith(_OWN_THREADS)
    }
    return threads | _open_sockets() | _children()


def _open_sockets() -> set[str]:
    """Sockets by inode; empty where there is no /proc."""
    found = set()
    for entry in _listed(Path("/proc/self/fd")):
        try:
            target = str(entry.readlink())
        except OSError:
            continue  # closed since, such as the one that listed the folder
        if target.startswith("socket:"):
            found.add(target)
    return found


def _children() -> set[str]:
    """Child processes by id; empty where /proc does not tell."""
    found = set()
    for task in _listed(Path("/proc/self/task")):
        try:
            pids = (task / "children").read_text().split()
        except OSError:
            continue
        for pid in pids:
            name = _command_of(pid)
            if "resource_tracker" not in name:  # multiprocessing's own, lives as long as we do
                found.add(f"process {pid} ({name})")
    return found


def _command_of(pid: str) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return "gone"
    return command.replace("\0", " ").strip()[:120] or "a zombie"


def _listed(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


# -- coroutine tests -----------------------------------------------------------------------------


@pytest.fixture(params=[new_event_loop, asyncio.new_event_loop], ids=["default", "stock"])
def loop_factory(request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop]:
    return request.param  # type: ignore[no-any-return]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    factory = pyfuncitem.funcargs.get("loop_factory", new_event_loop)

    async def bounded() -> None:
        async with asyncio.timeout(_TEST_S):
            await _without_leaks(pyfuncitem.obj)(**arguments)

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(bounded())
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    marked = item.get_closest_marker("asyncio") is not None
    if marked and isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
        item.obj = _without_leaks(item.obj)
    return (yield)


def _without_leaks(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def checked(*args: Any, **kwargs: Any) -> None:
        before = asyncio.all_tasks()
        await test(*args, **kwargs)
        deadline = time.monotonic() + _PATIENCE_S
        while left := asyncio.all_tasks() - before:
            if time.monotonic() > deadline:
                pytest.fail(f"left behind: {', '.join(map(repr, left))}")
            await asyncio.sleep(0)

    return checked


# -- the two ends by hand ------------------------------------------------------------------------


class RawPeer:
    """One end of a connection that says what it is told to, whether that is allowed or not."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def abort(self) -> None:
        self._writer.transport.abort()

    def hang_up(self) -> None:
        """End the stream behind what was sent."""
        self._writer.write_eof()

    async def close(self) -> None:
        self.abort()
        with suppress(ConnectionError):
            await self._writer.wait_closed()

    def send_bytes(self, data: bytes) -> None:
        self._writer.write(data)

    def send(self, message: Message, payload: bytes = b"") -> None:
        self._writer.write(encode(message, len(payload)) + payload)

    async def read(self) -> tuple[Message, bytes]:
        prefix = Prefix.unpack(await self._reader.readexactly(PREFIX_NBYTES))
        header = await self._reader.readexactly(prefix.header_nbytes)
        payload = await self._reader.readexactly(prefix.payload_nbytes)
        return decode(prefix, header), payload

    async def read_to_end(self) -> bytes:
        """The rest of the stream; a reset counts as its end."""
        try:
            return await self._reader.read()
        except ConnectionError:
            return b""

    async def read_a_little(self) -> None:
        """Read the beginning of what comes, and no more from then on."""
        await self._reader.readexactly(1000)
        self._writer.transport.pause_reading()  # type: ignore[attr-defined]


class RawWorker(RawPeer):
    """A worker by hand."""

    welcome: Welcome

    @classmethod
    @asynccontextmanager
    async def connect(cls, address: Address) -> AsyncIterator[RawWorker]:
        worker = cls(*await asyncio.open_connection(*address))
        try:
            yield worker
        finally:
            await worker.close()

    async def join(self, grid: Grid, **changes: Any) -> Welcome:
        """Say hello and join, subscribed to one message for the whole first pull."""
        self.send(Hello())
        message, _ = await self.read()
        assert isinstance(message, Welcome)
        self.welcome = message
        changes = {"subscription": whole(message.version, grid)} | changes
        self.send(Join(grid.fingerprint, **changes))
        return message

    async def pull(self) -> Floats:
        """Read one message, which must be parameters."""
        message, payload = await self.read()
        assert isinstance(message, Parameters), message
        return np.frombuffer(payload, np.float32)

    def push(self, step: int, gradients: Floats, grid: Grid, **changes: Any) -> None:
        """Send the whole contribution as one message."""
        cells = (Range(0, grid.n_cells),)
        message = Gradients(step, cells, whole(step + 1, grid), Report(0.5, 4))
        self.send(replace(message, **changes), gradients.tobytes())


def whole(version: int, grid: Grid) -> Subscription:
    """A subscription to everything in one message."""
    return Subscription(version, ((Range(0, grid.n_parameter_cells),),))


class RawServer:
    """A server by hand, for one worker."""

    def __init__(self) -> None:
        self._peers: asyncio.Queue[RawPeer] = asyncio.Queue()
        self.address: Address

    @classmethod
    @asynccontextmanager
    async def listen(cls) -> AsyncIterator[RawServer]:
        server, peers = cls(), []

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            peers.append(RawPeer(reader, writer))
            server._peers.put_nowait(peers[-1])

        listener = await asyncio.start_server(accept, "127.0.0.1", 0)
        server.address = Address(*listener.sockets[0].getsockname()[:2])
        try:
            yield server
        finally:
            listener.close()
            for peer in peers:
                await peer.close()

    async def accept(self) -> RawPeer:
        return await self._peers.get()

    async def greet(self, grid: Grid, *, steps: int = 1) -> RawPeer:
        """Welcome a worker, answer its pings and read its join."""
        peer = await self.accept()
        message, _ = await peer.read()
        assert isinstance(message, Hello)
        peer.send(Welcome(PROTOCOL_VERSION, "by-hand", 0, 1, 1, grid.layers, 0, steps, False))
        while not isinstance(message, Join):
            message, _ = await peer.read()
            if isinstance(message, Heartbeat):
                peer.send(Heartbeat(message.number, True, 0))
        return peer


@pytest.fixture
def listen_raw() -> Callable[[], Any]:
    return RawServer.listen


@pytest.fixture
def connect_raw() -> Callable[[Address], Any]:
    return RawWorker.connect


# -- disks ---------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[..., Any]]]:
    """A file system of 1 MiB, and a function that mounts it anew with other options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options: str) -> subprocess.CompletedProcess[str]:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(["size=1m", *options]), "t", str(place)]
        return subprocess.run(command, capture_output=True, text=True)

    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root")
    done = mount()
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    yield place, mount
    subprocess.run(["umount", str(place)], check=True)


# -- clusters ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """A Ray cluster on this machine: three nodes, each with room for a small run, and a head.

    A node may be lost in a test; drivers are processes of their own.
    """
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    small = {"object_store_memory": 80 * 2**20}
    watch = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": watch, **small}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(3):
            cluster.add_node(num_cpus=3, **small)
        yield cluster
    finally:
        cluster.shutdown()
        patch.undo()


# -- a toy model ---------------------------------------------------------------------------------


Made = dict[tuple[int, int], Floats]
"""By slot and step: the contribution that a worker made."""


@dataclass
class Replica:
    """What one worker ended with."""

    slot: int
    parameters: Floats
    statistics: Floats
    session: Session


@dataclass
class Toy:
    """A model whose gradients depend on every parameter, the worker and the step; no network."""

    layers: tuple[LayerSpec, ...] = (
        LayerSpec("front", 5000, decay=4100, statistics=7),
        LayerSpec("tiny", 3),
        LayerSpec("wide", 9000, decay=9000, statistics=4100),
        LayerSpec("last", 1, decay=1),
    )
    seed: int = 1
    grid: Grid = field(init=False)
    initial: Floats = field(init=False)
    initial_statistics: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.grid = Grid(self.layers)
        rng = np.random.default_rng(self.seed)
        self.initial = rng.standard_normal(self.grid.n_parameters).astype(np.float32)
        self.initial_statistics = rng.random(self.grid.n_statistics).astype(np.float32)

    def noise(self, slot: int, step: int) -> Floats:
        rng = np.random.default_rng((self.seed, slot, step))
        return rng.standard_normal(self.grid.n_floats).astype(np.float32)

    def loss(self, slot: int, step: int) -> float:
        return 1 / (3 + slot + 7 * step)

    def contribution(self, parameters: Floats, slot: int, step: int) -> Floats:
        """(n_floats,) float32: gradients, then batch statistics."""
        values = self.noise(slot, step)
        values[: self.grid.n_parameters] *= np.float32(0.1)
        values[: self.grid.n_parameters] += parameters * np.float32(1 / 3)
        return values

    def work(
        self,
        address: object,
        at_step: Callable[[Session, int], None] | None = None,
        made: Made | None = None,
        **options: Any,
    ) -> Replica:
        """Be a worker until the end; blocks. ``made`` takes down what it contributes."""
        options = {"layers": self.layers, "retry_s": 10.0} | options
        where = address if callable(address) else Address(*address)  # type: ignore[misc]
        with Session(where, **options) as session:
            slot, n_parameters = session.welcome.slot, self.grid.n_parameters
            for step in session.steps():
                if at_step is not None:
                    at_step(session, step.index)
                noise = self.noise(slot, step.index)
                for spec in self.layers:
                    step.wait(spec.name)
                    part = session.slice_of(spec.name)
                    pulled = session.parameters[part] * np.float32(1 / 3)
                    session.gradients[part] = noise[part] * np.float32(0.1) + pulled
                step.report(self.loss(slot, step.index), images=slot + 1)
                session.batch_statistics[:] = noise[n_parameters:]
                if made is not None and not step.abandoned:
                    whole = np.concatenate([session.gradients, session.batch_statistics])
                    made[slot, step.index] = whole
                for spec in reversed(self.layers):
                    step.gradient_ready(spec.name)
            return Replica(slot, session.parameters.copy(), session.statistics.copy(), session)

    def replay(self, n_workers: int, steps: int, training: Training) -> tuple[Floats, Floats]:
        """Train in one process, layer by layer in plain NumPy; return what must come out."""
        grid, rule = self.grid, training.rule
        parameters, running = self.initial.copy(), self.initial_statistics.copy()
        states = new_states(rule, grid.n_parameters)
        momentum = np.float32(training.statistics_momentum)
        for step in range(steps):
            contributions = [self.contribution(parameters, n, step) for n in range(n_workers)]
            mean = mean_in_rank_order(contributions)
            apply_rule(grid, training, parameters, mean[: grid.n_parameters], states, step)
            running = running * (np.float32(1) - momentum) + mean[grid.n_parameters :] * momentum
        return parameters, running

    def replay_log(
        self,
        log: Sequence[Applied],
        made: Made | Callable[[int, int, int], Floats],
        training: Training,
    ) -> tuple[Floats, Floats]:
        """Make the updates of a log, cell by cell in plain NumPy, from what workers say they made:
        by slot and step, or also by the entry's place in the log.

        Whatever is applied twice, or to a version that it does not belong to, fails.
        """
        grid, rule = self.grid, training.rule
        parameters, running = self.initial.copy(), self.initial_statistics.copy()
        states = new_states(rule, grid.n_parameters)
        used: set[tuple[int, int, int]] = set()
        undo: dict[tuple[int, int], Any] = {}  # by step and first cell
        for place, (step, cells, slots, undone) in enumerate(log):
            keys = {(slot, step, c) for slot in slots for c in range(cells.first, sum(cells))}
            if undone:
                for old, kept in undo.pop((step, cells.first)):
                    old[:] = kept
                used -= {key for key in used if key[1] == step and key[2] in range(*_ends(cells))}
                continue
            assert not keys & used, f"applied twice: {keys & used}"
            used |= keys
            start, stop = grid.floats(*cells)
            edge = grid.n_parameters
            if slots:
                whole = [
                    made(slot, step, place) if callable(made) else made[slot, step]
                    for slot in slots
                ]
                mean = mean_in_rank_order([values[start:stop] for values in whole])
            undo[step, cells.first] = [
                (old, old.copy())
                for old in (
                    parameters[start : min(stop, edge)],
                    *(state[start : min(stop, edge)] for state in states),
                    running[max(start - edge, 0) : max(stop - edge, 0)],
                )
            ]
            if not slots:
                continue
            if start < edge:
                gradient = np.zeros(edge, np.float32)
                gradient[start : min(stop, edge)] = mean[: edge - start]
                fresh, moved = parameters.copy(), [state.copy() for state in states]
                apply_rule(grid, training, fresh, gradient, moved, step)
                for old, new in zip((parameters, *states), (fresh, *moved), strict=True):
                    old[start : min(stop, edge)] = new[start : min(stop, edge)]
            if stop > edge:
                momentum = np.float32(training.statistics_momentum)
                part = slice(max(start - edge, 0), stop - edge)
                batch = mean[max(edge - start, 0) :]
                running[part] = running[part] * (np.float32(1) - momentum) + batch * momentum
        return parameters, running

    def replay_records(
        self, records: Sequence[StepRecord], training: Training
    ) -> tuple[Floats, Floats]:
        """Train in one process on what each cell of each step is said to be the mean of."""
        grid, rule = self.grid, training.rule
        parameters, running = self.initial.copy(), self.initial_statistics.copy()
        states, momentum = (
            new_states(rule, grid.n_parameters),
            np.float32(training.statistics_momentum),
        )
        for step, record in enumerate(records):
            assert record.index == step
            made: dict[tuple[int, ...], list[Floats]] = {}
            live = [parameters, running, *states]
            for _, slots in record.contributors:
                if not slots or slots in made:
                    continue
                mean = mean_in_rank_order([self.contribution(parameters, n, step) for n in slots])
                fresh, *moved = (array.copy() for array in (parameters, *states))
                apply_rule(grid, training, fresh, mean[: grid.n_parameters], moved, step)
                batch = mean[grid.n_parameters :]
                made[slots] = [
                    fresh,
                    running * (np.float32(1) - momentum) + batch * momentum,
                    *moved,
                ]
            for cells, slots in record.contributors:
                start, stop = grid.floats(*cells)
                edge = grid.n_parameters
                for index, old in enumerate(live if slots else ()):
                    shift = edge if index == 1 else 0
                    part = slice(max(start - shift, 0), max(stop - shift, 0))
                    old[part] = made[slots][index][part]
        return parameters, running


def _ends(cells: Range) -> tuple[int, int]:
    return cells.first, cells.first + cells.count


def new_states(rule: UpdateRule, n: int) -> list[Floats]:
    return [np.zeros(n, np.float32) for _ in range(rule.n_states)]


def mean_in_rank_order(contributions: Sequence[Floats]) -> Floats:
    total = contributions[0].copy()
    for contribution in contributions[1:]:
        total = total + contribution
    return total / np.float32(len(contributions))


def apply_rule(
    grid: Grid,
    training: Training,
    parameters: Floats,
    gradient: Floats,
    states: Sequence[Floats],
    step: int,
) -> None:
    """One update of the whole vector: each layer's decayed part, then the rest of it."""
    begin = 0
    for spec in grid.layers:
        options = (training.layers or {}).get(spec.name)
        scale = 1.0 if options is None else options.rate_scale
        decay = training.weight_decay
        if options is not None and options.weight_decay is not None:
            decay = options.weight_decay
        edges = (begin, begin + spec.decay, begin + spec.count)
        for (first, last), own in zip(pairwise(edges), (decay, 0.0), strict=True):
            if first < last:
                training.rule.update(
                    parameters[first:last],
                    gradient[first:last].copy(),
                    tuple(state[first:last] for state in states),
                    step=step,
                    rate=training.rate.rate(step) * scale,
                    decay=own,
                )
        begin += spec.count


@pytest.fixture
def toy() -> Toy:
    return Toy()
