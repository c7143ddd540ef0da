"""A cost table as it would be with another link, batch or number of workers, and who wins then.

What changes, changes for all workers of the table alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isfinite

from dynacomm_async.errors import PlanError
from dynacomm_async.schedule.costs import Costs, LayerCosts
from dynacomm_async.schedule.forecast import bound_of_all_ns, forecast
from dynacomm_async.schedule.planners.table import PLANNERS

__all__ = [
    "CLOSE",
    "Verdict",
    "judge",
    "with_bandwidth",
    "with_batch",
    "with_latency",
    "with_overhead",
    "with_speed",
    "with_workers",
]

CLOSE = 0.01
"""Steps that differ by less, relative to the shorter, are as good as the same."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the strategies make of one cost table.

    Attributes:
        steps_ns: each strategy's step, from the plainest to the most elaborate.
        lower_bound_ns: below every step.
    """

    steps_ns: Mapping[str, int]
    lower_bound_ns: int

    @property
    def best(self) -> list[str]:
        """The fastest strategy, or all of them on a tie, the plainest first."""
        least_ns = min(self.steps_ns.values())
        return [name for name, step_ns in self.steps_ns.items() if step_ns == least_ns]

    @property
    def choice(self) -> str:
        """The plainest strategy whose step is within :data:`CLOSE` of the fastest."""
        limit_ns = min(self.steps_ns.values()) * (1 + CLOSE)
        return next(name for name, step_ns in self.steps_ns.items() if step_ns <= limit_ns)


def judge(costs: Costs) -> Verdict:
    """Plan with every strategy and return what comes of it."""
    steps_ns = {name: forecast(plan, costs).step_ns for name, plan in PLANNERS.items()}
    return Verdict(steps_ns, bound_of_all_ns(costs).step_ns)


def with_bandwidth(
    costs: Costs, down_bytes_per_s: float, up_bytes_per_s: float | None = None
) -> Costs:
    """Return the table for a link of these rates; up is as down where it is left out.

    Raises:
        PlanError: a rate that is not above 0.
    """
    up_bytes_per_s = down_bytes_per_s if up_bytes_per_s is None else up_bytes_per_s
    for rate in (down_bytes_per_s, up_bytes_per_s):
        if not (rate > 0 and isfinite(rate)):
            raise PlanError(f"a rate of {rate} bytes/s, expected a finite one above 0")

    def changed(layer: LayerCosts) -> LayerCosts:
        return replace(
            layer,
            pull_ns=round(layer.nbytes * 1e9 / down_bytes_per_s),
            push_ns=round(layer.nbytes * 1e9 / up_bytes_per_s),
        )

    return _of_all(costs, lambda own: replace(own, layers=tuple(map(changed, own.layers))))


def with_speed(costs: Costs, factor: float) -> Costs:
    """Return the table for a link ``factor`` times as fast in both directions.

    Raises:
        PlanError: a factor that is not above 0.
    """
    if not (factor > 0 and isfinite(factor)):
        raise PlanError(f"a link {factor} times as fast, expected a finite factor above 0")

    def changed(layer: LayerCosts) -> LayerCosts:
        return replace(
            layer, pull_ns=round(layer.pull_ns / factor), push_ns=round(layer.push_ns / factor)
        )

    return _of_all(costs, lambda own: replace(own, layers=tuple(map(changed, own.layers))))


def with_overhead(costs: Costs, overhead_ns: int) -> Costs:
    """Return the table for a link whose messages cost this much beside their bytes."""
    return _of_all(
        costs,
        lambda own: replace(own, overhead_up_ns=overhead_ns, overhead_down_ns=overhead_ns),
    )


def with_latency(costs: Costs, latency_ns: int) -> Costs:
    """Return the table for a link with this latency each way."""
    return _of_all(
        costs, lambda own: replace(own, latency_up_ns=latency_ns, latency_down_ns=latency_ns)
    )


def with_batch(costs: Costs, batch: int) -> Costs:
    """Return the table for another batch size: compute times are taken to be proportional to it.

    Raises:
        PlanError: the table does not say which batch it was measured at.
    """
    if costs.batch is None:
        raise PlanError("the cost table has no batch, so its compute times cannot be scaled")
    if batch < 1:
        raise PlanError(f"a batch of {batch}, expected at least 1")
    old = costs.batch

    def changed(layer: LayerCosts) -> LayerCosts:
        return replace(
            layer,
            forward_ns=round(layer.forward_ns * batch / old),
            backward_ns=round(layer.backward_ns * batch / old),
        )

    return _of_all(
        costs, lambda own: replace(own, layers=tuple(map(changed, own.layers)), batch=batch)
    )


def with_workers(costs: Costs, workers: int) -> Costs:
    """Return the table for another number of workers, all like the table's own.

    The number matters where they share the link.
    """
    return replace(costs, workers=workers, others=())


def _of_all(costs: Costs, change: Callable[[Costs], Costs]) -> Costs:
    return replace(change(costs), others=tuple(map(change, costs.others)))
