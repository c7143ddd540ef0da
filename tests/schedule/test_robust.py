"""A plan for a rate that is not known exactly: judged by brute force over scenarios and plans."""

from __future__ import annotations

import statistics
from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from dynacomm_async.models import build, costs_of
from dynacomm_async.schedule import Costs, Plan, evaluate, make_plan
from dynacomm_async.schedule.robust import LARGEST_ERROR, LEAST_ERROR, plan_robust, spread_of
from dynacomm_async.schedule.whatif import with_speed

SEEDS = range(60)


def scale(total_ns: list[int], halves: int, error: int) -> list[int]:
    """Return each layer's transfer in a scenario, from rounded prefix sums as in the planner."""
    sums = [total * 2000 // (2000 + halves * error) for total in total_ns]
    return [after - before for before, after in pairwise(sums)]


def list_scenarios(costs: Costs, error: int) -> list[Costs]:
    """Return the tables of the five rates, both directions wrong by the same share."""
    layers = costs.layers
    pull, push = [0], [0]
    for layer in reversed(layers):
        pull.append(pull[-1] + layer.pull_ns)
        push.append(push[-1] + layer.push_ns)
    tables = []
    for halves in (-2, -1, 0, 1, 2):
        pulls = scale(pull, halves, error)[::-1]
        pushes = scale(push, halves, error)[::-1]
        changed = tuple(
            replace(layer, pull_ns=pull_ns, push_ns=push_ns)
            for layer, pull_ns, push_ns in zip(layers, pulls, pushes, strict=True)
        )
        tables.append(replace(costs, layers=changed))
    return tables


def mean_ns(plan: Plan, tables: list[Costs]) -> float:
    return statistics.mean(evaluate(plan, table).step_ns for table in tables)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_precise_estimate_gives_the_plan_of_the_estimate(make_costs, seed):
    costs = make_costs(seed)
    assert plan_robust(costs, 0, 0) == make_plan("dynacomm", costs)


@pytest.mark.parametrize("error", [20, 150, 300])
@pytest.mark.parametrize("seed", SEEDS)
def test_no_optimum_of_any_scenario_is_better_on_average(make_costs, seed, error):
    costs = make_costs(seed)
    tables = list_scenarios(costs, error)
    chosen = plan_robust(costs, error, error)
    optima = [make_plan("dynacomm", table) for table in tables]

    # Each phase depends on one direction: their optima may be combined.
    for pull in optima:
        for push in optima:
            other = Plan("mixed", len(costs.layers), pull.pull, push.push)
            assert mean_ns(chosen, tables) <= mean_ns(other, tables)


@pytest.mark.parametrize("seed", range(12))
def test_on_average_it_is_close_to_the_best_of_all_plans(make_costs, seed):
    costs = make_costs(seed, most_layers=5)
    tables = list_scenarios(costs, 300)
    n_layers = len(costs.layers)
    cuts = [chosen for size in range(n_layers) for chosen in combinations(range(1, n_layers), size)]
    best_ns = min(
        mean_ns(Plan.from_cuts("any", n_layers, pull, push), tables)
        for pull in cuts
        for push in cuts
    )
    assert mean_ns(plan_robust(costs), tables) <= 1.1 * best_ns


@pytest.mark.parametrize("seed", SEEDS)
def test_a_shared_link_is_one_on_which_everything_takes_longer(make_costs, seed):
    shared = make_costs(seed, workers=3, shared_link=True)
    alone = replace(
        shared,
        layers=tuple(
            replace(layer, pull_ns=3 * layer.pull_ns, push_ns=3 * layer.push_ns)
            for layer in shared.layers
        ),
        overhead_up_ns=3 * shared.overhead_up_ns,
        overhead_down_ns=3 * shared.overhead_down_ns,
        shared_link=False,
    )
    assert plan_robust(shared) == plan_robust(alone)


def test_more_error_than_the_largest_counts_as_the_largest(make_costs):
    for seed in SEEDS:
        costs = make_costs(seed)
        assert plan_robust(costs, 10**6, 10**6) == plan_robust(costs, LARGEST_ERROR, LARGEST_ERROR)
        assert plan_robust(costs, -5, -5) == plan_robust(costs, 0, 0)


def test_each_direction_bends_by_its_own_error(make_costs):
    for seed in SEEDS:
        costs = make_costs(seed)
        nominal = plan_robust(costs, 0, 0)
        assert plan_robust(costs, 0, 300).pull == nominal.pull
        assert plan_robust(costs, 300, 0).push == nominal.push


def test_the_spread_is_three_errors_within_its_limits():
    assert spread_of(0.0) == LEAST_ERROR
    assert spread_of(0.05) == 150
    assert spread_of(float("inf")) == spread_of(0.2) == LARGEST_ERROR


def test_a_rate_wrong_by_three_tenths_loses_a_tenth_of_what_the_plan_of_the_estimate_loses():
    """On a published network: what the experiment of ``demos/benchmarks/robustness.py`` shows."""
    losses: dict[str, list[float]] = {"nominal": [], "robust": []}
    network = build("googlenet")
    for bytes_per_s in (12.5e6, 40e6, 125e6):
        for overhead_ns in (100_000, 1_000_000, 5_000_000):
            costs = costs_of(
                network,
                batch=16,
                flops_per_s=1e12,
                down_bytes_per_s=bytes_per_s,
                overhead_ns=overhead_ns,
            )
            plans = {"nominal": make_plan("dynacomm", costs), "robust": plan_robust(costs)}
            for factor in (0.7, 1.3):
                truth = with_speed(costs, factor)
                best_ns = evaluate(make_plan("dynacomm", truth), truth).step_ns
                for name, plan in plans.items():
                    losses[name].append(evaluate(plan, truth).step_ns / best_ns - 1)

    assert statistics.mean(losses["robust"]) < 0.2 * statistics.mean(losses["nominal"])
    assert max(losses["robust"]) < 0.5 * max(losses["nominal"])
