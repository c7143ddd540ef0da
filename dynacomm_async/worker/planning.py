"""Which plan the next step follows: warm-up first, then the strategy on what was measured."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from dynacomm_async.ranges import Range
from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.dispatch import Dispatcher, OrderedDispatcher, PriorityDispatcher
from dynacomm_async.schedule.estimator import Estimator
from dynacomm_async.schedule.layout import Layout
from dynacomm_async.schedule.plan import AnyPlan, Plan, PolicyPlan, Segment, is_crossing
from dynacomm_async.schedule.planners import find_planner
from dynacomm_async.schedule.replan import Replan, describe_change, describe_estimate
from dynacomm_async.schedule.robust import plan_robust, spread_of
from dynacomm_async.schedule.timeline import evaluate
from dynacomm_async.wire.grid import Grid
from dynacomm_async.wire.messages import DownPolicy, Subscription

__all__ = [
    "WARMUP_STEPS",
    "AdaptivePlans",
    "FixedPlan",
    "Plans",
    "is_worthwhile",
    "subscription",
    "uplink",
]

_log = logging.getLogger("dynacomm_async.worker")

WARMUP_STEPS = 3
"""Steps with different cuts, so that rate and overhead of the link can be told apart."""

_WARMUP = "warm-up"

_WORTHWHILE_PERCENT = 98
"""A new plan replaces the old one only if it promises at most this much of its step time."""

_LOG_LENGTH = 256


class Plans(ABC):
    """Chooses the plan of each step and remembers the choices.

    Attributes:
        changes: ``(step, plan)`` for every step whose plan differs from the one before.
        costs: what the newest thinking rests on; None while there is nothing to think with.
        log: what made a plan give way to another, the last 256 times; empty if nothing ever does.
    """

    def __init__(self) -> None:
        self.changes: list[tuple[int, AnyPlan]] = []
        self._newest = -1
        self.costs: Costs | None = None
        self.log: deque[Replan] = deque(maxlen=_LOG_LENGTH)

    def plan(self, step: int) -> AnyPlan:
        """Return the plan of ``step``; steps come in order, but training may step back."""
        plan = self._choose(step)
        if self.changes and step <= self._newest:  # what followed has not been
            self.changes = [change for change in self.changes if change[0] < step]
        self._newest = step
        if not self.changes or self.changes[-1][1] != plan:
            # Replaced rather than added to: other threads may be reading.
            self.changes = [*self.changes, (step, plan)]
        return plan

    def plan_of(self, step: int) -> AnyPlan:
        """Return the plan that was chosen for a step of the past."""
        changes = self.changes
        return next((plan for first, plan in reversed(changes) if first <= step), changes[0][1])

    def refresh(self) -> None:  # noqa: B027 -- a plan that was made beforehand needs no thought
        """Think again, with what has been measured by now; called between steps.

        Choosing happens on the way to a message and must be quick; thinking happens here.
        """

    def close(self) -> None:  # noqa: B027 -- likewise
        """End what goes on in the background; called when the session ends."""

    @abstractmethod
    def _choose(self, step: int) -> AnyPlan: ...


class AdaptivePlans(Plans):
    """Warm-up steps, then the strategy's plan for what has been measured so far.

    A plan that rests on rates is chosen for those that the estimate leaves possible; see
    :mod:`dynacomm_async.schedule.robust`. Every change of plan is logged (at INFO, to
    ``dynacomm_async.worker``) with what has moved.

    Args:
        strategy: name of a planner.
        estimator: the measured costs, kept up to date by the session.
        n_layers: layers of the model.
        robust: whether ``dynacomm`` reckons with errors of the estimate; other strategies never do.
        workers: how many train together.

    Raises:
        ConfigError: no such strategy.
    """

    def __init__(
        self,
        strategy: str,
        estimator: Estimator,
        n_layers: int,
        *,
        robust: bool = True,
        workers: int = 1,
    ) -> None:
        super().__init__()
        self._planner = find_planner(strategy)
        self._robust = robust and strategy == "dynacomm"
        self._estimator = estimator
        self._n_layers = n_layers
        self._workers = workers
        self._current: AnyPlan | None = None
        self._current_costs: Costs | None = None  # which it was made for
        self._followed: AnyPlan | None = None  # what the log has come to
        self._followed_costs: Costs | None = None

    def refresh(self) -> None:
        """Plan for the newest costs, and keep that plan if it is clearly better than the last."""
        costs = self._estimator.costs()
        if costs is None:
            return
        self.costs = costs = replace(costs, workers=self._workers)
        fresh, current = self._make(costs), self._current
        if current is None or (fresh != current and is_worthwhile(fresh, current, costs)):
            self._current, self._current_costs = fresh, costs

    def _make(self, costs: Costs) -> AnyPlan:
        if not self._robust:
            return self._planner(costs)
        estimator = self._estimator
        return plan_robust(
            costs, spread_of(estimator.down.rate_error), spread_of(estimator.up.rate_error)
        )

    def _choose(self, step: int) -> AnyPlan:
        if step < WARMUP_STEPS:
            return _warmup_plan(step, self._n_layers)
        if self._current is None:
            return _equal_parts("layerwise", self._n_layers, self._n_layers)
        if self._current != self._followed:
            self._tell(step, self._current)
        return self._current

    def _tell(self, step: int, plan: AnyPlan) -> None:
        old, costs = self._followed_costs, self._current_costs
        assert costs is not None, "a plan is made for costs"
        if old is None:
            reason = f"first estimate: {describe_estimate(costs)}"
        else:
            reason = describe_change(old, costs)
        before = self.changes[-1][1] if self.changes else plan
        entry = Replan(step, reason, before, plan, _promises(before, costs), _promises(plan, costs))
        self.log.append(entry)
        self._followed, self._followed_costs = plan, costs
        _log.info("%s", entry)


class FixedPlan(Plans):
    """One plan that was made beforehand; warm-up steps for as long as there is none.

    Attributes:
        fixed: the plan; may be set at any time and holds from the next choice on.

    Args:
        plan: the plan, where there is one already.
        n_layers: layers of the model, where there is none.
        probe: what the warm-up steps after the first three follow; a plan that crosses the
            boundary between steps shows whether both directions have room at once.
    """

    def __init__(
        self,
        plan: AnyPlan | None = None,
        *,
        n_layers: int | None = None,
        probe: AnyPlan | None = None,
    ) -> None:
        super().__init__()
        self.fixed = plan
        self._probe = probe
        self._n_layers = plan.n_layers if plan is not None else n_layers

    def _choose(self, step: int) -> AnyPlan:
        if self.fixed is not None:
            return self.fixed
        if self._probe is not None and step >= WARMUP_STEPS:
            return self._probe
        assert self._n_layers is not None, "FixedPlan needs a plan or the number of layers"
        return _warmup_plan(step, self._n_layers)


def subscription(plan: AnyPlan, version: int, grid: Grid) -> Subscription:
    """Return what to ask of the server for a plan's pull."""
    if isinstance(plan, PolicyPlan):
        pull = plan.pull
        policy = DownPolicy(
            pull.cap_nbytes, pull.threshold_nbytes, pull.whole_layers, pull.one_layer
        )
        return Subscription(version, policy=policy)
    return Subscription(version, _messages(plan.pull, grid), plan.barrier)


def uplink(plan: AnyPlan, grid: Grid, skip: Sequence[Range] = ()) -> Dispatcher:
    """Return the rule by which a plan's gradients leave, without those that are there already.

    In a warm-up step they are held back until all are there, so that the messages leave back to
    back: where computing takes longer than sending none would otherwise tell its overhead.
    """
    if isinstance(plan, PolicyPlan):
        layout = Layout(4 * layer.count for layer in grid.layers)
        return PriorityDispatcher(plan.push, layout, skip)
    return OrderedDispatcher(
        _messages(plan.push, grid),
        n_cells=grid.n_parameter_cells,
        barrier=plan.strategy == _WARMUP,
        skip=skip,
    )


def _messages(segments: Sequence[Segment], grid: Grid) -> tuple[tuple[Range, ...], ...]:
    return tuple((grid.layers_cells(s.first, s.last),) for s in segments)


def _promises(plan: AnyPlan, costs: Costs) -> int:
    return evaluate(plan, costs).step_ns


def is_worthwhile(fresh: AnyPlan, current: AnyPlan, costs: Costs) -> bool:
    """Return whether a new plan promises enough for the old one to give way."""
    if costs.half_duplex and is_crossing(current):
        return True  # where directions take turns, only a barrier shows what each can do alone
    return 100 * _promises(fresh, costs) <= _WORTHWHILE_PERCENT * _promises(current, costs)


def _warmup_plan(step: int, n_layers: int) -> Plan:
    # Twice layer by layer: every message after the first tells the overhead, and a plan of one
    # message, which tells none, has to live on what these steps have told.
    n_parts = n_layers if step % 2 == 0 else (n_layers + 1) // 2
    return _equal_parts(_WARMUP, n_layers, n_parts)


def _equal_parts(name: str, n_layers: int, n_parts: int) -> Plan:
    """Cut the layers into parts of about the same number of layers, both ways."""
    edges = [n_layers * part // n_parts for part in range(n_parts + 1)]
    pull = [Segment(a, b - 1) for a, b in pairwise(edges)]
    return Plan(name, n_layers, tuple(pull), tuple(reversed(pull)))
