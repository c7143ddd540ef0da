"""Plans that are found by search: thinking that takes longer than a moment, in its own thread."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from functools import partial
from time import monotonic_ns, sleep, thread_time_ns
from typing import NamedTuple

from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.estimator import Estimator
from dynacomm_async.schedule.plan import AnyPlan, Plan, is_crossing
from dynacomm_async.schedule.planners import plan_joint
from dynacomm_async.schedule.robust import plan_robust, spread_of
from dynacomm_async.schedule.timeline import evaluate, lower_bound_ns
from dynacomm_async.worker.planning import AdaptivePlans, is_worthwhile

__all__ = ["SearchedPlans"]

_log = logging.getLogger("dynacomm_async.worker")

_WORSE_PERCENT = 102
"""A plan that is this much farther from the bound than when it was found is looked for anew."""

_MOVED_PERCENT = 5
"""So is one whose bound has moved by this much: what was best then may be far from it now."""

_EAGER = 8
"""Thoughts, from the first on, that follow each other at once: estimates still settle."""

_SHARE = 100
"""After those, thinking may take one part in so many of the time, unless the link has changed."""


class SearchedPlans(AdaptivePlans):
    """``joint``: the better of a plan found by search and DynaComm's for uncertain rates.

    All judging and searching happens in a thread, one thought at a time; the event loop takes up
    what the last one came to. Until the first has ended, and on a half-duplex link, it is
    DynaComm's plan, but for the few steps that try whether the link is one
    (:class:`~dynacomm_async.schedule.duplex.Duplex`).

    Args:
        estimator: the measured costs, kept up to date by the session.
        n_layers: layers of the model.
        workers: how many train together.
    """

    def __init__(self, estimator: Estimator, n_layers: int, *, workers: int = 1) -> None:
        super().__init__("joint", estimator, n_layers, robust=False, workers=workers)
        self._search = partial(plan_joint, pause=_give_way)
        self._found: _Found | None = None  # the thread's own
        self._thread: threading.Thread | None = None
        # Written by the thread before it ends, read by the loop after that.
        self._thought: tuple[AnyPlan, Costs] | None = None
        self._rest_until_ns = 0
        self._n_thoughts = 0
        # Of the link, when it was thought about last: how often it had changed, and its kind.
        self._link_seen = (0, False)
        self._failed = False

    def close(self) -> None:
        """Wait for a thought under way: a tenth of a second at most."""
        if self._thread is not None:
            self._thread.join()

    def refresh(self) -> None:
        """Take up what has been thought; think on with the newest costs."""
        costs = self._estimator.costs()
        if costs is None:
            return
        half_duplex = costs.half_duplex and not self._estimator.duplex.probing
        self.costs = costs = replace(costs, workers=self._workers, half_duplex=half_duplex)
        if self._is_thinking:
            return
        thought, self._thought = self._thought, None
        if thought is not None:
            self._take_up(*thought)
        plain = self._plan_plain(costs)
        current = self._current
        if current is None or (costs.half_duplex and is_crossing(current)):
            self._take_up(plain, costs)
        self._think(costs, plain)

    def _take_up(self, plan: AnyPlan, costs: Costs) -> None:
        if plan != self._current:
            self._current, self._current_costs = plan, costs

    @property
    def _is_thinking(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _plan_plain(self, costs: Costs) -> Plan:
        up, down = self._estimator.up, self._estimator.down
        plan = plan_robust(costs, spread_of(down.rate_error), spread_of(up.rate_error))
        return replace(plan, strategy="joint")

    def _think(self, costs: Costs, plain: Plan) -> None:
        changes = self._estimator.up.changes + self._estimator.down.changes
        link = (changes, costs.half_duplex)
        rested = self._n_thoughts < _EAGER or monotonic_ns() >= self._rest_until_ns
        if self._failed or not (rested or link != self._link_seen):
            return
        self._n_thoughts += 1
        self._link_seen = link
        current = self._current
        assert current is not None, "there is a plan before there are thoughts"

        def think() -> None:
            began_ns = thread_time_ns()
            try:
                best = self._find(costs, plain)
                if best != current and is_worthwhile(best, current, costs):
                    self._thought = best, costs
            except Exception:
                self._failed = True
                _log.exception("the search for a joint plan failed; steps keep the plan they have")
            cost_ns = thread_time_ns() - began_ns
            self._rest_until_ns = monotonic_ns() + _SHARE * cost_ns

        self._thread = threading.Thread(target=think, name="plan search", daemon=True)
        self._thread.start()

    def _find(self, costs: Costs, plain: Plan) -> AnyPlan:
        if costs.half_duplex:
            return plain
        if self._found is None or self._found.is_outdated(costs):
            self._found = _Found.judge(self._search(costs), costs)
        found = self._found.plan
        return found if _step_ns(found, costs) < _step_ns(plain, costs) else plain


def _give_way() -> None:
    """Let the interpreter go for a moment: whoever waits for it would be kept for 5 ms, every time.

    Sending, receiving and computing all wait for it, and a search takes a tenth of a second.
    """
    sleep(20e-6)


def _step_ns(plan: AnyPlan, costs: Costs) -> int:
    return evaluate(plan, costs).step_ns


class _Found(NamedTuple):
    """What a search has found, and how good it was then."""

    plan: AnyPlan
    step_ns: int
    bound_ns: int

    @classmethod
    def judge(cls, plan: AnyPlan, costs: Costs) -> _Found:
        return cls(plan, _step_ns(plan, costs), lower_bound_ns(costs).step_ns)

    def is_outdated(self, costs: Costs) -> bool:
        now = self.judge(self.plan, costs)
        if 100 * abs(now.bound_ns - self.bound_ns) > _MOVED_PERCENT * self.bound_ns:
            return True
        return 100 * now.step_ns * self.bound_ns > _WORSE_PERCENT * self.step_ns * now.bound_ns
