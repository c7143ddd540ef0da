"""What it costs a server to look for poison: NaN, infinite and huge values in contributions.

Run it::

    python demos/benchmarks/poison.py            # a minute
    python demos/benchmarks/poison.py --quick --json

A server looks at a contribution when it arrives, a mebibyte at a time, while it is in the cache
from being received (here: from being copied into place); it applies a step when all have arrived.
Both are measured in turns, as CPU time of one thread, in microseconds for each MiB of the model:
medians of several rounds. Look at the ratio of the two, beside what np.isfinite and a search for
the smallest and largest value would cost in the same place.

The bar is 2 % of applying. No look at every value can keep to it in NumPy: applying plain SGD is
two passes over the cache, and to look is a third. What the ratio is to a whole step is another
question: at 100 Mbit/s a mebibyte takes 84 ms to arrive.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from _machine import describe_machine, format_machine

from dynacomm_async.optim import SGD, Adam, Constant, UpdateRule
from dynacomm_async.ranges import Range
from dynacomm_async.server import Store, Training, is_sound
from dynacomm_async.wire.grid import Grid, LayerSpec

MIB = 1 << 18  # floats
CELLS = 64  # of a MiB
RULES: dict[str, UpdateRule] = {"sgd": SGD(), "momentum": SGD(0.9), "adam": Adam()}
LIMIT = Training.plain().max_gradient
CHECKS: dict[str, Callable[[Any], object]] = {
    "sound": lambda values: is_sound(values, LIMIT),
    "isfinite": lambda values: np.isfinite(values).all(),
    "min_max": lambda values: values.max() <= LIMIT and values.min() >= -LIMIT,
}


def receive(store: Store, arrived: Any, check: Callable[[Any], object]) -> float:
    """Put a whole contribution of every worker in place; return how long the checks took."""
    checking_s = 0.0
    for contribution in store.contributions:
        for start in range(0, contribution.size, MIB):
            piece = contribution[start : start + MIB]
            np.copyto(piece, arrived)
            begun_s = time.thread_time()
            check(piece)
            checking_s += time.thread_time() - begun_s
    return checking_s


def apply(store: Store) -> float:
    """Apply them all; return how long it took."""
    begun_s = time.thread_time()
    for cell in range(0, store.grid.n_cells, CELLS):
        store.apply(Range(cell, CELLS), 0)
    return time.thread_time() - begun_s


def measure(n_mib: int, n_workers: int, rule: str, rounds: int) -> dict[str, Any]:
    """Return microseconds per MiB of the model, and ratios."""
    grid = Grid([LayerSpec("layer", n_mib * MIB)])
    store = Store(grid, n_workers, Training(RULES[rule], Constant(0.01)))
    arrived = 1e-3 * np.random.default_rng(2).standard_normal(MIB, dtype=np.float32)
    found: dict[str, list[float]] = {name: [] for name in ("apply", *CHECKS)}
    for _ in range(rounds):
        for name, check in CHECKS.items():
            found[name].append(receive(store, arrived, check))
            found["apply"].append(apply(store))
    middle = {name: median(values) * 1e6 / n_mib for name, values in found.items()}
    return {
        "mib": n_mib,
        "workers": n_workers,
        "rule": rule,
        "apply_us_per_mib": middle["apply"],
        "sound_us_per_mib": middle["sound"],
        "ratios": {name: middle[name] / middle["apply"] for name in CHECKS},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What looking for poison costs a server.")
    parser.add_argument("--quick", action="store_true", help="small and few: figures mean little")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    sizes = [(1, 3)] if args.quick else [(1, 40), (16, 5), (64, 3)]
    rows = [
        measure(n_mib, n_workers, rule, rounds)
        for n_mib, rounds in sizes
        for n_workers in (1, 2, 4, 8)
        for rule in RULES
    ]
    machine = describe_machine()
    if args.json:
        print(json.dumps({"machine": machine, "rows": rows}))
        return
    print(format_machine(machine))
    print("\n        us per MiB of the model                ratio to applying")
    print(" MiB workers rule       apply   sound      sound  isfinite  min, max")
    for row in rows:
        ratios = row["ratios"]
        print(
            f"{row['mib']:4} {row['workers']:7} {row['rule']:9}{row['apply_us_per_mib']:7.0f} "
            f"{row['sound_us_per_mib']:7.0f}  {ratios['sound']:9.1%}{ratios['isfinite']:10.1%}"
            f"{ratios['min_max']:10.1%}"
        )


if __name__ == "__main__":
    main()
