"""How long planning a step takes: the linear planner beside the two classic dynamic programmes.

Run it::

    python demos/benchmarks/planner.py           # about 3 seconds
    python demos/benchmarks/planner.py --all     # minutes: the cubic one at 1000 layers too
    python demos/benchmarks/planner.py --json

For random models of L layers it plans both directions with each method and checks that all find
the same optimum. Look at the linear column: it is the whole of ``make_plan("dynacomm", costs)``,
fewest segments included, and at 1000 layers it should stay below a millisecond, so that a worker
can plan anew at every step. The others are the plain textbook programmes in pure Python, which
find the optimum's value only; written for NumPy they would be faster by a constant, and still
quadratic and cubic.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from dynacomm_async.schedule import Costs, LayerCosts, evaluate, make_plan
from dynacomm_async.testing import (
    solve_forward_cubic,
    solve_push_cubic,
    solve_push_quadratic,
)

T = TypeVar("T")

SIZES = (10, 22, 152, 1000, 10_000)
LONGEST_QUADRATIC = 1000
LONGEST_CUBIC = 152
LEAST_S = 0.3
MOST_RUNS = 301


def make_costs(n_layers: int, seed: int = 0) -> Costs:
    """Return a random model on a link that takes about as long as its computation."""
    numbers = random.Random(seed)

    def draw_ns() -> int:
        return numbers.randint(0, 10_000_000)

    layers = tuple(
        LayerCosts(
            name=f"layer{index}",
            nbytes=numbers.randint(1, 10_000_000),
            pull_ns=draw_ns(),
            forward_ns=draw_ns(),
            backward_ns=draw_ns(),
            push_ns=draw_ns(),
        )
        for index in range(n_layers)
    )
    return Costs(layers, overhead_up_ns=2_000_000, overhead_down_ns=3_000_000)


def solve_quadratic(costs: Costs) -> int:
    """Return the optimum's step; a pull phase is a push phase played backwards."""
    layers = costs.layers
    forward_ns = solve_push_quadratic(
        [layer.forward_ns for layer in layers],
        [layer.pull_ns for layer in layers],
        costs.overhead_down_ns,
    )
    backward_ns = solve_push_quadratic(
        [layer.backward_ns for layer in layers],
        [layer.push_ns for layer in layers],
        costs.overhead_up_ns,
    )
    return forward_ns + backward_ns


def solve_cubic(costs: Costs) -> int:
    """Return the optimum's step."""
    layers = costs.layers
    forward = solve_forward_cubic(
        [layer.forward_ns for layer in layers],
        [layer.pull_ns for layer in layers],
        costs.overhead_down_ns,
    )
    backward = solve_push_cubic(
        [layer.backward_ns for layer in layers],
        [layer.push_ns for layer in layers],
        costs.overhead_up_ns,
    )
    return forward.end_ns + backward.end_ns


def measure_s(function: Callable[[], T]) -> tuple[float, T]:
    """Return the median duration and the result; repeats unless once takes long enough."""
    durations: list[float] = []
    gc.collect()
    gc.disable()
    try:
        while not durations or (sum(durations) < LEAST_S and len(durations) < MOST_RUNS):
            begin = time.perf_counter()
            result = function()
            durations.append(time.perf_counter() - begin)
    finally:
        gc.enable()
    return statistics.median(durations), result


def measure_size(n_layers: int, *, everything: bool) -> dict[str, float | int | None]:
    """Measure all methods that are feasible at this size and check that they agree."""
    costs = make_costs(n_layers)
    linear_s, plan = measure_s(lambda: make_plan("dynacomm", costs))
    expected_ns = evaluate(plan, costs).step_ns
    row: dict[str, float | int | None] = {
        "layers": n_layers,
        "linear_s": linear_s,
        "quadratic_s": None,
        "cubic_s": None,
    }
    slow = [("quadratic_s", solve_quadratic, LONGEST_QUADRATIC)]
    slow.append(("cubic_s", solve_cubic, 1000 if everything else LONGEST_CUBIC))
    for name, solve, longest in slow:
        if n_layers <= longest:
            row[name], found_ns = measure_s(partial(solve, costs))
            assert found_ns == expected_ns, (n_layers, name, found_ns, expected_ns)
    return row


def print_table(rows: list[dict[str, float | int | None]]) -> None:
    """Print milliseconds and, beside the slow methods, how many times longer they take."""
    print(f"{'layers':>7} {'linear':>12} {'quadratic':>24} {'cubic':>26}")
    for row in rows:
        linear_s = row["linear_s"]
        assert linear_s
        cells = [f"{row['layers']:>7}", f"{linear_s * 1e3:9.3f} ms"]
        for name, width in (("quadratic_s", 24), ("cubic_s", 26)):
            slow_s = row[name]
            text = f"{slow_s * 1e3:.2f} ms ({slow_s / linear_s:,.0f}x)" if slow_s else "-"
            cells.append(f"{text:>{width}}")
        print(" ".join(cells))


def main() -> None:
    """Measure every size, print a table or JSON."""
    parser = argparse.ArgumentParser(description="Time the planner against the slow methods.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--all", action="store_true", help="cubic at 1000 layers: takes minutes")
    arguments = parser.parse_args()
    rows = [measure_size(n_layers, everything=arguments.all) for n_layers in SIZES]
    machine = f"{platform.machine()}, {platform.system()}"
    python = f"{platform.python_implementation()} {platform.python_version()}"
    if arguments.json:
        print(json.dumps({"machine": machine, "python": python, "sizes": rows}))
        return
    print(f"{machine}, {python}; medians, both directions; all methods found the same optimum")
    print_table(rows)
    if not arguments.all:
        print(f"cubic beyond {LONGEST_CUBIC} layers takes minutes in Python: see --all")


if __name__ == "__main__":
    main()
