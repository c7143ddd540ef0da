"""What it costs to think a plan over while training runs.

Run it::

    python demos/benchmarks/replanning.py            # half a minute
    python demos/benchmarks/replanning.py --tables   # five seconds: no training
    python demos/benchmarks/replanning.py --json

After a step a worker takes in what was measured, fits both directions of the link anew where the
new observations could move the fit, takes the layers' medians, makes the plan for each of five
rates that the estimate leaves possible and weighs it against the one in use. All this happens on
the event loop that also sends and receives, so it must be short: under 5 ms at once, and under
1 % of the time.

*Tables*: that work by itself, for networks of 5 to 156 layers, in processor time: the median and
the longest of many steps. Each step adds the observations that its plan would give. ``cold`` is the
longest of the steps after which the rate was found to have jumped; it counts in ``longest`` too.
``a message`` is what each observation costs when it comes in, fits that it calls for included.

*Training*: real steps through the link emulator, with every call of the thinking timed in the
session. *Share* is all thinking over all of the time. A session thinks after every step unless that
would take more than half a percent of the time: *thoughts* says how often it did. *Longest* is
time on the clock, so on a busy machine it holds other programs' turns as well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

# Before NumPy is loaded, here and in the workers: one core computes, one sends and receives.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from _machine import describe_machine, format_machine

import dynacomm_async as dc
from dynacomm_async.link import LinkProcess, LinkSettings, parse_rate
from dynacomm_async.models import build, costs_of
from dynacomm_async.schedule import Costs, Estimator
from dynacomm_async.transport import run
from dynacomm_async.worker import (
    WARMUP_STEPS,
    AdaptivePlans,
    Plans,
    bind_engine,
    layer_specs,
    train,
)

BATCH = 16
TIMEOUT_S = 120.0
FLOPS_PER_S = 1e11
OVERHEAD_NS = 2_000_000
TABLES = (("lenet", "100mbit"), ("resnet20", "200mbit"), ("resnet152", "1gbit"))
STRATEGIES = ("dynacomm", "ibatch", "layerwise")
N_STEPS = 120
JUMP_EVERY = 40
TRAININGS = (("lenet", "100mbit", 150), ("resnet20", "200mbit", 30))
MOST_SHARE, MOST_S = 0.01, 0.005


# -- the work by itself --------------------------------------------------------------------------


def measure_table(model: str, rate: str, strategy: str) -> dict[str, Any]:
    """Return what thinking costs after many steps; every 40th the rate halves or doubles."""
    bytes_per_s = parse_rate(rate)
    assert bytes_per_s is not None
    tables = [
        costs_of(
            build(model),
            batch=BATCH,
            flops_per_s=FLOPS_PER_S,
            down_bytes_per_s=bytes_per_s / divisor,
            overhead_ns=OVERHEAD_NS,
        )
        for divisor in (1, 2)
    ]
    numbers = random.Random(0)
    estimator = Estimator([(layer.name, layer.nbytes) for layer in tables[0].layers])
    plans = AdaptivePlans(strategy, estimator, len(tables[0].layers))
    durations_s, observing_s, jumps_s = [], [], []
    for step in range(N_STEPS):
        costs = tables[step // JUMP_EVERY % 2]
        changes = estimator.up.changes + estimator.down.changes
        plan = plans.plan(step)
        observations = list(imagine(plan, costs, numbers))
        began_ns = time.thread_time_ns()
        for up, observation in observations:
            (estimator.up if up else estimator.down).observe(*observation)
        observed_ns = time.thread_time_ns()
        estimator.times.observe(*imagine_times(costs, numbers))
        thought_ns = time.thread_time_ns()
        plans.refresh()
        taken_s = (time.thread_time_ns() - thought_ns) / 1e9
        if step > WARMUP_STEPS:
            durations_s.append(taken_s)
            observing_s.append((observed_ns - began_ns) / 1e9 / len(observations))
            if estimator.up.changes + estimator.down.changes > changes:
                jumps_s.append(taken_s)
    plan = plans.plan(N_STEPS)
    return {
        "model": model,
        "layers": len(costs.layers),
        "strategy": strategy,
        "median_s": statistics.median(durations_s),
        "longest_s": max(durations_s),
        "cold_s": max(jumps_s, default=None),
        "observe_s": statistics.median(observing_s),
        "step_s": dc.evaluate(plan, costs).step_ns / 1e9,
        "changes_of_plan": len(plans.log),
    }


def imagine(
    plan: Any, costs: Costs, numbers: random.Random
) -> Iterator[tuple[bool, tuple[int, int, int]]]:
    """Yield direction and observation of every message of a step, with a little noise."""
    for up, segments in ((False, plan.pull), (True, plan.push)):
        for number, segment in enumerate(segments):
            layers = costs.layers[segment.first : segment.last + 1]
            messages = min(number, 1)
            elapsed_ns = sum(layer.pull_ns for layer in layers) * numbers.gauss(1, 0.005)
            elapsed_ns += messages * OVERHEAD_NS + numbers.gauss(0, 50_000)
            nbytes = sum(layer.nbytes for layer in layers)
            yield up, (nbytes, max(0, round(elapsed_ns)), messages)


def imagine_times(costs: Costs, numbers: random.Random) -> tuple[list[int], list[int]]:
    """Return times of every layer, forward and backward, with a little noise."""
    return (
        [round(layer.forward_ns * numbers.uniform(0.98, 1.05)) for layer in costs.layers],
        [round(layer.backward_ns * numbers.uniform(0.98, 1.05)) for layer in costs.layers],
    )


# -- in a training -------------------------------------------------------------------------------


class TimedPlans(Plans):
    """Passes everything on and times the thinking."""

    def __init__(self, inner: Plans) -> None:
        super().__init__()
        self.inner = inner
        self.clock_ns: list[int] = []
        self.processor_ns: list[int] = []

    def refresh(self) -> None:
        began_ns, processor_ns = time.monotonic_ns(), time.thread_time_ns()
        self.inner.refresh()
        self.costs = self.inner.costs
        self.clock_ns.append(time.monotonic_ns() - began_ns)
        self.processor_ns.append(time.thread_time_ns() - processor_ns)

    def _choose(self, step: int) -> Any:
        return self.inner.plan(step)


def work(pipe: Connection, address: str, model: str) -> None:
    """Train to the end; send what thinking took."""
    network = build(model)
    numbers = np.random.default_rng(0)
    images = numbers.standard_normal((BATCH, *network.input_shape)).astype(np.float32)
    labels = numbers.integers(0, network.classes, BATCH)

    def make_plans(grid: Any, estimator: Estimator) -> Plans:
        return TimedPlans(AdaptivePlans("dynacomm", estimator, len(grid.layers)))

    with dc.Session(address, layer_specs(network), plans=make_plans) as session:
        engine = bind_engine(session, network, BATCH)
        started_ns = [
            step.started_ns for step in train(session, engine, lambda _: (images, labels))
        ]
        plans = session.plans
        assert isinstance(plans, TimedPlans)
        pipe.send(
            {
                "thoughts": len(plans.clock_ns),
                "longest_s": max(plans.clock_ns) / 1e9,
                "median_s": statistics.median(plans.processor_ns) / 1e9,
                "step_s": (started_ns[-1] - started_ns[0]) / 1e9 / (len(started_ns) - 1),
                "share": sum(plans.processor_ns) / (time.monotonic_ns() - started_ns[0]),
            }
        )


async def measure_training(model: str, rate: str, steps: int) -> dict[str, Any]:
    """Train for some steps and return what thinking cost."""
    network = build(model)
    bytes_per_s = parse_rate(rate)
    settings = LinkSettings(bytes_per_s, bytes_per_s, overhead_s=OVERHEAD_NS / 1e9)
    server = dc.ParameterServer(
        layer_specs(network),
        workers=1,
        steps=steps,
        training=dc.Training(dc.SGD(), dc.Constant(0.001)),
        initial=network.initialise(0),
        initial_statistics=network.initial_statistics(),
    )
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    async with server, LinkProcess(settings, tuple(server.address)) as link:
        worker = context.Process(target=work, args=(theirs, str(link.address), model), daemon=True)
        worker.start()
        theirs.close()
        try:
            found = await asyncio.to_thread(receive, ours)
        finally:
            worker.kill()
            worker.join()
    return {"model": model, "rate": rate, "steps": steps, **found}


def receive(pipe: Connection) -> Any:
    """Return what the worker says."""
    if not pipe.poll(TIMEOUT_S):
        raise TimeoutError(f"the worker said nothing within {TIMEOUT_S:g} s")
    return pipe.recv()


# -- what is printed -----------------------------------------------------------------------------


def print_tables(rows: Sequence[dict[str, Any]]) -> None:
    """Print milliseconds, and the median as a share of the predicted step."""
    print(
        f"{'model':10} {'layers':>6} {'strategy':10} {'median':>9} {'longest':>9} {'cold':>9} "
        f"{'a message':>10} {'of a step of':>20}"
    )
    for row in rows:
        cold = "-" if row["cold_s"] is None else f"{row['cold_s'] * 1e3:.2f} ms"
        print(
            f"{row['model']:10} {row['layers']:>6} {row['strategy']:10} "
            f"{row['median_s'] * 1e3:6.2f} ms {row['longest_s'] * 1e3:6.2f} ms {cold:>9} "
            f"{row['observe_s'] * 1e6:7.1f} us {row['median_s'] / row['step_s']:8.2%} "
            f"{row['step_s'] * 1e3:8.0f} ms"
        )


def print_trainings(rows: Sequence[dict[str, Any]]) -> None:
    """Print what thinking cost in real steps."""
    print(f"\n{'training':10} {'rate':>8} {'step':>9} {'thoughts':>10} {'median':>9} "
          f"{'longest':>9} {'share':>7}")  # fmt: skip
    for row in rows:
        print(
            f"{row['model']:10} {row['rate']:>8} {row['step_s'] * 1e3:6.1f} ms "
            f"{row['thoughts']:>4} of {row['steps']:<3} {row['median_s'] * 1e3:6.2f} ms "
            f"{row['longest_s'] * 1e3:6.2f} ms {row['share']:7.2%}"
        )
    share = max(row["share"] for row in rows)
    longest_s = max(row["longest_s"] for row in rows)
    print(
        f"largest share {share:.2%}, target under {MOST_SHARE:.0%}: "
        f"{'reached' if share < MOST_SHARE else 'missed'}; longest {longest_s * 1e3:.2f} ms, "
        f"target under {MOST_S * 1e3:g} ms: {'reached' if longest_s < MOST_S else 'missed'}"
    )


def main() -> None:
    """Measure tables and trainings, print them or JSON."""
    parser = argparse.ArgumentParser(
        description="Measure what thinking plans over costs.",
        epilog="example: python demos/benchmarks/replanning.py --tables",
    )
    parser.add_argument("--tables", action="store_true", help="no training")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    machine = describe_machine()
    if not args.json:
        print(format_machine(machine))
    tables = [measure_table(*table, strategy) for table in TABLES for strategy in STRATEGIES]
    if not args.json:
        print_tables(tables)
    trainings = [] if args.tables else [run(measure_training(*each)) for each in TRAININGS]
    if args.json:
        print(json.dumps({"machine": machine, "tables": tables, "trainings": trainings}))
    elif trainings:
        print_trainings(trainings)


if __name__ == "__main__":
    main()
