"""Training on a Ray cluster: server and workers as actors that survive the loss of their nodes.

A server of your own and workers of your own, placed by Ray::

    import ray
    from functools import partial
    from dynacomm_async import ParameterServer, Session
    from dynacomm_async.adapters.ray import train

    def work(server):  # in an actor's process; may be called again, there or on another node
        with Session(server, layers) as session:
            for step in session.steps():
                ...  # what a step needs follows from step.index and session.welcome.slot

    ray.init()
    make_server = partial(ParameterServer, layers, steps=1000, initial=vector)
    result = train(make_server, work, workers=4, checkpoint_dir="/shared/run-1")

:class:`dynacomm_async.adapters.torch.TorchSession` and :func:`dynacomm_async.connect` take
``server`` as their address, too. Ray starts an actor anew when its process or node dies; how a run
goes on then is told in :mod:`dynacomm_async.adapters.ray_actors`. Server and workers talk to each
other directly, not through Ray, which only places them, watches them and carries the result. The
process that calls :func:`train` and Ray's head node are not replaced: with ``resume`` a run goes on
after their loss.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from dynacomm_async.adapters.ray_actors import (
    News,
    Placed,
    ServerActor,
    ServerPlace,
    Terms,
    WorkerActor,
)
from dynacomm_async.errors import ChannelError, ConfigError, DynaCommError, PeerError
from dynacomm_async.server import ParameterServer, RunResult, StepRecord

__all__ = ["ActorLost", "Placed", "ServerPlace", "train"]

_THREADS = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""The same on every node: how many threads compute a product can change its last bit."""

_LOOK_S = 0.5
"""How long Python waits within Ray at a time; Ctrl-C is seen to in between."""

_UNPLACED_S = 10.0
"""How long an actor may be without a place before that is told, and told again."""

_STOP_S = 12.0
"""How long a server may take to save its last step boundary when the driver is interrupted."""

_LAST_S = 2.0
"""How long an answer may take that is no longer needed."""


class ActorLost(DynaCommError):
    """An actor died, and Ray does not start it anew any more."""


def train(
    make_server: Callable[..., ParameterServer],
    work: Callable[[ServerPlace], object],
    *,
    workers: int,
    checkpoint_dir: str | Path,
    resume: bool = False,
    run: str | None = None,
    insecure: bool = False,
    restarts: int = -1,
    server_options: Mapping[str, Any] | None = None,
    worker_options: Mapping[str, Any] | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    on_news: Callable[[Placed | str], None] | None = None,
) -> RunResult:
    """Train on the Ray cluster that this process is connected to; blocks until the run has ended.

    All actors are gone when this returns or raises. After Ctrl-C (KeyboardInterrupt) the server
    saves its last step boundary first: with ``resume`` the run can go on from there.

    Args:
        make_server: makes the run's :class:`dynacomm_async.ParameterServer` in its actor. It gets
            ``workers``, ``listen``, ``insecure``, ``run``, ``checkpoints``, ``resume`` and
            ``on_step``, and adds the rest; a ``functools.partial`` of the class will do. It is
            called again whenever the server is started anew.
        work: one worker, from joining to the end of the run, in its actor. It gets the place of the
            server, which a session takes as its address. It is called anew after a loss, and what
            it returns is dropped.
        workers: how many.
        checkpoint_dir: a folder that is the same on every node which the server may come to.
        resume: go on from the newest checkpoint there, if there is one.
        run: id of the run; random by default.
        insecure: allow the server to listen where other machines reach it, as it has to on a
            cluster of several. There is no authentication.
        restarts: how often Ray starts each actor anew; -1: whenever it is lost.
        server_options, worker_options: more of what Ray's ``Actor.options()`` takes, such as
            ``{"num_cpus": 2, "resources": {"edge": 1}}``. By default each has one CPU, and workers
            are spread over the nodes.
        on_step: called in this process after each step; after a loss some steps come again.
        on_news: called when a process of the run has been placed (:class:`Placed`), was lost, or
            waits for a place; what it gets is, or makes (``str``), a line of text.

    Raises:
        ConfigError: arguments that cannot work.
        ActorLost: an actor died more than ``restarts`` times.
        Exception: what ``make_server``, the server or ``work`` raised in an actor (the remote
            traceback is its ``__cause__``). Not so lost connections (ChannelError, TimeoutError):
            after those ``work`` is called again.
    """
    if workers < 1:
        raise ConfigError(f"{workers} workers, expected at least 1")
    if restarts < -1:
        raise ConfigError(f"{restarts} restarts, expected -1 (no limit), 0 or more")
    terms = Terms(
        make_server=make_server,
        workers=workers,
        checkpoint_dir=Path(checkpoint_dir).absolute(),
        resume=resume,
        run=run if resume else run or secrets.token_hex(8),
        insecure=insecure,
    )
    common = {"num_cpus": 1, "max_restarts": restarts, "max_task_retries": restarts}
    fleet = _Fleet(
        terms,
        work,
        restarts,
        _with_threads({**common, **(server_options or {})}),
        _with_threads({**common, "scheduling_strategy": "SPREAD", **(worker_options or {})}),
        on_step or (lambda record: None),
        on_news or (lambda news: None),
    )
    try:
        return fleet.watch()
    except KeyboardInterrupt:
        fleet.stop()
        raise
    finally:
        fleet.kill()


def _with_threads(options: dict[str, Any]) -> dict[str, Any]:
    environment = options.get("runtime_env") or {}
    variables = {**_THREADS, **environment.get("env_vars", {})}
    return {**options, "runtime_env": {**environment, "env_vars": variables}}


class _Fleet:
    """The actors of a run, as the driver sees them.

    Args:
        terms: of the run.
        work: what workers do.
        restarts: how often each is started anew; -1: whenever it is lost.
        server_options, worker_options: what Ray is told of each.
        on_step, on_news: as :func:`train` takes them.
    """

    def __init__(
        self,
        terms: Terms,
        work: Callable[[ServerPlace], object],
        restarts: int,
        server_options: Mapping[str, Any],
        worker_options: Mapping[str, Any],
        on_step: Callable[[StepRecord], None],
        on_news: Callable[[Placed | str], None],
    ) -> None:
        self._on_step = on_step
        self._on_news = on_news
        self._restarts = restarts
        self._server = ray.remote(ServerActor).options(**server_options).remote()
        self._workers: dict[str, Any] = {}
        self._waiting: dict[Any, str] = {self._server.run.remote(terms): "the server"}
        make_worker = ray.remote(WorkerActor).options(**worker_options)
        for number in range(terms.workers):
            name = f"worker actor {number}"
            self._workers[name] = worker = make_worker.remote()
            place = ServerPlace(self._server)
            self._waiting[worker.work.remote(name, work, place)] = name
        self._unplaced = {"server", *self._workers}
        self._told_at = self._heard_at = time.monotonic()
        self._life, self._seen = "", 0
        self._news: Any = None  # the question under way

    def watch(self) -> RunResult:
        """Pass news on until all have ended; return the server's result.

        Raises:
            Exception: what has failed; of several the one that explains the others.
        """
        try:
            return self._watch()
        except (PeerError, ChannelError) as error:
            reason = self._find_reason() or error
            raise reason from reason.__cause__

    def _find_reason(self) -> BaseException | None:
        """Return what a worker has raised itself: the others may be told of its loss before."""
        ready, _ = ray.wait([*self._waiting], num_returns=len(self._waiting), timeout=_LAST_S)
        for ref in ready:
            try:
                self._get(ref, self._waiting[ref])
            except (PeerError, ChannelError):
                continue
            except Exception as error:
                return error
        return None

    def _watch(self) -> RunResult:
        result: RunResult | None = None
        while self._waiting:
            self._ask_for_news()
            ready, _ = ray.wait([self._news, *self._waiting], num_returns=1, timeout=_LOOK_S)
            for ref in ready:
                if ref == self._news:
                    self._take_news()
                elif self._waiting[ref] == "the server":
                    result = _own_copy(self._get(ref, "the server"))
                else:
                    self._take_end(ref, run_is_over=result is not None)
                self._waiting.pop(ref, None)
            self._tell_unplaced()
        self._ask_for_news()
        self._take_news()
        assert result is not None, "the server was waited for"
        return result

    def stop(self) -> None:
        """Have the server save where it stands."""
        with suppress(RayError):
            step = ray.get(self._server.stop.remote(), timeout=_STOP_S)
            if step is not None:
                self._on_news(f"stopped at step {step}, from which the run can be resumed")

    def kill(self) -> None:
        """End all actors, and look at what their calls have come to: else Ray prints it."""
        for actor in (*self._workers.values(), self._server):
            ray.kill(actor, no_restart=True)
        left = [*self._waiting, *([] if self._news is None else [self._news])]
        ready, _ = ray.wait(left, num_returns=len(left), timeout=_LAST_S) if left else ([], [])
        for ref in ready:
            with suppress(Exception):
                ray.get(ref)

    def _take_end(self, ref: Any, *, run_is_over: bool) -> None:
        """See how a worker has ended.

        Raises:
            Exception: what it raised, unless that only says that the run is over.
        """
        try:
            self._get(ref, self._waiting[ref])
        except (PeerError, ChannelError, ActorLost):
            if not run_is_over:
                raise

    def _ask_for_news(self) -> None:
        if self._news is None:
            question = self._server.news.options(max_task_retries=0)
            self._news = question.remote(self._life, self._seen)

    def _take_news(self) -> None:
        asked, self._news = self._news, None
        try:
            self._life, self._seen, news = ray.get(asked, timeout=_LAST_S)
        except RayError:  # the server is lost: its own call will say so
            time.sleep(_LOOK_S)
            return
        self._heard_at = time.monotonic()
        for item in news:
            self._pass_on(item)

    def _pass_on(self, news: News) -> None:
        if isinstance(news, StepRecord):
            self._on_step(news)
            return
        if isinstance(news, Placed):
            self._unplaced.discard(news.who)
        self._on_news(news)

    def _tell_unplaced(self) -> None:
        now = time.monotonic()
        if now - self._heard_at > _UNPLACED_S:
            self._unplaced.add("server")
        if not self._unplaced or now - self._told_at < _UNPLACED_S:
            return
        self._told_at = now
        free, there = ray.available_resources(), ray.cluster_resources()
        cpus = f"{free.get('CPU', 0):g} of the cluster's {there.get('CPU', 0):g} CPUs are free"
        self._on_news(f"waiting for Ray to start {', '.join(sorted(self._unplaced))}: {cpus}")

    def _get(self, ref: Any, who: str) -> Any:
        """Return what a call has returned, or raise what its code has raised."""
        try:
            return ray.get(ref)
        except RayTaskError as error:
            raise error.cause from error
        except RayActorError as error:
            times = "" if self._restarts < 0 else f" (restarts: {self._restarts})"
            why = shorten(str(error).strip().splitlines()[-1], 200, placeholder=" ...")
            raise ActorLost(f"{who} died, and Ray does not start it anew{times}: {why}") from error


def _own_copy(result: RunResult) -> RunResult:
    """Return a result whose arrays are not Ray's shared memory, which goes with the connection."""
    return replace(result, parameters=result.parameters.copy(), statistics=result.statistics.copy())
