"""The default parameter server: everything in one message each way, nothing overlaps."""

from __future__ import annotations

from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.plan import Plan

__all__ = ["plan_sequential"]


def plan_sequential(costs: Costs) -> Plan:
    """Return the plan with one segment each way; only the number of layers matters."""
    return Plan.from_cuts("sequential", len(costs.layers), (), ())
