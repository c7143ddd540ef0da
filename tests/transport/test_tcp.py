"""What is particular to TCP: memory, back-pressure, addresses, and peers that misbehave."""

from __future__ import annotations

import asyncio
import hashlib
import re
import socket
import struct
import sys
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from dynacomm_async.errors import (
    ChannelBroken,
    ChannelClosed,
    ConfigError,
    RemoteProtocolError,
)
from dynacomm_async.ranges import Range
from dynacomm_async.transport import Address, TcpChannel, check_congestion, connect, listen, tcp
from dynacomm_async.transport.tcp import HIGH_WATER_NBYTES
from dynacomm_async.wire import (
    PREFIX_NBYTES,
    Gradients,
    Heartbeat,
    Hello,
    Message,
    Prefix,
    Role,
    encode,
)

LoopFactory = Callable[[], asyncio.AbstractEventLoop]
OpenTcp = Callable[..., AbstractAsyncContextManager[Any]]

PUSH = Gradients(0, (Range(0, 1),))
PAYLOAD_NBYTES = 64 << 20


@pytest.fixture(autouse=True)
def _on_both_loops(loop_factory: LoopFactory) -> None:
    """Every test of this file runs on both kinds of loop."""


@contextmanager
def traced() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the peak of what Python allocated since."""
    tracemalloc.start()
    base = tracemalloc.get_traced_memory()[0]
    try:
        yield lambda: tracemalloc.get_traced_memory()[1] - base
    finally:
        tracemalloc.stop()


def resident_nbytes() -> int:
    """What this process holds, whoever allocated it; 0 where there is no /proc."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0


class RawPeer:
    """A blocking socket in the server's place: it reads only what it is told to."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def send(self, message: Message) -> None:
        self.sock.sendall(encode(message))

    def skip_message(self) -> bytes:
        """Read one message; return the hash of its payload."""
        prefix = Prefix.unpack(self.read(PREFIX_NBYTES))
        self.read(prefix.header_nbytes)
        digest, left = hashlib.sha256(), prefix.payload_nbytes
        while left:
            data = self.sock.recv(min(left, 1 << 16))
            digest.update(data)
            left -= len(data)
        return digest.digest()

    def read(self, nbytes: int) -> bytes:
        data = b""
        while len(data) < nbytes:
            data += self.sock.recv(nbytes - len(data))
        return data


@asynccontextmanager
async def open_raw(
    new_recorder: Callable[[TcpChannel], Any], handshake: tuple[Message, ...]
) -> AsyncIterator[tuple[TcpChannel, Any, RawPeer]]:
    """A worker that is a member of a run, and its raw server with a small receive buffer."""
    recorders = []

    def begin(channel: TcpChannel) -> Any:
        recorders.append(new_recorder(channel))
        return recorders[0]

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        worker = await connect(begin, Address(*listening.getsockname()))
        sock, _ = listening.accept()
    with closing(sock):
        sock.settimeout(20)
        peer = RawPeer(sock)
        for number, message in enumerate(handshake):
            if number % 2:
                peer.send(message)
                await recorders[0].until_received(1 + number // 2)
            else:
                await worker.send(message)
                peer.skip_message()
        yield worker, recorders[0], peer
        worker.abort()
        await recorders[0].until_lost()


async def test_a_reader_that_does_not_read_holds_the_sender_and_costs_no_memory(
    new_recorder: type, handshake: tuple[Message, ...]
) -> None:
    payload = memoryview(bytes(range(256)) * (PAYLOAD_NBYTES // 256))
    async with open_raw(new_recorder, handshake) as (worker, _, peer):
        loop = asyncio.get_running_loop()
        before = resident_nbytes()
        with traced() as peak_nbytes:
            sending = asyncio.create_task(worker.send(PUSH, [payload]))
            done, _ = await asyncio.wait({sending}, timeout=0.3)
            assert not done
            assert resident_nbytes() - before < PAYLOAD_NBYTES // 4
            digest = await loop.run_in_executor(None, peer.skip_message)
            await sending
            assert peak_nbytes() < PAYLOAD_NBYTES // 20
        assert digest == hashlib.sha256(payload).digest()


async def test_small_messages_are_held_back_too(
    new_recorder: type, handshake: tuple[Message, ...]
) -> None:
    payload, n_sent, gone = memoryview(bytes(50_000)), 0, asyncio.Event()
    async with open_raw(new_recorder, handshake) as (worker, _, peer):

        async def send_all() -> None:
            nonlocal n_sent
            while True:
                await worker.send(PUSH, [payload])
                n_sent += 1
                gone.set()

        with traced() as peak_nbytes:
            sending = asyncio.create_task(send_all())
            done, _ = await asyncio.wait({sending}, timeout=0.3)
            assert not done
            assert peak_nbytes() < 1 << 20
        gone.clear()
        loop = asyncio.get_running_loop()
        for _ in range(n_sent):
            await loop.run_in_executor(None, peer.skip_message)
        await gone.wait()
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


async def test_neither_side_copies_a_payload(open_tcp_pair: OpenTcp) -> None:
    payload = memoryview(bytes(range(256)) * (PAYLOAD_NBYTES // 256))
    target = bytearray(PAYLOAD_NBYTES)
    async with open_tcp_pair() as pair:
        await pair.greet()
        pair.at_server.views = [memoryview(target)]
        before = resident_nbytes()
        with traced() as peak_nbytes:
            await pair.worker.send(PUSH, [payload])
            await pair.at_server.until_received(1)
            assert peak_nbytes() < PAYLOAD_NBYTES // 20
        # The target's own pages are touched for the first time here.
        assert resident_nbytes() - before < PAYLOAD_NBYTES + PAYLOAD_NBYTES // 4
        assert target == payload


class LaxTransport(asyncio.Transport):
    """A transport whose ``writelines`` never pauses its protocol, as in Python 3.12 and 3.13."""

    def __init__(self, protocol: TcpChannel) -> None:
        self.sock = socket.socket()
        super().__init__({"socket": self.sock, "peername": ("10.0.0.1", 1)})
        self._protocol = protocol
        self.nbytes = 0
        self.high = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.nbytes += len(data)
        self.set_write_buffer_limits(self.high)

    def writelines(self, list_of_data: Any) -> None:
        self.nbytes += sum(map(len, list_of_data))

    def get_write_buffer_size(self) -> int:
        return self.nbytes

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high is not None
        self.high = high
        if self.nbytes > high:
            self._protocol.pause_writing()


async def test_a_loop_that_forgets_to_pause_is_made_to(
    new_recorder: type, handshake: tuple[Message, ...]
) -> None:
    worker = TcpChannel(Role.WORKER, new_recorder)
    transport = LaxTransport(worker)
    with closing(transport.sock):
        worker.connection_made(transport)
        for number, message in enumerate(handshake):
            if number % 2:
                data = encode(message)
                worker.get_buffer(-1)[: len(data)] = data
                worker.buffer_updated(len(data))
            else:
                await worker.send(message)
        payload = memoryview(bytes(HIGH_WATER_NBYTES // 2))

        async def send_many() -> None:
            for _ in range(100):
                await worker.send(PUSH, [payload])

        sending = asyncio.create_task(send_many())
        for _ in range(200):
            await asyncio.sleep(0)
        assert not sending.done()
        assert transport.nbytes < 2 * HIGH_WATER_NBYTES
        worker.connection_lost(None)
        with pytest.raises(ChannelBroken):
            await sending


# -- addresses -----------------------------------------------------------------------------------


async def test_ipv6_carries_as_well(open_tcp_pair: OpenTcp) -> None:
    try:
        with closing(socket.socket(socket.AF_INET6)) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"this machine has no IPv6 loopback: {error}")
    async with open_tcp_pair("::1") as pair:
        await pair.greet()
        await pair.worker.send(PUSH, [memoryview(b"abc")])
        await pair.at_server.until_received(1)
        assert pair.at_server.payloads == [b"abc"]
        assert pair.worker.peer.startswith("[::1]:")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
async def test_listening_beyond_this_machine_must_be_asked_for(
    host: str, new_recorder: type
) -> None:
    with pytest.raises(ConfigError, match=r"without authentication; pass --insecure"):
        await listen(new_recorder, Address(host, 0))


async def test_listening_beyond_this_machine_works_when_asked_for(new_recorder: type) -> None:
    listener = await listen(new_recorder, Address("0.0.0.0", 0), insecure=True)
    assert listener.addresses[0].port > 0
    await listener.close()


def control_of(sock: socket.socket) -> str:
    name = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    return name.rstrip(b"\0").decode()


@pytest.mark.skipif(not hasattr(socket, "TCP_CONGESTION"), reason="no choice on this system")
async def test_each_end_may_choose_a_congestion_control_for_what_it_sends(
    new_recorder: type, handshake: tuple[Message, ...], loop_factory: object
) -> None:
    with socket.socket() as sock:
        system = control_of(sock)
    others = [name for name in tcp.allowed_congestion() if name != system]
    if not others:
        pytest.skip(f"this system allows {system} only")
    for at_server, at_worker in ((others[0], None), (None, others[0])):
        accepted: list[Any] = []

        def accept(channel: TcpChannel, accepted: list[Any] = accepted) -> Any:
            accepted.append((channel, new_recorder(channel)))
            return accepted[-1][1]

        recorders: list[Any] = []
        listener = await listen(accept, Address("127.0.0.1", 0), congestion=at_server)
        worker = await connect(
            lambda channel, own=recorders: own.append(new_recorder(channel)) or own[-1],
            listener.addresses[0],
            congestion=at_worker,
        )
        await worker.send(handshake[0])
        await accepted[0][1].until_received(1)
        assert control_of(worker._socket) == (at_worker or system)
        assert control_of(accepted[0][0]._socket) == (at_server or system)
        worker.abort()
        await recorders[0].until_lost()
        await accepted[0][1].until_lost()
        await listener.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_CONGESTION"), reason="no choice on this system")
@pytest.mark.parametrize("name", ["cubik", "", "reno\0b", "\udcff", "ü", "r" * 300])
async def test_a_congestion_control_that_is_none_is_refused_with_those_that_are(
    name: str, new_recorder: type, loop_factory: object
) -> None:
    told = f"congestion control {re.escape(repr(name))}: no such control; choose one of .*reno"
    with pytest.raises(ConfigError, match=told):
        check_congestion(name)
    with pytest.raises(ConfigError, match=told):
        await listen(new_recorder, Address("127.0.0.1", 0), congestion=name)
    with socket.create_server(("127.0.0.1", 0)) as other:
        recorders: list[Any] = []
        with pytest.raises(ConfigError, match=told):
            await connect(
                lambda channel: recorders.append(new_recorder(channel)) or recorders[-1],
                Address(*other.getsockname()),
                congestion=name,
            )
        await recorders[0].until_lost()


async def test_a_port_in_use_is_a_setting_to_change(
    new_recorder: type, loop_factory: object
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = Address(*other.getsockname())
        with pytest.raises(ConfigError, match=f"cannot listen on {address}: .*in use"):
            await listen(new_recorder, address)


@pytest.mark.parametrize("host", ["192.0.2.1", "nobody..here"])
async def test_an_address_of_nobody_here_is_a_setting_to_change(
    host: str, new_recorder: type
) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen on {host}:7: "):
        await listen(new_recorder, Address(host, 7), insecure=True)


async def test_connecting_to_nobody_breaks_at_once(new_recorder: type) -> None:
    with closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can take it either
        address = Address(*unused.getsockname())
        with pytest.raises(ChannelBroken, match=f"cannot connect to {address}: .*refused"):
            await connect(new_recorder, address)


@pytest.mark.parametrize("host", ["nobody..here", "x" * 70])
async def test_connecting_to_a_name_that_cannot_be_breaks_at_once(
    host: str, new_recorder: type
) -> None:
    with pytest.raises(ChannelBroken, match=f"cannot connect to {host}:7: "):
        await connect(new_recorder, Address(host, 7))


async def test_a_closed_listener_takes_nobody_in_and_leaves_the_others_alone(
    new_recorder: type,
) -> None:
    accepted: asyncio.Queue[Any] = asyncio.Queue()

    def accept(channel: TcpChannel) -> Any:
        accepted.put_nowait(new_recorder(channel))
        return new_recorder(channel)

    listener = await listen(accept, Address("127.0.0.1", 0))
    worker = await connect(new_recorder, listener.addresses[0])
    at_server = await accepted.get()
    await listener.close()
    with pytest.raises(ChannelBroken):
        await connect(new_recorder, listener.addresses[0])
    await worker.send(Hello())
    await worker.close()
    at_server.channel.abort()


@pytest.mark.parametrize("turns", range(5))
async def test_who_was_accepted_while_the_listener_closes_is_served_or_sent_away(
    new_recorder: type, turns: int
) -> None:
    """The stock loop would forget such connections: open, and answered by nobody."""
    served: list[TcpChannel] = []

    def accept(channel: TcpChannel) -> Any:
        served.append(channel)
        return new_recorder(channel)

    listener = await listen(accept, Address("127.0.0.1", 0))
    peers = [socket.create_connection(listener.addresses[0]) for _ in range(3)]
    for _ in range(turns):
        await asyncio.sleep(0)
    await listener.close()
    for channel in served:
        channel.abort()
    for peer in peers:
        with closing(peer):
            peer.settimeout(5)
            try:
                ending = await asyncio.to_thread(peer.recv, 1)
            except ConnectionError:
                ending = b""
            assert ending == b""


# -- peers that misbehave ------------------------------------------------------------------------


@asynccontextmanager
async def attack(
    new_recorder: Callable[[TcpChannel], Any],
) -> AsyncIterator[tuple[socket.socket, Any]]:
    """A raw socket that is connected to a server's channel, and the handler of that."""
    accepted: asyncio.Queue[Any] = asyncio.Queue()

    def accept(channel: TcpChannel) -> Any:
        recorder = new_recorder(channel)
        accepted.put_nowait(recorder)
        return recorder

    listener = await listen(accept, Address("127.0.0.1", 0))
    with closing(socket.create_connection(listener.addresses[0])) as sock:
        recorder = await accepted.get()
        yield sock, recorder
    await recorder.until_lost()
    await listener.close()


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01" + bytes(200),
        bytes(64),
        struct.pack("<2sBBIQQ", b"DC", 1, 0, 5000, 0, 0),
        struct.pack("<2sBBIQQ", b"DC", 6, 0, 1 << 20, 1 << 40, 0),
        struct.pack("<2sBBIQQ", b"DC", 1, 0, 1, 0, 0) + b"\xc1",
        encode(Hello(), 5) + b"12345",
        encode(Heartbeat(1, False, 0)),
    ],
    ids=["http", "tls", "zeros", "long hello", "gradients", "msgpack", "payload", "heartbeat"],
)
async def test_a_stranger_who_breaks_the_rules_is_cut_off_unheard(
    data: bytes, new_recorder: type
) -> None:
    def place(message: Message, payload_nbytes: int) -> Sequence[memoryview]:
        return ()

    async with attack(new_recorder) as (sock, recorder):
        recorder.views = []
        sock.sendall(data)
        assert isinstance(await recorder.until_lost(), RemoteProtocolError)
        assert recorder.messages == []
        with pytest.raises(RemoteProtocolError):
            await recorder.channel.send(Heartbeat(1, False, 0))


@pytest.mark.parametrize("nbytes", [0, 1, PREFIX_NBYTES, len(encode(Hello())) - 1])
@pytest.mark.parametrize("way", ["end", "reset"])
async def test_a_peer_that_vanishes_breaks_the_channel(
    nbytes: int, way: str, new_recorder: type
) -> None:
    async with attack(new_recorder) as (sock, recorder):
        sock.sendall(encode(Hello())[:nbytes])
        if way == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        else:
            sock.shutdown(socket.SHUT_WR)
        assert isinstance(await recorder.until_lost(), ChannelBroken)
        assert recorder.messages == []


async def test_garbage_on_one_connection_does_not_disturb_another(
    open_tcp_pair: OpenTcp, new_recorder: type
) -> None:
    async with open_tcp_pair() as pair, attack(new_recorder) as (sock, recorder):
        await pair.greet()
        sock.sendall(b"garbage" * 1000)
        await recorder.until_lost()
        await pair.worker.send(PUSH, [memoryview(b"abc")])
        await pair.at_server.until_received(1)
        assert pair.at_server.payloads == [b"abc"]


async def test_closing_waits_for_the_end(open_tcp_pair: OpenTcp) -> None:
    async with open_tcp_pair() as pair:
        await pair.worker.close()
        assert isinstance(pair.at_worker.error, ChannelClosed)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux only")
def test_the_kernel_is_told_to_give_up_on_peers_that_take_nothing_or_have_vanished():
    with socket.socket() as sock:
        tcp._notice_vanished_peers(sock, tcp.SILENCE_S)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        patience = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert patience == 1000 * tcp.SILENCE_S
        probes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
        interval = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
        idle = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
        assert idle + probes * interval <= 1.5 * tcp.SILENCE_S


class _Limits:
    """A socket that remembers its limits."""

    def __init__(self) -> None:
        self.set: list[int] = []

    def fileno(self) -> int:
        return 3

    def setsockopt(self, level: int, option: int, value: int) -> None:
        self.set.append(value)


async def test_what_the_kernel_may_hold_unsent_follows_the_links_speed_within_its_bounds(
    new_recorder: Any,
) -> None:
    channel = TcpChannel(Role.WORKER, new_recorder)
    limits = channel._socket = _Limits()
    channel._limit_notsent(tcp.LEAST_NOTSENT_NBYTES)
    for nbytes, elapsed_s in (
        (1 << 20, 0.08),  # 100 Mbit/s: a few milliseconds are less than the least
        (1 << 10, 1e-9),  # too little to tell
        (100_000_000, 0.8),  # 1 Gbit/s
        (100_000_000, 1.0),  # about the same
        (1 << 30, 0.1),  # as fast as memory
        (1 << 20, 1.0),  # collapsed
    ):
        channel._take_time(nbytes, elapsed_s)
    least, most = tcp.LEAST_NOTSENT_NBYTES, tcp.MOST_NOTSENT_NBYTES
    assert limits.set == [least, 625_000, most, least]


class _Payload:
    """A connection in the middle of a payload, of which so much is missing after each read."""

    def __init__(self, *missing: int) -> None:
        self._missing = iter(missing)

    def buffer_updated(self, nbytes: int, now_ns: int) -> None:
        self.missing_nbytes = next(self._missing)

    def next_message(self) -> None:
        return None


class _Body:
    """A connection in the middle of a payload, that remembers its reads."""

    def __init__(self, nbytes: int) -> None:
        self._rest = memoryview(bytearray(nbytes))
        self.reads: list[int] = []
        self.ended_in_order = True
        self.whole = asyncio.Event()

    @property
    def missing_nbytes(self) -> int:
        return len(self._rest)

    def get_buffer(self) -> memoryview:
        return self._rest or memoryview(bytearray(64))

    def buffer_updated(self, nbytes: int, now_ns: int) -> None:
        self._rest = self._rest[nbytes:]
        self.reads.append(nbytes)
        if not self._rest:
            self.whole.set()

    def next_message(self) -> None:
        return None


async def test_what_trickles_in_is_read_in_gulps_and_counted_before(new_recorder: Any) -> None:
    nbytes, piece = 700_000, b"x" * 10_000
    with socket.create_server(("127.0.0.1", 0)) as server:
        channel = TcpChannel(Role.WORKER, new_recorder)
        body = channel._connection = _Body(nbytes)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(lambda: channel, *server.getsockname())
        peer, _ = server.accept()
        with closing(transport), peer:
            for sent in range(len(piece), nbytes + 1, len(piece)):
                await loop.run_in_executor(None, peer.sendall, piece)
                while channel.received_nbytes < sent:  # noqa: ASYNC110 -- nothing would say so
                    await asyncio.sleep(0)
                assert channel.received_nbytes == sent
            await body.whole.wait()
    assert sum(body.reads) == nbytes
    if sys.platform == "linux":  # of seventy pieces
        assert len(body.reads) <= 5


async def test_a_payload_is_taken_in_gulps_and_what_is_left_of_it_is_always_waited_for(
    new_recorder: Any,
) -> None:
    channel = TcpChannel(Role.WORKER, new_recorder)
    limits = channel._socket = _Limits()
    missing = (800_000, 600_000, 300_000, 40_000, 3_000, 1, 0)
    channel._connection = _Payload(*missing)
    for _ in missing:
        channel.buffer_updated(1)
    assert limits.set == [tcp.GULP_NBYTES, 40_000, 1]
