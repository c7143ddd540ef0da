"""Faults on real sockets."""

from __future__ import annotations

import argparse
import asyncio
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from dynacomm_async.errors import ConfigError
from dynacomm_async.link import (
    Link,
    LinkProcess,
    LinkSettings,
    arguments_of,
    parse_fault,
    precise_loop,
    settings_from,
)
from dynacomm_async.link.options import add_arguments
from dynacomm_async.transport import new_event_loop

DATA = bytes(index % 251 for index in range(50_000))
LOOPS = [precise_loop, new_event_loop]
Loop = Callable[[], asyncio.AbstractEventLoop]
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        yield listener


def connect(link: Link | LinkProcess, server: socket.socket, way: str) -> Pair:
    """Sender and receiver of that direction."""
    client = socket.create_connection(link.address, timeout=5)
    accepted, _ = server.accept()
    accepted.settimeout(5)
    return (client, accepted) if way == "up" else (accepted, client)


def talk(pair: Pair, *, end: bool = True) -> tuple[bytes, bool]:
    """Send DATA; return what arrived and whether its end was a reset."""

    def send() -> None:
        try:
            pair[0].sendall(DATA)
            if end:
                pair[0].shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the fault

    sender = threading.Thread(target=send)
    sender.start()
    received, was_reset = b"", False
    try:
        while piece := pair[1].recv(1 << 16):
            received += piece
    except ConnectionResetError:
        was_reset = True
    sender.join()
    for sock in pair:
        sock.close()
    return received, was_reset


def through(
    server: socket.socket, fault: str, way: str, loop: Loop, *, end: bool = True
) -> tuple[bytes, bool, dict[str, int]]:
    async def main() -> tuple[bytes, bool, dict[str, int]]:
        async with Link(LinkSettings(faults=(parse_fault(fault),)), server.getsockname()) as link:
            pair = await asyncio.to_thread(connect, link, server, way)
            received, was_reset = await asyncio.to_thread(talk, pair, end=end)
            return received, was_reset, link.faults

    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(main())


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("kind", ["cut", "reset"])
@pytest.mark.parametrize("counted", ["way", "both"])
def test_exactly_the_bytes_before_a_cut_or_reset_arrive(
    server: socket.socket, kind: str, way: str, counted: str, loop: Loop
) -> None:
    fault = f"{kind}:{way if counted == 'way' else 'both'}@bytes=12345"
    received, was_reset, fired = through(server, fault, way, loop, end=False)
    assert received == DATA[:12345]
    assert was_reset == (kind == "reset")
    assert fired == {fault: 1}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize(
    "rest",
    [
        "slice:{},size=1",
        "slice:{},size=7919",
        "slice:{},size=random,seed=3",
        "stall:{}@bytes=20000,every=10000,for=0.01s",
        "slow-close:{},for=0.05s",
        "down:{}@bytes=30000,for=0.05s",
    ],
)
def test_slices_stalls_slow_ends_and_outages_change_no_byte(
    server: socket.socket, rest: str, way: str, loop: Loop
) -> None:
    received, was_reset, fired = through(server, rest.format(way), way, loop)
    assert received == DATA
    assert not was_reset
    assert list(fired.values()) == [4 if rest.startswith("stall") else 1]


def test_a_fault_that_never_happened_is_listed_with_0(server: socket.socket) -> None:
    for fault in ("reset:up@bytes=50001", "cut:up@bytes=1,connection=1", "reset:down@bytes=1"):
        assert through(server, fault, "up", precise_loop) == (DATA, False, {fault: 0})


def test_a_fault_by_time_needs_no_traffic(server: socket.socket) -> None:
    async def main() -> None:
        faults = (parse_fault("reset@time=0.01s,every=0.01s"),)
        async with Link(LinkSettings(faults=faults), server.getsockname()) as link:
            pair = await asyncio.to_thread(connect, link, server, "up")
            for sock in pair:
                with pytest.raises(ConnectionResetError):
                    await asyncio.to_thread(sock.recv, 1)
                sock.close()
            assert link.faults == {str(faults[0]): 1}

    asyncio.run(main())


def test_while_a_link_is_down_clients_are_refused(server: socket.socket) -> None:
    async def main() -> None:
        async with Link(LinkSettings(), server.getsockname()) as link:
            assert link.fire(parse_fault("down,for=60s", on_demand=True)) == 0
            with (
                socket.create_connection(link.address, timeout=5) as client,
                pytest.raises(ConnectionResetError),
            ):
                await asyncio.to_thread(client.recv, 1)
            assert link.faults == {"down:both,for=60.0s": 1}

    asyncio.run(main())


def test_a_link_process_fires_faults_on_demand_and_counts_them(server: socket.socket) -> None:
    async def main() -> None:
        settings = LinkSettings(faults=(parse_fault("cut:up@bytes=99999"),))
        async with LinkProcess(settings, server.getsockname()) as link:
            pair = await asyncio.to_thread(connect, link, server, "up")
            pair[0].sendall(b"x")
            assert await asyncio.to_thread(pair[1].recv, 1) == b"x"
            assert await link.fire("stall:up,for=0s") == 1
            with pytest.raises(ConfigError, match="not a fault"):
                await link.fire("stall:up\nreset")
            assert await link.fire("reset") == 1
            for sock in pair:
                with pytest.raises(ConnectionResetError):
                    await asyncio.to_thread(sock.recv, 1)
                sock.close()
            assert (await link.stop())["faults"] == {
                "cut:up@bytes=99999": 0,
                "stall:up,for=0.0s": 1,
                "reset:both": 1,
            }
            with pytest.raises(ConfigError, match="not running"):
                await link.fire("reset")

    asyncio.run(main())


def test_faults_survive_the_way_through_the_command_line() -> None:
    texts = ["reset:up@bytes=5,every=7", "stall@time=0.1s,for=0.3s", "slice:down,size=7"]
    settings = LinkSettings(faults=tuple(map(parse_fault, texts)))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = ["--listen=127.0.0.1:0", "--to=127.0.0.1:1", *arguments_of(settings)]
    assert settings_from(parser.parse_args(arguments)) == settings


WHENS = {
    "reset": "",
    "cut": "",
    "stall": ",for=0.01s",
    "slice": ",size=100",
    "slow-close": ",for=0.01s",
    "down": ",for=0.01s",
}


@pytest.mark.parametrize("way", ["up", "down", "both"])
@pytest.mark.parametrize("trigger", ["bytes=2000", "time=0.01s,every=0.05s"])
@pytest.mark.parametrize("kind", WHENS)
def test_every_fault_happens_each_way_at_a_time_or_a_count_and_is_counted_by_its_name(
    server: socket.socket, kind: str, way: str, trigger: str
) -> None:
    """Bytes go both ways in turns until the fault has happened, and a little longer."""
    fault = parse_fault(f"{kind}:{way}@{trigger}{WHENS[kind]}")

    def exchange(pair: Pair) -> bool:
        """Carry 1000 bytes there and back; return whether the connection still is there."""
        for source, sink in (pair, pair[::-1]):
            try:
                source.sendall(DATA[:1000])
                left = 1000
                while left and (piece := sink.recv(left)):
                    assert piece == DATA[1000 - left : 1000 - left + len(piece)]
                    left -= len(piece)
            except ConnectionError:
                return False
            if left:
                return False
        return True

    def end(pair: Pair) -> bytes:
        for sock in pair:
            sock.shutdown(socket.SHUT_WR)
        return pair[0].recv(1) + pair[1].recv(1)

    async def main() -> None:
        async with Link(LinkSettings(faults=(fault,)), server.getsockname()) as link:
            pair = await asyncio.to_thread(connect, link, server, "up")
            alive = True
            if kind in ("reset", "cut"):
                while alive:
                    alive = await asyncio.to_thread(exchange, pair)
            elif kind == "slow-close":  # happens to the end of the stream
                until = asyncio.get_running_loop().time() + 0.1
                while asyncio.get_running_loop().time() < until:
                    assert await asyncio.to_thread(exchange, pair)
            else:
                while not link.faults[str(fault)]:
                    assert await asyncio.to_thread(exchange, pair)
                assert await asyncio.to_thread(exchange, pair)
            if alive:
                assert await asyncio.to_thread(end, pair) == b""
            for sock in pair:
                sock.close()
            assert list(link.faults) == [str(fault)]
            assert link.faults[str(fault)] >= 1

    asyncio.run(main())
