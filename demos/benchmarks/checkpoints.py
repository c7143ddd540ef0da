"""What checkpoints and the check for poisoned gradients cost a server.

Run it::

    python demos/benchmarks/checkpoints.py                   # a minute, needs 1.2 GB of disk
    python demos/benchmarks/checkpoints.py --dir /mnt/disk   # on the disk that you will use
    python demos/benchmarks/checkpoints.py --quick --json

First a model of 100 MB with its momentum is saved and loaded. Beside the time look at how long the
event loop was held: the longest time that a task which only yields did not get its turn, while the
state was copied on the loop, while it was copied in a thread, and while it was saved in a thread.

Then contributions are checked for NaN, infinite and huge values before they are applied, in turns
with applying alone. Look at what the check adds to applying, beside what np.isfinite and a search
for the smallest and largest value would add; CPU times of one thread, the best of several rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _machine import describe_machine, format_machine

from dynacomm_async.optim import SGD, Adam, Constant, UpdateRule
from dynacomm_async.ranges import Range
from dynacomm_async.server import Checkpoints, CheckpointState, Saver, Store, Training, is_sound
from dynacomm_async.wire.grid import Grid, LayerSpec

MIB = 1 << 18  # floats
RULES: dict[str, UpdateRule] = {"sgd": SGD(), "momentum": SGD(0.9), "adam": Adam()}


def make_state(n_mib: int, step: int = 1) -> CheckpointState:
    """Return the state of a model of ten layers."""
    layers = tuple(LayerSpec(f"layer{i}", n_mib * MIB // 10) for i in range(10))
    n = sum(layer.count for layer in layers)
    values = np.random.default_rng(1).standard_normal(n, dtype=np.float32)
    return CheckpointState(
        run="benchmark",
        step=step,
        incarnation=1,
        layers=layers,
        rule="momentum",
        parameters=values,
        statistics=values[:0],
        optimizer=(values.copy(),),
    )


class Watch:
    """Notes the longest time between two turns of the event loop."""

    def __init__(self) -> None:
        self.longest_s = 0.0

    async def run(self) -> None:
        """Yield for ever."""
        last_s = time.perf_counter()
        while True:
            await asyncio.sleep(0.0005)
            now_s = time.perf_counter()
            self.longest_s = max(self.longest_s, now_s - last_s)
            last_s = now_s

    def take(self) -> float:
        """Return the longest time since the last call."""
        longest_s, self.longest_s = self.longest_s, 0.0
        return longest_s


async def measure_saving(directory: Path, n_mib: int, rounds: int) -> dict[str, float]:
    """Save a state several times; return medians."""
    state = make_state(n_mib)
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    watch = Watch()
    watching = asyncio.create_task(watch.run())
    with Checkpoints(directory) as checkpoints:
        for _ in range(rounds):
            await asyncio.sleep(0.02)
            watch.take()
            await asyncio.sleep(0.2)
            note("idle_hold_s", watch.take())
            state.copy()
            await asyncio.sleep(0.002)
            note("copy_on_loop_hold_s", watch.take())
            begun_s = time.perf_counter()
            own = await asyncio.to_thread(state.copy)
            note("copy_in_thread_s", time.perf_counter() - begun_s)
            note("copy_in_thread_hold_s", watch.take())
            begun_s = time.perf_counter()
            saver = Saver(checkpoints)
            saver.offer(own)
            if not await asyncio.to_thread(saver.close):
                raise SystemExit(f"error: {saver.last_error}")
            note("save_s", time.perf_counter() - begun_s)
            note("save_hold_s", watch.take())
        newest = checkpoints.list()[-1].path
        note("nbytes", sum(path.stat().st_size for path in newest.iterdir()))
        begun_s = time.perf_counter()
        checkpoints.load()
        note("load_s", time.perf_counter() - begun_s)
    watching.cancel()
    return {name: sorted(values)[len(values) // 2] for name, values in found.items()}


def measure_checking(n_mib: int, n_workers: int, rule: str, rounds: int) -> dict[str, Any]:
    """Return CPU microseconds per MiB of the model for applying, and what checks add to it."""
    layers = [LayerSpec("layer", n_mib * MIB)]
    store = Store(Grid(layers), n_workers, Training(RULES[rule], Constant(0.01)))
    rng = np.random.default_rng(2)
    pushed = [1e-3 * rng.standard_normal(n_mib * MIB, dtype=np.float32) for _ in range(n_workers)]
    limit = store.training.max_gradient
    checks: dict[str, Callable[[Any], object]] = {
        "sound": lambda values: is_sound(values, limit),
        "isfinite": lambda values: np.isfinite(values).all(),
        "min_max": lambda values: values.max() <= limit and values.min() >= -limit,
    }
    best = dict.fromkeys(["apply", *checks], float("inf"))
    for _ in range(rounds):
        for name in best:
            for contribution, values in zip(store.contributions, pushed, strict=True):
                np.copyto(contribution, values)
            begun_s = time.thread_time()
            for cell in range(0, n_mib * 64, 64):
                if name in checks:
                    start, stop = store.grid.floats(cell, 64)
                    for contribution in store.contributions:
                        checks[name](contribution[start:stop])
                store.apply(Range(cell, 64), 0)
            best[name] = min(best[name], time.thread_time() - begun_s)
    return {
        "mib": n_mib,
        "workers": n_workers,
        "rule": rule,
        "apply_us_per_mib": best["apply"] * 1e6 / n_mib,
        **{f"{name}_added": best[name] / best["apply"] - 1 for name in checks},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What checkpoints and poison checks cost.")
    parser.add_argument("--dir", type=Path, help="where to save (a temporary directory)")
    parser.add_argument("--quick", action="store_true", help="small and few: figures mean little")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    logging.basicConfig()
    n_mib, rounds = (10, 1) if args.quick else (100, 5)
    directory = Path(tempfile.mkdtemp(prefix="checkpoints-", dir=args.dir))
    try:
        saving = asyncio.run(measure_saving(directory, n_mib, rounds))
    finally:
        shutil.rmtree(directory)
    sizes = [(1, 3)] if args.quick else [(1, 60), (10, 12), (100, 4)]
    checking = [
        measure_checking(size, n_workers, rule, rounds)
        for size, rounds in sizes
        for n_workers in (1, 4)
        for rule in RULES
    ]
    machine = describe_machine()
    if args.json:
        print(json.dumps({"machine": machine, "saving": saving, "checking": checking}))
        return
    print(format_machine(machine))
    print(f"\na model of {n_mib} MiB with momentum: {saving['nbytes'] / 1e6:.0f} MB")
    for name in ("save_s", "load_s", "copy_in_thread_s"):
        print(f"  {name:24}{saving[name]:8.3f} s")
    for name in ("idle", "copy_on_loop", "copy_in_thread", "save"):
        print(f"  loop held, {name:16}{1e3 * saving[name + '_hold_s']:6.1f} ms")
    print("\n MiB workers rule      apply us/MiB   sound  isfinite  min, max")
    for row in checking:
        print(
            f"{row['mib']:4} {row['workers']:7} {row['rule']:9}{row['apply_us_per_mib']:13.0f}"
            f"{row['sound_added']:+8.1%}{row['isfinite_added']:+10.1%}{row['min_max_added']:+10.1%}"
        )


if __name__ == "__main__":
    main()
