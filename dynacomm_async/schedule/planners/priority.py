"""Fixed slices, front layers first, across the step boundary.

This is the rule of P3 (Jayarajan et al., "Priority-based Parameter Propagation for Distributed DNN
Training", MLSys 2019, arXiv 1905.03960) and of ByteScheduler (Peng et al., "A Generic
Communication Scheduler for Distributed DNN Training Acceleration", SOSP 2019,
doi 10.1145/3341301.3359642): every layer is cut into slices of one size, a slice is a message, and
of the slices that are ready that of the layer nearest to the input leaves first. Parameters
come down as soon as their gradients are up. The size is fixed here, as in P3; ByteScheduler tunes
it while it trains.
"""

from __future__ import annotations

from dynacomm_async.errors import PlanError
from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.dispatch import Policy
from dynacomm_async.schedule.plan import PolicyPlan

__all__ = ["plan_priority"]

_SLICE_NBYTES = 4 * 2**20


def plan_priority(costs: Costs, slice_nbytes: int = _SLICE_NBYTES) -> PolicyPlan:
    """Return the policies that send slices of at most ``slice_nbytes``, none of two layers.

    Only the number of layers matters. P3's own slices hold 50,000 parameters, 200,000 bytes: good
    where a message costs next to nothing, and far worse than no schedule where it does.

    Raises:
        PlanError: ``slice_nbytes`` is below 1.
    """
    if slice_nbytes < 1:
        raise PlanError(f"a slice is {slice_nbytes} bytes, expected at least 1")
    policy = Policy(slice_nbytes, one_layer=True)
    return PolicyPlan("priority", len(costs.layers), pull=policy, push=policy)
