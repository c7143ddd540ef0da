"""What runs on the nodes of a Ray cluster: one server, and workers that find it wherever it is.

Both are actors that Ray starts anew when their process or node dies, with the calls under way made
again. What comes back is empty; it goes on with what others have:

- the *server* goes on from its newest checkpoint, in a folder that all nodes read, and has a new
  address. Only one process at a time can use the folder, so a server that Ray takes for dead while
  it lives on (a network that is cut in two) keeps its successor waiting rather than spoil the run;
- a *worker* asks the server's actor for the address before each attempt to connect, so sessions
  that have lost the server follow it. A new one joins in the place of the lost one. A strategy
  without a barrier may have updated a part of the model with what the lost worker still sent: then
  the server goes back to the last step boundary, and a newcomer can compute the step anew.

Batches are functions of rank and step, and so the result is that of a run that nothing has
disturbed, bit for bit.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from dynacomm_async.errors import (
    ChannelBroken,
    ChannelError,
    CheckpointError,
    ConfigError,
    PeerError,
)
from dynacomm_async.server import Checkpoints, ParameterServer, RunResult, StepRecord
from dynacomm_async.transport import Address

__all__ = ["News", "Placed", "ServerActor", "ServerPlace", "Terms", "WorkerActor"]

_ANSWER_S = 5.0
"""How long a worker waits for the server's actor to say where it listens, before it asks again."""

_NEWS_S, _BATCH_S = 1.0, 0.05
"""How long a question for news waits for some, and then for more of it."""

_FOLDER_S = 120.0
"""How long a server's successor waits until nobody else uses the checkpoints."""

_REFUSED_S, _LONGEST_REFUSED_S, _PAUSE_S = 2.0, 30.0, 0.2
"""How long a worker that finds its place taken waits before the server makes room, and from one
attempt to the next."""

_STOPPED = "server-draining"

_ANEW = {
    *("run-full", "place-kept", "run-mismatch", "term-outdated", "connection-outdated"),
    *(_STOPPED, "server-stopped"),
}
"""Refusals after which a worker begins anew; others are errors that would come again."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a run's server needs to know.

    Attributes:
        make_server: makes it, as :func:`dynacomm_async.adapters.ray.train` says.
        workers: ranks.
        checkpoint_dir: where checkpoints go; the same folder on every node.
        resume: whether its first life goes on from a checkpoint, too.
        run: id of the run, or None.
        insecure: whether it may listen where other machines reach it.
    """

    make_server: Callable[..., ParameterServer]
    workers: int
    checkpoint_dir: Path
    resume: bool
    run: str | None
    insecure: bool


@dataclass(frozen=True, slots=True)
class Placed:
    """A process of the run has begun somewhere; as text, a line for people.

    Attributes:
        who: ``"server"`` or, as an example, ``"worker actor 3"``. Ranks are given out by the
            server, in the order of joining: this number is none.
        node_id: the node, as Ray names it.
        host: the node's address.
        pid: the process.
        again: whether an earlier life of it has ended.
    """

    who: str
    node_id: str
    host: str
    pid: int
    again: bool

    def __str__(self) -> str:
        again = " anew" if self.again else ""
        where = f"node {self.node_id[:8]} at {self.host}, process {self.pid}"
        return f"{self.who} starts{again} on {where}"

    @classmethod
    def here(cls, who: str) -> Placed:
        """Return that the actor that calls this is ``who``."""
        context = ray.get_runtime_context()
        again = bool(context.was_current_actor_reconstructed)
        return cls(who, context.get_node_id(), ray.util.get_node_ip_address(), os.getpid(), again)


News: TypeAlias = StepRecord | Placed | str


class _Warnings(logging.Handler):
    """Adds what the server warns of to the news; from any thread."""

    def __init__(self, news: list[News]) -> None:
        super().__init__(logging.WARNING)
        self._news = news

    def emit(self, record: logging.LogRecord) -> None:
        self._news.append(self.format(record))


class ServerActor:
    """The run's server. Its methods are called through Ray."""

    def __init__(self) -> None:  # no arguments: Ray need not keep them for the next life
        self._life = secrets.token_hex(4)
        place = Placed.here("server")
        self._is_successor = place.again
        self._running: asyncio.Task[RunResult] | None = None
        self._address: Address | None = None
        self._settled = asyncio.Event()  # there is an address, or there will be none any more
        self._asked = asyncio.Event()  # to go back to the last step boundary
        self._stops = False
        self._step = 0  # of the latest boundary that it went back to
        self._news: list[News] = [place]
        self._told = asyncio.Event()
        logging.getLogger("dynacomm_async.server").addHandler(_Warnings(self._news))

    async def run(self, terms: Terms) -> RunResult:
        """Serve until the run has ended; return its result. May be called again."""
        if self._running is None:
            self._running = asyncio.create_task(self._run(terms), name="run")
            self._running.add_done_callback(lambda _: self._settled.set())
        return await asyncio.shield(self._running)

    async def address(self) -> Address:
        """Return where workers connect to, once that is known.

        Raises:
            PeerError: the run has ended (``run-over``).
        """
        while self._address is None:
            if self._running is not None and self._running.done():
                raise PeerError("run-over", "this run has ended")
            await self._settled.wait()
        return self._address

    async def make_room(self) -> None:
        """Go back to the last step boundary, so that somebody new can compute the step."""
        self._asked.set()

    async def stop(self) -> int | None:
        """Go back to the last step boundary, save it and end; return the step it is before.

        None if the run has ended already, or has never begun, or nothing could be saved.
        """
        if self._running is None or self._running.done():
            return None
        self._stops = True
        self._asked.set()
        await asyncio.wait([self._running])
        error = self._running.exception()
        return self._step if isinstance(error, PeerError) and error.code == _STOPPED else None

    async def tell(self, news: News) -> None:
        """Have the driver hear of something."""
        self._tell(news)

    async def news(self, life: str, seen: int) -> tuple[str, int, list[News]]:
        """Wait a moment for news.

        Args:
            life: of this actor, by which the caller has been told before.
            seen: how much it has been told.

        Returns:
            this life, how much it has told with this, and the news.
        """
        if life != self._life:
            seen = 0
        if seen == len(self._news):
            self._told.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(_NEWS_S):
                    await self._told.wait()
        await asyncio.sleep(_BATCH_S)
        return self._life, len(self._news), self._news[seen:]

    def _tell(self, news: News) -> None:
        self._news.append(news)
        self._told.set()

    async def _run(self, terms: Terms) -> RunResult:
        with await self._open_checkpoints(terms.checkpoint_dir) as checkpoints:
            resume = terms.resume or self._is_successor
            while True:
                result = await self._serve(terms, checkpoints, resume)
                if result is not None:
                    return result
                if self._stops:
                    raise PeerError(_STOPPED, f"stopped at step {self._step}")
                resume = True

    async def _open_checkpoints(self, folder: Path) -> Checkpoints:
        """Open the folder, as soon as a former life that Ray has given up lets go of it."""
        deadline = time.monotonic() + _FOLDER_S
        while True:
            try:
                return await asyncio.to_thread(Checkpoints, folder)
            except ConfigError:
                if not self._is_successor or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(_PAUSE_S)

    async def _serve(
        self, terms: Terms, checkpoints: Checkpoints, resume: bool
    ) -> RunResult | None:
        """Return the result; None if the server was asked to go back."""
        if not self._stops:
            self._asked.clear()
        result: RunResult | None = None
        try:
            async with terms.make_server(
                workers=terms.workers,
                listen=Address(ray.util.get_node_ip_address(), 0),
                insecure=terms.insecure,
                run=terms.run,
                checkpoints=checkpoints,
                resume=resume,
                on_step=self._tell,
            ) as server:
                result = await self._watch(server)
        except CheckpointError as error:
            if result is None:
                raise
            self._tell(f"the last checkpoint was not saved: {error}")
        return result

    async def _watch(self, server: ParameterServer) -> RunResult | None:
        """Return the result; None once the server has been asked to go back, and has."""
        finished = asyncio.create_task(server.finished(), name="finished")
        asked = asyncio.create_task(self._asked.wait(), name="asked")
        self._address = server.address
        self._settled.set()
        try:
            await asyncio.wait([finished, asked], return_when=asyncio.FIRST_COMPLETED)
            if finished.done():
                return finished.result()
            self._forget_address()
            self._step = await server.drain()
            self._tell(f"the server goes back to step {self._step}")
            return None
        finally:
            self._forget_address()
            asked.cancel()
            finished.cancel()
            await asyncio.gather(asked, finished, return_exceptions=True)

    def _forget_address(self) -> None:
        self._address = None
        self._settled.clear()


class ServerPlace:
    """Where the run's server is: what a worker's function gets, and a session takes as its address.

    Calling it returns the address of now. It may go to any process of the Ray cluster.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __call__(self) -> Address:
        """Return where the server listens.

        Raises:
            ChannelBroken: it does not now, but may soon: ask again.
            PeerError: the run has ended (``run-over``).
        """
        return Address(*self._ask("address"))

    def tell(self, news: News) -> None:
        """Have the driver hear of something, once there is a server."""
        self._actor.tell.remote(news)

    def make_room(self) -> None:
        """Have the server go back to its last step boundary, unless there is none now."""
        with suppress(ChannelBroken):
            self._ask("make_room")

    def _ask(self, method: str) -> Any:
        once = getattr(self._actor, method).options(max_task_retries=0)
        try:
            return ray.get(once.remote(), timeout=_ANSWER_S)
        except (GetTimeoutError, RayActorError) as error:
            raise ChannelBroken("Ray is starting the server's actor anew") from error
        except RayTaskError as error:
            raise error.cause from None


class WorkerActor:
    """One worker of the run. Its method is called through Ray."""

    def work(self, name: str, work: Callable[[ServerPlace], object], server: ServerPlace) -> None:
        """Call ``work`` with the server's place; and again after a loss, until the run has ended.

        Args:
            name: of this worker, for people.

        Raises:
            Exception: whatever it raises for another reason.
        """
        server.tell(Placed.here(name))
        refused_s, patience_s = 0.0, _REFUSED_S
        while True:
            try:
                work(server)
                return
            except PeerError as error:
                if error.code == "run-over":
                    return  # it came too late
                if error.code not in _ANEW:
                    raise
                refused_s = refused_s + _PAUSE_S if error.code == "run-full" else 0.0
            except (ChannelError, TimeoutError) as error:
                server.tell(f"{name} begins anew: {error}")
            if refused_s >= patience_s:
                server.make_room()
                refused_s, patience_s = 0.0, min(2 * patience_s, _LONGEST_REFUSED_S)
            time.sleep(_PAUSE_S)
