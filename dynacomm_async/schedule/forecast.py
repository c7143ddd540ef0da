"""What a run's step will be: every worker plans for itself, and the slowest sets the pace.

Synchronous training joins all workers' gradients, so a step is over when the last worker's have
arrived, and all begin the next one together. A worker that would be done earlier waits. Without a
barrier workers wait for each other cell by cell, which may take longer than the slowest alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.crossing import Crossing, lockstep_ns
from dynacomm_async.schedule.plan import AnyPlan, is_crossing
from dynacomm_async.schedule.timeline import LowerBound, evaluate, lower_bound_ns

__all__ = ["Forecast", "bound_of_all_ns", "forecast", "split"]


@dataclass(frozen=True, slots=True)
class Forecast:
    """The step of a run.

    Attributes:
        plans: what each worker follows; the table's own first.
        own_ns: what each worker's step would be if it trained alone.
        step_ns: the step of all.
    """

    plans: tuple[AnyPlan, ...]
    own_ns: tuple[int, ...]
    step_ns: int

    @property
    def slowest(self) -> int:
        """Whom the others wait for most; the first of equals."""
        return self.own_ns.index(max(self.own_ns))

    @property
    def waits_ns(self) -> tuple[int, ...]:
        """How long each worker waits for the others in a step."""
        return tuple(self.step_ns - own_ns for own_ns in self.own_ns)


def split(costs: Costs) -> tuple[Costs, ...]:
    """Return every worker's own table, without others; one table where all are alike."""
    return (replace(costs, others=()), *costs.others)


def forecast(planner: Callable[[Costs], AnyPlan], costs: Costs) -> Forecast:
    """Return the step of a run whose workers all follow ``planner``, each for its own costs."""
    tables = split(costs)
    plans = tuple(map(planner, tables))
    own_ns = tuple(evaluate(plan, own).step_ns for plan, own in zip(plans, tables, strict=True))
    step_ns = max(own_ns)
    apart = any(map(is_crossing, plans)) and not any(own.half_duplex for own in tables)
    if len(tables) > 1 and apart:
        step_ns = max(step_ns, lockstep_ns([Crossing(own) for own in tables], plans))
    return Forecast(plans, own_ns, step_ns)


def bound_of_all_ns(costs: Costs) -> LowerBound:
    """Return the bound on the run's step: the greatest of the workers' bounds."""
    return max(map(lower_bound_ns, split(costs)), key=lambda bound: bound.step_ns)
