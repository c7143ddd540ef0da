"""The relay's behaviour on real sockets; its timing is in test_process.py, where it is alone."""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

import pytest

from dynacomm_async.errors import ConfigError
from dynacomm_async.link import Link, LinkSettings, precise_loop
from dynacomm_async.wire.frame import PREFIX_NBYTES, MessageKind, Prefix

LoopFactory = Callable[[], asyncio.AbstractEventLoop]
LOOPS: list[LoopFactory] = [precise_loop, asyncio.new_event_loop]
with suppress(ImportError):
    import uvloop

    LOOPS.append(uvloop.new_event_loop)


@contextmanager
def running(
    settings: LinkSettings, server: socket.socket, loop_factory: LoopFactory = precise_loop
) -> Iterator[Link]:
    """Run a link to ``server`` on a loop in a thread of its own."""
    link = Link(settings, server.getsockname()[:2])
    ready, ends = threading.Event(), []

    async def main() -> None:
        end = asyncio.Event()
        loop = asyncio.get_running_loop()
        ends.append(lambda: loop.call_soon_threadsafe(end.set))
        async with link:
            ready.set()
            await end.wait()

    def work() -> None:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(main())

    thread = threading.Thread(target=work)
    thread.start()
    assert ready.wait(5)
    try:
        yield link
    finally:
        ends[0]()
        thread.join(5)
        assert not thread.is_alive()


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        yield listener


@contextmanager
def connected(link: Link, server: socket.socket) -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_connection(link.address, timeout=5) as client:
        accepted, _ = server.accept()
        accepted.settimeout(5)
        with accepted:
            yield client, accepted


def message(nbytes: int, step: int = 0, kind: MessageKind = MessageKind.GRADIENTS) -> bytes:
    body = bytes(index % 251 for index in range(nbytes - PREFIX_NBYTES))
    return Prefix(kind, 0, 0, len(body), step).pack() + body


def read_to_end(sock: socket.socket) -> bytes:
    pieces = []
    while piece := sock.recv(1 << 20):
        pieces.append(piece)
    return b"".join(pieces)


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("loop_factory", LOOPS)
@pytest.mark.parametrize(
    "settings",
    [
        LinkSettings(),
        LinkSettings(delay_s=0.02),
        LinkSettings(rate_up_bytes_per_s=20e6, rate_down_bytes_per_s=20e6, delay_s=0.005),
        LinkSettings(20e6, 20e6, overhead_s=0.001, half_duplex=True, shared=True),
    ],
)
def test_each_direction_carries_its_bytes_unchanged_and_then_its_end(
    server: socket.socket, settings: LinkSettings, loop_factory: LoopFactory
) -> None:
    ups = b"".join(message(size, size) for size in (24, 100_000, 25, 300_000))
    downs = b"".join(message(size, size) for size in (200_000, 24, 70_000))
    with running(settings, server, loop_factory) as link, connected(link, server) as (a, b):
        sender = threading.Thread(target=lambda: (a.sendall(ups), a.shutdown(socket.SHUT_WR)))
        sender.start()
        assert read_to_end(b) == ups
        sender.join()
        # The client has said all it had to say, and still hears the answer.
        sender = threading.Thread(target=lambda: (b.sendall(downs), b.shutdown(socket.SHUT_WR)))
        sender.start()
        assert read_to_end(a) == downs
        sender.join()
        assert (link.counters.up.messages, link.counters.up.nbytes) == (4, len(ups))
        assert (link.counters.down.messages, link.counters.down.nbytes) == (3, len(downs))


@pytest.mark.parametrize("loop_factory", LOOPS)
@pytest.mark.parametrize("by_client", [True, False])
def test_a_reset_reaches_the_other_side_after_the_bytes_before_it(
    server: socket.socket, by_client: bool, loop_factory: LoopFactory
) -> None:
    settings = LinkSettings(delay_s=0.1)
    with running(settings, server, loop_factory) as link, connected(link, server) as (a, b):
        breaker, other = (a, b) if by_client else (b, a)
        breaker.sendall(message(1000))
        time.sleep(0.05)  # a reset would overtake what the relay has not read yet
        reset(breaker)
        received = b""
        while len(received) < 1000:
            received += other.recv(1000)
        with pytest.raises(ConnectionResetError):
            other.recv(1)


def test_a_client_that_breaks_while_it_is_sent_to_is_reset_at_the_server(
    server: socket.socket,
) -> None:
    with running(LinkSettings(), server) as link, connected(link, server) as (a, b):
        ended = threading.Event()

        def send() -> None:
            with suppress(ConnectionError):
                while True:
                    b.sendall(bytes(65536))
            ended.set()

        sender = threading.Thread(target=send)
        sender.start()
        a.recv(65536)
        reset(a)
        sender.join(5)
        assert ended.is_set()


def test_a_client_is_closed_at_once_while_the_server_cannot_be_reached_and_served_afterwards(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(5)
        with running(LinkSettings(), server) as link:
            with (
                pytest.raises(ConnectionResetError),  # so soon, perhaps, that connecting fails
                socket.create_connection(link.address, timeout=5) as client,
            ):
                client.recv(1)
            assert "link: cannot reach 127.0.0.1:" in caplog.text
            server.listen()
            with connected(link, server) as (a, b):
                a.sendall(b"still here")
                assert b.recv(100) == b"still here"


def test_leaving_the_link_ends_its_connections_and_stops_listening(server: socket.socket) -> None:
    with running(LinkSettings(), server) as link:
        address = link.address
        client = socket.create_connection(address, timeout=5)
        accepted, _ = server.accept()
        client.sendall(b"x")
        assert accepted.recv(1) == b"x"
    with client, accepted:
        for sock in (client, accepted):
            sock.settimeout(5)
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    with pytest.raises(ConfigError, match="not running"):
        _ = link.address


def test_an_address_in_use_is_refused_by_name(server: socket.socket) -> None:
    host, port = server.getsockname()

    async def main() -> None:
        async with Link(LinkSettings(), ("127.0.0.1", 1), host, port):
            raise AssertionError

    with pytest.raises(ConfigError, match=f"cannot listen on {host}:{port}: Address already"):
        asyncio.run(main())


def test_both_sides_may_be_ipv6() -> None:
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")

    async def main() -> bytes:
        async with Link(LinkSettings(), server.getsockname()[:2], "::1") as link:
            assert link.address[0] == "::1"
            return await asyncio.to_thread(talk, link)

    def talk(link: Link) -> bytes:
        with connected(link, server) as (a, b):
            a.sendall(b"six")
            return b.recv(10)

    with server:
        assert asyncio.run(main()) == b"six"


def test_counters_are_exact_when_bytes_come_one_at_a_time(server: socket.socket) -> None:
    stream = message(30, 1) + message(24, 1, MessageKind.HEARTBEAT) + message(40, 2)
    settings = LinkSettings(overhead_s=1e-4)
    with running(settings, server) as link, connected(link, server) as (a, b):
        a.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for index in range(len(stream)):
            a.sendall(stream[index : index + 1])
            time.sleep(2e-4)
        received = b""
        while len(received) < len(stream):
            received += b.recv(1000)
        assert received == stream
        up = link.counters.to_json()["up"]
        assert up["kinds"]["GRADIENTS"] == {"messages": 2, "bytes": 70, "steps": {"1": 1, "2": 1}}
        assert up["kinds"]["HEARTBEAT"] == {"messages": 1, "bytes": 24, "steps": {"1": 1}}
        assert link.counters.down.messages == 0


def test_a_message_counts_only_when_it_is_whole(server: socket.socket) -> None:
    with running(LinkSettings(), server) as link, connected(link, server) as (a, b):
        whole = message(1000)
        a.sendall(whole[:-1])
        received = 0
        while received < 999:
            received += len(b.recv(2000))
        assert link.counters.up.messages == 0
        a.sendall(whole[-1:])
        wait_for(lambda: link.counters.up.messages == 1)


def test_each_connection_is_counted_apart_and_all_together(server: socket.socket) -> None:
    with running(LinkSettings(), server) as link:
        for count in (1, 2):
            with connected(link, server) as (a, b):
                a.sendall(message(100) * count)
                a.shutdown(socket.SHUT_WR)
                read_to_end(b)
        assert [counters.up.messages for counters in link.connections] == [1, 2]
        assert link.counters.up.messages == 3


def test_traffic_that_is_not_dynacomm_is_refused_by_name_when_there_is_overhead(
    server: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    settings = LinkSettings(overhead_s=1e-3)
    with running(settings, server) as link, connected(link, server) as (a, b):
        a.sendall(b"GET / HTTP/1.0\r\n\r\n")
        for sock in (a, b):
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        # Others are not disturbed.
        with connected(link, server) as (c, d):
            c.sendall(message(100))
            assert d.recv(1000) == message(100)
    records = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(records) == 1
    line = records[0].getMessage()
    assert line.startswith("link: not dynacomm traffic")
    assert line.endswith("--overhead needs message boundaries; use --overhead 0ms")
    assert "\n" not in line


def test_traffic_that_is_not_dynacomm_passes_uncounted_without_overhead(
    server: socket.socket,
) -> None:
    settings = LinkSettings(rate_up_bytes_per_s=20e6)
    with running(settings, server) as link, connected(link, server) as (a, b):
        a.sendall(b"anything" * 10_000)
        a.shutdown(socket.SHUT_WR)
        assert read_to_end(b) == b"anything" * 10_000
        assert (link.counters.up.messages, link.counters.up.nbytes) == (0, 0)


def test_a_sender_gets_little_ahead_of_what_the_link_has_delivered(server: socket.socket) -> None:
    settings = LinkSettings(rate_up_bytes_per_s=2.5e6)
    with running(settings, server) as link, connected(link, server) as (a, b):
        # What this socket itself holds is not the link's doing: keep it small.
        a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        a.setblocking(False)
        b.setblocking(False)
        data = bytes(16384)
        sent = received = most = 0
        until = time.monotonic() + 0.4
        while time.monotonic() < until:
            readable, writable, _ = select.select([b], [a], [], 0.1)
            if readable:
                received += len(b.recv(1 << 20))
            if writable:
                with suppress(BlockingIOError):
                    sent += a.send(data)
            most = max(most, sent - received)
    assert received > 0.6 * 2.5e6 * 0.4
    assert most < 128 * 1024


def test_a_receiver_that_does_not_read_stops_the_sender(server: socket.socket) -> None:
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
    with running(LinkSettings(delay_s=0.001), server) as link, connected(link, server) as (a, b):
        a.settimeout(0.5)
        sent = 0
        with suppress(TimeoutError):
            while sent < 100_000_000:
                sent += a.send(bytes(65536))
        assert sent < 100_000_000
        a.shutdown(socket.SHUT_WR)
        b.settimeout(5)
        assert len(read_to_end(b)) == sent


def test_a_loop_that_is_often_late_does_not_lower_the_rate(server: socket.socket) -> None:
    def make_late_loop() -> asyncio.AbstractEventLoop:
        loop = precise_loop()

        def block() -> None:
            time.sleep(0.006)
            loop.call_later(0.014, block)

        loop.call_soon(block)
        return loop

    stream = message(1_000_000)

    def transfer_s() -> float:
        settings = LinkSettings(rate_up_bytes_per_s=4e6)
        with running(settings, server, make_late_loop) as link, connected(link, server) as (a, b):
            begin = time.perf_counter()
            sender = threading.Thread(target=a.sendall, args=(stream,))
            sender.start()
            left = len(stream)
            while left:
                left -= len(b.recv(1 << 20))
            took_s = time.perf_counter() - begin
            sender.join()
        return took_s

    # Late for 6 ms of every 20 it would take 0.357 s if the medium stood still meanwhile.
    measured: list[float] = []
    while len(measured) < 5 and min(measured, default=1.0) > 0.3:
        measured.append(transfer_s())
    assert 0.245 < min(measured) < 0.3, measured


def test_a_link_with_nobody_on_it_can_be_entered_again(server: socket.socket) -> None:
    async def main() -> None:
        link = Link(LinkSettings(), server.getsockname()[:2])
        for _ in range(2):
            async with link:
                with closing(socket.create_connection(link.address)):
                    await asyncio.sleep(0.01)

    asyncio.run(main())


def test_of_closed_connections_the_newest_hundred_are_counted_apart(
    server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynacomm_async.link.link.KEPT_CLOSED", 3)
    with running(LinkSettings(), server) as link, connected(link, server) as (held, _):
        held.sendall(message(100, step=0))
        for step in range(1, 6):
            with connected(link, server) as (client, accepted):
                client.sendall(message(100, step=step))
                client.shutdown(socket.SHUT_WR)
                assert len(read_to_end(accepted)) == 100
        wait_for(lambda: len(link.connections) == 4)
        wait_for(lambda: link.counters.up.messages == 6)
        kept = [each.up.kinds[MessageKind.GRADIENTS].steps for each in link.connections]
    assert kept == [{0: 1}, {3: 1}, {4: 1}, {5: 1}]  # the one that is open, and three that closed
