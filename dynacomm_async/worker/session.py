"""A worker's place in a run, for code that blocks while it computes.

The session's I/O runs on an event loop in a thread of its own, so that sending and receiving go
on while the caller computes. For code that awaits see :mod:`dynacomm_async.worker.aio`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.errors import (
    ChannelBroken,
    ConfigError,
    LocalProtocolError,
    PeerError,
    ShapeError,
)
from dynacomm_async.recording import Recorder
from dynacomm_async.schedule.account import LinkObserved, WorkerReport, expect, summarise
from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.estimator import Estimator
from dynacomm_async.schedule.planners import find_planner
from dynacomm_async.split import Split
from dynacomm_async.transport import LoopThread, check_congestion, parse_address
from dynacomm_async.wire.grid import Grid, LayerSpec, as_layer_specs
from dynacomm_async.wire.messages import Hello, Welcome
from dynacomm_async.worker.board import Board
from dynacomm_async.worker.client import Arenas, Client
from dynacomm_async.worker.line import Line
from dynacomm_async.worker.metrics import Metrics
from dynacomm_async.worker.planning import AdaptivePlans, Plans
from dynacomm_async.worker.reaching import Reacher, Whereabouts
from dynacomm_async.worker.searching import SearchedPlans
from dynacomm_async.worker.taken import Step

__all__ = ["DEFAULT_PORT", "DEFAULT_STRATEGY", "Layers", "PlansFactory", "Session"]

DEFAULT_PORT = 7070

DEFAULT_STRATEGY = "joint"

Floats = NDArray[np.float32]
Layers: TypeAlias = (
    Mapping[str, int]
    | Iterable[LayerSpec]
    | Callable[[Mapping[str, Any]], Mapping[str, int] | Iterable[LayerSpec]]
)
"""A layer table, or a function from the server's settings to one."""

PlansFactory: TypeAlias = Callable[[Grid, Estimator], Plans]


class Session:
    """One worker's membership of a run. A context manager; use it from one thread.

    Connections may come and go below it. A server that was restarted from a checkpoint has stepped
    back, and the session with it: the step under way is *abandoned*. Nothing of it counts any more,
    none of its methods blocks or raises, and the next step has an index that has been before. So
    whatever a step needs must follow from its index and this worker's rank.

    Example::

        with Session("127.0.0.1:7070", layers={"w": 10}) as session:
            for step in session.steps():
                step.wait("w")
                session.gradients[:] = gradient_of(session.parameters)
                step.gradient_ready("w")

    Args:
        address: the server's, as ``host:port``; or a function that says where it is now, for one
            that may come back elsewhere. The function is called in a thread before each attempt
            to connect, may block for some seconds, and raises ChannelBroken while nobody knows.
        layers: the model's layers in forward order, or a function that makes them from the
            server's settings; None takes the server's table.
        initial: (n,) float32 initial parameters, for a server that has none; copied.
        initial_statistics: (m,) float32 likewise.
        strategy: name of the scheduling strategy; None takes ``settings["strategy"]`` of the
            server if there is one, else the default.
        run: id of the run that is meant; None takes whatever the server runs.
        kernels: names the numerical choices that must be the same on all workers.
        retry_s: how long to try to reach a server that does not answer, at first and whenever the
            connection is lost: then the step goes on where it stood, as if nothing had been. 0:
            a loss ends the session.
        plans: makes the plans instead of ``strategy``.
        estimator: what is known of this model and link already; added to. None starts afresh.
        io: the thread that does the I/O, shared with other sessions; None starts one.
        recorder: takes down what this session does and when; None records nothing.
        congestion: which TCP congestion control governs what this end sends, such as ``"cubic"``;
            None: the system's default.

    Attributes (once entered):
        welcome: what the server said.
        grid: the model as the transport sees it.
        parameters: (n,) float32, forward order; received into, read-only for the caller. A
            layer's values are those of the step from ``step.wait(layer)`` until
            ``step.gradient_ready(layer)``; after the last step, the final ones.
        statistics: (m,) float32 running statistics; filled when the run has ended.
        gradients: (n,) float32, written by the caller; a layer's belong to the session from
            ``step.gradient_ready(layer)`` until the next step's ``step.wait(layer)``.
        batch_statistics: (m,) float32, written by the caller before its first gradient is ready.
        plans: the plans that were followed.
        metrics: where the time of each step went; a step is added when the next one is asked for.

    Raises (on entering):
        ConfigError: an address, strategy or congestion control that is none.
        PeerError: the server refuses; ``code`` and text say why.
        ChannelBroken: no server answers within ``retry_s``, or it vanished.
        TimeoutError: something accepts the connection but never answers.
        ShapeError: the layers, or ``initial``, do not fit the model.
    """

    def __init__(
        self,
        address: str | Whereabouts,
        layers: Layers | None = None,
        *,
        initial: Floats | None = None,
        initial_statistics: Floats | None = None,
        strategy: str | None = None,
        run: str | None = None,
        kernels: str = "",
        retry_s: float = 30.0,
        plans: PlansFactory | None = None,
        estimator: Estimator | None = None,
        io: LoopThread | None = None,
        recorder: Recorder | None = None,
        congestion: str | None = None,
    ) -> None:
        self.address = (
            parse_address(address, port=DEFAULT_PORT) if isinstance(address, str) else address
        )
        if strategy is not None:
            find_planner(strategy)
        if congestion is not None:
            check_congestion(congestion)
        self._layers = layers
        self._initial = initial
        self._initial_statistics = initial_statistics
        self._strategy = strategy
        self._run = run
        self._kernels = kernels
        self._retry_s = retry_s
        self._congestion = congestion
        self._plans_factory = plans
        self._estimator = estimator
        self._shared_io = io
        if recorder is not None:
            recorder.begin("worker")
        self.recorder = recorder
        self._own_io: LoopThread | None = None  # while entered
        self._client: Client | None = None
        self._lock = threading.Lock()  # for the next two
        self._opening: concurrent.futures.Future[None] | None = None
        self._abandoned = False
        self.metrics = Metrics()
        self.welcome: Welcome
        self.grid: Grid
        self.plans: Plans
        self.board: Board
        self._arenas: Arenas
        self._indices: dict[str, int]

    def __enter__(self) -> Session:
        if self._shared_io is None:
            self._own_io = LoopThread().__enter__()
        with self._lock:
            opening = self._opening = self._io.submit(self._open())
            if self._abandoned:
                opening.cancel()
        try:
            opening.result()
        except BaseException:
            opening.cancel()
            self.close()
            raise
        return self

    def abandon(self) -> None:
        """Have :meth:`__enter__`, which another thread is in, give up soon. Idempotent."""
        with self._lock:
            self._abandoned = True
            if self._opening is not None:
                self._opening.cancel()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the run. Idempotent."""
        client, self._client = self._client, None
        if client is not None:
            self._io.submit(client.leave()).result()
            self.plans.close()
        own, self._own_io = self._own_io, None
        if own is not None:
            own.__exit__()

    @property
    def _io(self) -> LoopThread:
        io = self._shared_io or self._own_io
        if io is None:
            raise LocalProtocolError("the session is not open: use it inside `with`")
        return io

    @property
    def estimator(self) -> Estimator:
        """The measured costs."""
        assert self._estimator is not None, "the session has not been entered"
        return self._estimator

    @property
    def slot(self) -> int:
        """This worker's rank."""
        return self.welcome.slot

    @property
    def workers(self) -> int:
        """How many ranks the run has."""
        return self.welcome.workers

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the server told its workers."""
        return self.welcome.settings

    @property
    def parameters(self) -> Floats:
        """(n,) float32; see the class."""
        return self._arenas.incoming[: self.grid.n_parameters]

    @property
    def statistics(self) -> Floats:
        """(m,) float32; see the class."""
        return self._arenas.incoming[self.grid.n_parameters :]

    @property
    def gradients(self) -> Floats:
        """(n,) float32; see the class."""
        return self._arenas.outgoing[: self.grid.n_parameters]

    @property
    def batch_statistics(self) -> Floats:
        """(m,) float32; see the class."""
        return self._arenas.outgoing[self.grid.n_parameters :]

    def slice_of(self, layer: str | int) -> slice:
        """Return where a layer lies in ``parameters`` and ``gradients``."""
        return self.grid.layer_slice(self.index_of(layer))

    def index_of(self, layer: str | int) -> int:
        """Return the index of a layer in forward order.

        Raises:
            ConfigError: the model has no such layer.
        """
        if isinstance(layer, int) and 0 <= layer < len(self.grid.layers):
            return layer
        if isinstance(layer, str) and layer in self._indices:
            return self._indices[layer]
        raise ConfigError(f"no layer {layer!r}; the model has: {', '.join(self._indices)}")

    def split_of(self, step: int) -> Split | None:
        """Return among whom the data of a step are divided, where that changes as workers come and
        go; None: among all ranks. Of a step to come it is a guess."""
        return self.board.split_of(step)

    def steps(self) -> Iterator[Step]:
        """Yield the steps until the run ends. An index may repeat after a server's restart.

        The first one comes when training begins. Where the run divides its data anew when workers
        come and go, a step comes when its first parameters do, since they say among whom:
        :attr:`Step.split`. An index is left out where the server has made a step without this
        worker.

        Returns when the final parameters (and statistics) have arrived.

        Raises:
            DynaCommError: what ended the session before.
            LocalProtocolError: a step was left before all its gradients were ready.
        """
        step: Step | None = None
        while True:
            step = self._wait_next(step)
            if step.index < self.welcome.steps:
                yield step
                step.end()
            elif self._wait_ended(step):
                return

    def next_step(self, before: Step | None) -> Step | None:
        """Return the step to compute after ``before`` (None: the first); behind the last one, a
        step with the index ``welcome.steps``, in which there is nothing to compute. None: it is not
        known yet; see :meth:`when_next`."""
        life, _ = self.board.course
        index = self._next_index(before)
        return None if index is None else Step(self, index, life)

    def when_next(self, before: Step | None, call: Callable[[], None]) -> None:
        """Call ``call`` once, on the I/O thread or now, when :meth:`next_step` has an answer."""
        self.board.when_true(lambda: self._next_index(before) is not None, call)

    def _next_index(self, before: Step | None) -> int | None:
        board, n_steps = self.board, self.welcome.steps
        life, first = board.course
        index = first if before is None or before.life != life else before.index + 1
        if board.is_over:
            return n_steps
        if index is None or (self._is_elastic and board.opened < index < n_steps):
            return None
        return index

    @property
    def _is_elastic(self) -> bool:
        """Whether the data are divided anew when workers come and go."""
        return self.welcome.split is not None

    def _wait_next(self, before: Step | None) -> Step:
        while True:
            step = self.next_step(before)
            if step is not None:
                return step
            known = threading.Event()
            self.when_next(before, known.set)
            known.wait()

    def _wait_ended(self, step: Step) -> bool:
        """Block until the run has ended and the final parameters are here, or it has stepped back.

        Raises:
            DynaCommError: it ended otherwise.
        """
        if not self.board.ended:
            over = threading.Event()
            self.board.when_ended(over.set, step.life)
            over.wait()
        return self.board.ended

    def describe(self) -> WorkerReport:
        """Return what explains how this worker has spent its time so far.

        For the thread that computes, between two steps or after the last one; also after the
        session was closed. :func:`dynacomm_async.observe.explain_worker` makes a text of it.
        """
        io = self._shared_io or self._own_io
        costs, link = self._measured() if io is None else io.submit(self._measured_soon()).result()
        _, plan = self.plans.changes[-1]
        return WorkerReport(
            slot=self.welcome.slot,
            workers=self.welcome.workers,
            expectation=None if costs is None else expect(plan, costs),
            link=link,
            summary=summarise(self.metrics.steps),
            replans=tuple(self.plans.log),
        )

    def post(self, call: Callable[..., object], *args: object) -> None:
        """Have the event loop call something of the client's."""
        self._io.loop.call_soon_threadsafe(self.client.guard, call, *args)

    @property
    def client(self) -> Client:
        """The I/O side; its methods belong to the event loop."""
        if self._client is None:
            raise LocalProtocolError("the session is closed")
        return self._client

    # -- on the event loop --

    async def _measured_soon(self) -> tuple[Costs | None, LinkObserved]:
        return self._measured()

    def _measured(self) -> tuple[Costs | None, LinkObserved]:
        costs = self.plans.costs or self.estimator.costs(guess=True)
        return costs, LinkObserved.by(self.estimator)

    async def _open(self) -> None:
        reacher = Reacher(self.address, self._retry_s, self.recorder, self._congestion)
        hello = Hello(run=self._run)
        deadline = asyncio.get_running_loop().time() + self._retry_s
        while True:
            line, self.welcome = await reacher.reach(lambda: hello)
            try:
                await self._join(line, reacher)
                return
            except ChannelBroken:  # it was there, and is gone again
                if asyncio.get_running_loop().time() > deadline:
                    raise
            except BaseException:
                line.channel.abort()
                raise

    async def _join(self, line: Line, reacher: Reacher) -> None:
        welcome = self.welcome
        self.grid = Grid(await asyncio.to_thread(self._table, welcome))
        self._indices = {spec.name: index for index, spec in enumerate(self.grid.layers)}
        if self.recorder is not None:
            self.recorder.layers = [
                (spec.name, *self.grid.layer_cells(layer))
                for layer, spec in enumerate(self.grid.layers)
            ]
        self._arenas = Arenas.allocate(self.grid)
        if welcome.upload:
            self._fill_initial()
        if self._estimator is None:
            sizes = [(spec.name, 4 * spec.count) for spec in self.grid.layers]
            self._estimator = Estimator(sizes)
        self.plans = self._make_plans(welcome)
        self.board = Board(len(self.grid.layers), None)
        await line.measure_round_trip()
        if line.error is not None:
            raise line.error
        self._client = Client(
            welcome,
            self.grid,
            self._arenas,
            self.board,
            self.plans,
            self.estimator,
            kernels=self._kernels,
            fill_initial=self._fill_initial,
            reach=reacher.reach_again if self._retry_s > 0 else None,
            recorder=self.recorder,
        )
        self._client.join(line)

    def _table(self, welcome: Welcome) -> tuple[LayerSpec, ...]:
        layers = self._layers
        if callable(layers):  # once, however often the server is lost meanwhile
            layers = self._layers = as_layer_specs(layers(welcome.settings))
        if layers is None:
            if welcome.layers is None:
                raise ShapeError(
                    "neither the server nor this worker has a layer table: pass layers="
                )
            return welcome.layers
        table = as_layer_specs(layers)
        if welcome.layers is not None and table != welcome.layers:
            raise PeerError("model-mismatch", _difference(table, welcome.layers))
        return table

    def _fill_initial(self) -> None:
        if self._initial is None:
            raise ShapeError(
                "the server has no initial parameters and asks this worker for them: pass initial="
            )
        for name, values, target in (
            ("initial", self._initial, self.parameters),
            ("initial_statistics", self._initial_statistics, self.statistics),
        ):
            if values is None:
                continue
            if values.shape != target.shape or values.dtype != np.float32:
                raise ShapeError(
                    f"{name}: {values.dtype} of shape {values.shape}, "
                    f"expected float32 of shape {target.shape}"
                )
            target[:] = values

    def _make_plans(self, welcome: Welcome) -> Plans:
        if self._plans_factory is not None:
            return self._plans_factory(self.grid, self.estimator)
        strategy = self._strategy or welcome.settings.get("strategy") or DEFAULT_STRATEGY
        if strategy == "joint":
            return SearchedPlans(self.estimator, len(self.grid.layers), workers=welcome.workers)
        return AdaptivePlans(
            str(strategy), self.estimator, len(self.grid.layers), workers=welcome.workers
        )


def _difference(ours: tuple[LayerSpec, ...], theirs: tuple[LayerSpec, ...]) -> str:
    """Say in one sentence where two layer tables part."""
    for mine, its in zip(ours, theirs, strict=False):
        if mine != its:
            return (
                f"this worker's model is not the server's: layer {_describe(mine)}, "
                f"expected {_describe(its)}"
            )
    return f"this worker's model is not the server's: {len(ours)} layers, expected {len(theirs)}"


def _describe(spec: LayerSpec) -> str:
    return (
        f"{spec.name!r} with {spec.count} parameters ({spec.decay} decay) "
        f"and {spec.statistics} statistics"
    )
