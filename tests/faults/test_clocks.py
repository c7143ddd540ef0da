"""The clock on the wall jumps, there and back: nobody is given up because of that, or kept."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time

import pytest

from dynacomm_async.errors import PeerError
from dynacomm_async.optim import SGD, Constant
from dynacomm_async.server import Checkpoints, ParameterServer, Training

STEPS = 6
HEARTBEAT_S = 0.75
TRAINING = Training(SGD(0.9), Constant(0.05))
YEAR_S = 365 * 86400.0
JUMPS_S = (0.0, 3600.0, -YEAR_S, 10 * YEAR_S, -3600.0, 5.0)


@pytest.fixture(autouse=True)
def jumping(monkeypatch):
    """Every reading of the wall clock jumps, by seconds to years."""
    jumps, true_s = itertools.cycle(JUMPS_S), time.time
    monkeypatch.setattr(time, "time", lambda: true_s() + next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: int(time.time() * 1e9))


def serve(toy, checkpoints=None, **options):
    return ParameterServer(
        toy.layers,
        steps=STEPS,
        training=TRAINING,
        initial=toy.initial,
        initial_statistics=toy.initial_statistics,
        heartbeat_s=HEARTBEAT_S,
        checkpoints=checkpoints,
        checkpoint_every=2,
        **options,
    )


async def test_a_run_through_jumps_of_years_loses_nobody_and_no_bit(
    toy, tmp_path, caplog, loop_factory
):
    def be_quiet(session, step):
        if step == 3:  # only heartbeats say that both ends are there, for several limits
            threading.Event().wait(2 * HEARTBEAT_S)

    with Checkpoints(tmp_path) as checkpoints, caplog.at_level(logging.WARNING):
        async with serve(toy, checkpoints, workers=2) as server:
            work = [asyncio.to_thread(toy.work, server.address, be_quiet) for _ in range(2)]
            replicas = await asyncio.gather(*work)
            result = await server.finished()
        saved = checkpoints.load()
    expected, statistics = toy.replay(2, STEPS, TRAINING)
    for parameters in (result.parameters, saved.parameters, *(one.parameters for one in replicas)):
        assert parameters.tobytes() == expected.tobytes()
    assert saved.statistics.tobytes() == statistics.tobytes()
    assert [record.getMessage() for record in caplog.records] == []


async def test_silence_is_noticed_and_given_up_in_time_however_the_clock_jumps(toy, connect_raw):
    loop = asyncio.get_running_loop()
    async with (
        serve(toy, workers=1, absence_s=HEARTBEAT_S) as server,
        connect_raw(server.address) as raw,
    ):
        await raw.join(toy.grid)
        await raw.pull()
        quiet_since_s = loop.time()
        await raw.read_to_end()
        assert loop.time() - quiet_since_s >= 0.9 * HEARTBEAT_S, "not before its time"
        with pytest.raises(PeerError, match=r"did not come back within 0\.75 s"):
            await server.finished()
