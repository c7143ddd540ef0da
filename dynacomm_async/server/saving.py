"""When checkpoints are made, and what a server takes from one when it begins."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from dynacomm_async.errors import CheckpointError, ConfigError
from dynacomm_async.failpoints import failpoint
from dynacomm_async.optim import Schedule, UpdateRule
from dynacomm_async.server.checkpoint import Checkpoints, CheckpointState, Saver
from dynacomm_async.wire.grid import Grid

__all__ = ["Saving", "check_settings", "name_rule"]

_log = logging.getLogger("dynacomm_async.server")


class Saving:
    """Saves a run's checkpoints; all methods but :meth:`close` belong to the event loop.

    Args:
        checkpoints: where they go.
        every: steps from one to the next, at least 1.

    Attributes:
        incarnation: the number of this life of the server, on the disk.

    Raises:
        ConfigError: ``every`` is below 1.
    """

    def __init__(self, checkpoints: Checkpoints, every: int) -> None:
        if every < 1:
            raise ConfigError(f"a checkpoint every {every} steps, expected at least 1")
        self._checkpoints = checkpoints
        self._every = every
        self._saver: Saver | None = None
        self._offered_step: int | None = None
        self.incarnation = 0

    async def begin(
        self, *, resume: bool, run: str | None, grid: Grid | None, rule: str
    ) -> CheckpointState | None:
        """Return what to go on from; None for a fresh start.

        Raises:
            ConfigError: there is a checkpoint of another run, model or rule, or one at all and
                ``resume`` is false.
            CheckpointError: checkpoints are there and none can be trusted, or the disk fails.
        """
        return await asyncio.to_thread(self._begin, resume, run, grid, rule)

    def _begin(
        self, resume: bool, run: str | None, grid: Grid | None, rule: str
    ) -> CheckpointState | None:
        checkpoints = self._checkpoints
        if not resume and checkpoints.list():
            raise ConfigError(
                f"{checkpoints.directory} holds checkpoints of an earlier run: go on with it by "
                "--resume (resume=True), or choose an empty directory"
            )
        layers = None if grid is None else grid.layers
        state = checkpoints.load(run=run, layers=layers, rule=rule)
        self._offered_step = None if state is None else state.step
        self.incarnation = checkpoints.next_incarnation()
        return state

    async def save_first(self, make: Callable[[], CheckpointState]) -> None:
        """Save the beginning, with the roster; training may begin when this returns."""
        state = make()
        try:
            await asyncio.to_thread(self._checkpoints.save, state)
        except CheckpointError as error:
            _log.error("training begins without a checkpoint: %s", error)
        self._saver = Saver(self._checkpoints)

    def resumed(self) -> None:
        """Training goes on from a checkpoint."""
        self._saver = Saver(self._checkpoints)

    async def save_if_due(
        self, make: Callable[[], CheckpointState], step: int, last_step: int
    ) -> None:
        """Copy the state, whose arrays must not change meanwhile, and have it written."""
        offered = self._offered_step or 0
        if step // self._every == offered // self._every and step < last_step:
            return
        failpoint("server.before-save")
        state = await asyncio.to_thread(make().copy)
        failpoint("server.snapshot")
        self.offer(state)

    def offer(self, state: CheckpointState) -> None:
        """Have a state written that does not change any more."""
        assert self._saver is not None, "training has begun"
        self._saver.offer(state)
        self._offered_step = state.step

    async def save_end(self, make: Callable[[], CheckpointState]) -> None:
        """Have the end of the run written, unless it has been offered already."""
        state = make()
        if self._saver is not None and state.step != self._offered_step:
            self.offer(await asyncio.to_thread(state.copy))

    async def close(self, limit_s: float) -> None:
        """Finish what is being written.

        Raises:
            CheckpointError: the last one was not saved, or not within the limit.
        """
        saver, self._saver = self._saver, None
        if saver is None:
            return
        if not await _close(saver, limit_s):
            error = saver.last_error or f"it takes longer than {limit_s:g} s"
            raise CheckpointError(f"the last checkpoint was not saved: {error}")


async def _close(saver: Saver, limit_s: float) -> bool:
    """Close a saver in a thread that keeps nobody waiting who does not want to wait any more."""
    loop = asyncio.get_running_loop()
    closed: asyncio.Future[bool] = loop.create_future()

    def tell(well: bool) -> None:
        if not closed.done():
            closed.set_result(well)

    def close() -> None:
        well = saver.close(limit_s)
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            loop.call_soon_threadsafe(tell, well)

    threading.Thread(target=close, name="checkpoints-end", daemon=True).start()
    return await closed


def name_rule(rule: UpdateRule | Schedule) -> str:
    """Name an update rule or rate and its constants, the same in every life of a server."""
    kind = type(rule)
    own = kind.__repr__ is not object.__repr__
    return repr(rule) if own else f"{kind.__module__}.{kind.__qualname__}"


def check_settings(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Make sure that a run goes on as it began.

    Raises:
        ConfigError: names the first thing that differs.
    """
    ours = json.loads(json.dumps(ours, default=repr))  # as it comes back from a file
    for name in sorted({*saved, *ours}):
        if saved.get(name) != ours.get(name):
            if isinstance(saved.get(name), dict) and isinstance(ours.get(name), dict):
                check_settings(saved[name], ours[name])
            raise ConfigError(
                f"the checkpoint is of a run with {name} {saved.get(name)!r}, not "
                f"{ours.get(name)!r}: resume it with what it began with"
            )
