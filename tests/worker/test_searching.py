"""Plans that a thread looks for, and what is followed meanwhile."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from dynacomm_async.schedule import Costs, LayerCosts, evaluate, make_plan
from dynacomm_async.schedule.plan import is_crossing
from dynacomm_async.schedule.planners.dynacomm import plan_dynacomm
from dynacomm_async.schedule.whatif import with_speed
from dynacomm_async.worker import searching
from dynacomm_async.worker.planning import WARMUP_STEPS
from dynacomm_async.worker.searching import SearchedPlans

MS = 10**6
COSTS = Costs(
    tuple(
        LayerCosts(f"layer{index}", 200_000, 16 * MS, 4 * MS, 8 * MS, 16 * MS) for index in range(8)
    ),
    overhead_up_ns=MS,
    overhead_down_ns=MS,
)


class Told:
    """An estimator that is told what it has measured."""

    def __init__(self, costs: Costs) -> None:
        self.now = costs
        self.up = self.down = SimpleNamespace(rate_error=0.0)

    def costs(self) -> Costs:
        return self.now


def make(costs: Costs = COSTS) -> tuple[SearchedPlans, Told]:
    told = Told(costs)
    return SearchedPlans(told, len(costs.layers)), told  # type: ignore[arg-type]


def step_ns(plan, costs):
    return evaluate(plan, costs).step_ns


def test_dynacomms_plan_is_followed_until_the_first_search_has_ended_and_then_what_it_found():
    plans, _ = make()
    plans.refresh()
    plans.close()
    first = plans.plan(WARMUP_STEPS)
    assert first == replace(plan_dynacomm(COSTS), strategy="joint")
    plans.refresh()
    found = plans.plan(WARMUP_STEPS + 1)
    assert found == make_plan("joint", COSTS)
    assert step_ns(found, COSTS) < 0.8 * step_ns(first, COSTS)
    assert [entry.step for entry in plans.log] == [WARMUP_STEPS, WARMUP_STEPS + 1]


def test_no_second_search_begins_while_the_costs_stay_or_one_is_under_way(monkeypatch):
    plans, _ = make()
    searches, go = [], threading.Event()

    def search(costs):
        searches.append(costs)
        assert go.wait(10)
        return make_plan("joint", costs)

    monkeypatch.setattr(plans, "_search", search)
    for _ in range(5):
        plans.refresh()
    go.set()
    plans.close()
    for _ in range(5):
        plans.refresh()
    plans.close()
    assert searches == [COSTS]


def test_a_search_lets_go_of_the_interpreter_again_and_again(monkeypatch):
    turns = []
    monkeypatch.setattr(searching, "_give_way", lambda: turns.append(threading.current_thread()))
    plans, _ = make()
    plans.refresh()
    plans.close()
    assert len(turns) >= 20
    assert {turn.name for turn in turns} == {"plan search"}


@pytest.mark.parametrize("speed", [0.2, 5])
def test_a_plan_that_has_come_to_be_far_from_the_bound_is_looked_for_anew(speed):
    plans, told = make()
    plans.refresh()
    plans.close()
    plans.refresh()
    before = plans.plan(WARMUP_STEPS)
    told.now = with_speed(COSTS, speed)
    plans.refresh()
    plans.close()
    plans.refresh()
    after = plans.plan(WARMUP_STEPS + 1)
    # Not for less than two per cent.
    assert 98 * step_ns(after, told.now) <= 100 * step_ns(make_plan("joint", told.now), told.now)
    assert step_ns(after, told.now) <= step_ns(before, told.now)


def test_between_searches_the_better_of_the_plan_found_and_dynacomms_is_followed():
    plans, told = make()
    plans.refresh()
    plans.close()
    plans.refresh()
    plans.plan(WARMUP_STEPS)
    # On a link that is all but free of bytes, many small messages only cost their overheads.
    told.now = with_speed(replace(COSTS, overhead_up_ns=20 * MS, overhead_down_ns=20 * MS), 1000)
    plans.refresh()
    at_once = plans.plan(WARMUP_STEPS + 1)
    plans.close()
    assert step_ns(at_once, told.now) <= step_ns(plan_dynacomm(told.now), told.now)


def test_a_link_that_turns_out_to_be_half_duplex_gets_its_barrier_back():
    plans, told = make()
    for step in (WARMUP_STEPS, WARMUP_STEPS + 1):
        plans.refresh()
        plans.close()
        crossing = plans.plan(step)
    assert is_crossing(crossing)
    told.now = replace(COSTS, half_duplex=True)
    plans.refresh()
    plans.close()
    assert plans.plan(WARMUP_STEPS + 2) == replace(plan_dynacomm(COSTS), strategy="joint")


def test_on_a_half_duplex_link_it_is_dynacomms_plan():
    costs = replace(COSTS, half_duplex=True)
    plans, _ = make(costs)
    for _ in range(2):
        plans.refresh()
        plans.close()
    assert plans.plan(WARMUP_STEPS) == replace(plan_dynacomm(costs), strategy="joint")
