from __future__ import annotations

from dynacomm_async.schedule import Costs, LayerCosts, Segment, make_plan


def test_everything_is_one_message_each_way() -> None:
    costs = Costs(tuple(LayerCosts(f"{index}", 1, 1, 1, 1, 1) for index in range(3)), 1, 1)
    plan = make_plan("sequential", costs)
    assert plan.pull == plan.push == (Segment(0, 2),)
