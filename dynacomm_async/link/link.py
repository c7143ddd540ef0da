"""The relay: accepts clients, connects each to the server and joins them over emulated links."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
from collections import deque
from collections.abc import Coroutine
from types import TracebackType
from typing import Final, Self

from dynacomm_async.addresses import Address, check_listen
from dynacomm_async.errors import ConfigError, RemoteProtocolError
from dynacomm_async.link.counters import Counters
from dynacomm_async.link.fault import Fault
from dynacomm_async.link.flow import PIECE_NS, Clock, Endpoint, Flow, FlowLog
from dynacomm_async.link.gate import Faulted
from dynacomm_async.link.medium import Medium, Rates
from dynacomm_async.link.settings import LinkSettings
from dynacomm_async.link.walk import MessageWalk
from dynacomm_async.recording import Recorder

__all__ = ["Link"]

_log = logging.getLogger("dynacomm_async.link")

MAX_CONNECTIONS: Final = 400
"""At two sockets each, the ``select`` call that the precise loop uses can still watch them."""

KEPT_CLOSED: Final = 100
"""Closed connections that are counted apart; older ones are in the totals alone."""

_CONNECT_TIMEOUT_S: Final = 10.0
_ACCEPT_RETRY_S: Final = 0.1
_CLOSE_TIMEOUT_S: Final = 1.0
"""How long both sides have to notice a cut before what they still send meets a reset."""

_MIN_RECEIVE_NBYTES: Final = 8 * 1024
_MAX_RECEIVE_NBYTES: Final = 256 * 1024


class Link:
    """A relay between TCP clients and one server, as an async context manager.

    It runs on any asyncio loop; how exactly it keeps time depends on the loop's timers (see
    :func:`dynacomm_async.link.process.precise_loop`), the long-run rate does not.

    Args:
        settings: what the link is like.
        to: the server's host and port; clients are closed at once while it cannot be reached.
        host: where to listen.
        port: where to listen; 0 picks a free port.
        insecure: allow listening where other machines can reach it. There is no authentication,
            and who reaches the link reaches the server behind it.
        recorder: takes down when each message was on the medium; None records nothing.

    Raises:
        ConfigError: (on entering) it cannot listen there, or may not.
    """

    def __init__(
        self,
        settings: LinkSettings,
        to: tuple[str, int],
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        insecure: bool = False,
        recorder: Recorder | None = None,
    ) -> None:
        self._settings = settings
        self._to = Address(*to[:2])
        self._listen = Address(host, port)
        self._insecure = insecure
        if recorder is not None:
            recorder.begin("link")
        self._recorder = recorder
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._counters = Counters()
        # By number, in order of arrival; and the numbers of those closed, in order of their end.
        self._connections: dict[int, Counters] = {}
        self._closed: deque[int] = deque()
        self._n_connections = 0
        self._faulted: dict[int, Faulted] = {}
        self._fired = {str(fault): 0 for fault in settings.faults}
        self._refuse_until_ns = 0
        self._clock = Clock()
        self._down = _rates(settings, 1)
        self._up = _rates(settings, 2)
        self._media = self._make_media()

    @property
    def address(self) -> Address:
        """Host and port on which clients are accepted; valid inside the context."""
        if self._listener is None:
            raise ConfigError("the link is not running: enter its context first")
        return Address(*self._listener.getsockname()[:2])

    @property
    def counters(self) -> Counters:
        """All connections together, live: it goes on counting."""
        return self._counters

    @property
    def connections(self) -> tuple[Counters, ...]:
        """One for each connection that is open and the last 100 that closed, live.

        They are in order of arrival. Whatever closed before is in :attr:`counters` alone.
        """
        return tuple(self._connections.values())

    @property
    def faults(self) -> dict[str, int]:
        """How often each fault has happened, by its text; 0 for those that have not yet.

        A fault of several connections counts on each, slow-close once per end of a stream.
        """
        return dict(self._fired)

    def fire(self, fault: Fault) -> int:
        """Let a fault happen now, on the connections that are open; return their number.

        ``slice`` and ``slow-close`` hold for the rest of those connections. Call it on the
        link's own loop.
        """
        concerned = [one for one in self._faulted.values() if one.concerns(fault) and not one.ended]
        if fault.kind == "down":
            assert fault.for_s is not None
            self._refuse_until_ns = self._clock.now_ns() + round(fault.for_s * 1e9)
            self._count_fault(fault)
        for connection in concerned:
            connection.apply(fault)
        return len(concerned)

    async def __aenter__(self) -> Self:
        check_listen(self._listen, insecure=self._insecure)
        self._listener = await self._open_listener()
        self._clock = Clock()
        self._spawn(self._accept(self._listener))
        for fault in self._settings.faults:
            if fault.at_s is not None:
                self._spawn(self._fire_at(fault, fault.at_s))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Abort every connection and stop listening."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _make_media(self) -> tuple[Medium, Medium]:
        overhead_ns = round(self._settings.overhead_s * 1e9)
        up = Medium(overhead_ns)
        return up, up if self._settings.half_duplex else Medium(overhead_ns)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _open_listener(self) -> socket.socket:
        host, port = self._listen
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            family, kind, protocol, _, address = found[0]
            sock = socket.socket(family, kind, protocol)
        except OSError as error:
            raise _cannot_listen(self._listen, error) from error
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Accepted sockets inherit it, and only so does it bound the window from the start.
            _bound_receive_buffer(sock, self._up)
            sock.bind(address)
            sock.listen(128)
        except OSError as error:
            sock.close()
            raise _cannot_listen(self._listen, error) from error
        return sock

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(listener)
            except OSError as error:
                _log.warning("link: cannot accept a connection: %s", error.strerror)
                await asyncio.sleep(_ACCEPT_RETRY_S)
                continue
            client = Endpoint(sock)
            if self._clock.now_ns() < self._refuse_until_ns:
                client.abort()
            elif len(self._tasks) > MAX_CONNECTIONS:
                _log.warning("link: refused a connection: %d are open", MAX_CONNECTIONS)
                client.abort()
            else:
                self._spawn(self._serve(client, str(Address(*address[:2]))))

    async def _serve(self, client: Endpoint, name: str) -> None:
        try:
            client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server = await self._connect()
        except (OSError, TimeoutError) as error:
            _log.warning("link: cannot reach %s: %s", self._to, _reason(error))
            client.abort()
            return
        except BaseException:
            client.abort()
            raise
        try:
            if await self._join(client, server):
                await _close_in_order(client, server)
            client.sock.close()
            server.sock.close()
        except* OSError:
            _log.debug("link: the connection of %s was reset", name)
        except* RemoteProtocolError as errors:
            _log.warning(
                "link: not dynacomm traffic on the connection of %s (%s): "
                "--overhead needs message boundaries; use --overhead 0ms",
                name,
                errors.exceptions[0],
            )
        finally:
            client.abort()
            server.abort()

    async def _connect(self) -> Endpoint:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            failure = OSError("no address found")
            for family, kind, protocol, _, address in await loop.getaddrinfo(
                *self._to, type=socket.SOCK_STREAM
            ):
                sock = socket.socket(family, kind, protocol)
                try:
                    sock.setblocking(False)
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    _bound_receive_buffer(sock, self._down)
                    await loop.sock_connect(sock, address)
                except OSError as error:
                    sock.close()
                    failure = error
                except BaseException:
                    sock.close()
                    raise
                else:
                    return Endpoint(sock)
            raise failure

    def _count_connection(self) -> tuple[int, Counters]:
        """Return the number of a new connection, and what counts it."""
        number, counters = self._n_connections, Counters()
        self._n_connections += 1
        self._connections[number] = counters
        return number, counters

    def _count_closed(self, number: int) -> None:
        self._closed.append(number)
        if len(self._closed) > KEPT_CLOSED:
            del self._connections[self._closed.popleft()]

    async def _join(self, client: Endpoint, server: Endpoint) -> bool:
        """Relay until the end; return whether a fault has cut the connection.

        Raises:
            ConnectionResetError: a fault has reset it.
        """
        number, counters = self._count_connection()
        task = asyncio.current_task()
        assert task is not None
        orderly: list[bool] = []

        def end(in_order: bool) -> None:
            if not orderly:
                orderly.append(in_order)
                task.cancel()

        faulted = Faulted(
            number,
            self._settings.faults,
            now_ns=self._clock.now_ns,
            count=self._count_fault,
            end=end,
            fire=self._fire_one,
        )
        self._faulted[number] = faulted
        try:
            await self._relay(client, server, counters, faulted)
        except asyncio.CancelledError:
            if not orderly or task.uncancel() > 0:
                raise
            if not orderly[0]:
                raise ConnectionResetError("reset by a fault") from None
            return True
        finally:
            del self._faulted[number]
            self._count_closed(number)
        return False

    def _count_fault(self, fault: Fault) -> None:
        self._fired[str(fault)] = self._fired.get(str(fault), 0) + 1

    def _fire_one(self, fault: Fault, connection: Faulted) -> None:
        """A byte count of one connection was reached."""
        if fault.kind == "down":
            self.fire(fault)
        else:
            connection.apply(fault)

    async def _fire_at(self, fault: Fault, at_s: float) -> None:
        at_ns = round(at_s * 1e9)
        await self._clock.wait_until(at_ns)
        self.fire(fault)
        while fault.every is not None:
            at_ns += max(1, round(fault.every * 1e9))
            await self._clock.wait_until(at_ns)
            self.fire(fault)
            await asyncio.sleep(0)

    async def _relay(
        self, client: Endpoint, server: Endpoint, counters: Counters, faulted: Faulted
    ) -> None:
        up, down = self._media if self._settings.shared else self._make_media()
        delay_ns = round(self._settings.delay_s * 1e9)
        strict = self._settings.overhead_s > 0
        up_log, down_log = self._make_logs(client, server)
        flows = (
            Flow(
                client,
                server,
                clock=self._clock,
                medium=up,
                rates=self._up,
                delay_ns=delay_ns,
                walk=MessageWalk(strict=strict),
                gate=faulted.gates["up"],
                tallies=(counters.up, self._counters.up),
                log=up_log,
            ),
            Flow(
                server,
                client,
                clock=self._clock,
                medium=down,
                rates=self._down,
                delay_ns=delay_ns,
                walk=MessageWalk(strict=strict),
                gate=faulted.gates["down"],
                tallies=(counters.down, self._counters.down),
                log=down_log,
            ),
        )
        async with asyncio.TaskGroup() as group:
            for flow in flows:
                group.create_task(flow.take())
                group.create_task(flow.give())

    def _make_logs(
        self, client: Endpoint, server: Endpoint
    ) -> tuple[FlowLog, FlowLog] | tuple[None, None]:
        """Return what records the directions up and down, if anything does."""
        if self._recorder is None:
            return None, None
        connection = self._recorder.open_connection(
            local=str(Address(*server.sock.getsockname()[:2])),
            peer=str(Address(*client.sock.getpeername()[:2])),
        )
        up = FlowLog(self._recorder, connection, up=True)
        return up, FlowLog(self._recorder, connection, up=False)


async def _close_in_order(*endpoints: Endpoint) -> None:
    """End both streams; read on, as closing over unread bytes would send a reset."""
    loop = asyncio.get_running_loop()

    async def drain(sock: socket.socket) -> None:
        sock.shutdown(socket.SHUT_WR)
        while await loop.sock_recv(sock, 65536):
            pass

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            socks = [endpoint.sock for endpoint in endpoints]
            await asyncio.gather(*map(drain, socks), return_exceptions=True)


def _rates(settings: LinkSettings, column: int) -> Rates:
    first = (settings.rate_down_bytes_per_s, settings.rate_up_bytes_per_s)[column - 1]
    steps: list[tuple[int, float | None]] = [(0, first)]
    for entry in settings.schedule:
        at_ns, rate = round(entry[0] * 1e9), (entry[1], entry[2])[column - 1]
        if at_ns == 0:
            steps.clear()
        steps.append((at_ns, rate))
    return Rates(steps)


def _bound_receive_buffer(sock: socket.socket, rates: Rates) -> None:
    """Keep the kernel from reading ahead of a slow link; about a piece beyond the one in hand."""
    nbytes = rates.most_nbytes_in(PIECE_NS)
    if math.isfinite(nbytes):
        bounded = int(min(max(nbytes, _MIN_RECEIVE_NBYTES), _MAX_RECEIVE_NBYTES))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, bounded)


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError) and not getattr(error, "strerror", None):
        return f"no answer within {_CONNECT_TIMEOUT_S:g} s"
    return str(getattr(error, "strerror", None) or error)


def _cannot_listen(address: Address, error: OSError) -> ConfigError:
    return ConfigError(f"cannot listen on {address}: {_reason(error)}; choose another address")
