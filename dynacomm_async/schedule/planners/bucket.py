"""Buckets of a fixed size, filled in backward order.

This is how PyTorch's DistributedDataParallel groups gradients (Li et al., VLDB 2020,
doi 10.14778/3415478.3415530), without its smaller first bucket; pulls mirror the pushes.
"""

from __future__ import annotations

from dynacomm_async.errors import PlanError
from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.plan import Plan

__all__ = ["plan_bucket"]

_CAP_NBYTES = 25 * 2**20


def plan_bucket(costs: Costs, cap_nbytes: int = _CAP_NBYTES) -> Plan:
    """Return the plan whose segments hold at most ``cap_nbytes``; a larger layer goes alone.

    Only the layers' sizes matter. O(L).

    Raises:
        PlanError: ``cap_nbytes`` is below 1.
    """
    if cap_nbytes < 1:
        raise PlanError(f"a bucket's cap is {cap_nbytes} bytes, expected at least 1")
    cuts: list[int] = []
    held_nbytes = 0
    for layer in range(len(costs.layers) - 1, -1, -1):
        nbytes = costs.layers[layer].nbytes
        if held_nbytes and held_nbytes + nbytes > cap_nbytes:
            cuts.append(layer + 1)
            held_nbytes = 0
        held_nbytes += nbytes
    cuts.reverse()
    return Plan.from_cuts("bucket", len(costs.layers), cuts, cuts)
