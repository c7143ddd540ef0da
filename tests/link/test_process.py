"""The link as its own process: how exactly it keeps time, and how it begins and ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from dynacomm_async.addresses import parse_address
from dynacomm_async.errors import ConfigError
from dynacomm_async.link import LinkProcess, LinkSettings, arguments_of
from dynacomm_async.link.flow import _CREDIT_NS
from dynacomm_async.wire.frame import PREFIX_NBYTES, MessageKind, Prefix

pytestmark = pytest.mark.timing

MBIT_100 = 12.5e6
TRIES = 5


def command(to: tuple[str, int], *options: str, listen: str = "127.0.0.1:0") -> list[str]:
    module = [sys.executable, "-m", "dynacomm_async.link", "--listen", listen]
    return [*module, "--to", f"{to[0]}:{to[1]}", *options]


@contextmanager
def started(*options: str, to: tuple[str, int]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a link process; yields it and the address that it says it listens on."""
    with subprocess.Popen(
        command(to, *options, "--json"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())["listening"]
        finally:
            process.kill()


class Path:
    """Connections through a link process, client end first."""

    def __init__(self, settings: LinkSettings, connections: int = 1) -> None:
        self._settings = settings
        self._connections = connections

    @contextmanager
    def open(self) -> Iterator[list[tuple[socket.socket, socket.socket]]]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            options = arguments_of(self._settings)
            with started(*options, to=server.getsockname()) as (_, listening):
                pairs = []
                for _ in range(self._connections):
                    client = socket.create_connection(parse_address(listening), timeout=10)
                    accepted, _ = server.accept()
                    accepted.settimeout(10)
                    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    pairs.append((client, accepted))
                try:
                    yield pairs
                finally:
                    for pair in pairs:
                        for sock in pair:
                            sock.close()


def message(nbytes: int) -> bytes:
    prefix = Prefix(MessageKind.GRADIENTS, 0, 0, nbytes - PREFIX_NBYTES, 0)
    return prefix.pack() + bytes(nbytes - PREFIX_NBYTES)


def transfer(ways: list[tuple[socket.socket, socket.socket, bytes]]) -> list[float]:
    """Send each ``(source, sink, data)`` at once; return when each was whole, in seconds."""
    ends = [0.0] * len(ways)

    def receive(index: int) -> None:
        _, sink, data = ways[index]
        buffer, left = bytearray(1 << 20), len(data)
        while left:
            left -= sink.recv_into(buffer)
        ends[index] = time.perf_counter()

    receivers = [threading.Thread(target=receive, args=(i,)) for i in range(len(ways))]
    senders = [threading.Thread(target=way[0].sendall, args=(way[2],)) for way in ways]
    for thread in receivers:
        thread.start()
    begin = time.perf_counter()
    for thread in senders:
        thread.start()
    for thread in senders + receivers:
        thread.join()
    return [end - begin for end in ends]


def check(measure: Callable[[], float], expected_s: float, floor: float = 0.98) -> None:
    """A link is never faster than it should be, however busy the machine; nor much slower.

    But for what it credits itself with when it wakes up late: then it takes bytes for having waited
    that may have come just now.
    How exactly it keeps time is arithmetic, tested in test_medium.py, and wake-ups, which are the
    machine's: ``demos/benchmarks/link.py`` measures them. Here, a mistake that charges a byte or
    an overhead twice, or to the wrong direction, would double the time.
    """
    most_s = expected_s * 1.6
    measured: list[float] = []
    while not measured or (len(measured) < TRIES and min(measured) > most_s):
        measured.append(measure())
    assert min(measured) > expected_s * floor - _CREDIT_NS / 1e9, measured
    assert min(measured) < most_s, measured


@pytest.mark.parametrize(
    ("settings", "stream", "expected_s"),
    [
        (LinkSettings(rate_up_bytes_per_s=MBIT_100), message(2_500_000), 0.200),
        (LinkSettings(rate_up_bytes_per_s=MBIT_100), message(1000) * 2500, 0.200),
        (LinkSettings(rate_up_bytes_per_s=MBIT_100, delay_s=0.04), message(2_500_000), 0.240),
        (LinkSettings(rate_up_bytes_per_s=125e6), message(25_000_000), 0.200),
        (LinkSettings(rate_up_bytes_per_s=1.25e6), message(250_000), 0.200),
        (LinkSettings(rate_up_bytes_per_s=1e6, overhead_s=0.002), message(1000) * 60, 0.180),
        (LinkSettings(overhead_s=0.002), message(1000) * 80, 0.160),
    ],
    ids=["100mbit", "small-messages", "long-path", "1gbit", "10mbit", "overhead", "only-overhead"],
)
def test_bytes_take_as_long_as_the_settings_say(
    settings: LinkSettings, stream: bytes, expected_s: float
) -> None:
    with Path(settings).open() as [(client, server)]:
        check(lambda: transfer([(client, server, stream)])[0], expected_s)


def test_each_direction_has_its_own_rate() -> None:
    settings = LinkSettings(rate_down_bytes_per_s=MBIT_100, rate_up_bytes_per_s=MBIT_100 / 2)
    with Path(settings).open() as [(client, server)]:
        check(lambda: transfer([(server, client, message(1_250_000))])[0], 0.100)
        check(lambda: transfer([(client, server, message(1_250_000))])[0], 0.200)


def test_an_idle_link_delays_a_small_message_by_its_delay_alone() -> None:
    with Path(LinkSettings(MBIT_100, MBIT_100, delay_s=0.02)).open() as [(client, server)]:
        check(lambda: transfer([(client, server, message(100))])[0], 0.020)


def test_two_connections_have_a_link_each_unless_it_is_shared() -> None:
    stream = message(1_250_000)
    for shared, expected_s in ((False, 0.100), (True, 0.200)):
        with Path(LinkSettings(MBIT_100, MBIT_100, shared=shared), 2).open() as pairs:
            ways = [(client, server, stream) for client, server in pairs]
            # Who begins a little earlier has the shared link to itself for that long.
            check(lambda ways=ways: min(transfer(ways)), expected_s, 0.9)  # type: ignore[misc]
            check(lambda ways=ways: max(transfer(ways)), expected_s)  # type: ignore[misc]


def test_directions_do_not_slow_each_other_unless_the_link_is_half_duplex() -> None:
    stream = message(1_250_000)
    for half_duplex, expected_s in ((False, 0.100), (True, 0.200)):
        settings = LinkSettings(MBIT_100, MBIT_100, half_duplex=half_duplex)
        with Path(settings).open() as [(client, server)]:
            ways = [(client, server, stream), (server, client, stream)]
            check(lambda ways=ways: max(transfer(ways)), expected_s)  # type: ignore[misc]


def test_a_schedule_changes_the_rate_under_way() -> None:
    schedule = ((0.0, None, 2.5e6), (0.5, None, 10e6))
    with Path(LinkSettings(schedule=schedule)).open() as [(client, server)]:
        took_s = transfer([(client, server, message(4_000_000))])[0]
    # 1.25 MB until the change and the rest after it, but for the time to connect; at the first
    # rate alone it would be 1.6 s, at the second 0.4 s.
    assert 0.65 < took_s < 1.3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_within_a_second_and_it_says_what_it_counted(number: int) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        started("--delay=1ms", to=server.getsockname()) as (process, listening),
        socket.create_connection(parse_address(listening), timeout=5) as client,
    ):
        accepted, _ = server.accept()
        with accepted:
            client.sendall(message(500))
            assert accepted.recv(1000) == message(500)
            process.send_signal(number)
            output, _ = process.communicate(timeout=1)
    counters = json.loads(output)
    assert counters["up"]["messages"] == 1
    assert counters["up"]["kinds"]["GRADIENTS"]["bytes"] == 500
    assert counters["connections"] == [{"up": counters["up"], "down": counters["down"]}]
    assert process.returncode == 0


def test_it_ends_when_standard_input_closes_if_asked() -> None:
    with started("--until-stdin-closes", to=("127.0.0.1", 9)) as (process, _):
        output, _ = process.communicate(timeout=2)
        assert json.loads(output)["up"]["messages"] == 0
        assert process.returncode == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--bandwidth", "fast"], "link: --bandwidth: 'fast' is not a rate: expected one such as"),
        (["--listen", "nowhere"], "link: 'nowhere' is not an address: expected HOST:PORT"),
    ],
)
def test_a_wrong_option_ends_it_with_one_line(options: list[str], said: str) -> None:
    done = subprocess.run(
        command(("127.0.0.1", 9), *options), capture_output=True, text=True, timeout=10
    )
    assert done.returncode == 1
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1


def test_listening_where_others_can_reach_it_needs_to_be_allowed() -> None:
    done = subprocess.run(
        command(("127.0.0.1", 9), listen="0.0.0.0:0"), capture_output=True, text=True, timeout=10
    )
    assert done.returncode == 1
    assert done.stderr.startswith("link: listening on 0.0.0.0:0 lets other machines in without")
    assert "--insecure" in done.stderr
    assert done.stderr.count("\n") == 1

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            to = server.getsockname()
            async with LinkProcess(LinkSettings(), to, "0.0.0.0", insecure=True) as link:
                socket.create_connection(("127.0.0.1", link.address.port), timeout=5).close()

    asyncio.run(main())


def test_a_port_in_use_ends_it_with_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        done = subprocess.run(
            command(("127.0.0.1", 9), listen=listen), capture_output=True, text=True, timeout=10
        )
    assert done.returncode == 1
    assert done.stderr.startswith(f"link: cannot listen on {listen}: ")
    assert done.stderr.count("\n") == 1


def test_a_link_process_relays_and_gives_its_counters_when_it_is_stopped() -> None:
    async def main() -> dict[str, object]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            async with LinkProcess(LinkSettings(), server.getsockname()) as link:
                await asyncio.to_thread(talk, link.address, server)
                counters = await link.stop()
                assert await link.stop() == counters
                return counters

    def talk(address: tuple[str, int], server: socket.socket) -> None:
        with socket.create_connection(address, timeout=5) as client:
            accepted, _ = server.accept()
            with accepted:
                client.sendall(message(500))
                assert accepted.recv(1000) == message(500)

    counters = asyncio.run(main())
    assert counters["up"]["messages"] == 1  # type: ignore[index]


@pytest.mark.parametrize("quiet", [False, True])
def test_a_link_process_says_that_nobody_is_behind_it_unless_it_is_to_be_quiet(
    capfd: pytest.CaptureFixture[str], quiet: bool
) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            nobody = closed.getsockname()
        async with LinkProcess(LinkSettings(), nobody, quiet=quiet) as link:
            await asyncio.to_thread(talk, link.address)

    def talk(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=5) as client, suppress(ConnectionError):
            assert client.recv(1) == b""

    asyncio.run(main())
    assert ("cannot reach" in capfd.readouterr().err) is not quiet


def test_a_link_process_that_cannot_start_says_so() -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            async with LinkProcess(LinkSettings(), ("127.0.0.1", 9), *taken.getsockname()):
                raise AssertionError

    with pytest.raises(ConfigError, match="did not start"):
        asyncio.run(main())


def test_a_link_process_does_not_outlive_its_parent() -> None:
    program = (
        "import asyncio, os\n"
        "from dynacomm_async.link import LinkProcess, LinkSettings\n"
        "async def main():\n"
        "    async with LinkProcess(LinkSettings(), ('127.0.0.1', 9)) as link:\n"
        "        print(*link.address, flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stderr is not None
        host, port = parent.stdout.readline().split()
        os.kill(parent.pid, signal.SIGKILL)
        # The link has the other end of this pipe until it ends; it has nothing to complain of.
        assert parent.stderr.read() == ""
    deadline = time.monotonic() + 3
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            break
        assert time.monotonic() < deadline
        time.sleep(0.02)
