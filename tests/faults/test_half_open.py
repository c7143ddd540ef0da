"""Half-open connections: the other side is gone, and nothing says so.

A process is stopped (SIGSTOP), or the network between two namespaces is taken down, while nothing
is under way and in the middle of a message. The other side notices within 1.5 times the limit, and
neither socket nor buffer of the connection stays.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from dynacomm_async.link import Link, LinkSettings
from dynacomm_async.server import ParameterServer
from dynacomm_async.transport import Address
from dynacomm_async.wire.grid import LayerSpec

# ruff: noqa: ASYNC110 -- the system announces the end of a socket to nobody

pytestmark = [
    pytest.mark.timing,
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="sockets are found in /proc"),
]

LIMIT_S = 2.0
LARGE = (LayerSpec("large", 250_000),)
RATE_BYTES_PER_S = 1e6
"""A message of a megabyte takes a second."""

ESTABLISHED, FIN_WAIT, CLOSE_WAIT, LAST_ACK = 1, 4, 8, 9
"""States in which a socket is used, or has bytes to send; the kernel's numbers."""


def sockets(pid, port):
    """The states of a system's connections with a port of the server's at either end."""
    found = []
    table = Path(f"/proc/{pid}/net/tcp")
    if not table.exists():
        return found  # the process has ended, and holds none
    for line in table.read_text().splitlines()[1:]:
        _, local, remote, state, *_ = line.split()
        ports = {int(end.partition(":")[2], 16) for end in (local, remote)}
        if port in ports and int(state, 16) in (ESTABLISHED, FIN_WAIT, CLOSE_WAIT, LAST_ACK):
            found.append((int(local.partition(":")[2], 16), int(state, 16)))
    return found


async def given_up(pid, port):
    """Wait until no connection of the port is used by a process of this system."""
    while any(state == ESTABLISHED for _, state in sockets(pid, port)):
        await asyncio.sleep(0.01)


async def freed(pid, port, at=None):
    """Wait until nothing is left of the connections of a port, or of their ends at it."""
    while any(at in (None, local) for local, _ in sockets(pid, port)):
        await asyncio.sleep(0.01)


class Departures(logging.Handler):
    """When the server has noticed, by its own log."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.loop, self.noticed = asyncio.get_running_loop(), asyncio.Event()
        self.text, self.at = "", 0.0

    def emit(self, record):
        if "is away" in record.getMessage():
            self.at, self.text = time.monotonic(), record.getMessage()
            self.loop.call_soon_threadsafe(self.noticed.set)

    @contextmanager
    def listening(self):
        log = logging.getLogger("dynacomm_async.server")
        log.addHandler(self)
        try:
            yield
        finally:
            log.removeHandler(self)


SOAK = pytest.mark.soak


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("idle", marks=SOAK),
        pytest.param("inside a push", marks=SOAK),
        "inside parameters",
    ],
)
async def test_a_stopped_worker_is_noticed_and_leaves_no_socket(toy, hits, faults, moment):
    """The link is slow one way, so that a message is under way when the worker is stopped."""
    model = type(toy)(LARGE)
    rate = RATE_BYTES_PER_S
    slow = {
        "idle": LinkSettings(),
        "inside a push": LinkSettings(rate_up_bytes_per_s=rate),
        "inside parameters": LinkSettings(rate_down_bytes_per_s=rate),
    }[moment]
    departures = Departures()
    layers = [[spec.name, spec.count] for spec in LARGE]
    async with (
        ParameterServer(
            LARGE, workers=1, steps=100, initial=model.initial, heartbeat_s=LIMIT_S, absence_s=60
        ) as server,
        Link(slow, server.address) as link,
        faults.WorkerLife(
            link.address, hits, layers=layers, idle_at=1 if moment == "idle" else None
        ) as life,
    ):
        await life.said("1")
        tally = link.counters.up if moment == "inside a push" else link.counters.down
        if moment != "idle":
            nbytes = tally.nbytes
            await asyncio.sleep(0.3 * model.initial.nbytes / rate)  # the moment is the fault
            assert tally.nbytes - nbytes < model.initial.nbytes
        with departures.listening():
            began = time.monotonic()
            life.process.send_signal(signal.SIGSTOP)
            await departures.noticed.wait()
        assert f"for {LIMIT_S:g} s" in departures.text
        assert LIMIT_S * 0.5 < departures.at - began < 1.5 * LIMIT_S
        await freed("self", server.address.port, at=server.address.port)


@pytest.mark.parametrize("moment", ["idle", pytest.param("inside parameters", marks=SOAK)])
async def test_a_stopped_server_is_noticed_and_leaves_no_socket(
    toy, tmp_path, hits, faults, moment
):
    model, idle = type(toy)(LARGE), moment == "idle"
    layers = [[spec.name, spec.count] for spec in LARGE]
    slow = LinkSettings(rate_down_bytes_per_s=None if idle else RATE_BYTES_PER_S)
    lives = faults.ServerLives(
        model, tmp_path, hits, workers=1, steps=100, every=1000, heartbeat_s=LIMIT_S
    )
    serving = asyncio.create_task(lives.live())
    try:
        await lives.listening.wait()
        async with (
            Link(slow, lives.address) as link,
            faults.WorkerLife(
                link.address, hits, layers=layers, retry_s=0, idle_at=1 if idle else None
            ) as life,
        ):
            await life.said("1")
            if not idle:
                await asyncio.sleep(0.3 * model.initial.nbytes / RATE_BYTES_PER_S)
            began = time.monotonic()
            lives.stop()
            while any(
                state == ESTABLISHED and local != link.address.port
                for local, state in sockets("self", link.address.port)
            ):
                await asyncio.sleep(0.01)
            assert LIMIT_S * 0.5 < time.monotonic() - began < 1.5 * LIMIT_S
            if not idle:  # otherwise it stays in its step, and does not hear of it before the end
                complaint = await life.complaint()
                assert f"nothing has come over it for {LIMIT_S:g} s" in complaint
    finally:
        lives.kill()
        await serving


# -- the network goes ----------------------------------------------------------------------------


class Network:
    """Two machines, ``here`` and ``there``, as network namespaces with a cable between them."""

    def __init__(self) -> None:
        name = f"dynacomm{os.getpid()}"
        self._names = [f"{name}a", f"{name}b"]
        self.here, self.there = (("ip", "netns", "exec", name) for name in self._names)
        self.address = Address("10.231.77.1", 0)

    def __enter__(self) -> Network:
        try:
            for name in self._names:
                _ip("netns", "add", name)
            a, b = self._names
            ends = ("link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable")
            _ip(*ends, "netns", b)
            for number, name in enumerate(self._names, 1):
                _ip("-n", name, "address", "add", f"10.231.77.{number}/24", "dev", "cable")
                _ip("-n", name, "link", "set", "cable", "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def slow_down(self, rate: str) -> None:
        """Limit what leaves the server's machine."""
        shape = ("root", "tbf", "rate", rate, "burst", "16kb", "latency", "200ms")
        subprocess.run([*self.here, "tc", "qdisc", "add", "dev", "cable", *shape], check=True)

    def cut(self) -> None:
        """Take the cable out, so that nobody hears of it."""
        # Down at this end, the other's system would see its carrier go; routes stay either way.
        _ip("-n", self._names[0], "link", "set", "cable", "down")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def can_make_networks() -> bool:
    if (
        sys.platform != "linux"
        or os.geteuid() != 0
        or not (shutil.which("ip") and shutil.which("tc"))
    ):
        return False
    try:
        with Network():
            return True
    except (OSError, subprocess.SubprocessError):
        return False


@pytest.fixture(scope="module")
def _networks():
    if not can_make_networks():
        pytest.skip("needs root, ip and tc: network namespaces")


@pytest.mark.usefixtures("_networks")
@pytest.mark.parametrize("moment", [pytest.param("idle", marks=SOAK), "inside parameters"])
async def test_a_network_that_goes_is_noticed_at_both_ends_and_leaves_no_socket(
    toy, tmp_path, hits, faults, moment
):
    model, idle = type(toy)(LARGE), moment == "idle"
    layers = [[spec.name, spec.count] for spec in LARGE]
    with Network() as network:
        if not idle:
            network.slow_down("8mbit")
        lives = faults.ServerLives(
            model,
            tmp_path,
            hits,
            inside=network.here,
            host=network.address.host,
            workers=1,
            steps=100,
            every=1000,
            heartbeat_s=LIMIT_S,
        )
        serving = asyncio.create_task(lives.live())
        try:
            await lives.listening.wait()
            address = network.address._replace(port=lives.port)
            async with faults.WorkerLife(
                address,
                hits,
                inside=network.there,
                layers=layers,
                retry_s=0,
                idle_at=1 if idle else None,
            ) as life:
                await life.said("1")
                if not idle:
                    await asyncio.sleep(0.3)  # of a second
                began = time.monotonic()
                network.cut()
                ends = (lives.pid, life.process.pid)
                await asyncio.gather(*(given_up(pid, lives.port) for pid in ends))
                took_s = time.monotonic() - began
                assert LIMIT_S * 0.5 < took_s < 1.5 * LIMIT_S
                await asyncio.gather(*(freed(pid, lives.port) for pid in ends))
                print(f"{moment}: noticed after {took_s:.2f} s", end=", ")
                print(f"freed after {time.monotonic() - began:.2f} s")
                if not idle:
                    assert "was lost" in await life.complaint()
        finally:
            lives.kill()
            await serving
