"""Both ends of every way to move an array that ``transport.py`` compares.

An end lives in a process of its own and is told what to do by blocking calls: a receiver listens
and accepts, a sender connects; then ``receive`` and ``send``, or ``echo`` and ``ping``, are called
on the two at the same time. A *batch* is ``count`` payloads one behind the other and one small
answer at the end, so a sender's time covers everything up to the last byte in the receiver's
array. All receivers end with the payload in a NumPy array that existed before.
"""

from __future__ import annotations

import asyncio
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import numpy as np

from dynacomm_async.errors import DynaCommError
from dynacomm_async.ranges import Range
from dynacomm_async.transport import Address, TcpChannel, connect, listen, new_event_loop
from dynacomm_async.wire.decoder import Received
from dynacomm_async.wire.grid import LayerSpec
from dynacomm_async.wire.messages import (
    Gradients,
    Hello,
    Join,
    Message,
    Parameters,
    Subscription,
    Welcome,
)

__all__ = ["PEERS", "Peer", "Receiver", "Sender", "find_missing"]

PING_NBYTES = 64
GRPC_PIECE_NBYTES = 1 << 20


class Receiver(Protocol):
    """The end with the array that is filled."""

    def listen(self) -> str:
        """Return what the sender must be given to find this end."""
        ...

    def accept(self) -> None:
        """Wait for the sender."""
        ...

    def prepare(self, nbytes: int) -> None:
        """Make the array that payloads of this size go into."""
        ...

    def receive(self, count: int, batches: int) -> None:
        """Receive batches and answer each."""
        ...

    def echo(self, count: int) -> None:
        """Answer messages of 64 bytes with 64 bytes."""
        ...


class Sender(Protocol):
    """The end with the array that is sent."""

    def connect(self, address: str) -> None:
        """Connect to the receiver."""
        ...

    def prepare(self, nbytes: int) -> None:
        """Make the array of this size that is sent."""
        ...

    def send(self, count: int, batches: int) -> list[float]:
        """Send batches; return the seconds that each took, its answer included."""
        ...

    def ping(self, count: int) -> list[float]:
        """Send 64 bytes and wait for 64 bytes; return the seconds of each round trip."""
        ...


def make_array(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return an array whose pages are really there, so that no page fault is measured."""
    return np.full(nbytes, 7, np.uint8)


def make_loop(kind: str) -> asyncio.AbstractEventLoop:
    """Return the loop that the package would use, or the stock one."""
    return asyncio.new_event_loop() if kind == "stock" else new_event_loop()


# -- blocking sockets ----------------------------------------------------------------------------


class BlockingReceiver:
    """``recv_into`` an array: the practical limit."""

    def __init__(self, loop_kind: str) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))

    def listen(self) -> str:
        return str(self._listener.getsockname()[1])

    def accept(self) -> None:
        self._socket, _ = self._listener.accept()
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def prepare(self, nbytes: int) -> None:
        self._view = memoryview(make_array(nbytes))

    def receive(self, count: int, batches: int) -> None:
        for _ in range(batches):
            for _ in range(count):
                receive_exactly(self._socket, self._view)
            self._socket.sendall(b"!")

    def echo(self, count: int) -> None:
        view = memoryview(bytearray(PING_NBYTES))
        for _ in range(count):
            receive_exactly(self._socket, view)
            self._socket.sendall(view)


class BlockingSender:
    """``sendall`` from an array."""

    def __init__(self, loop_kind: str) -> None: ...

    def connect(self, address: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", int(address)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def prepare(self, nbytes: int) -> None:
        self._view = memoryview(make_array(nbytes))

    def send(self, count: int, batches: int) -> list[float]:
        answer = memoryview(bytearray(1))

        def send_batch() -> None:
            for _ in range(count):
                self._socket.sendall(self._view)
            receive_exactly(self._socket, answer)

        return [measure(send_batch) for _ in range(batches)]

    def ping(self, count: int) -> list[float]:
        view = memoryview(bytearray(PING_NBYTES))

        def ping_once() -> None:
            self._socket.sendall(view)
            receive_exactly(self._socket, view)

        return [measure(ping_once) for _ in range(count)]


def receive_exactly(sock: socket.socket, view: memoryview) -> None:
    """Fill the view from the socket."""
    while len(view):
        nbytes = sock.recv_into(view)
        if not nbytes:
            raise ConnectionError("the other end is gone")
        view = view[nbytes:]


def measure(function: Callable[[], None]) -> float:
    """Return how long the function took."""
    begin = perf_counter()
    function()
    return perf_counter() - begin


# -- this package --------------------------------------------------------------------------------


class _Collector:
    """A channel's handler: payloads go into one array, complete messages are counted."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(PING_NBYTES))
        self._counted = 0
        self._wanted = 0
        self._enough: asyncio.Future[None] | None = None
        self.error: DynaCommError | None = None

    def place(self, message: Message, payload_nbytes: int) -> Sequence[memoryview]:
        return (self.view[:payload_nbytes],)

    def handle(self, received: Received) -> None:
        self._counted += 1
        if self._enough is not None and self._counted >= self._wanted:
            self._wake()

    def lost(self, error: DynaCommError) -> None:
        self.error = error
        self._wake()

    async def wait(self, count: int) -> None:
        """Wait until this many more messages have come than were waited for before."""
        if self._counted < count and self.error is None:
            self._wanted = count
            self._enough = asyncio.get_running_loop().create_future()
            await self._enough
        if self.error is not None:
            raise self.error
        self._counted -= count

    def _wake(self) -> None:
        enough, self._enough = self._enough, None
        if enough is not None:
            enough.set_result(None)


RANGES = (Range(0, 1),)
ANSWER = Parameters(1, RANGES)


class OursReceiver:
    """The server's end of a :class:`TcpChannel`."""

    def __init__(self, loop_kind: str) -> None:
        self._loop = make_loop(loop_kind)
        self._collector = _Collector()

    def listen(self) -> str:
        self._accepted: asyncio.Future[TcpChannel] = self._loop.create_future()
        self._listener = self._loop.run_until_complete(listen(self._take, Address("127.0.0.1", 0)))
        return str(self._listener.addresses[0].port)

    def _take(self, channel: TcpChannel) -> _Collector:
        self._accepted.set_result(channel)
        return self._collector

    def accept(self) -> None:
        self._loop.run_until_complete(self._greet())

    async def _greet(self) -> None:
        self._channel = await self._accepted
        await self._collector.wait(1)
        layers = (LayerSpec("layer", 1),)
        await self._channel.send(Welcome(1, "run", 0, 1, 1, layers, 0, 1, False))
        await self._collector.wait(1)
        await self._channel.send(ANSWER)

    def prepare(self, nbytes: int) -> None:
        self._collector.view = memoryview(make_array(nbytes))

    def receive(self, count: int, batches: int) -> None:
        self._loop.run_until_complete(self._receive(count, batches))

    async def _receive(self, count: int, batches: int) -> None:
        for _ in range(batches):
            await self._collector.wait(count)
            await self._channel.send(ANSWER)

    def echo(self, count: int) -> None:
        view = self._collector.view
        self._collector.view = memoryview(bytearray(PING_NBYTES))
        self._loop.run_until_complete(self._echo(count))
        self._collector.view = view

    async def _echo(self, count: int) -> None:
        payload = (self._collector.view,)
        for _ in range(count):
            await self._collector.wait(1)
            await self._channel.send(ANSWER, payload)


class OursSender:
    """The worker's end of a :class:`TcpChannel`."""

    def __init__(self, loop_kind: str) -> None:
        self._loop = make_loop(loop_kind)
        self._collector = _Collector()

    def connect(self, address: str) -> None:
        self._loop.run_until_complete(self._connect(Address("127.0.0.1", int(address))))

    async def _connect(self, address: Address) -> None:
        self._channel = await connect(lambda channel: self._collector, address)
        await self._channel.send(Hello())
        await self._collector.wait(1)
        await self._channel.send(Join("", Subscription(1, (RANGES,))))
        await self._collector.wait(1)

    def prepare(self, nbytes: int) -> None:
        self._payload = (memoryview(make_array(nbytes)),)

    def send(self, count: int, batches: int) -> list[float]:
        return self._loop.run_until_complete(self._send(self._payload, count, batches))

    async def _send(self, payload: Sequence[memoryview], count: int, batches: int) -> list[float]:
        channel, collector = self._channel, self._collector
        durations = []
        for _ in range(batches):
            begin = perf_counter()
            for number in range(count):
                await channel.send(Gradients(0, RANGES), payload, back_to_back=number > 0)
            await collector.wait(1)
            durations.append(perf_counter() - begin)
        return durations

    def ping(self, count: int) -> list[float]:
        payload = (memoryview(make_array(PING_NBYTES)),)
        return self._loop.run_until_complete(self._send(payload, 1, count))


# -- asyncio streams -----------------------------------------------------------------------------


class StreamsReceiver:
    """``readexactly``, then a copy into the array: there is no reading into place."""

    def __init__(self, loop_kind: str) -> None:
        self._loop = make_loop(loop_kind)

    def listen(self) -> str:
        return str(self._loop.run_until_complete(self._listen()))

    async def _listen(self) -> int:
        self._accepted: asyncio.Future[None] = self._loop.create_future()

        def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._reader, self._writer = reader, writer
            self._accepted.set_result(None)

        self._server = await asyncio.start_server(take, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def accept(self) -> None:
        self._loop.run_until_complete(self._accepted)

    def prepare(self, nbytes: int) -> None:
        self._array = make_array(nbytes)

    def receive(self, count: int, batches: int) -> None:
        self._loop.run_until_complete(self._receive(count, batches))

    async def _receive(self, count: int, batches: int) -> None:
        for _ in range(batches):
            for _ in range(count):
                data = await self._reader.readexactly(len(self._array))
                self._array[:] = np.frombuffer(data, np.uint8)
                del data
            self._writer.write(b"!")
            await self._writer.drain()

    def echo(self, count: int) -> None:
        self._loop.run_until_complete(self._echo(count))

    async def _echo(self, count: int) -> None:
        for _ in range(count):
            self._writer.write(await self._reader.readexactly(PING_NBYTES))
            await self._writer.drain()


class StreamsSender:
    """``write`` and ``drain``."""

    def __init__(self, loop_kind: str) -> None:
        self._loop = make_loop(loop_kind)

    def connect(self, address: str) -> None:
        self._reader, self._writer = self._loop.run_until_complete(
            asyncio.open_connection("127.0.0.1", int(address))
        )

    def prepare(self, nbytes: int) -> None:
        self._view = memoryview(make_array(nbytes))

    def send(self, count: int, batches: int) -> list[float]:
        return self._loop.run_until_complete(self._send(self._view, 1, count, batches))

    async def _send(
        self, view: memoryview, answer_nbytes: int, count: int, batches: int
    ) -> list[float]:
        durations = []
        for _ in range(batches):
            begin = perf_counter()
            for _ in range(count):
                self._writer.write(view)
                await self._writer.drain()
            await self._reader.readexactly(answer_nbytes)
            durations.append(perf_counter() - begin)
        return durations

    def ping(self, count: int) -> list[float]:
        view = memoryview(make_array(PING_NBYTES))
        return self._loop.run_until_complete(self._send(view, PING_NBYTES, 1, count))


# -- gloo ----------------------------------------------------------------------------------------


class _GlooEnd:
    """``torch.distributed`` on gloo: rank 0 receives, rank 1 sends."""

    def __init__(self, loop_kind: str) -> None:
        import torch
        from torch import distributed

        torch.set_num_threads(1)
        self._torch, self._distributed = torch, distributed

    def _join(self, path: str, rank: int) -> None:
        self._distributed.init_process_group(
            "gloo",
            init_method=f"file://{path}",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=60),
        )
        self._answer = self._torch.zeros(1, dtype=self._torch.uint8)
        self._small = self._torch.zeros(PING_NBYTES, dtype=self._torch.uint8)

    def prepare(self, nbytes: int) -> None:
        self._tensor = self._torch.from_numpy(make_array(nbytes))


class GlooReceiver(_GlooEnd):
    """Receives into a tensor that shares the array's memory."""

    def listen(self) -> str:
        self._folder = tempfile.TemporaryDirectory()
        self._path = str(Path(self._folder.name) / "rendezvous")
        return self._path

    def accept(self) -> None:
        self._join(self._path, 0)

    def receive(self, count: int, batches: int) -> None:
        for _ in range(batches):
            for _ in range(count):
                self._distributed.recv(self._tensor, 1)
            self._distributed.send(self._answer, 1)

    def echo(self, count: int) -> None:
        for _ in range(count):
            self._distributed.recv(self._small, 1)
            self._distributed.send(self._small, 1)


class GlooSender(_GlooEnd):
    """Sends a tensor that shares the array's memory."""

    def connect(self, address: str) -> None:
        self._join(address, 1)

    def send(self, count: int, batches: int) -> list[float]:
        def send_batch() -> None:
            for _ in range(count):
                self._distributed.send(self._tensor, 0)
            self._distributed.recv(self._answer, 0)

        return [measure(send_batch) for _ in range(batches)]

    def ping(self, count: int) -> list[float]:
        def ping_once() -> None:
            self._distributed.send(self._small, 0)
            self._distributed.recv(self._small, 0)

        return [measure(ping_once) for _ in range(count)]


# -- gRPC ----------------------------------------------------------------------------------------


class GrpcReceiver:
    """A service of raw bytes: a stream of pieces is copied into the array, piece by piece."""

    def __init__(self, loop_kind: str) -> None:
        from concurrent.futures import ThreadPoolExecutor

        import grpc

        self._served = threading.Semaphore(0)
        handlers = {
            "Move": grpc.stream_unary_rpc_method_handler(self._move),
            "Echo": grpc.unary_unary_rpc_method_handler(self._echo),
        }
        self._server = grpc.server(ThreadPoolExecutor(2))
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("Array", handlers),)
        )

    def _move(self, pieces: Iterator[bytes], context: object) -> bytes:
        array = self._array
        start = 0
        for piece in pieces:
            array[start : start + len(piece)] = np.frombuffer(piece, np.uint8)
            start = (start + len(piece)) % len(array)
        self._served.release()
        return b"!"

    def _echo(self, request: bytes, context: object) -> bytes:
        self._served.release()
        return request

    def listen(self) -> str:
        port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        return str(port)

    def accept(self) -> None: ...

    def prepare(self, nbytes: int) -> None:
        self._array = make_array(nbytes)

    def receive(self, count: int, batches: int) -> None:
        for _ in range(batches):
            self._served.acquire()

    def echo(self, count: int) -> None:
        for _ in range(count):
            self._served.acquire()


class GrpcSender:
    """Calls the service; each batch is one call."""

    def __init__(self, loop_kind: str) -> None: ...

    def connect(self, address: str) -> None:
        import grpc

        self._channel = grpc.insecure_channel(f"127.0.0.1:{address}")
        grpc.channel_ready_future(self._channel).result(timeout=30)
        self._move = self._channel.stream_unary("/Array/Move")
        self._echo = self._channel.unary_unary("/Array/Echo")

    def prepare(self, nbytes: int) -> None:
        self._view = memoryview(make_array(nbytes))

    def _cut(self, count: int) -> Iterator[bytes]:
        for _ in range(count):
            for start in range(0, len(self._view), GRPC_PIECE_NBYTES):
                yield bytes(self._view[start : start + GRPC_PIECE_NBYTES])

    def send(self, count: int, batches: int) -> list[float]:
        return [measure(lambda: self._move(self._cut(count))) for _ in range(batches)]

    def ping(self, count: int) -> list[float]:
        data = bytes(PING_NBYTES)
        return [measure(lambda: self._echo(data)) for _ in range(count)]


# -- the table -----------------------------------------------------------------------------------


class Peer(NamedTuple):
    """One way to move an array.

    Attributes:
        name: what a table calls it.
        module: what must be importable, or None.
        package: what to install for that.
        receiver: makes the receiving end for a kind of event loop.
        sender: makes the sending end.
    """

    name: str
    module: str | None
    package: str | None
    receiver: Callable[[str], Receiver]
    sender: Callable[[str], Sender]


PEERS = {
    "ours": Peer("dynacomm_async", None, None, OursReceiver, OursSender),
    "blocking": Peer("blocking sockets", None, None, BlockingReceiver, BlockingSender),
    "streams": Peer("asyncio streams", None, None, StreamsReceiver, StreamsSender),
    "gloo": Peer("gloo send/recv", "torch", "torch", GlooReceiver, GlooSender),
    "grpc": Peer("gRPC, 1 MiB pieces", "grpc", "grpcio", GrpcReceiver, GrpcSender),
}


def find_missing(key: str) -> str | None:
    """Return the package to install before this peer can run, or None."""
    peer = PEERS[key]
    return peer.package if peer.module is not None and find_spec(peer.module) is None else None
