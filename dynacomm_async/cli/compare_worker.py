"""One worker process of ``dynacomm compare``: a session for each strategy, in turns.

Reads one line of JSON (the specification) from standard input, reports events on standard
output. All workers take the same turns, so only one strategy is on the link at any moment:

1. Warm-up: a few steps of each strategy's run, cut in different ways. All sessions add to one
   estimator, so that there is one cost table for all strategies.
2. Each strategy's plan is made from that table and kept.
3. Measured blocks: some steps of each strategy, and again, so that slow drifts of the machine
   touch all strategies alike.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, pairwise
from typing import Any

from dynacomm_async.cli.main import run_child
from dynacomm_async.cli.output import emit
from dynacomm_async.cli.tracing import label_recorders
from dynacomm_async.cli.workload import Workload, load_workload
from dynacomm_async.nn import KERNELS
from dynacomm_async.observe import explain_layers, explain_link, explain_plan, explain_steps
from dynacomm_async.schedule import (
    Costs,
    Estimator,
    LinkObserved,
    Policy,
    PolicyPlan,
    crosses,
    expect,
    make_plan,
    summarise,
)
from dynacomm_async.transport import LoopThread
from dynacomm_async.wire.grid import Grid
from dynacomm_async.worker import (
    WARMUP_STEPS,
    FixedPlan,
    Metrics,
    Session,
    TrainedStep,
    bind_engine,
    layer_specs,
    train,
)

__all__ = ["LEAST_STEPS", "main"]

_WARMUP = 2 * WARMUP_STEPS
"""Steps of each strategy before its plan is made."""

LEAST_STEPS = _WARMUP + 4
"""Steps without which nothing could be measured: one block whose first two steps do not count."""

_BLOCKS = 5

_PROBE_MESSAGES = 8
"""Each way, at once, in the warm-up of strategies that use both directions at once."""


@dataclass(slots=True)
class _Runner:
    """One strategy's run in this process."""

    strategy: str
    plans: FixedPlan
    steps: Iterator[TrainedStep]
    rank: int
    metrics: Metrics
    counted: list[int] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    compute_s: list[float] = field(default_factory=list)

    def run_block(self, n_steps: int, *, measure: bool) -> None:
        """Train on; keep the durations of steps that began and ended within the block.

        The first step of a block finds parameters that had time to arrive while others had their
        turn, and may still follow an earlier plan: it does not count, nor does the one before.
        """
        block = list(islice(self.steps, n_steps))
        if not measure:
            return
        for step, after in pairwise(block[1:]):
            if self.plans.plan_of(step.index) == self.plans.fixed:
                self.counted.append(step.index)
                self.step_s.append((after.started_ns - step.started_ns) / 1e9)
                self.compute_s.append(step.compute_ns / 1e9)


def main() -> int:
    """Work through all strategies."""
    specification = json.loads(sys.stdin.readline())
    return run_child("compare worker", lambda: _work(specification))


def _work(specification: Mapping[str, Any]) -> int:
    settings, steps = specification["settings"], specification["steps"]
    workload = load_workload(settings)
    specs = layer_specs(workload.network)
    estimator = Estimator([(spec.name, 4 * spec.count) for spec in specs])
    with contextlib.ExitStack() as stack:
        recorders = stack.enter_context(label_recorders(specification))
        io = stack.enter_context(LoopThread())
        sessions = {
            strategy: stack.enter_context(
                Session(
                    address,
                    specs,
                    run=f"compare-{strategy}",
                    kernels=KERNELS,
                    plans=partial(_make_plans, strategy),
                    estimator=estimator,
                    io=io,
                    recorder=recorders.get(strategy),
                )
            )
            for strategy, address in specification["addresses"].items()
        }
        slowdown = specification["slowdown"]
        runners = [_runner(name, session, workload, slowdown) for name, session in sessions.items()]
        n_done = 0
        total = steps * len(runners)

        def run_blocks(n_steps: int, *, measure: bool) -> None:
            nonlocal n_done
            for runner in runners:
                runner.run_block(n_steps, measure=measure)
                n_done += n_steps
                emit("progress", done=min(n_done, total), total=total)

        run_blocks(_WARMUP, measure=False)
        numbers = {"workers": settings["workers"], "batch": settings["batch"]}
        costs, link = io.submit(_take_costs(estimator, numbers)).result()
        emit(
            "costs",
            costs=costs.to_json(),
            known=link.known,
            explanation=f"{explain_link(costs, link)}\n\n{explain_layers(costs)}",
        )
        # The file is what counts: predictions must be reproducible from what it holds.
        costs = Costs.from_json(costs.to_json())
        for runner in runners:
            runner.plans.costs = costs
            runner.plans.fixed = make_plan(runner.strategy, costs)
        for n_steps in _split(steps - _WARMUP, _BLOCKS):
            run_blocks(n_steps, measure=True)
        for runner in runners:
            for _ in runner.steps:
                raise AssertionError("a run went on after its last step")
            emit("measured", **_summary(runner), explanation=_explain(runner, costs))
    return 0


async def _take_costs(
    estimator: Estimator, numbers: Mapping[str, int]
) -> tuple[Costs, LinkObserved]:
    """Return the table, and how the link is known; on the loop, which the estimator is of."""
    costs = estimator.costs(workers=numbers["workers"], batch=numbers["batch"], guess=True)
    assert costs is not None, "steps have been computed"
    return costs, LinkObserved.by(estimator)


def _make_plans(strategy: str, grid: Grid, estimator: Estimator) -> FixedPlan:
    n_layers = len(grid.layers)
    if not crosses(strategy):
        return FixedPlan(n_layers=n_layers)
    slices = Policy(grid.parameter_nbytes // _PROBE_MESSAGES + 1)
    return FixedPlan(n_layers=n_layers, probe=PolicyPlan("probe", n_layers, slices, slices))


def _runner(strategy: str, session: Session, workload: Workload, slowdown: float) -> _Runner:
    batch = session.settings["batch"]
    engine = bind_engine(
        session,
        workload.network,
        batch,
        smoothing=workload.smoothing,
        threads=workload.threads,
    )
    slot = session.welcome.slot
    batches = partial(workload.batch, slot)
    steps = train(session, engine, batches, slowdown=slowdown, seed=workload.seed)
    plans = session.plans
    assert isinstance(plans, FixedPlan)
    return _Runner(strategy, plans, steps, slot, session.metrics)


def _split(n_steps: int, n_blocks: int) -> list[int]:
    """Return up to ``n_blocks`` numbers of at least 4 with the sum ``n_steps``."""
    n_blocks = max(1, min(n_blocks, n_steps // 4))
    edges = [n_steps * block // n_blocks for block in range(n_blocks + 1)]
    return [end - start for start, end in pairwise(edges)]


def _interval(values: Sequence[float]) -> list[float]:
    """Return a 95 % confidence interval of the median, from the order of the values alone."""
    ordered = sorted(values)
    middle, reach = len(ordered) / 2, 0.98 * len(ordered) ** 0.5
    low, high = round(middle - reach), round(middle + reach)
    return [ordered[max(low, 1) - 1], ordered[min(high, len(ordered) - 1)]]


def _explain(runner: _Runner, costs: Costs) -> str:
    """Return the plan and where the time of the steps that count went, as text."""
    assert runner.plans.fixed is not None
    expectation = expect(runner.plans.fixed, costs)
    counted = set(runner.counted)
    steps = [account for account in runner.metrics.steps if account.index in counted]
    told = explain_steps(summarise(steps), expectation, slot=runner.rank)
    return f"{explain_plan(expectation)}\n\n{told}"


def _summary(runner: _Runner) -> dict[str, Any]:
    return {
        "strategy": runner.strategy,
        "rank": runner.rank,
        "counted": runner.counted,
        "step_s": statistics.median(runner.step_s),
        "interval_s": _interval(runner.step_s),
        "compute_s": statistics.median(runner.compute_s),
        "plans": [[first, plan.to_json()] for first, plan in runner.plans.changes],
    }


if __name__ == "__main__":
    sys.exit(main())
