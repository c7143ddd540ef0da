from __future__ import annotations

from dynacomm_async.schedule import Costs, LayerCosts, Segment, make_plan


def test_every_layer_is_a_message() -> None:
    costs = Costs(tuple(LayerCosts(f"{index}", 1, 1, 1, 1, 1) for index in range(3)), 1, 1)
    plan = make_plan("layerwise", costs)
    assert plan.pull == (Segment(0, 0), Segment(1, 1), Segment(2, 2))
    assert plan.push == plan.pull[::-1]
