"""Changed cost tables against arithmetic, and verdicts against plans made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dynacomm_async.errors import PlanError
from dynacomm_async.schedule import (
    CROSSING,
    PLANNERS,
    Costs,
    LayerCosts,
    Plan,
    evaluate,
    lower_bound_ns,
)
from dynacomm_async.schedule.whatif import (
    Verdict,
    judge,
    with_bandwidth,
    with_batch,
    with_latency,
    with_overhead,
    with_speed,
    with_workers,
)
from dynacomm_async.testing import list_all_cuts

COSTS = Costs(
    (
        LayerCosts("a", 1000, 500, 20, 30, 700),
        LayerCosts("b", 4000, 2000, 10, 50, 2800),
        LayerCosts("c", 2000, 1000, 40, 40, 1400),
    ),
    overhead_up_ns=100,
    overhead_down_ns=200,
    latency_up_ns=3,
    latency_down_ns=4,
    server_ns=5,
    batch=10,
)


def column(costs, name):
    return [getattr(layer, name) for layer in costs.layers]


def test_a_bandwidth_decides_the_transfer_times_and_nothing_else():
    changed = with_bandwidth(COSTS, 1e9, 5e8)
    assert column(changed, "pull_ns") == [1000, 4000, 2000]
    assert column(changed, "push_ns") == [2000, 8000, 4000]
    assert column(with_bandwidth(COSTS, 1e9), "push_ns") == [1000, 4000, 2000]
    assert with_bandwidth(changed, 2e9, 1e9 / 0.7) == COSTS


def test_a_faster_link_keeps_the_ratio_of_its_directions():
    changed = with_speed(COSTS, 0.5)
    assert column(changed, "pull_ns") == [1000, 4000, 2000]
    assert column(changed, "push_ns") == [1400, 5600, 2800]
    assert with_speed(changed, 2) == COSTS


def test_overhead_and_latency_hold_for_both_directions():
    changed = with_latency(with_overhead(COSTS, 7), 9)
    assert (changed.overhead_up_ns, changed.overhead_down_ns) == (7, 7)
    assert (changed.latency_up_ns, changed.latency_down_ns) == (9, 9)
    assert changed.layers == COSTS.layers


def test_compute_is_proportional_to_the_batch():
    changed = with_batch(COSTS, 25)
    assert column(changed, "forward_ns") == [50, 25, 100]
    assert column(changed, "backward_ns") == [75, 125, 100]
    assert changed.batch == 25
    assert with_batch(changed, 10) == COSTS


def test_workers_matter_on_a_shared_link():
    own, shared = with_workers(COSTS, 3), with_workers(replace(COSTS, shared_link=True), 3)
    assert judge(own).steps_ns == judge(COSTS).steps_ns
    # Sequential, by hand: everything on the link takes three times as long.
    assert judge(COSTS).steps_ns["sequential"] == 200 + 3500 + 100 + 4900 + 190 + 3 + 4 + 5
    assert judge(shared).steps_ns["sequential"] == 3 * (3700 + 5000) + 190 + 3 + 4 + 5


@pytest.mark.parametrize("seed", range(40))
def test_dynacomm_is_as_good_as_the_best_of_all_plans_in_any_setting(seed, make_costs):
    costs = with_overhead(with_bandwidth(make_costs(seed, 5), 2e9 / (seed + 1)), 3 * seed)
    verdict = judge(costs)
    n_layers = len(costs.layers)
    best_ns = min(
        evaluate(Plan.from_cuts("any", n_layers, pull, push), costs).step_ns
        for pull in list_all_cuts(n_layers)
        for push in list_all_cuts(n_layers)
    )
    assert list(verdict.steps_ns) == list(PLANNERS)
    with_barrier_ns = [verdict.steps_ns[name] for name in verdict.steps_ns if name not in CROSSING]
    assert verdict.steps_ns["dynacomm"] == best_ns == min(with_barrier_ns)
    assert verdict.steps_ns["joint"] <= best_ns
    assert verdict.lower_bound_ns == lower_bound_ns(costs).step_ns <= min(verdict.steps_ns.values())


@pytest.mark.parametrize(
    ("steps_ns", "best", "choice"),
    [
        ({"plain": 100, "good": 100}, ["plain", "good"], "plain"),
        ({"plain": 101, "good": 100}, ["good"], "plain"),
        ({"plain": 1011, "good": 1001, "better": 1000}, ["better"], "good"),
        ({"plain": 102, "good": 100}, ["good"], "good"),
        ({"plain": 0, "good": 0}, ["plain", "good"], "plain"),
        ({"plain": 1, "good": 0}, ["good"], "good"),
    ],
)
def test_the_choice_is_the_plainest_within_one_percent(steps_ns, best, choice):
    verdict = Verdict(steps_ns, 0)
    assert (verdict.best, verdict.choice) == (best, choice)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: with_bandwidth(COSTS, 0), "a rate of 0 bytes/s"),
        (lambda: with_bandwidth(COSTS, 1, float("inf")), "a rate of inf"),
        (lambda: with_bandwidth(COSTS, float("nan")), "a rate of nan"),
        (lambda: with_speed(COSTS, -1), "a link -1 times as fast"),
        (lambda: with_overhead(COSTS, -1), "overhead_up_ns is -1"),
        (lambda: with_latency(COSTS, -1), "latency_up_ns is -1"),
        (lambda: with_batch(COSTS, 0), "a batch of 0"),
        (lambda: with_batch(replace(COSTS, batch=None), 4), "has no batch"),
        (lambda: with_workers(COSTS, 0), "workers is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(PlanError, match=message):
        change()
