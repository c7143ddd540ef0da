from __future__ import annotations

from collections.abc import Callable

import pytest

from dynacomm_async.errors import PlanError
from dynacomm_async.schedule import Costs, LayerCosts, Policy, evaluate
from dynacomm_async.schedule.planners import plan_priority


def test_slices_hold_one_layer_and_the_front_ones_leave_first() -> None:
    layers = (
        LayerCosts("a", 40_000, 40, 1, 1, 40),
        LayerCosts("b", 10_000, 10, 1, 1, 10),
        LayerCosts("c", 100_000, 100, 1, 1, 100),
    )
    plan = plan_priority(Costs(layers, 0, 0), slice_nbytes=3 * 16_384)
    pushes = [t for t in evaluate(plan, Costs(layers, 0, 0)).transfers if t.direction == "push"]
    assert [t.ranges for t in pushes] == [
        ((50_000, 49_152),),  # nothing else was ready yet
        ((0, 40_000),),
        ((40_000, 10_000),),
        ((99_152, 49_152),),
        ((148_304, 1_696),),
    ]


def test_both_directions_send_slices_of_the_same_size(make_costs: Callable[..., Costs]) -> None:
    plan = plan_priority(make_costs(3), slice_nbytes=5)
    assert plan.pull == plan.push == Policy(5, one_layer=True)
    assert plan.strategy == "priority"


def test_slices_of_nothing_are_refused(make_costs: Callable[..., Costs]) -> None:
    with pytest.raises(PlanError, match="a slice is 0 bytes, expected at least 1"):
        plan_priority(make_costs(3), slice_nbytes=0)
