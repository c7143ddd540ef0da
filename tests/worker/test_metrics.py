"""The metrics of every step: what a session keeps of each, and when it asks the cost model."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

import pytest

from dynacomm_async.ranges import Range
from dynacomm_async.schedule import Costs, LayerCosts, Plan, evaluate, lower_bound_ns
from dynacomm_async.server import ParameterServer
from dynacomm_async.wire.grid import Grid, LayerSpec
from dynacomm_async.wire.messages import End, Parameters, Timing
from dynacomm_async.worker import FixedPlan, Session, connect, metrics as metrics_module
from dynacomm_async.worker.metrics import KEPT_STEPS, Metrics

COSTS = Costs(
    tuple(LayerCosts(name, 1, 10, 20, 30, 40) for name in "abc"),
    overhead_up_ns=1,
    overhead_down_ns=2,
)
ONE = Plan.from_cuts("one", 3, [], [])
ALL = Plan.from_cuts("all", 3, [1, 2], [1, 2])
TIMES = {"step_ns": 500, "compute_ns": 150, "stalled_ns": 300}


def test_a_step_is_accounted_for_by_its_plan_the_newest_costs_and_the_servers_words():
    metrics = Metrics()
    account = metrics.add(0, ALL, COSTS, Timing((), 100, 50, 2), **TIMES)

    timeline = evaluate(ALL, COSTS)
    assert account is metrics.latest
    assert (account.index, account.step_ns, account.compute_ns) == (0, 500, 150)
    assert (account.waited_ns, account.server_ns, account.exposed_ns) == (100, 50, 150)
    assert account.last_slot == 2
    assert account.predicted_ns == timeline.step_ns
    assert account.hidden_fraction == 1 - 250 / timeline.busy_ns  # without waiting for others
    assert account.bound == lower_bound_ns(COSTS)


def test_a_step_is_settled_if_the_one_before_followed_the_same_plan():
    metrics = Metrics()
    for index, plan in enumerate([ONE, ONE, ALL, ALL, ALL, ONE]):
        metrics.add(index, plan, None, None, **TIMES)

    settled = [account.settled for account in metrics.steps]
    assert settled == [False, True, False, True, True, False]


def test_without_costs_nothing_is_predicted_and_without_the_servers_words_nobody_waits_for_others():
    account = Metrics().add(0, ONE, None, None, **TIMES)

    assert (account.predicted_ns, account.hidden_fraction, account.certificate) == (None,) * 3
    assert (account.waited_ns, account.server_ns, account.last_slot) == (0, 0, None)


def watch_expect(monkeypatch):
    asked = []
    expect = metrics_module.expect

    def watched(plan, costs):
        asked.append((plan.strategy, costs))
        return expect(plan, costs)

    monkeypatch.setattr(metrics_module, "expect", watched)
    return asked


def test_the_cost_model_is_asked_only_when_plan_or_costs_have_changed(monkeypatch):
    asked = watch_expect(monkeypatch)
    metrics, newer = Metrics(clock=lambda: 0), Costs(COSTS.layers, 5, 6)
    followed = [(ONE, None), *[(ONE, COSTS)] * 5, *[(ALL, COSTS)] * 5, *[(ALL, newer)] * 5]
    for index, (plan, costs) in enumerate(followed):
        metrics.add(index, plan, costs, None, **TIMES)

    assert asked == [("one", COSTS), ("all", COSTS), ("all", newer)]


def test_costs_that_change_at_every_step_take_half_a_percent_of_the_time(monkeypatch):
    asked = watch_expect(monkeypatch)
    ticks = itertools.count(step=10)  # asking takes 10 ns: once in 2000 ns, or four steps
    metrics = Metrics(clock=lambda: next(ticks))
    for index in range(41):
        metrics.add(index, ONE, replace(COSTS, server_ns=index), None, **TIMES)
    assert [costs.server_ns for _, costs in asked] == list(range(0, 41, 4))

    metrics.add(41, ALL, COSTS, None, **TIMES)
    assert asked[-1] == ("all", COSTS), "a new plan does not have to wait"


def test_the_history_is_bounded():
    metrics = Metrics()
    assert metrics.latest is None
    for index in range(KEPT_STEPS + 10):
        metrics.add(index, ONE, COSTS, None, **TIMES)

    assert len(metrics.steps) == KEPT_STEPS
    assert (metrics.steps[0].index, metrics.latest.index) == (10, KEPT_STEPS + 9)


# -- in a session --------------------------------------------------------------------------------

PAIR = Grid([LayerSpec("front", 5000), LayerSpec("back", 10)])


@pytest.mark.parametrize(
    ("timing", "causes"),
    [
        (Timing((), 10**15, 10**15, 1), {"waited"}),
        (Timing((), 0, 10**15, 0), {"server"}),
        (Timing((), 0, 0, 0), {"link"}),
        (None, {"link"}),
    ],
)
async def test_waiting_is_put_down_to_what_the_server_says_and_the_rest_to_the_link(
    listen_raw, timing, causes
):
    plan = Plan.from_cuts("by hand", 2, [], [])

    def work(address):
        with Session(address, plans=lambda grid, estimator: FixedPlan(plan)) as session:
            for step in session.steps():
                step.wait("front")
                step.wait("back")
                step.gradient_ready("back")
                step.gradient_ready("front")
            return list(session.metrics.steps)

    async with listen_raw() as server:
        working = asyncio.create_task(asyncio.to_thread(work, server.address))
        peer = await server.greet(PAIR, steps=2)
        everything = (Range(0, 3),)
        peer.send(Parameters(0, everything), bytes(4 * 5010))
        await peer.read()
        peer.send(Parameters(1, everything, timing), bytes(4 * 5010))
        await peer.read()
        peer.send(Parameters(2, everything), bytes(4 * 5010))
        peer.send(End(2))
        await peer.read_to_end()
        first, second = await working

    assert (first.last_slot, first.waited_ns, first.server_ns) == (None, 0, 0)
    parts = {"waited": second.waited_ns, "server": second.server_ns, "link": second.exposed_ns}
    assert {name for name, ns in parts.items() if ns} == causes
    assert second.last_slot == (None if timing is None else timing.last_slot)
    assert second.settled
    assert second.own_ns >= 0


async def test_every_step_has_an_account_in_either_kind_of_session(toy):
    async def work_awaiting(address):
        async with connect(address) as session:
            async for step in session.steps():
                for spec in toy.layers:
                    await step.parameters(spec.name)
                for spec in reversed(toy.layers):
                    step.gradient_ready(spec.name)
            assert (await session.describe()).workers == 2
            return session.metrics

    def work_blocking(address):
        with Session(address) as session:
            for step in session.steps():
                for spec in toy.layers:
                    step.wait(spec.name)
                for spec in reversed(toy.layers):
                    step.gradient_ready(spec.name)
        return session.metrics

    async with ParameterServer(toy.layers, workers=2, steps=9, initial=toy.initial) as server:
        every = await asyncio.gather(
            work_awaiting(server.address), asyncio.to_thread(work_blocking, server.address)
        )
    for metrics in every:
        assert [account.index for account in metrics.steps] == list(range(9))
        assert {account.last_slot for account in list(metrics.steps)[1:]} <= {0, 1}
        assert all(0 < account.compute_ns < account.step_ns for account in metrics.steps)


async def test_a_session_describes_itself_while_it_is_open_and_when_it_is_closed(toy):
    def work(address):
        reports = []
        with Session(address, strategy="layerwise") as session:
            for step in session.steps():
                for spec in toy.layers:
                    step.wait(spec.name)
                for spec in reversed(toy.layers):
                    step.gradient_ready(spec.name)
                reports.append(session.describe())
        return [*reports, session.describe()]

    async with ParameterServer(toy.layers, workers=1, steps=12, initial=toy.initial) as server:
        *reports, last = await asyncio.to_thread(work, server.address)
    assert {(report.slot, report.workers) for report in reports} == {(0, 1)}
    assert last.expectation is not None
    assert last.expectation.plan.strategy == "layerwise"
    assert [layer.name for layer in last.expectation.costs.layers] == [
        spec.name for spec in toy.layers
    ]
    assert last.summary.last == 11
