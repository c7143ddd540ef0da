"""DynaComm's optimum of both phases of a step, found in linear time.

The problem is DynaComm's (Cai et al., IEEE JSAC 40(2):611-625, 2022,
doi 10.1109/JSAC.2021.3118419, arXiv 2101.07968), whose own dynamic programme takes O(L**3).
"""

from __future__ import annotations

from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.phase import fewest_cuts, sum_up
from dynacomm_async.schedule.plan import Plan

__all__ = ["plan_dynacomm"]


def plan_dynacomm(costs: Costs) -> Plan:
    """Return the plan with the shortest step of all plans that have a barrier.

    Of the plans that reach it, each direction has the fewest segments possible: fewer messages
    depend less on a well estimated overhead. O(L) time and memory, exact.
    """
    layers = costs.layers[::-1]
    share = costs.link_share
    pull_cuts = fewest_cuts(
        sum_up([layer.forward_ns for layer in layers]),
        sum_up(_scale([layer.pull_ns for layer in layers], share)),
        costs.overhead_down_ns * share,
    )
    push_cuts = fewest_cuts(
        sum_up([layer.backward_ns for layer in layers]),
        sum_up(_scale([layer.push_ns for layer in layers], share)),
        costs.overhead_up_ns * share,
    )
    return Plan.from_cuts("dynacomm", len(layers), pull_cuts, push_cuts)


def _scale(values: list[int], factor: int) -> list[int]:
    return values if factor == 1 else [value * factor for value in values]
