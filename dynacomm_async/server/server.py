"""The parameter server as its owner sees it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynacomm_async.errors import ConfigError, PeerError, RemoteProtocolError
from dynacomm_async.recording import Recorder
from dynacomm_async.server.checkpoint import Checkpoints
from dynacomm_async.server.modes import Mode, check_mode
from dynacomm_async.server.results import Applied, RunResult, StepRecord
from dynacomm_async.server.run import Options, Run
from dynacomm_async.server.saving import Saving, name_rule
from dynacomm_async.server.store import Training
from dynacomm_async.transport import (
    Address,
    Channel,
    TcpListener,
    check_congestion,
    listen,
    parse_address,
)
from dynacomm_async.transport.channel import Handler
from dynacomm_async.wire.codec import decode, encode
from dynacomm_async.wire.frame import PREFIX_NBYTES, Prefix
from dynacomm_async.wire.grid import Grid, LayerSpec, as_layer_specs
from dynacomm_async.wire.messages import (
    PROTOCOL_VERSION,
    Error,
    Welcome,
)

__all__ = ["ParameterServer", "RunResult", "StepRecord"]

Floats = NDArray[np.float32]

_STOP_S = 1.2
"""How long connections may take to hear that the server stops."""

_SAVE_S = 8.0
"""How long a server that stops may take to finish its last checkpoint."""

_LONGEST_S = 1e6

_BARRIER_STRATEGY = "dynacomm"
"""What workers follow by themselves where no plan may cross the boundary between steps."""


class ParameterServer:
    """Keeps the parameters, waits for its workers, trains, ends. An async context manager.

    Example::

        async with ParameterServer({"w": 10}, workers=2, steps=100) as server:
            print("listening on", server.address)
            result = await server.finished()

    Args:
        layers: the layer table in forward order, as ``{name: float32 count}`` or as specs; None:
            the first member brings it.
        workers: ranks; training begins when all are taken.
        steps: updates of the model, at least one.
        training: how gradients become parameters; plain SGD at 0.01 by default.
        initial: (n,) float32 initial parameters, copied; None: the first member uploads them.
        initial_statistics: (m,) float32 running statistics, copied; zeros by default.
        settings: told to each worker in its welcome; plain values that msgpack can carry.
        run: id of the run; workers that name another one are refused. Random by default.
        listen: where; port 0 lets the kernel choose one.
        insecure: allow listening where other machines can reach it. There is no authentication.
        on_step: called on the event loop after each step; after a restart from a checkpoint some
            steps come again.
        heartbeat_s: a connection over which nothing has come for so long is lost; both ends of it
            see to it that something does. The workers are told. A slow link is no silence: 16 KiB
            in that time are enough.
        absence_s: how long a member whose connection was lost keeps its place. Training waits for
            it meanwhile, unless ``mode`` says otherwise; then ``mode.on_leave`` says what happens.
        mode: what becomes of training when members are slow or gone: by default it is synchronous,
            and ends with ``worker-lost`` when a member is gone for good.
        blocks: batches of one worker in an epoch, where ``mode`` divides the data anew when
            members come and go; see :class:`dynacomm_async.split.Split`. None: an epoch never ends.
        refusals: how many contributions of a member are refused, because they hold values that
            are not finite or above ``training.max_gradient``, before it is expelled.
        checkpoints: where checkpoints go; None makes none. The caller closes them.
        checkpoint_every: steps from one checkpoint to the next. The beginning and the end are
            saved too.
        resume: go on from the newest good checkpoint, if there is one. Workers that were there go
            back to its step by themselves.
        on_applied: called on the event loop after each update of cells, in the order in which they
            are made: from it and the contributions, everything can be computed again.
        recorder: takes down what this server does and when; None records nothing.
        congestion: which TCP congestion control governs what this end sends, such as ``"cubic"``;
            None: the system's default.

    Raises:
        ConfigError: arguments that cannot work, a ``settings["strategy"]`` that does not hold in
            the mode, or settings that cannot be sent; raised by
            ``async with`` for the address, and for checkpoints of another run.
        CheckpointError: by ``async with``: there are checkpoints, and none can be trusted.
        ShapeError: ``initial`` does not fit the layers.
    """

    def __init__(
        self,
        layers: Mapping[str, int] | Iterable[LayerSpec] | None,
        *,
        workers: int,
        steps: int,
        training: Training | None = None,
        initial: Floats | None = None,
        initial_statistics: Floats | None = None,
        settings: Mapping[str, Any] | None = None,
        run: str | None = None,
        listen: str | Address = "127.0.0.1:0",
        insecure: bool = False,
        on_step: Callable[[StepRecord], None] | None = None,
        on_applied: Callable[[Applied], None] | None = None,
        recorder: Recorder | None = None,
        heartbeat_s: float = 15.0,
        absence_s: float = 120.0,
        mode: Mode | None = None,
        blocks: int | None = None,
        refusals: int = 3,
        checkpoints: Checkpoints | None = None,
        checkpoint_every: int = 100,
        resume: bool = False,
        congestion: str | None = None,
    ) -> None:
        for name, number in (("workers", workers), ("steps", steps), ("refusals", refusals)):
            if number < 1:
                raise ConfigError(f"{number} {name}, expected at least 1")
        if blocks is not None and blocks < workers:
            raise ConfigError(f"{blocks} blocks, expected at least one for each of the workers")
        if layers is None and initial is not None:
            raise ConfigError("initial parameters without a layer table: pass layers too")
        if initial is None and initial_statistics is not None:
            raise ConfigError("initial statistics without initial parameters: pass both")
        if not 0 < heartbeat_s < _LONGEST_S:
            raise ConfigError(
                f"a heartbeat of {heartbeat_s:g} s, expected over 0, below {_LONGEST_S:g}"
            )
        if not 0 <= absence_s < _LONGEST_S:
            raise ConfigError(
                f"an absence of {absence_s:g} s, expected 0 or more, below {_LONGEST_S:g}"
            )
        if congestion is not None:
            check_congestion(congestion)
        if recorder is not None:
            recorder.begin("server")
        self.steps = steps
        self.workers = workers
        options = Options(
            workers=workers,
            steps=steps,
            training=training or Training.plain(),
            settings=_check_settings(_complete_settings(settings or {}, mode or Mode(), workers)),
            mode=mode or Mode(),
            blocks=blocks,
            refusals=refusals,
            heartbeat_s=heartbeat_s,
            absence_s=absence_s,
            on_step=on_step,
            on_applied=on_applied,
            recorder=recorder,
        )
        self._rule = options.training.rule
        self._saving = None if checkpoints is None else Saving(checkpoints, checkpoint_every)
        self._run_is_given = run is not None
        self._run = Run(run or secrets.token_hex(8), options, self._saving, self._run_ended)
        if layers is not None:
            self._run.take_model(Grid(as_layer_specs(layers)), initial, initial_statistics)
        self._listen_at = parse_address(listen) if isinstance(listen, str) else listen
        self._insecure = insecure
        self._congestion = congestion
        self._listener: TcpListener | None = None
        self._resume = resume
        self._result: asyncio.Future[RunResult] | None = None

    async def __aenter__(self) -> ParameterServer:
        self._result = asyncio.get_running_loop().create_future()
        if self._saving is not None:
            await self._go_on(self._saving)
        self._listener = await listen(
            self._run.accept,
            self._listen_at,
            insecure=self._insecure,
            congestion=self._congestion,
        )
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._listener is not None
        await self._listener.close()
        if not self._run.has_ended:
            self._run.fail(Error("server-stopped", "the server was stopped before the run ended"))
        await self._run.close(_STOP_S)
        if self._saving is not None:
            await self._saving.close(_SAVE_S)

    async def drain(self) -> int:
        """Stop in order: go back to the last step boundary, save it, and tell the workers.

        :meth:`finished` raises ``server-draining`` then. Without checkpoints nothing is saved, and
        leaving the ``async with`` block says ``server-stopped``. Under staleness there are no step
        boundaries, and nothing to go back to.

        Returns:
            the step that the run can be resumed from.

        Raises:
            CheckpointError: the checkpoint was not saved.
        """
        run, saving = self._run, self._saving
        state = await run.stop_updates()
        if saving is None or run.has_ended:
            return run.step
        if not run.finishing:
            text = f"the server stops at step {run.step}; it may be started again to go on there"
            run.draining = Error("server-draining", text)
            run.fail(run.draining)
        if state is None:  # training has not begun: there is nothing that the next life needs
            return run.step
        saving.offer(state.copy())
        await saving.close(_SAVE_S)
        return run.step

    @property
    def run(self) -> str:
        """The id of the run."""
        return self._run.name

    @property
    def address(self) -> Address:
        """Where workers connect to."""
        return self.addresses[0]

    @property
    def addresses(self) -> Sequence[Address]:
        """All addresses that it listens on (a name such as localhost may have several)."""
        assert self._listener is not None, "the server has not been started"
        return self._listener.addresses

    @property
    def members(self) -> list[int]:
        """The ranks whose workers are connected and have joined, ascending."""
        return self._run.members

    @property
    def step(self) -> int:
        """How many steps everybody has finished: where training stands, or a resumed run begins."""
        return self._run.step

    @property
    def memory_nbytes(self) -> int | None:
        """Bytes held for parameters, states and contributions, or None before there is a model."""
        store = self._run.store
        return None if store is None else store.nbytes

    async def finished(self) -> RunResult:
        """Wait for the end of the run.

        Raises:
            PeerError: the run failed, because a worker was lost or sent an error, or because its
                parameters are not finite any more.
        """
        assert self._result is not None, "the server has not been started"
        return await asyncio.shield(self._result)

    def connect_channel(self, channel: Channel) -> Handler:
        """Take a connection in that does not come from the listener; returns its handler."""
        return self._run.accept(channel)

    async def _go_on(self, saving: Saving) -> None:
        """Take up a run where its newest checkpoint left it, if there is one."""
        store = self._run.store
        state = await saving.begin(
            resume=self._resume,
            run=self._run.name if self._run_is_given else None,
            grid=None if store is None else store.grid,
            rule=name_rule(self._rule),
        )
        self._run.start_life(saving.incarnation)
        if state is not None:
            self._run.go_on_from(state)
            saving.resumed()

    def _run_ended(self, outcome: RunResult | Error, cause: BaseException | None) -> None:
        assert self._result is not None
        if isinstance(outcome, RunResult):
            self._result.set_result(outcome)
            return
        failure = PeerError(outcome.code, outcome.text)
        failure.__cause__ = cause
        self._result.set_exception(failure)
        self._result.exception()  # seen: an owner that leaves early need not ask for it


def _complete_settings(settings: Mapping[str, Any], mode: Mode, workers: int) -> Mapping[str, Any]:
    """Make sure that the strategy holds in the mode; name one where the default would not."""
    strategy = settings.get("strategy")
    if not isinstance(strategy, str):
        strategy = _BARRIER_STRATEGY  # which holds in every mode
        if not mode.may_cross:
            settings = {**settings, "strategy": strategy}
    check_mode(mode, strategy, workers=workers)
    return settings


def _check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Make sure that a welcome can carry the settings and a worker can read them."""
    welcome = Welcome(PROTOCOL_VERSION, "", 0, 0, 0, None, 0, 0, False, dict(settings))
    try:
        head = encode(welcome)
        decode(Prefix.unpack(head), head[PREFIX_NBYTES:])
    except (TypeError, ValueError, OverflowError, RemoteProtocolError) as error:
        raise ConfigError(
            f"the settings cannot be sent to workers ({error}); expected a dict of text keys and "
            "plain values: text, numbers, true, false, None, lists, dicts"
        ) from error
    return dict(settings)
