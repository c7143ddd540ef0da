from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dynacomm_async.schedule import Costs, Crossing, LayerCosts, Plan, evaluate, make_plan
from dynacomm_async.schedule.explicit import search_segments

MakeCosts = Callable[..., Costs]


def test_the_step_that_is_promised_is_the_one_of_the_cost_model(
    make_costs: MakeCosts, make_random_plan: Callable[[int, int], Plan]
) -> None:
    for seed in range(60):
        costs = make_costs(
            seed,
            latency_up_ns=seed % 3,
            latency_down_ns=seed % 5,
            server_ns=seed % 7,
            workers=1 + seed % 3,
            shared_link=seed % 2 == 0,
        )
        begin = make_random_plan(seed, len(costs.layers))
        plan, step_ns = search_segments(costs, [begin])
        assert evaluate(plan, costs).step_ns == Crossing(costs).step_ns(plan) == step_ns, seed
        assert step_ns <= Crossing(costs).step_ns(replace(begin, barrier=False)), seed


def test_a_layer_that_is_worth_waiting_for_is_waited_for() -> None:
    # The front layer's gradient is there just after the large one's: no policy by size waits.
    layers = (
        LayerCosts("front", 100, 100, 500, 10, 100),
        LayerCosts("large", 1000, 1000, 0, 10, 1000),
    )
    plan, _ = search_segments(Costs(layers, 1, 1))
    assert [segment.first for segment in plan.push] == [0, 1]
    assert evaluate(plan, Costs(layers, 1, 1)).step_ns == 20 + 101 + 1001 + 1001


def test_one_layer_is_one_message_each_way() -> None:
    costs = Costs((LayerCosts("a", 1, 2, 3, 5, 7),), 1, 1)
    plan, step_ns = search_segments(costs, [make_plan("sequential", costs)])  # type: ignore[list-item]
    assert (len(plan.push), len(plan.pull), step_ns) == (1, 1, 5 + 8 + 3 + 3)
