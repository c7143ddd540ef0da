"""Train a LeNet on scanned digits with a server and workers on this machine, from Python.

What it shows
    The whole of a training run in the library's own terms: a model and data, a parameter server
    in this process, workers in processes of their own (their matrix products need a core each),
    and an emulated slow link before every worker. ``dynacomm train`` does the same from the
    command line; this is what to start from when you want something of yours in the middle.

Run it::

    python demos/train_one_machine.py                  # under a minute
    python demos/train_one_machine.py --strategy sequential --bandwidth 20mbit
    python demos/train_one_machine.py --model resnet20 --data synthetic --steps 20

What to look for
    The loss falls, and about 97 in 100 digits of the test set are classified rightly. Compare the
    step's time under ``--strategy sequential`` (all parameters, then computing, then all gradients)
    and ``--strategy dynacomm`` on a slow link: the trained parameters are the same, bit for bit
    (look at the hash), the time is not.

What it leaves out
    Augmentation and a tuned schedule (``dynacomm demo`` has them), and other machines (see
    ``train_several_machines.py``). The digits come with scikit-learn; without it choose
    ``--data synthetic``.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import statistics
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from itertools import pairwise
from typing import Any

# Before NumPy is loaded, here and in the workers: one core computes, one sends and receives.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray

import dynacomm_async as dc
from dynacomm_async.data import Batches, Dataset, load
from dynacomm_async.link import LinkProcess, add_setting_arguments, settings_from
from dynacomm_async.models import build
from dynacomm_async.nn import Network
from dynacomm_async.transport import run
from dynacomm_async.worker import bind_engine, layer_specs, train

SEED = 0


def load_run(settings: Mapping[str, Any]) -> tuple[Network, Dataset, Dataset]:
    """Return the model, and the data fitted to its input: to learn from, and to be judged by."""
    network = build(settings["model"])
    height, width, channels = network.input_shape
    learned, judged = load(
        settings["data"], input_shape=(height, width, channels), classes=network.classes
    )
    return network, learned, judged


# -- a worker, in a process of its own -----------------------------------------------------------


def work(address: str) -> None:
    """Train until the run ends; everything but the address comes from the server."""
    loaded: list[tuple[Network, Dataset, Dataset]] = []

    def layers(settings: Mapping[str, Any]) -> tuple[dc.LayerSpec, ...]:
        loaded.append(load_run(settings))
        return layer_specs(loaded[0][0])

    with dc.Session(address, layers) as session:
        network, learned, _ = loaded[0]
        slot, workers = session.welcome.slot, session.welcome.workers
        size = session.settings["batch"]
        batches = Batches(len(learned), workers=workers, batch=size, seed=SEED)

        def batch(step: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
            chosen = batches.indices(slot, step)
            return learned.images[chosen], learned.labels[chosen]

        for _ in train(session, bind_engine(session, network, size), batch):
            pass  # each step is yielded here when it has been computed, with its loss and times


class WorkerFailed(Exception):
    """A worker process ended before the run did; its own message is above."""


async def run_worker(address: str) -> None:
    """Run a worker process to its end; cancelled, end it at once.

    Raises:
        WorkerFailed: it did not end well.
    """
    # Spawned, not forked: a fork would copy the threads' locks but not the threads.
    process = multiprocessing.get_context("spawn").Process(
        target=work, args=(address,), daemon=True
    )
    process.start()
    try:
        await asyncio.to_thread(process.join)
    finally:
        process.kill()
    if process.exitcode:
        raise WorkerFailed(f"a worker ended with exit code {process.exitcode}")


# -- the server ----------------------------------------------------------------------------------


async def train_here(args: argparse.Namespace) -> None:
    """Serve one run and print what comes of it."""
    settings = {
        "model": args.model,
        "data": args.data,
        "batch": args.batch,
        "strategy": args.strategy,
    }
    network, _, judged = load_run(settings)

    def on_step(record: dc.StepRecord) -> None:
        if (record.index + 1) % 20 == 0:
            print(f"step {record.index + 1}: loss {record.loss:.4f}", flush=True)

    server = dc.ParameterServer(
        layer_specs(network),
        workers=args.workers,
        steps=args.steps,
        training=dc.Training(dc.SGD(0.9), dc.Constant(args.rate), weight_decay=1e-4),
        initial=network.initialise(SEED),
        initial_statistics=network.initial_statistics(),
        settings=settings,
        on_step=on_step,
    )
    async with server, AsyncExitStack() as links, asyncio.TaskGroup() as group:
        target = (server.address.host, server.address.port)
        for _ in range(args.workers):
            link = await links.enter_async_context(LinkProcess(settings_from(args), target))
            host, port = link.address
            group.create_task(run_worker(f"{host}:{port}"))
        result = await server.finished()
    print_result(args, network, judged, result)


def print_result(
    args: argparse.Namespace, network: Network, judged: Dataset, result: dc.RunResult
) -> None:
    """Print how good the model is, and what a step took."""
    engine = network.bind(args.batch, parameters=result.parameters, statistics=result.statistics)
    _, right = engine.evaluate(judged.images, judged.labels)
    ended_ns = [record.ended_ns for record in result.records]
    step_s = statistics.median(after - before for before, after in pairwise(ended_ns)) / 1e9
    print(
        f"{args.strategy}: {step_s * 1e3:.1f} ms a step (median), "
        f"test accuracy {right / len(judged):.3f}, "
        f"parameters sha256 {result.parameters_sha256[:16]}"
    )


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(
        description="Train with a server and workers on this machine.",
        epilog="example: python demos/train_one_machine.py --strategy sequential --delay 10ms",
    )
    parser.add_argument("--model", default="lenet", help="see dynacomm models (default: lenet)")
    parser.add_argument("--data", default="digits", help="or synthetic (default: digits)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="(default: 2)")
    parser.add_argument("--steps", type=int, default=200, metavar="K", help="(default: 200)")
    parser.add_argument("--batch", type=int, default=32, metavar="B", help="(default: 32)")
    parser.add_argument("--rate", type=float, default=0.02, metavar="R", help="(default: 0.02)")
    parser.add_argument(
        "--strategy", default="dynacomm", choices=list(dc.PLANNERS), help="(default: dynacomm)"
    )
    add_setting_arguments(parser)
    parser.set_defaults(bandwidth="100mbit", delay="2ms")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps {args.steps}: at least 2 are needed to time one")
    run(train_here(args))


if __name__ == "__main__":
    try:
        main()
    except* (dc.DynaCommError, WorkerFailed) as failed:
        sys.exit(f"error: {failed.exceptions[0]}")
    except* KeyboardInterrupt:
        sys.exit(130)
