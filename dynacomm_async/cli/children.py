"""Processes of one command: started together, watched, and never left behind."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from dynacomm_async.cli.lastwords import Words
from dynacomm_async.cli.output import say
from dynacomm_async.errors import DynaCommError

__all__ = ["Child", "ChildFailed", "Children", "Event"]

_GRACE_S = 0.7
"""How long a child may take to end when told to."""

_SILENCE_S = 2.0
"""A child that lives on for so long after a line has not said its last word with it, even on a
busy machine, where ending takes its time."""

Event = Mapping[str, Any]


class ChildFailed(DynaCommError):
    """A child process ended early; its own last words say why."""


class Child:
    """A child process that speaks in events; see :func:`dynacomm_async.cli.output.emit`."""

    def __init__(self, name: str, process: Process, on_event: Callable[[Event], None]) -> None:
        self.name = name
        self._process = process
        self._on_event = on_event
        self._words = Words()
        self._ending = False

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send one line of JSON to its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def watch(self) -> None:
        """Hand its events on until it ends.

        Raises:
            ChildFailed: it did not end well.
        """
        await asyncio.gather(self._read_events(), self._read_words())
        code = await self._process.wait()
        if code:
            last = self._words.last or f"ended with code {code} and no message"
            raise ChildFailed(f"{self.name}: {last.partition('error: ')[2] or last}")
        self._forward(self._words.release())

    async def _read_events(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            event = _parse_event(line)
            if event is None:  # printed by a model of the user's own
                say(line.decode(errors="replace").rstrip("\n"))
            else:
                self._on_event(event)

    async def _read_words(self) -> None:
        assert self._process.stderr is not None
        data = b"?"
        while data:
            try:
                async with asyncio.timeout(_SILENCE_S if self._words.held else None):
                    data = await self._process.stderr.read(65536)
            except TimeoutError:
                self._forward(self._words.release())
            else:
                self._forward(self._words.take(data))

    def _forward(self, lines: Sequence[str]) -> None:
        """Pass on what it says on standard error, such as a warning of a user's own model."""
        for line in lines if not self._ending else ():
            say(f"{self.name}: {line}")

    def hush(self) -> None:
        """From now on what it says on standard error is not passed on."""
        self._ending = True

    async def end(self) -> None:
        """End it now if it still runs; what it has to say to that is not passed on."""
        self.hush()
        process = self._process
        if process.returncode is None:
            process.terminate()
        try:
            async with asyncio.timeout(_GRACE_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


class Children:
    """Child processes that end when the block is left, however it is left.

    They get an environment with one BLAS thread each, a session of their own (so that Ctrl-C
    reaches only this process, which ends them in order) and a standard input that closes when
    this process dies, which they take as the order to end.
    """

    def __init__(self) -> None:
        self._children: list[Child] = []
        self._watchers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Children:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.gather(*(child.end() for child in self._children))
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)

    def hush(self) -> None:
        """From now on what they say on standard error is not passed on: all are about to end."""
        for child in self._children:
            child.hush()

    async def start(
        self,
        name: str,
        module: str,
        *arguments: str,
        on_event: Callable[[Event], None],
        machine: Sequence[str] = (),
    ) -> Child:
        """Start ``python -m module arguments``, after ``machine`` if it is to run elsewhere."""
        process = await asyncio.create_subprocess_exec(
            *machine,
            sys.executable,
            "-m",
            module,
            *arguments,
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            start_new_session=True,
            limit=1 << 24,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        child = Child(name, process, on_event)
        self._children.append(child)
        self._watchers.append(asyncio.create_task(child.watch(), name=f"watch {name}"))
        return child

    async def wait_for(self, awaited: asyncio.Future[Any]) -> Any:
        """Return what ``awaited`` gives, unless a child fails before.

        Raises:
            ChildFailed: one did.
        """
        while True:
            watchers = [task for task in self._watchers if not task.done()]
            await self._raise_failure()
            if awaited.done():
                return awaited.result()
            if not watchers:
                raise ChildFailed("all processes ended without a result")
            await asyncio.wait([awaited, *watchers], return_when=asyncio.FIRST_COMPLETED)

    async def wait_all(self) -> None:
        """Wait until all children have ended well.

        Raises:
            ChildFailed: one has not.
        """
        pending = set(self._watchers)
        while pending:
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            await self._raise_failure()

    async def _raise_failure(self) -> None:
        """Raise the failure that explains the others: a lost worker's own words, if it has any."""
        if not self._failures():
            return
        await asyncio.wait(self._watchers, timeout=_GRACE_S)
        failures = self._failures()
        raise next((error for error in failures if not _is_consequence(error)), failures[0])

    def _failures(self) -> list[BaseException]:
        ended = [task for task in self._watchers if task.done() and not task.cancelled()]
        return [error for task in ended if (error := task.exception()) is not None]


def _parse_event(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def _is_consequence(error: BaseException) -> bool:
    """Return whether it only says that another process has ended."""
    phrases = (" was lost", " left in step ", " was stopped before the run ended")
    return any(phrase in str(error) for phrase in phrases)
