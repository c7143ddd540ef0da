"""Which plan the next step follows: warm-up first, then the strategy on what was measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise

from dynacomm_async.ranges import Range
from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.estimator import Estimator
from dynacomm_async.schedule.plan import Plan, Segment
from dynacomm_async.schedule.planners import find_planner
from dynacomm_async.schedule.timeline import evaluate
from dynacomm_async.wire.grid import Grid
from dynacomm_async.wire.messages import Subscription

__all__ = [
    "WARMUP_STEPS",
    "AdaptivePlans",
    "FixedPlan",
    "Plans",
    "push_messages",
    "subscription",
]

WARMUP_STEPS = 3
"""Steps with different cuts, so that rate and overhead of the link can be told apart."""

_WORTHWHILE_PERCENT = 98
"""A new plan replaces the old one only if it promises at most this much of its step time."""


class Plans(ABC):
    """Chooses the plan of each step and remembers the choices.

    Attributes:
        changes: ``(step, plan)`` for every step whose plan differs from the one before.
        costs: what the newest thinking rests on; None while there is nothing to think with.
    """

    def __init__(self) -> None:
        self.changes: list[tuple[int, Plan]] = []
        self.costs: Costs | None = None

    def plan(self, step: int) -> Plan:
        """Return the plan of ``step``; steps come in order."""
        plan = self._choose(step)
        if not self.changes or self.changes[-1][1] != plan:
            self.changes.append((step, plan))
        return plan

    def plan_of(self, step: int) -> Plan:
        """Return the plan that was chosen for a step of the past."""
        return next(plan for first, plan in reversed(self.changes) if first <= step)

    def refresh(self) -> None:  # noqa: B027 -- a plan that was made beforehand needs no thought
        """Think again, with what has been measured by now; called between steps.

        Choosing happens on the way to a message and must be quick; thinking happens here.
        """

    @abstractmethod
    def _choose(self, step: int) -> Plan: ...


class AdaptivePlans(Plans):
    """Warm-up steps, then the strategy's plan for what has been measured so far.

    Args:
        strategy: name of a planner.
        estimator: the measured costs, kept up to date by the session.
        n_layers: layers of the model.

    Raises:
        ConfigError: no such strategy.
    """

    def __init__(self, strategy: str, estimator: Estimator, n_layers: int) -> None:
        super().__init__()
        self._planner = find_planner(strategy)
        self._estimator = estimator
        self._n_layers = n_layers
        self._current: Plan | None = None

    def refresh(self) -> None:
        """Plan for the newest costs, and keep that plan if it is clearly better than the last."""
        costs = self._estimator.costs()
        self.costs = costs
        if costs is None:
            return
        fresh, current = self._planner(costs), self._current
        if current is None or current == fresh:
            self._current = fresh
            return
        promised, limit = _promises(fresh, costs), _promises(current, costs) * _WORTHWHILE_PERCENT
        if 100 * promised <= limit:
            self._current = fresh

    def _choose(self, step: int) -> Plan:
        if step < WARMUP_STEPS:
            return _warmup_plan(step, self._n_layers)
        return self._current or _equal_parts("layerwise", self._n_layers, self._n_layers)


class FixedPlan(Plans):
    """One plan that was made beforehand; warm-up steps for as long as there is none.

    Attributes:
        fixed: the plan; may be set at any time and holds from the next choice on.
    """

    def __init__(self, plan: Plan | None = None, *, n_layers: int | None = None) -> None:
        super().__init__()
        self.fixed = plan
        self._n_layers = plan.n_layers if plan is not None else n_layers

    def _choose(self, step: int) -> Plan:
        if self.fixed is not None:
            return self.fixed
        assert self._n_layers is not None, "FixedPlan needs a plan or the number of layers"
        return _warmup_plan(step, self._n_layers)


def subscription(plan: Plan, version: int, grid: Grid) -> Subscription:
    """Return what to ask of the server for a plan's pull."""
    messages = tuple((grid.layers_cells(s.first, s.last),) for s in plan.pull)
    return Subscription(version, messages, barrier=True)


def push_messages(plan: Plan, grid: Grid) -> list[tuple[Range, ...]]:
    """Return the gradient messages of a plan's push, in the order to send."""
    return [(grid.layers_cells(s.first, s.last),) for s in plan.push]


def _promises(plan: Plan, costs: Costs) -> int:
    return evaluate(plan, costs).step_ns


def _warmup_plan(step: int, n_layers: int) -> Plan:
    n_parts = (n_layers, 1, max(1, (n_layers + 1) // 2))[step % WARMUP_STEPS]
    return _equal_parts("warm-up", n_layers, n_parts)


def _equal_parts(name: str, n_layers: int, n_parts: int) -> Plan:
    """Cut the layers into parts of about the same number of layers, both ways."""
    edges = [n_layers * part // n_parts for part in range(n_parts + 1)]
    pull = [Segment(a, b - 1) for a, b in pairwise(edges)]
    return Plan(name, n_layers, tuple(pull), tuple(reversed(pull)))
