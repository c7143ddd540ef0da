"""What input costs a step: shuffling, normalising, cropping and mirroring, in line and ahead of it.

Run it::

    python demos/benchmarks/input.py                # half a minute
    python demos/benchmarks/input.py --json

ResNet-20 is trained on noise in the form of CIFAR-10 (50,000 images of 3 planes of 32 x 32 bytes),
in one process and without a server. Every epoch is shuffled anew; images are normalised, moved by
up to four pixels and mirrored every other time. Steps are taken in turns with one and the same
batch, with each step's batch made in line, and with each step's batch made by the thread that makes
them a step ahead, as workers do.

Columns: the median step; what it takes longer than with one batch; and how long the computing
thread was kept by the input: all of making the batch, or what it waited for the thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from functools import partial
from time import perf_counter

# Before NumPy is loaded: one core computes, the other is for the thread that makes batches.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from _machine import describe_machine, format_machine
from numpy.typing import NDArray

from dynacomm_async.data import Ahead, Batches, parse_augmentation
from dynacomm_async.data.pixels import Normalisation, PreparedImages
from dynacomm_async.models import build

SEED = 0
IMAGES = 50_000
WARMUP = 3
BLOCK = 5
"""Steps of each kind before it is the next one's turn."""

Batch = tuple[NDArray[np.float32], NDArray[np.int64]]


def make_source(batch: int, augment: str) -> Callable[[int], Batch]:
    """Return the function from a step to its batch."""
    generator = np.random.default_rng(SEED)
    planes = generator.integers(0, 256, (IMAGES, 3, 32, 32), np.uint8)
    scale = Normalisation((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
    stored = PreparedImages(planes.transpose(0, 2, 3, 1), scale, (32, 32, 3), "noise")
    labels = generator.integers(0, 10, IMAGES)
    batches = Batches(IMAGES, workers=1, batch=batch, seed=SEED)
    augmentation = parse_augmentation(augment)

    def make(step: int) -> Batch:
        indices, epoch = batches.indices(0, step), step // batches.steps_per_epoch
        images = augmentation.take(stored, indices, seed=SEED, epoch=epoch)
        return images, labels[indices]

    return make


def measure(batch: int, augment: str, n_steps: int) -> dict[str, dict[str, float]]:
    """Return the median step and wait for input of each kind, in seconds."""
    network = build("resnet20")
    engine = network.bind(batch, network.initialise(SEED))
    make = make_source(batch, augment)
    same = make(0)
    with Ahead(make, 2 * n_steps) as ahead:
        kinds = {"one batch": lambda step: same, "in line": make, "a step ahead": ahead.take}
        for step in range(WARMUP):
            engine.step(*ahead.take(step))
        taken = {name: partial(run_step, engine.step, take) for name, take in kinds.items()}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
        for first in range(WARMUP, WARMUP + n_steps, BLOCK):
            for name, run in taken.items():
                times[name] += [run(step) for step in range(first, first + BLOCK)][1:]
    return {
        name: {
            "step_s": statistics.median(whole for whole, _ in rows),
            "input_s": statistics.median(waited for _, waited in rows),
        }
        for name, rows in times.items()
    }


def run_step(
    compute: Callable[..., float], take: Callable[[int], Batch], step: int
) -> tuple[float, float]:
    """Return how long a step took, and how long its input of that."""
    began = perf_counter()
    images, labels = take(step)
    ready = perf_counter()
    compute(images, labels)
    return perf_counter() - began, ready - began


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(
        description="What input costs a training step of ResNet-20.",
        epilog="example: python demos/benchmarks/input.py --batch 16",
    )
    parser.add_argument("--batch", type=int, default=32, help="(default: 32)")
    parser.add_argument("--augment", default="crop:4,flip", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of each kind (default: 60)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    machine = describe_machine()
    rows = measure(args.batch, args.augment, args.steps)
    if args.json:
        print(json.dumps({"machine": machine, "batch": args.batch, "rows": rows}))
        return
    print(format_machine(machine))
    print(f"ResNet-20, batch {args.batch}, 32 x 32 x 3, {args.augment}\n")
    print(f"{'input':14}{'step, ms':>10}{'longer':>9}{'kept by input, ms':>20}{'of the step':>13}")
    plain = rows["one batch"]["step_s"]
    for name, row in rows.items():
        longer, share = row["step_s"] / plain - 1, row["input_s"] / row["step_s"]
        print(
            f"{name:14}{1e3 * row['step_s']:10.1f}{longer:9.1%}{1e3 * row['input_s']:20.3f}"
            f"{share:13.2%}"
        )


if __name__ == "__main__":
    main()
