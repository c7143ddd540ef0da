"""The link as a process of its own: what runs inside it, and how others start it.

Timers decide how well a link is imitated. asyncio's default selector (epoll) rounds every timeout
up to a whole millisecond, which is 12.5 kB at 100 Mbit/s; ``select`` takes microseconds. So the
process runs on a loop of :func:`precise_loop`, which is good for about a thousand sockets.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import selectors
import signal
import sys
import threading
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TextIO

from dynacomm_async.addresses import Address, parse_address
from dynacomm_async.errors import ConfigError
from dynacomm_async.link.fault import parse_fault
from dynacomm_async.link.link import Link
from dynacomm_async.link.options import addresses_from, arguments_of, settings_from
from dynacomm_async.link.settings import LinkSettings
from dynacomm_async.recording import Recorder, write_recordings

__all__ = ["LinkProcess", "precise_loop", "run_link", "serve_link"]

_log = logging.getLogger("dynacomm_async.link")

_STOP_TIMEOUT_S: Final = 5.0
_WRITE_TIMEOUT_S: Final = 60.0
"""Added where a recording is written, which may be large."""


def precise_loop() -> asyncio.AbstractEventLoop:
    """Return a new event loop whose timers are better than a tenth of a millisecond."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


async def serve_link(
    settings: LinkSettings,
    listen: tuple[str, int],
    to: tuple[str, int],
    report: TextIO | None = None,
    *,
    insecure: bool = False,
    until_stdin_closes: bool = False,
    recorder: Recorder | None = None,
) -> None:
    """Run a link until SIGTERM or SIGINT, or until standard input closes if asked.

    Args:
        settings: what the link is like.
        listen: host and port for clients; port 0 picks a free one.
        to: host and port of the server.
        report: gets one line of JSON, ``{"listening": "host:port"}``, when clients can connect,
            and another with the counters at the end: ``{"up":, "down":, "connections": [...]}``,
            with faults also ``"faults": {TEXT: times}``; see
            :attr:`~dynacomm_async.link.link.Link.connections`.
            Without it the same is said in words on the log.
        insecure: as :class:`~dynacomm_async.link.link.Link` takes it.
        until_stdin_closes: end too when standard input closes. Until then each line of it is a
            fault to happen now, such as ``reset`` or ``stall:up,for=2s``, answered on ``report``
            by ``{"fired":, "connections":}`` or ``{"error":}``.
        recorder: as :class:`~dynacomm_async.link.link.Link` takes it.

    Raises:
        ConfigError: it cannot listen there, or may not.
    """
    stop = asyncio.Event()
    async with Link(settings, to, *listen, insecure=insecure, recorder=recorder) as link:

        def obey(line: str) -> None:
            _fire(link, line, report)

        with _stopping(stop, obey if until_stdin_closes else None):
            _say_listening(link, to, report)
            await stop.wait()
            _say_counters(link, report)


def run_link(args: argparse.Namespace) -> None:
    """Run the link that the options of ``add_arguments`` describe, on a loop of its own.

    Raises:
        ConfigError: an option that cannot be read, or an address that it cannot listen on.
        OSError: the recording cannot be written.
    """
    settings = settings_from(args)
    listen, to = addresses_from(args)
    report = sys.stdout if args.json else None
    recorder = None if args.trace is None else Recorder()
    work = serve_link(
        settings,
        listen,
        to,
        report,
        insecure=args.insecure,
        until_stdin_closes=args.until_stdin_closes,
        recorder=recorder,
    )
    try:
        with asyncio.Runner(loop_factory=precise_loop) as runner:
            runner.run(work)
    except BrokenPipeError:
        # Who should read the report has gone; the interpreter would complain when it flushes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if recorder is not None:
        write_recordings(args.trace, [recorder.recording()])


class LinkProcess:
    """A link in a child process, as an async context manager.

    The child ends when the context is left, and also when this process dies in any way.

    Args:
        settings: what the link is like.
        to: host and port of the server.
        host: where to listen.
        port: where to listen; 0 picks a free port.
        insecure: as :class:`~dynacomm_async.link.link.Link` takes it.
        trace: where the child writes its recording when it ends; None: nothing is recorded.
        quiet: drop what it says on standard error, such as that the server cannot be reached.

    Raises:
        ConfigError: (on entering) the link did not start; the message is its own.
    """

    def __init__(
        self,
        settings: LinkSettings,
        to: tuple[str, int],
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        insecure: bool = False,
        trace: Path | None = None,
        quiet: bool = False,
    ) -> None:
        self._words = DEVNULL if quiet else None
        self._arguments = [
            f"--listen={Address(host, port)}",
            f"--to={Address(*to[:2])}",
            *arguments_of(settings),
            *(["--insecure"] if insecure else []),
            *([f"--trace={trace}"] if trace is not None else []),
            "--json",
            "--until-stdin-closes",
        ]
        self._stop_timeout_s = _STOP_TIMEOUT_S + (0 if trace is None else _WRITE_TIMEOUT_S)
        self._asking = asyncio.Lock()
        self._process: Process | None = None
        self._address: Address | None = None
        self._counters: dict[str, Any] | None = None

    @property
    def address(self) -> Address:
        """Host and port on which clients are accepted; valid once entered."""
        if self._address is None:
            raise ConfigError("the link is not running: enter its context first")
        return self._address

    async def __aenter__(self) -> Self:
        # A session of its own: Ctrl-C in a terminal reaches the parent, which ends it in order.
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "dynacomm_async.link",
            *self._arguments,
            stdin=PIPE,
            stdout=PIPE,
            stderr=self._words,
            start_new_session=True,
        )
        try:
            self._address = await self._read_address(self._process)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()  # nobody has its address, so it has nothing to end in order
            await self._process.communicate()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def stop(self) -> dict[str, Any]:
        """End the child if it runs and return its counters (``{}`` if it died without them)."""
        if self._process is None:
            raise ConfigError("the link is not running: enter its context first")
        if self._counters is None:
            self._counters = await self._end(self._process)
        return self._counters

    async def fire(self, fault: str) -> int:
        """Let a fault happen now and return on how many connections it did.

        Args:
            fault: as for ``--fault`` without a trigger: ``"reset"``, ``"stall:up,for=2s"``.

        Raises:
            ConfigError: not such a fault, or the link is not running.
        """
        process = self._process
        if process is None or process.returncode is not None or self._counters is not None:
            raise ConfigError("the link is not running: enter its context first")
        assert process.stdin is not None
        assert process.stdout is not None
        async with self._asking:
            process.stdin.write(" ".join(fault.split()).encode() + b"\n")
            line = await process.stdout.readline()
        if not line:
            raise ConfigError("the link has ended: its own message says why")
        answer = json.loads(line)
        if "error" in answer:
            raise ConfigError(answer["error"])
        return int(answer["connections"])

    async def _read_address(self, process: Process) -> Address:
        assert process.stdout is not None
        line = await process.stdout.readline()
        if not line:
            raise ConfigError("the link did not start; its own message says why")
        return parse_address(json.loads(line)["listening"])

    async def _end(self, process: Process) -> dict[str, Any]:
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(self._stop_timeout_s):
                output, _ = await process.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        return dict(json.loads(output)) if output.strip() else {}


@contextlib.contextmanager
def _stopping(stop: asyncio.Event, obey: Callable[[str], None] | None) -> Iterator[None]:
    """Set ``stop`` on SIGTERM, SIGINT and the end of standard input, if ``obey`` gets its lines."""
    loop = asyncio.get_running_loop()
    handled = []
    for number in (signal.SIGTERM, signal.SIGINT):
        # Not every platform has them, and only the main thread may handle them.
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, stop.set)
            handled.append(number)
    if obey is not None:
        threading.Thread(target=_watch_stdin, args=(loop, stop, obey), daemon=True).start()
    try:
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)


def _watch_stdin(
    loop: asyncio.AbstractEventLoop, stop: asyncio.Event, obey: Callable[[str], None]
) -> None:
    # Not sys.stdin: a daemon thread that holds its lock would break the interpreter's exit.
    rest = b""
    with contextlib.suppress(OSError, RuntimeError):
        while data := os.read(0, 4096):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                loop.call_soon_threadsafe(obey, line.decode(errors="replace"))
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(stop.set)


def _fire(link: Link, line: str, report: TextIO | None) -> None:
    """Obey one line of standard input."""
    answer: dict[str, Any]
    try:
        fault = parse_fault(line, on_demand=True)
        answer = {"fired": str(fault), "connections": link.fire(fault)}
    except ConfigError as error:
        answer = {"error": str(error)}
    if report is None:
        _log.info("link: %s", ", ".join(f"{name}: {value}" for name, value in answer.items()))
    else:
        print(json.dumps(answer), file=report, flush=True)


def _say_listening(link: Link, to: tuple[str, int], report: TextIO | None) -> None:
    if report is None:
        _log.info("link: listening on %s, relaying to %s", link.address, Address(*to[:2]))
    else:
        print(json.dumps({"listening": str(link.address)}), file=report, flush=True)


def _say_counters(link: Link, report: TextIO | None) -> None:
    total = link.counters
    if report is None:
        for name, tally in (("up", total.up), ("down", total.down)):
            _log.info("link: %s: %d messages, %d bytes", name, tally.messages, tally.nbytes)
        for fault, times in link.faults.items():
            _log.info("link: fault %s: %d times", fault, times)
        return
    connections = [counters.to_json() for counters in link.connections]
    said = {**total.to_json(), "connections": connections}
    if link.faults:
        said["faults"] = link.faults
    print(json.dumps(said), file=report, flush=True)
