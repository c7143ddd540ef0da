from __future__ import annotations

import pytest

from dynacomm_async.errors import PlanError
from dynacomm_async.schedule import Costs, LayerCosts, Segment
from dynacomm_async.schedule.planners import plan_bucket


def make_costs(*sizes: int) -> Costs:
    layers = tuple(LayerCosts(f"{i}", nbytes, 1, 1, 1, 1) for i, nbytes in enumerate(sizes))
    return Costs(layers, 1, 1)


def test_buckets_are_filled_from_the_last_layer() -> None:
    plan = plan_bucket(make_costs(4, 4, 4, 4, 4), cap_nbytes=8)
    assert plan.push == (Segment(3, 4), Segment(1, 2), Segment(0, 0))
    assert plan.pull == plan.push[::-1]


def test_a_layer_above_the_cap_goes_alone() -> None:
    plan = plan_bucket(make_costs(1, 20, 1, 1), cap_nbytes=8)
    assert plan.push == (Segment(2, 3), Segment(1, 1), Segment(0, 0))


def test_the_default_cap_is_25_mib() -> None:
    mib = 2**20
    assert len(plan_bucket(make_costs(10 * mib, 15 * mib)).push) == 1
    assert len(plan_bucket(make_costs(10 * mib, 15 * mib + 1)).push) == 2


def test_a_cap_of_nothing_is_refused() -> None:
    with pytest.raises(PlanError, match="at least 1"):
        plan_bucket(make_costs(1), cap_nbytes=0)
