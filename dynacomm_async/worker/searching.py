"""Plans that are found by search: thinking that takes longer than a moment, in its own thread."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from time import sleep
from typing import NamedTuple

from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.estimator import Estimator
from dynacomm_async.schedule.plan import AnyPlan
from dynacomm_async.schedule.planners import keep_joint, plan_dynacomm, plan_joint
from dynacomm_async.schedule.timeline import evaluate, lower_bound_ns
from dynacomm_async.worker.planning import AdaptivePlans

__all__ = ["SearchedPlans"]

_WORSE_PERCENT = 102
"""A plan that is this much farther from the bound than when it was found is looked for anew."""

_MOVED_PERCENT = 5
"""So is one whose bound has moved by this much: what was best then may be far from it now."""


class SearchedPlans(AdaptivePlans):
    """``joint``: a full search in a thread whenever the costs have moved, and between two searches
    the better of the plan found last and DynaComm's for the newest costs.

    Args:
        estimator: the measured costs, kept up to date by the session.
        n_layers: layers of the model.
        workers: how many train together.
    """

    def __init__(self, estimator: Estimator, n_layers: int, *, workers: int = 1) -> None:
        super().__init__("joint", estimator, n_layers, robust=False, workers=workers)
        self._search = partial(plan_joint, pause=_give_way)
        # Written by the searching thread, read by the event loop's: one assignment each.
        self._found: _Found | None = None
        self._thread: threading.Thread | None = None

    def close(self) -> None:
        """Wait for a search under way: a tenth of a second at most."""
        if self._thread is not None:
            self._thread.join()

    def _make(self, costs: Costs) -> AnyPlan:
        found = self._found
        if found is None or found.is_outdated(costs):
            self._search_for(costs)
        if found is None:
            return replace(plan_dynacomm(costs), strategy="joint")
        return keep_joint(found.plan, costs)

    def _search_for(self, costs: Costs) -> None:
        if self._thread is not None and self._thread.is_alive():
            return

        def search() -> None:
            self._found = _Found.judge(self._search(costs), costs)

        self._thread = threading.Thread(target=search, name="plan search", daemon=True)
        self._thread.start()


def _give_way() -> None:
    """Let the interpreter go for a moment: whoever waits for it would be kept for 5 ms, every time.

    Sending, receiving and computing all wait for it, and a search takes a tenth of a second.
    """
    sleep(20e-6)


class _Found(NamedTuple):
    """What a search has found, and how good it was then."""

    plan: AnyPlan
    step_ns: int
    bound_ns: int

    @classmethod
    def judge(cls, plan: AnyPlan, costs: Costs) -> _Found:
        return cls(plan, evaluate(plan, costs).step_ns, lower_bound_ns(costs).step_ns)

    def is_outdated(self, costs: Costs) -> bool:
        now = self.judge(self.plan, costs)
        if 100 * abs(now.bound_ns - self.bound_ns) > _MOVED_PERCENT * self.bound_ns:
            return True
        return 100 * now.step_ns * self.bound_ns > _WORSE_PERCENT * self.step_ns * now.bound_ns
