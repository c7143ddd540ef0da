"""Poison in gradients: refused by name, never in the parameters, and its maker expelled at last."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest

from dynacomm_async.errors import PeerError
from dynacomm_async.optim import SGD, Constant
from dynacomm_async.ranges import Range
from dynacomm_async.schedule import PLANNERS
from dynacomm_async.server import Mode, ParameterServer
from dynacomm_async.server.store import Training
from dynacomm_async.wire.messages import Error, Hello, Membership, Parameters, Skip
from dynacomm_async.worker import Session

TRAINING = Training(SGD(0.9), Constant(0.05), weight_decay=0.01)
STEPS = 6
BARRIER = [name for name in PLANNERS if name not in ("joint", "priority")]


class Run:
    """A server with its log, and workers one of which makes poison in step 2."""

    def __init__(self, toy, **options):
        options = {"initial": toy.initial, "initial_statistics": toy.initial_statistics} | options
        options = {"steps": STEPS, "training": TRAINING, "absence_s": 0.0} | options
        self.toy, self.log, self.made = toy, [], {}
        self.server = ParameterServer(toy.layers, on_applied=self.log.append, **options)

    def work(self, poison=None, bad_layer="wide", bad_steps=(2,), **options):
        """Be a worker; the one in slot 1 puts ``poison`` into one value of a layer."""
        toy = self.toy
        with Session(self.server.address, layers=toy.layers, **options) as session:
            slot, n_parameters = session.welcome.slot, toy.grid.n_parameters
            for step in session.steps():
                for spec in toy.layers:
                    step.wait(spec.name)
                whole = toy.contribution(session.parameters, slot, step.index)
                if slot == 1 and step.index in bad_steps and poison is not None:
                    whole[session.slice_of(bad_layer).start + 7] = poison
                session.gradients[:] = whole[:n_parameters]
                session.batch_statistics[:] = whole[n_parameters:]
                if not step.abandoned:
                    self.made[slot, step.index] = whole
                step.report(toy.loss(slot, step.index), 1)
                for spec in reversed(toy.layers):
                    step.gradient_ready(spec.name)
            return session.parameters.copy()

    async def train(self, n_workers, *args, **options):
        work = [asyncio.to_thread(self.work, *args, **options) for _ in range(n_workers)]
        ends = await asyncio.gather(*work)
        return await self.server.finished(), ends

    def judge(self, result):
        parameters, statistics = self.toy.replay_log(self.log, self.made, TRAINING)
        assert result.parameters.tobytes() == parameters.tobytes()
        assert result.statistics.tobytes() == statistics.tobytes()
        assert np.isfinite(result.parameters).all()


def without(toy, slot, step, n_workers):
    """The parameters that come out if a step is made without a worker's contribution."""
    parameters = toy.initial.copy()
    made, log = {}, []
    for now in range(STEPS):
        slots = tuple(s for s in range(n_workers) if (s, now) != (slot, step))
        made |= {(s, now): toy.contribution(parameters, s, now) for s in slots}
        log.append((now, Range(0, toy.grid.n_cells), slots, False))
        parameters, _ = toy.replay_log(log, made, TRAINING)
    return parameters


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e38])
@pytest.mark.parametrize("bad_layer", ["front", "last"])  # which travels last, and first
async def test_behind_a_barrier_a_contribution_is_refused_whole(toy, poison, bad_layer, caplog):
    expected = without(toy, 1, 2, 3)
    for strategy in BARRIER:
        run = Run(toy, workers=3)
        async with run.server:
            result, ends = await run.train(3, poison, bad_layer, strategy=strategy)
        run.judge(result)
        assert result.parameters.tobytes() == expected.tobytes(), strategy
        for end in ends:
            assert end.tobytes() == expected.tobytes()
        assert result.losses[2] == (toy.loss(0, 2) + toy.loss(2, 2)) / 2
    assert "gradients of step 2 hold values that are not finite, or above 1e+09" in caplog.text
    assert "worker 1 (127.0.0.1" in caplog.text
    assert "rank 1: gradients of step 2" in caplog.text, "the worker knows it too"


@pytest.mark.parametrize("poison", [math.nan, 1e38])
@pytest.mark.parametrize("strategy", ["joint", "priority"])
@pytest.mark.parametrize("bad_layer", ["front", "wide", "last"])
async def test_across_the_boundary_it_is_refused_from_there_on(toy, strategy, poison, bad_layer):
    run = Run(toy, workers=3)
    async with run.server:
        result, ends = await run.train(3, poison, bad_layer, strategy=strategy)
    run.judge(result)
    for end in ends:
        assert end.tobytes() == result.parameters.tobytes()
    for step, record in enumerate(result.records):
        slots = {some for _, some in record.contributors}
        assert slots <= {(0, 1, 2), (0, 2)} if step == 2 else slots == {(0, 1, 2)}
    place = Range(*toy.grid.layer_cells(["front", "tiny", "wide", "last"].index(bad_layer)))
    hit = [
        some
        for cells, some in result.records[2].contributors
        if place.first in range(cells.first, cells.first + cells.count)
    ]
    assert hit == [(0, 2)], "the poison is in nobody's parameters"


async def test_the_one_worker_there_is_may_have_its_step_refused_and_goes_on(toy):
    make = toy.contribution

    def contribution(parameters, slot, step):
        values = make(parameters, slot, step)
        values[0] = np.nan if step == 2 else values[0]
        return values

    toy.contribution = contribution
    for strategy in ("joint", "dynacomm"):
        run = Run(toy, workers=1)
        async with run.server:
            result, _ = await run.train(1, strategy=strategy)
        run.judge(result)
        assert () in {slots for _, slots in result.records[2].contributors}
        assert len(result.records) == STEPS


async def test_under_staleness_what_is_sound_stays_and_the_rest_of_the_step_is_skipped(toy):
    for bound in (0, 2, math.inf):
        run = Run(toy, workers=3, mode=Mode(staleness=bound))
        async with run.server:
            result, ends = await run.train(3, math.nan, "wide", strategy="layerwise")
        run.judge(result)
        for end in ends:
            assert end.tobytes() == result.parameters.tobytes()
        assert len(result.records) == STEPS


async def test_a_quorum_takes_others_for_the_refused_or_fewer_where_there_are_none(toy):
    for quorum in (2, 3):
        run = Run(toy, workers=3, mode=Mode(quorum=quorum))
        async with run.server:
            result, _ = await run.train(3, math.inf, "tiny", strategy="dynacomm")
        run.judge(result)
        assert 1 not in result.records[2].contributors[0][1]


@pytest.mark.parametrize("leaving", ["end", "shrink"])
async def test_whoever_makes_poison_again_and_again_is_expelled_by_name(toy, leaving, connect_raw):
    run = Run(toy, workers=2, refusals=3, steps=40, mode=Mode(on_leave=leaving), absence_s=30.0)
    steps = tuple(range(2, 40))
    async with run.server as server:
        work = [
            asyncio.create_task(asyncio.to_thread(run.work, math.nan, bad_steps=steps))
            for _ in range(2)
        ]
        if leaving == "end":
            with pytest.raises(PeerError, match=r"worker 1 .* is quarantined") as failure:
                await server.finished()
            assert failure.value.code == "worker-lost"
        else:
            await server.finished()
        ends = await asyncio.gather(*work, return_exceptions=True)
    codes = sorted(end.code for end in ends if isinstance(end, PeerError))
    assert codes == ["quarantined", *(["worker-lost"] if leaving == "end" else [])]
    if leaving == "shrink":
        run.judge(await server.finished())
        poisoned = {step for step, _, slots, _ in run.log if slots == (0,)}
        assert min(poisoned) == 2


async def test_the_expelled_one_is_refused_when_it_comes_back(toy, connect_raw):
    run = Run(toy, workers=2, refusals=1, steps=3, mode=Mode(on_leave="shrink"), absence_s=30.0)
    async with run.server as server, connect_raw(server.address) as raw:
        other = asyncio.create_task(asyncio.to_thread(run.work))
        welcome = await raw.join(toy.grid)
        await raw.pull()
        raw.push(0, np.full(toy.grid.n_floats, np.nan, np.float32), toy.grid)
        message, _ = await raw.read()
        while not isinstance(message, Error):
            assert isinstance(message, Skip | Parameters)
            message, _ = await raw.read()
        assert message.code == "quarantined"
        async with connect_raw(server.address) as again:
            member = Membership(welcome.slot, welcome.term, 1, welcome.incarnation)
            again.send(Hello(run=welcome.run, member=member))
            message, _ = await again.read()
            assert message.code in ("quarantined", "run-over")
        await server.finished()
        await other


async def test_an_update_that_makes_infinite_parameters_ends_the_run_before_anybody_gets_them(toy):
    training = Training(SGD(), Constant(3e38), max_gradient=1e30)
    run = Run(toy, workers=2, training=training)
    async with run.server as server:
        work = [asyncio.create_task(asyncio.to_thread(run.work)) for _ in range(2)]
        with pytest.raises(PeerError, match="made values that are not finite") as failure:
            await server.finished()
        assert failure.value.code == "diverged"
        for error in await asyncio.gather(*work, return_exceptions=True):
            assert isinstance(error, PeerError)
            assert error.code == "diverged"
