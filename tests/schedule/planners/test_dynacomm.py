from __future__ import annotations

from collections.abc import Callable

import pytest

from dynacomm_async.schedule import Costs, LayerCosts, Plan, evaluate, make_plan
from dynacomm_async.testing import (
    PhaseOptimum,
    search_forward,
    search_push,
    solve_forward_cubic,
    solve_push_cubic,
    solve_push_quadratic,
)

Phase = tuple[list[int], list[int], int]


def split_phases(costs: Costs) -> tuple[Phase, Phase]:
    share, layers = costs.link_share, costs.layers
    return (
        (
            [layer.forward_ns for layer in layers],
            [layer.pull_ns * share for layer in layers],
            costs.overhead_down_ns * share,
        ),
        (
            [layer.backward_ns for layer in layers],
            [layer.push_ns * share for layer in layers],
            costs.overhead_up_ns * share,
        ),
    )


def read_optimum(plan: Plan, costs: Costs) -> tuple[PhaseOptimum, PhaseOptimum]:
    timeline = evaluate(plan, costs)
    return (
        PhaseOptimum(timeline.forward_ns, len(plan.pull)),
        PhaseOptimum(timeline.backward_ns, len(plan.push)),
    )


@pytest.mark.parametrize("first_seed", range(0, 4000, 500))
def test_the_plan_is_the_best_of_all_with_the_fewest_segments(
    first_seed: int, make_costs: Callable[..., Costs]
) -> None:
    for seed in range(first_seed, first_seed + 500):
        costs = make_costs(seed, most_layers=7)
        forward, push = split_phases(costs)
        found = read_optimum(make_plan("dynacomm", costs), costs)
        assert found == (search_forward(*forward), search_push(*push)), seed


@pytest.mark.parametrize("seed", range(60))
def test_the_plan_is_the_best_of_all_of_up_to_ten_layers(
    seed: int, make_costs: Callable[..., Costs]
) -> None:
    costs = make_costs(seed, most_layers=10)
    forward, push = split_phases(costs)
    found = read_optimum(make_plan("dynacomm", costs), costs)
    assert found == (search_forward(*forward), search_push(*push))


@pytest.mark.parametrize("seed", range(100))
def test_the_plan_equals_the_dynamic_programmes_on_larger_models(
    seed: int, make_costs: Callable[..., Costs]
) -> None:
    costs = make_costs(seed, most_layers=45)
    forward, push = split_phases(costs)
    found = read_optimum(make_plan("dynacomm", costs), costs)
    assert found == (solve_forward_cubic(*forward), solve_push_cubic(*push))
    assert found[0].end_ns == solve_push_quadratic(*forward)
    assert found[1].end_ns == solve_push_quadratic(*push)


@pytest.mark.parametrize("seed", range(100))
def test_the_plan_is_the_best_on_a_shared_link(seed: int, make_costs: Callable[..., Costs]) -> None:
    costs = make_costs(seed, workers=3, shared_link=True)
    forward, push = split_phases(costs)
    found = read_optimum(make_plan("dynacomm", costs), costs)
    assert found == (search_forward(*forward), search_push(*push))


def test_a_single_layer_is_one_segment_each_way() -> None:
    costs = Costs((LayerCosts("only", 1, 5, 7, 11, 13),), 3, 2)
    plan = make_plan("dynacomm", costs)
    assert read_optimum(plan, costs) == (PhaseOptimum(14, 1), PhaseOptimum(27, 1))


def test_a_huge_overhead_leaves_one_segment() -> None:
    layers = tuple(LayerCosts(f"{index}", 1, 5, 5, 5, 5) for index in range(9))
    plan = make_plan("dynacomm", Costs(layers, 10**15, 10**15))
    assert (len(plan.pull), len(plan.push)) == (1, 1)


def test_without_overhead_the_step_is_as_short_as_layer_by_layer() -> None:
    layers = tuple(LayerCosts(f"{index}", 1, 5 + index, 7, 9, 11 - index) for index in range(9))
    costs = Costs(layers, 0, 0)
    best, finest = make_plan("dynacomm", costs), make_plan("layerwise", costs)
    assert evaluate(best, costs).step_ns == evaluate(finest, costs).step_ns


def test_where_nothing_takes_time_one_message_is_enough() -> None:
    layers = tuple(LayerCosts(f"{index}", 1, 0, 0, 0, 0) for index in range(9))
    plan = make_plan("dynacomm", Costs(layers, 0, 0))
    assert (len(plan.pull), len(plan.push)) == (1, 1)


@pytest.mark.parametrize("seed", range(50))
def test_latency_and_server_time_do_not_change_the_plan(
    seed: int, make_costs: Callable[..., Costs]
) -> None:
    far = make_costs(seed, latency_up_ns=10**6, latency_down_ns=10**7, server_ns=10**8)
    assert make_plan("dynacomm", far) == make_plan("dynacomm", make_costs(seed))
