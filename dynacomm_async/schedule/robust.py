"""DynaComm's plan chosen for a link that is not known exactly.

A plan that is the best for the estimated rate may be a bad one for a rate close by: it saves an
overhead where the estimate says that a message arrives just in time, and arrives too late. So five
rates around the estimate are taken for possible, the best plan for each is a candidate, and the
candidate with the least mean over all five is chosen. The phases of a step depend on one direction
of the link each, so each is chosen for itself.

How far the five rates are apart is the caller's estimate of the error. The optimum of the estimate
itself is always among the candidates, and with an error of 0 it is the choice. On the networks of
DynaComm's paper (``demos/benchmarks/robustness.py``) a rate wrong by 30 % costs the optimum of the
estimate 2.0 % on average and 16.7 % at worst, this choice 0.1 % and 3.5 %; where the estimate is
right it loses 0.06 % and 2.1 %, a tenth of that with the smallest error. Choosing by the mean is as
good as by the least worst loss, and needs no second optimum for each rate.
"""

from __future__ import annotations

from collections.abc import Sequence

from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.phase import fewest_cuts, sum_up
from dynacomm_async.schedule.plan import Plan

__all__ = ["LARGEST_ERROR", "LEAST_ERROR", "plan_robust", "spread_of"]

LARGEST_ERROR = 300
"""Per mille of the rate: an estimate that is worth planning by is not further off."""

LEAST_ERROR = 80
"""Per mille: however exact an estimate, the next steps' rate and the computing are not just it."""

_ERRORS_PER_SPREAD = 3

_SCENARIOS = (0, -2, -1, 1, 2)  # halves of the error; on a tie the first stands: the estimate


def plan_robust(
    costs: Costs, down_error: int = LARGEST_ERROR, up_error: int = LARGEST_ERROR
) -> Plan:
    """Return DynaComm's plan that does best on the average of five rates of each direction.

    O(L) with a constant that is about six times that of
    :func:`~dynacomm_async.schedule.planners.dynacomm.plan_dynacomm`; exact in integers, so that
    equal tables give equal plans everywhere.

    Args:
        costs: what has been estimated.
        down_error: by how many thousandths of itself the downlink's rate may be wrong; more than
            :data:`LARGEST_ERROR` counts as that.
        up_error: the same of the uplink.
    """
    layers = costs.layers[::-1]
    share = costs.link_share
    pull_cuts = _choose(
        [layer.forward_ns for layer in layers],
        [layer.pull_ns * share for layer in layers],
        costs.overhead_down_ns * share,
        down_error,
    )
    push_cuts = _choose(
        [layer.backward_ns for layer in layers],
        [layer.push_ns * share for layer in layers],
        costs.overhead_up_ns * share,
        up_error,
    )
    return Plan.from_cuts("dynacomm", len(layers), pull_cuts, push_cuts)


def spread_of(rate_error: float) -> int:
    """Return the error to reckon with, in per mille, for a rate with this relative standard error.

    Three standard errors, but no less than :data:`LEAST_ERROR`, no more than :data:`LARGEST_ERROR`.
    """
    return round(min(max(1000 * _ERRORS_PER_SPREAD * rate_error, LEAST_ERROR), LARGEST_ERROR))


def _choose(
    compute: Sequence[int], transfer: Sequence[int], overhead_ns: int, error: int
) -> list[int]:
    """Return the cuts of a phase, given from its last layer, as layers in ascending order."""
    error = min(max(error, 0), LARGEST_ERROR)
    ready, sent = sum_up(compute), sum_up(transfer)
    if not error:
        return fewest_cuts(ready, sent, overhead_ns)
    scenarios = [
        [total_ns * 2000 // (2000 + halves * error) for total_ns in sent] for halves in _SCENARIOS
    ]
    candidates: list[list[int]] = []
    for scenario in scenarios:
        cuts = fewest_cuts(ready, scenario, overhead_ns)
        if cuts not in candidates:
            candidates.append(cuts)
    if len(candidates) == 1:
        return candidates[0]
    return min(
        candidates,
        key=lambda cuts: sum(_end_ns(ready, scenario, overhead_ns, cuts) for scenario in scenarios),
    )


def _end_ns(
    ready: Sequence[int], sent: Sequence[int], overhead_ns: int, cuts: Sequence[int]
) -> int:
    """Return when a phase given from its last layer ends."""
    n_layers = len(ready) - 1
    now_ns = begin = 0
    for cut in reversed((0, *cuts)):
        end = n_layers - cut
        now_ns = max(now_ns, ready[end]) + overhead_ns + sent[end] - sent[begin]
        begin = end
    return now_ns
