"""Plans that a thread looks for, and what is followed meanwhile."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from dynacomm_async.schedule import Costs, LayerCosts, evaluate, make_plan
from dynacomm_async.schedule.plan import is_crossing
from dynacomm_async.schedule.robust import LEAST_ERROR, plan_robust
from dynacomm_async.schedule.whatif import with_speed
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
        self.up = self.down = SimpleNamespace(rate_error=0.0, changes=0)
        self.duplex = SimpleNamespace(probing=False)

    def costs(self) -> Costs:
        return self.now


def make(costs: Costs = COSTS) -> tuple[SearchedPlans, Told]:
    told = Told(costs)
    return SearchedPlans(told, len(costs.layers)), told  # type: ignore[arg-type]


def think(plans):
    """Begin a thought, wait for its end, and take up what it came to."""
    plans.refresh()
    plans.close()
    plans.refresh()
    plans.close()


def step_ns(plan, costs):
    return evaluate(plan, costs).step_ns


def plain(costs):
    return replace(plan_robust(costs, LEAST_ERROR, LEAST_ERROR), strategy="joint")


def test_dynacomms_plan_is_followed_until_the_first_search_has_ended_and_then_what_it_found():
    plans, _ = make()
    plans.refresh()
    plans.close()
    first = plans.plan(WARMUP_STEPS)
    assert first == plain(COSTS)
    plans.refresh()
    found = plans.plan(WARMUP_STEPS + 1)
    plans.close()
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
    for _ in range(20):
        think(plans)
    assert searches == [COSTS]


@pytest.mark.parametrize("speed", [0.2, 5])
def test_a_plan_that_has_come_to_be_far_from_the_bound_is_looked_for_anew(speed):
    plans, told = make()
    think(plans)
    before = plans.plan(WARMUP_STEPS)
    told.now = with_speed(COSTS, speed)
    think(plans)
    after = plans.plan(WARMUP_STEPS + 1)
    # Not for less than two per cent.
    assert 98 * step_ns(after, told.now) <= 100 * step_ns(make_plan("joint", told.now), told.now)
    assert step_ns(after, told.now) <= step_ns(before, told.now)


def test_thinking_takes_a_small_share_of_the_time_unless_the_link_has_changed(monkeypatch):
    plans, told = make()
    now_ns = [0]
    monkeypatch.setattr("dynacomm_async.worker.searching.monotonic_ns", lambda: now_ns[0])
    thoughts = []

    def find(costs, plan):
        thoughts.append(costs)
        return plan

    monkeypatch.setattr(plans, "_find", find)
    for _ in range(50):
        think(plans)
    n_eager = len(thoughts)
    assert n_eager < 20
    told.up.changes += 1
    think(plans)
    assert len(thoughts) == n_eager + 1
    now_ns[0] = 10**12
    plans.refresh()
    plans.close()
    assert len(thoughts) == n_eager + 2


def test_a_search_that_fails_is_told_of_once_and_steps_keep_a_plan(monkeypatch, caplog):
    plans, _ = make()
    monkeypatch.setattr(plans, "_search", lambda costs: 1 // 0)
    for _ in range(5):
        think(plans)
    assert plans.plan(WARMUP_STEPS) == plain(COSTS)
    assert [r.getMessage() for r in caplog.records if r.levelname == "ERROR"] == [
        "the search for a joint plan failed; steps keep the plan they have"
    ]


def test_a_link_that_turns_out_to_be_half_duplex_gets_its_barrier_back_at_once():
    plans, told = make()
    think(plans)
    assert is_crossing(plans.plan(WARMUP_STEPS))
    told.now = replace(COSTS, half_duplex=True)
    plans.refresh()
    assert plans.plan(WARMUP_STEPS + 1) == plain(told.now)
    plans.close()
    think(plans)
    assert plans.plan(WARMUP_STEPS + 2) == plain(told.now)


def test_a_link_that_is_tried_for_both_directions_is_crossed_at_once_and_the_log_says_so(
    monkeypatch,
):
    # No thought is due but for a change of the link.
    monkeypatch.setattr("dynacomm_async.worker.searching.monotonic_ns", lambda: 0)
    plans, told = make()
    for _ in range(20):
        think(plans)
    plans.plan(WARMUP_STEPS)
    told.now = replace(COSTS, half_duplex=True)
    think(plans)
    assert plans.plan(WARMUP_STEPS + 1).barrier
    told.duplex.probing = True
    think(plans)
    assert is_crossing(plans.plan(WARMUP_STEPS + 2))
    told.duplex.probing = False
    think(plans)
    assert plans.plan(WARMUP_STEPS + 3) == plain(told.now)
    assert [entry.reason for entry in plans.log][-3:] == [
        "the link's directions take turns",
        "the link's directions have room at once, or it is tried whether they have",
        "the link's directions take turns",
    ]
