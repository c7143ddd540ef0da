"""What a wrong estimate of the rate costs, and how a plan can be made that minds it less.

Run it::

    python demos/benchmarks/robustness.py           # five seconds
    python demos/benchmarks/robustness.py --json

DynaComm's optimum is optimal for the rate that it was made for. Here that rate is wrong: for the
four networks of the paper, as cost tables over batches, rates, overheads and speeds of machines,
every plan is judged at rates that differ from the estimate by up to 30 % either way, by how much
longer the step is than under the plan made with the truth. Nothing is measured, so the figures are
the same on every machine.

Rows: the optimum of the estimate; the same for a link assumed a tenth faster than estimated; and
the best of five plans, made for five rates around the estimate and chosen by their mean over these
rates, with the outermost 30, 15, 8 or 4 % away. The rates are spread by three standard errors of
the estimate, between 8 and 30 %, in a session: look at how little the wider choices lose where the
estimate is right, and how much the narrow ones lose where it is not.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator

from dynacomm_async.models import build, costs_of
from dynacomm_async.schedule import Costs, Plan, evaluate, make_plan
from dynacomm_async.schedule.robust import plan_robust
from dynacomm_async.schedule.whatif import with_speed

NETWORKS = ("vgg19", "googlenet", "inception_v4", "resnet152")
BATCHES = (4, 16, 64)
RATES_BYTES_PER_S = (12.5e6, 40e6, 125e6, 400e6, 1.25e9)
FLOPS_PER_S = (3e11, 3e12)
OVERHEADS_NS = (100_000, 1_000_000, 5_000_000)
ERRORS = (0.0, 0.03, 0.1, 0.2, 0.3)


def list_tables() -> Iterator[Costs]:
    """Yield every cost table as it was estimated."""
    for network in map(build, NETWORKS):
        for batch in BATCHES:
            for bytes_per_s in RATES_BYTES_PER_S:
                for flops_per_s in FLOPS_PER_S:
                    for overhead_ns in OVERHEADS_NS:
                        yield costs_of(
                            network,
                            batch=batch,
                            flops_per_s=flops_per_s,
                            down_bytes_per_s=bytes_per_s,
                            overhead_ns=overhead_ns,
                        )


def robust(error: int) -> Callable[[Costs], Plan]:
    """Return the planner that reckons with an error of so many thousandths."""
    return lambda costs: plan_robust(costs, error, error)


PLANNERS: dict[str, Callable[[Costs], Plan]] = {
    "the estimate's": lambda costs: make_plan("dynacomm", costs),
    "a tenth faster": lambda costs: make_plan("dynacomm", with_speed(costs, 1 / 0.9)),
    "best of 5, 30 %": robust(300),
    "best of 5, 15 %": robust(150),
    "best of 5, 8 %": robust(80),
    "best of 5, 4 %": robust(40),
}


def measure() -> tuple[int, dict[str, dict[float, list[float]]]]:
    """Return the number of tables, and each planner's losses by the error of the estimate."""
    losses: dict[str, dict[float, list[float]]] = {
        name: {error: [] for error in ERRORS} for name in PLANNERS
    }
    tables = list(list_tables())
    for costs in tables:
        plans = {name: make(costs) for name, make in PLANNERS.items()}
        for error in ERRORS:
            for factor in {1 - error, 1 + error}:
                truth = with_speed(costs, factor)
                best_ns = evaluate(make_plan("dynacomm", truth), truth).step_ns
                for name, plan in plans.items():
                    loss = evaluate(plan, truth).step_ns / best_ns - 1
                    losses[name][error].append(loss)
    return len(tables), losses


def main() -> None:
    """Judge every planner at every error, print a table or JSON."""
    parser = argparse.ArgumentParser(
        description="Judge plans that were made for a wrong rate.",
        epilog="example: python demos/benchmarks/robustness.py --json",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    n_tables, losses = measure()
    rows = [
        {
            "plan": name,
            "errors": [
                {"error": error, "mean_loss": statistics.mean(found), "worst_loss": max(found)}
                for error, found in by_error.items()
            ],
        }
        for name, by_error in losses.items()
    ]
    if args.json:
        print(json.dumps({"tables": n_tables, "rows": rows}))
        return
    print(f"{n_tables} cost tables; loss to the plan made with the truth: mean, worst")
    print(f"{'plan':16}" + "".join(f"{f'rate off by {error:.0%}':>19}" for error in ERRORS))
    for name, by_error in losses.items():
        cells = [
            f"{statistics.mean(found):>10.2%} {max(found):>7.1%} " for found in by_error.values()
        ]
        print(f"{name:16}" + "".join(cells))


if __name__ == "__main__":
    main()
