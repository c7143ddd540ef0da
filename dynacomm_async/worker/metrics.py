"""What each step of a session was, kept for whoever wants to know."""

from __future__ import annotations

from collections import deque

from dynacomm_async.schedule.account import Expectation, StepAccount, account_for, expect
from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.plan import AnyPlan
from dynacomm_async.wire.messages import Timing

__all__ = ["KEPT_STEPS", "Metrics"]

KEPT_STEPS = 1000
"""Accounts that a session keeps; older ones are forgotten."""


class Metrics:
    """The accounts of a session's last steps. It belongs to the computing thread.

    The cost model is asked only when plan or costs have changed, never at every step.

    Attributes:
        steps: newest last, at most :data:`KEPT_STEPS`.
        expectation: what the newest step's plan promised; None while the costs are not known.
    """

    def __init__(self) -> None:
        self.steps: deque[StepAccount] = deque(maxlen=KEPT_STEPS)
        self.expectation: Expectation | None = None
        self._plan: AnyPlan | None = None  # of the newest step

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
        elif known is None or known.costs is not costs or known.plan != plan:
            self.expectation = expect(plan, costs)
        return self.expectation
