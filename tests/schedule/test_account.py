"""Accounts of steps, against timelines and sums by hand."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from dynacomm_async.errors import PlanError
from dynacomm_async.schedule import Costs, LayerCosts, evaluate, make_plan
from dynacomm_async.schedule.account import account_for, expect, summarise
from dynacomm_async.schedule.planners import PLANNERS
from dynacomm_async.testing import simulate


def stalls_ns(timeline):
    """How long nothing is computed: before, between and after the computations."""
    events = timeline.computations
    gaps = sum(after.start_ns - before.end_ns for before, after in pairwise(events))
    return events[0].start_ns + gaps + timeline.step_ns - events[-1].end_ns


def test_a_step_that_goes_as_predicted_has_the_timelines_figures(make_costs, make_random_plan):
    for seed in range(300):
        costs = make_costs(seed, server_ns=seed % 7, latency_up_ns=seed % 3, latency_down_ns=2)
        plan = make_random_plan(seed, len(costs.layers))
        timeline = evaluate(plan, costs)

        account = account_for(
            3,
            step_ns=simulate(plan, costs),
            compute_ns=sum(layer.forward_ns + layer.backward_ns for layer in costs.layers),
            stalled_ns=stalls_ns(timeline),
            server_ns=costs.server_ns,
            expectation=expect(plan, costs),
        )

        assert account.own_ns == 0
        assert account.step_ns == account.predicted_ns
        assert account.busy_ns == sum(each.end_ns - each.start_ns for each in timeline.transfers)
        assert account.hidden_fraction == timeline.hidden_fraction
        assert account.exposed_ns == stalls_ns(timeline) - costs.server_ns
        assert account.certificate is None or account.certificate >= 1


def test_sequential_hides_nothing_and_no_strategy_hides_less_than_nothing_without_latency(
    make_costs,
):
    for seed in range(200):
        costs = make_costs(seed)
        hidden = {}
        for name, planner in PLANNERS.items():
            timeline = expect(planner(costs), costs).timeline
            hidden[name] = timeline.step_ns, timeline.hidden_fraction
        assert hidden["sequential"][1] == 0
        assert all(fraction >= 0 for _, fraction in hidden.values())


@pytest.mark.parametrize("n_layers", [2, 5, 40])
def test_layers_that_compute_as_long_as_they_travel_hide_all_but_one_of_them(n_layers):
    layers = tuple(LayerCosts(f"layer{n}", 1, 10, 10, 10, 10) for n in range(n_layers))
    costs = Costs(layers, overhead_up_ns=0, overhead_down_ns=0)
    plan = make_plan("dynacomm", costs)

    account = account_for(
        1,
        step_ns=simulate(plan, costs),
        compute_ns=20 * n_layers,
        stalled_ns=20,
        expectation=expect(plan, costs),
    )

    assert account.hidden_fraction == pytest.approx(1 - 1 / n_layers)


def test_what_the_callers_own_work_hid_of_others_and_the_server_does_not_count():
    account = account_for(
        2, step_ns=100, compute_ns=60, stalled_ns=30, waited_ns=25, server_ns=20, last_slot=1
    )

    assert (account.waited_ns, account.server_ns, account.exposed_ns, account.own_ns) == (
        25,
        5,
        0,
        10,
    )


def test_what_is_not_known_is_none_and_nothing_to_send_hides_nothing():
    account = account_for(0, step_ns=10, compute_ns=5, stalled_ns=5)
    assert (account.hidden_fraction, account.certificate, account.predicted_ns) == (None,) * 3

    costs = Costs((LayerCosts("a", 1, 0, 0, 0, 0),), overhead_up_ns=0, overhead_down_ns=0)
    expectation = expect(make_plan("sequential", costs), costs)
    account = account_for(0, step_ns=9, compute_ns=5, stalled_ns=4, expectation=expectation)
    assert (account.hidden_fraction, account.certificate) == (0, None)


@pytest.mark.parametrize(
    "change",
    [{"compute_ns": -1}, {"stalled_ns": -1}, {"waited_ns": -1}, {"server_ns": -1}, {"step_ns": -9}],
)
def test_times_that_cannot_be_are_refused_by_step(change):
    times = {"step_ns": 10, "compute_ns": 5, "stalled_ns": 5} | change
    with pytest.raises(PlanError, match="step 7: "):
        account_for(7, **times)


def test_parts_that_overran_a_step_by_a_little_are_cut_to_it():
    account = account_for(7, step_ns=100, compute_ns=60, stalled_ns=47, waited_ns=45, server_ns=5)
    parts = (account.compute_ns, account.stalled_ns, account.waited_ns, account.server_ns)
    assert parts == (60, 40, 40, 0)
    assert account_for(7, step_ns=100, compute_ns=101, stalled_ns=3).compute_ns == 100


# -- the typical step ----------------------------------------------------------------------------


def draw_account(numbers, index, **changes):
    compute_ns, stalled_ns = numbers.randrange(100), numbers.randrange(100)
    options = {
        "step_ns": compute_ns + stalled_ns + numbers.randrange(50),
        "compute_ns": compute_ns,
        "stalled_ns": stalled_ns,
        "waited_ns": numbers.randrange(50),
        "server_ns": numbers.randrange(50),
        "settled": True,
    }
    return account_for(index, **(options | changes))


def test_the_parts_of_a_typical_step_add_up_and_lie_between_the_quartiles():
    for seed in range(100):
        numbers = random.Random(seed)
        accounts = [draw_account(numbers, index) for index in range(numbers.randint(1, 40))]
        summary = summarise(accounts)

        parts = (summary.compute_ns, summary.exposed_ns, summary.waited_ns, summary.server_ns)
        assert sum(parts) + summary.own_ns == summary.step_ns
        assert summary.low_ns <= summary.median_ns <= summary.high_ns
        assert summary.low_ns - 3 <= summary.step_ns <= summary.high_ns + 3  # five roundings
        steps = sorted(account.step_ns for account in accounts)
        inside = [step for step in steps if summary.low_ns <= step <= summary.high_ns]
        assert 2 * len(inside) >= len(steps)


def test_a_few_steps_that_were_held_up_do_not_show():
    numbers = random.Random(5)
    calm = [
        account_for(index, step_ns=100, compute_ns=70, stalled_ns=30, settled=True)
        for index in range(20)
    ]
    for place in (3, 8, 13, 18):
        calm[place] = draw_account(numbers, place, step_ns=10**9)
    summary = summarise(calm)

    assert (summary.median_ns, summary.low_ns, summary.high_ns) == (100, 100, 100)
    assert (summary.compute_ns, summary.exposed_ns) == (70, 30)


def test_steps_since_the_last_change_of_plan_count_if_they_are_enough():
    def steps(n_before, n_after):
        lengths = [90] * n_before + [50] + [40] * n_after
        return [
            account_for(index, step_ns=ns, compute_ns=1, stalled_ns=1, settled=ns != 50)
            for index, ns in enumerate(lengths)
        ]

    many = summarise(steps(30, 10))
    assert (many.first, many.last, many.n_steps, many.median_ns) == (31, 40, 10, 40)
    few = summarise(steps(30, 3))
    assert (few.first, few.last, few.n_steps, few.median_ns) == (0, 33, 33, 90)


def test_who_came_last_is_counted():
    slots = [0, 1, 1, None, 1]
    accounts = [
        account_for(index, step_ns=3, compute_ns=1, stalled_ns=1, settled=True, last_slot=slot)
        for index, slot in enumerate(slots)
    ]

    assert summarise(accounts).last_slots == ((1, 3), (0, 1))


def test_no_settled_step_is_no_summary():
    assert summarise([]) is None
    assert summarise([account_for(0, step_ns=3, compute_ns=1, stalled_ns=1)]) is None
