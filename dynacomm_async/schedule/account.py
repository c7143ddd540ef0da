"""Where the time of a step went: what was measured, beside what the cost model says of it.

A step lasts from the moment its worker asks for the first parameters to the same moment of the
next step. The computing thread spends it on four things, which add up to it:

    compute   in the layers
    stalled   waiting for parameters: for other workers, for the server, the rest for the link
    own       anything else: the next batch, the loss, handing gradients over

The tail of a step's push falls into the next step's wait, as it does in every steady run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dynacomm_async.errors import PlanError
from dynacomm_async.schedule.costs import Costs
from dynacomm_async.schedule.estimator import Estimator
from dynacomm_async.schedule.plan import AnyPlan
from dynacomm_async.schedule.replan import Replan
from dynacomm_async.schedule.timeline import LowerBound, Timeline, evaluate, lower_bound_ns

__all__ = [
    "Expectation",
    "LinkObserved",
    "StepAccount",
    "Summary",
    "WorkerReport",
    "account_for",
    "expect",
    "summarise",
]

_LEAST_STEPS = 8
"""Steps under one plan that say more than all steps under several plans do."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the cost model says of a plan; made by :func:`expect`.

    Attributes:
        plan: what is sent when.
        costs: what it was judged by.
        timeline: one step.
        bound: below every step, whatever the plan.
    """

    plan: AnyPlan
    costs: Costs
    timeline: Timeline
    bound: LowerBound


def expect(plan: AnyPlan, costs: Costs) -> Expectation:
    """Return what a step under ``plan`` will be. O(L).

    Raises:
        PlanError: the plan is for another number of layers.
    """
    return Expectation(plan, costs, evaluate(plan, costs), lower_bound_ns(costs))


@dataclass(frozen=True, slots=True)
class StepAccount:
    """Where the time of one step of one worker went; made by :func:`account_for`.

    Attributes:
        index: the step.
        step_ns: the whole of it.
        compute_ns: in the layers.
        stalled_ns: waiting for parameters.
        waited_ns: of that, waiting for other workers' gradients of the step before.
        server_ns: of that, waiting for the server to apply them.
        last_slot: the worker whose gradients came last; None where the server did not say.
        settled: whether the step before followed the same plan; the first step is not settled.
        predicted_ns: the step by the cost model; None while the costs are not known.
        busy_ns: how long the plan occupies the links, both directions together; None likewise.
        bound: below every step by the cost model; None likewise.
    """

    index: int
    step_ns: int
    compute_ns: int
    stalled_ns: int
    waited_ns: int
    server_ns: int
    last_slot: int | None
    settled: bool
    predicted_ns: int | None
    busy_ns: int | None
    bound: LowerBound | None

    @property
    def exposed_ns(self) -> int:
        """How long the worker waited for the link: communication that nothing hid."""
        return self.stalled_ns - self.waited_ns - self.server_ns

    @property
    def own_ns(self) -> int:
        """What neither computing nor waiting for parameters took."""
        return self.step_ns - self.compute_ns - self.stalled_ns

    @property
    def hidden_fraction(self) -> float | None:
        """The share of the links' busy time that cost the step nothing.

        1 - (step - compute) / busy, where waiting for other workers is no part of the step, for
        it is no transfer's fault. Below 0 where latency and other waits cost more than all overlap
        saves; 0 where nothing is sent; None while not known.
        """
        return _hidden(self.step_ns - self.waited_ns - self.compute_ns, self.busy_ns)

    @property
    def certificate(self) -> float | None:
        """The step over its lower bound: 1 is the best possible; None while not known."""
        if self.bound is None or not self.bound.step_ns:
            return None
        return self.step_ns / self.bound.step_ns


def account_for(
    index: int,
    *,
    step_ns: int,
    compute_ns: int,
    stalled_ns: int,
    waited_ns: int = 0,
    server_ns: int = 0,
    last_slot: int | None = None,
    settled: bool = False,
    expectation: Expectation | None = None,
) -> StepAccount:
    """Return a step's account.

    The server's two times are what it saw. Of them only what the worker had to wait for counts:
    they may have passed while it made its next batch, or computed. Likewise of computing and
    waiting what fits into the step counts: clocks are read one after the other, and a caller may
    begin the next step late.

    Raises:
        PlanError: a negative time.
    """
    parts = (step_ns, compute_ns, stalled_ns, waited_ns, server_ns)
    if min(parts) < 0:
        raise PlanError(
            f"step {index}: {compute_ns} ns of computing and {stalled_ns} ns of waiting in "
            f"{step_ns} ns, with {waited_ns} ns for others and {server_ns} ns at the server; "
            "expected no negative time"
        )
    compute_ns = min(compute_ns, step_ns)
    stalled_ns = min(stalled_ns, step_ns - compute_ns)
    waited_ns = min(waited_ns, stalled_ns)
    return StepAccount(
        index=index,
        step_ns=step_ns,
        compute_ns=compute_ns,
        stalled_ns=stalled_ns,
        waited_ns=waited_ns,
        server_ns=min(server_ns, stalled_ns - waited_ns),
        last_slot=last_slot,
        settled=settled,
        predicted_ns=None if expectation is None else expectation.timeline.step_ns,
        busy_ns=None if expectation is None else expectation.timeline.busy_ns,
        bound=None if expectation is None else expectation.bound,
    )


@dataclass(frozen=True, slots=True)
class LinkObserved:
    """What is known of a worker's link.

    Attributes:
        known: whether both rates and overheads can be told; if not, they are guesses.
        n_down: messages that the downlink's rate and overhead were fitted to, and older ones.
        n_up: likewise of the uplink.
        half_duplex: whether both directions take turns on one medium; None while both have not
            been busy at once for long enough to tell.
    """

    known: bool
    n_down: int
    n_up: int
    half_duplex: bool | None = None

    @classmethod
    def by(cls, estimator: Estimator) -> LinkObserved:
        """Return what an estimator has come to know."""
        up, down = estimator.up, estimator.down
        return cls(up.known and down.known, down.n_observed, up.n_observed, estimator.duplex.half)


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """All that explains how one worker spent its time.

    Attributes:
        slot: its rank.
        workers: how many ranks the run has.
        expectation: what the plan in use promises by the newest costs; None if nothing is known.
        link: what the costs of the link rest on.
        summary: a typical step; None if no step followed the same plan as the one before.
        replans: what made a plan give way to another, oldest first.
    """

    slot: int
    workers: int
    expectation: Expectation | None
    link: LinkObserved
    summary: Summary | None
    replans: tuple[Replan, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a typical step was; made by :func:`summarise`.

    The parts are means over the middle half of the steps, by duration: they add up, and the few
    steps that something else on the machine held up do not show.

    Attributes:
        first, last: indices of the first and the last step that count.
        n_steps: how many count.
        median_ns: the median step.
        low_ns, high_ns: half of the steps lie between these.
        step_ns: the sum of the next five.
        compute_ns, exposed_ns, waited_ns, server_ns, own_ns: as in :class:`StepAccount`.
        predicted_ns: the median of what was predicted.
        busy_ns: how long the links are occupied.
        bound: the lower bound whose step is the median.
        last_slots: who came last in how many steps, most often first.
    """

    first: int
    last: int
    n_steps: int
    median_ns: int
    low_ns: int
    high_ns: int
    step_ns: int
    compute_ns: int
    exposed_ns: int
    waited_ns: int
    server_ns: int
    own_ns: int
    predicted_ns: int | None
    busy_ns: int | None
    bound: LowerBound | None
    last_slots: tuple[tuple[int, int], ...]

    @property
    def hidden_fraction(self) -> float | None:
        """As in :class:`StepAccount`, of the typical step."""
        return _hidden(self.idle_ns, self.busy_ns)

    @property
    def idle_ns(self) -> int:
        """How much longer than its computing the step is, without waiting for other workers."""
        return self.step_ns - self.waited_ns - self.compute_ns

    @property
    def certificate(self) -> float | None:
        """The median step over its lower bound; None while not known."""
        if self.bound is None or not self.bound.step_ns:
            return None
        return self.median_ns / self.bound.step_ns


def summarise(accounts: Iterable[StepAccount]) -> Summary | None:
    """Return what is typical of the settled steps; None if there are none.

    The steps since the last change of plan count, or all if those are few.

    Args:
        accounts: in the order of the steps.
    """
    every = list(accounts)
    settled = [account for account in every if account.settled]
    if not settled:
        return None
    changes = [place for place, account in enumerate(every) if not account.settled]
    latest = every[changes[-1] + 1 :] if changes else every
    counted = latest if len(latest) >= _LEAST_STEPS else settled
    by_time = sorted(counted, key=lambda account: account.step_ns)
    quarter = len(by_time) // 4
    middle = by_time[quarter : len(by_time) - quarter]
    parts = {
        name: _mean([getattr(account, name) for account in middle])
        for name in ("compute_ns", "exposed_ns", "waited_ns", "server_ns", "own_ns")
    }
    bounds = [account.bound for account in counted if account.bound is not None]
    last_slots = Counter(account.last_slot for account in counted if account.last_slot is not None)
    return Summary(
        first=counted[0].index,
        last=counted[-1].index,
        n_steps=len(counted),
        median_ns=by_time[(len(by_time) - 1) // 2].step_ns,
        low_ns=middle[0].step_ns,
        high_ns=middle[-1].step_ns,
        step_ns=sum(parts.values()),
        **parts,
        predicted_ns=_median([account.predicted_ns for account in counted]),
        busy_ns=_median([account.busy_ns for account in counted]),
        bound=sorted(bounds)[(len(bounds) - 1) // 2] if bounds else None,
        last_slots=tuple(last_slots.most_common()),
    )


def _hidden(idle_ns: int, busy_ns: int | None) -> float | None:
    if busy_ns is None:
        return None
    return 1 - idle_ns / busy_ns if busy_ns else 0.0


def _mean(values: Sequence[int]) -> int:
    return round(sum(values) / len(values))


def _median(values: Iterable[int | None]) -> int | None:
    known = sorted(value for value in values if value is not None)
    return known[(len(known) - 1) // 2] if known else None
