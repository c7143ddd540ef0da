"""What a run's step will be: every worker plans for itself, and the slowest sets the pace.

Synchronous training joins all workers' gradients, so a step is over when the last worker's have
arrived, and all begin the next one together. A worker that would be done earlier waits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.plan import AnyPlan
from dynacomm_async.schedule.timeline import LowerBound, evaluate, lower_bound_ns

__all__ = ["Forecast", "bound_of_all_ns", "forecast", "split"]


@dataclass(frozen=True, slots=True)
class Forecast:
    """The step of a run.

    Attributes:
        own_ns: what each worker's step would be if it trained alone; the table's own first.
    """

    own_ns: tuple[int, ...]

    @property
    def step_ns(self) -> int:
        """The step of all."""
        return max(self.own_ns)

    @property
    def slowest(self) -> int:
        """Whom the others wait for; the first of equals."""
        return self.own_ns.index(self.step_ns)

    @property
    def waits_ns(self) -> tuple[int, ...]:
        """How long each worker waits for the slowest in a step."""
        return tuple(self.step_ns - own_ns for own_ns in self.own_ns)


def split(costs: Costs) -> tuple[Costs, ...]:
    """Return every worker's own table, without others; one table where all are alike."""
    return (replace(costs, others=()), *costs.others)


def forecast(planner: Callable[[Costs], AnyPlan], costs: Costs) -> Forecast:
    """Return the step of a run whose workers all follow ``planner``, each for its own costs."""
    return Forecast(tuple(evaluate(planner(own), own).step_ns for own in split(costs)))


def bound_of_all_ns(costs: Costs) -> LowerBound:
    """Return the bound on the run's step: the greatest of the workers' bounds."""
    return max(map(lower_bound_ns, split(costs)), key=lambda bound: bound.step_ns)
