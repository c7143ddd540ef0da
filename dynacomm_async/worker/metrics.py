"""What each step of a session was, kept for whoever wants to know."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import thread_time_ns

from dynacomm_async.schedule.account import Expectation, StepAccount, account_for, expect
from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.plan import AnyPlan
from dynacomm_async.wire.messages import Timing

__all__ = ["KEPT_STEPS", "Metrics"]

KEPT_STEPS = 1000
"""Accounts that a session keeps; older ones are forgotten."""

_SHARE = 200
"""The cost model may take one of so many parts of the time: half a percent."""


class Metrics:
    """The accounts of a session's last steps. It belongs to the computing thread.

    The cost model is asked when the plan has changed. Costs change a little with every step, so
    for them it is asked anew only as often as takes half a percent of the time.

    Args:
        clock: nanoseconds of this thread's processor time.

    Attributes:
        steps: newest last, at most :data:`KEPT_STEPS`.
        expectation: what the newest step's plan promised; None while the costs are not known.
    """

    def __init__(self, clock: Callable[[], int] = thread_time_ns) -> None:
        self.steps: deque[StepAccount] = deque(maxlen=KEPT_STEPS)
        self.expectation: Expectation | None = None
        self._clock = clock
        self._plan: AnyPlan | None = None  # of the newest step
        self._cost_ns = 0  # of asking the cost model the last time
        self._passed_ns = 0  # since then, in steps

    @property
    def latest(self) -> StepAccount | None:
        """The step that ended last."""
        return self.steps[-1] if self.steps else None

    def add(
        self,
        index: int,
        plan: AnyPlan,
        costs: Costs | None,
        timing: Timing | None,
        *,
        step_ns: int,
        compute_ns: int,
        stalled_ns: int,
    ) -> StepAccount:
        """Add the step that has just ended.

        Args:
            index: of the step.
            plan: what it followed.
            costs: the newest; None while not known.
            timing: what the server said of the step before, if it did.
            step_ns, compute_ns, stalled_ns: see :class:`StepAccount`.
        """
        before, self._plan = self._plan, plan
        self._passed_ns += step_ns
        expectation = self._expect(plan, costs)
        account = account_for(
            index,
            step_ns=step_ns,
            compute_ns=compute_ns,
            stalled_ns=stalled_ns,
            waited_ns=0 if timing is None else timing.wait_ns,
            server_ns=0 if timing is None else timing.apply_ns,
            last_slot=None if timing is None else timing.last_slot,
            settled=plan == before,
            expectation=expectation,
        )
        self.steps.append(account)
        return account

    def _expect(self, plan: AnyPlan, costs: Costs | None) -> Expectation | None:
        known = self.expectation
        if costs is None:
            self.expectation = None
        elif known is None or known.plan != plan or (known.costs is not costs and self._may_ask):
            began_ns = self._clock()
            self.expectation = expect(plan, costs)
            self._cost_ns, self._passed_ns = self._clock() - began_ns, 0
        return self.expectation

    @property
    def _may_ask(self) -> bool:
        return self._passed_ns >= _SHARE * self._cost_ns
