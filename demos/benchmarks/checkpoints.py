"""What checkpoints cost a server.

Run it::

    python demos/benchmarks/checkpoints.py                   # a minute, needs 1.2 GB of disk
    python demos/benchmarks/checkpoints.py --dir /mnt/disk   # on the disk that you will use
    python demos/benchmarks/checkpoints.py --quick --json

A model of 100 MB with its momentum is saved and loaded. Beside the time look at how long the
event loop was held: the longest time that a task which only yields did not get its turn, while the
state was copied on the loop, while it was copied in a thread, and while it was saved in a thread.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from _machine import describe_machine, format_machine

from dynacomm_async.server import Checkpoints, CheckpointState, Saver
from dynacomm_async.wire.grid import LayerSpec

MIB = 1 << 18  # floats


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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What checkpoints cost a server.")
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
    machine = describe_machine()
    if args.json:
        print(json.dumps({"machine": machine, "saving": saving}))
        return
    print(format_machine(machine))
    print(f"\na model of {n_mib} MiB with momentum: {saving['nbytes'] / 1e6:.0f} MB")
    for name in ("save_s", "load_s", "copy_in_thread_s"):
        print(f"  {name:24}{saving[name]:8.3f} s")
    for name in ("idle", "copy_on_loop", "copy_in_thread", "save"):
        print(f"  loop held, {name:16}{1e3 * saving[name + '_hold_s']:6.1f} ms")


if __name__ == "__main__":
    main()
