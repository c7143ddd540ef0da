"""Train the paper's large networks at their real sizes, and see what that takes.

What it shows
    VGG-19, GoogLeNet and ResNet-152 on images of 224 x 224 and Inception-v4 on 299 x 299, each with
    a server, an emulated link and one worker as processes of their own. The images are noise and
    the batch is two: what counts here is that 28 to 575 MB of parameters move each way in every
    step, and how much memory each end needs for that.

Run it::

    python demos/large_networks.py                              # all four, four minutes, 5 GB
    python demos/large_networks.py vgg19 --bandwidth 500mbit
    python demos/large_networks.py googlenet --batch 8 --steps 12

What to look for
    The step beside what computing it takes, and beside what pulling all parameters and pushing all
    gradients take on that link: the joint plan hides most of the shorter behind the longer. The
    first steps measure the link under different cuts; the plan is the one that the last step
    followed, and the step printed is the median of those since that plan was chosen. Memory is the
    most that a process ever held: the server's parameters, momentum and what is on its way; the
    worker's parameters, gradients and activations.

What it leaves out
    Learning: a few steps with noise teach nothing. ``train_one_machine.py`` does that.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import resource
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

# Before NumPy is loaded, here and in the processes: one core computes, one sends and receives.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

import dynacomm_async as dc
from dynacomm_async.link import LinkProcess, add_setting_arguments, parse_rate, settings_from
from dynacomm_async.models import build
from dynacomm_async.observe import describe_plan
from dynacomm_async.transport import run
from dynacomm_async.worker import bind_engine, layer_specs, train

NETWORKS = ("vgg19", "googlenet", "inception_v4", "resnet152")
LEAST_STEPS = 7
"""Three to measure the link, one or two until a plan is found, and some that follow it."""

PATIENCE_S = 600


def peak_nbytes() -> int:
    """Return the most memory that this process has held."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else 1024 * held


# -- the two processes: each tells what came of it through its pipe ------------------------------


def serve(model: str, batch: int, steps: int, pipe: Connection) -> None:
    """Serve one run; tell the address first, then losses and memory."""
    network = build(model)

    async def serve_one() -> dc.RunResult:
        async with dc.ParameterServer(
            layer_specs(network),
            workers=1,
            steps=steps,
            training=dc.Training(dc.SGD(0.9), dc.Constant(1e-4)),
            initial=network.initialise(0),
            initial_statistics=network.initial_statistics(),
            settings={"model": model, "batch": batch, "strategy": "joint"},
        ) as server:
            pipe.send((server.address.host, server.address.port))
            return await server.finished()

    result = run(serve_one())
    pipe.send({"losses": result.losses, "nbytes": peak_nbytes()})


def work(address: str, pipe: Connection) -> None:
    """Train until the run ends; tell what the steps were."""

    def layers(settings: Mapping[str, Any]) -> tuple[dc.LayerSpec, ...]:
        return layer_specs(build(settings["model"]))

    with dc.Session(address, layers) as session:
        network, batch = build(session.settings["model"]), session.settings["batch"]

        def noise(step: int) -> tuple[Any, Any]:
            generator = np.random.default_rng(step)
            images = generator.standard_normal((batch, *network.input_shape), np.float32)
            return images, generator.integers(0, network.classes, batch)

        for step in train(session, bind_engine(session, network, batch), noise):
            print(f"  step {step.index}: loss {step.loss:.3f}", flush=True)
        accounts = list(session.metrics.steps)
        chosen, plan = session.plans.changes[-1]
        settled = [each for each in accounts if each.index > chosen] or accounts[-1:]
        pipe.send(
            {
                "steps": len(accounts),
                "strategy": plan.strategy,
                "plan": describe_plan(plan),
                "step_s": statistics.median(each.step_ns for each in settled) / 1e9,
                "compute_s": statistics.median(each.compute_ns for each in settled) / 1e9,
                "nbytes": peak_nbytes(),
            }
        )


# -- one network ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What the two processes told."""

    model: str
    server: Mapping[str, Any]
    worker: Mapping[str, Any]


class ProcessFailed(Exception):
    """A process ended without having told what came of it; its own message is above."""


async def hear(name: str, pipe: Connection) -> Any:
    """Return the next thing that a process tells."""
    try:
        if await asyncio.to_thread(pipe.poll, PATIENCE_S):
            return pipe.recv()
    except EOFError:
        pass
    raise ProcessFailed(f"the {name} has ended, or tells nothing for {PATIENCE_S} seconds")


async def train_one(model: str, args: argparse.Namespace) -> Outcome:
    """Run a server, a link and a worker to the end."""
    # Spawned, not forked: a fork would copy the threads' locks but not the threads, and memory.
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    server = context.Process(target=serve, args=(model, args.batch, args.steps, theirs))
    server.start()
    theirs.close()
    processes = [server]
    try:
        address = await hear("server", mine)
        async with LinkProcess(settings_from(args), address) as link:
            host, port = link.address
            heard, told = context.Pipe(duplex=False)
            worker = context.Process(target=work, args=(f"{host}:{port}", told))
            worker.start()
            told.close()
            processes.append(worker)
            of_worker = await hear("worker", heard)
            of_server = await hear("server", mine)
        return Outcome(model, of_server, of_worker)
    finally:
        for process in processes:
            await asyncio.to_thread(process.join, 2)
            process.kill()
            process.join()


def describe(outcome: Outcome, args: argparse.Namespace) -> str:
    """Return what came of it, in four lines."""
    network, worker = build(outcome.model), outcome.worker
    nbytes, rate = 4 * network.parameters, parse_rate(args.bandwidth)
    way_s = "" if rate is None else f"; {nbytes / rate:.2f} s each way on the link"
    server_gib, worker_gib = (each["nbytes"] / 2**30 for each in (outcome.server, worker))
    return (
        f"  {len(network.layers)} layers, {nbytes / 1e6:,.0f} MB of parameters{way_s}\n"
        f"  plan: {worker['plan']}\n"
        f"  {worker['steps']} steps done, {worker['step_s']:.2f} s each, of which "
        f"{worker['compute_s']:.2f} s computing\n"
        f"  memory at its peak: server {server_gib:.2f} GiB, worker {worker_gib:.2f} GiB"
    )


async def train_all(args: argparse.Namespace) -> None:
    """Train one after the other, and tell of each."""
    for model in args.networks or NETWORKS:
        print(f"{model}, batch {args.batch}, {args.bandwidth}", flush=True)
        outcome = await train_one(model, args)
        print(describe(outcome, args), flush=True)


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(
        description="Train the paper's networks at their real sizes.",
        epilog="example: python demos/large_networks.py resnet152 --bandwidth 500mbit",
    )
    parser.add_argument(
        "networks", nargs="*", metavar="NETWORK", help=f"(default: {' '.join(NETWORKS)})"
    )
    parser.add_argument("--batch", type=int, default=2, metavar="B", help="(default: 2)")
    parser.add_argument(
        "--steps", type=int, default=9, metavar="K", help=f"at least {LEAST_STEPS} (default: 9)"
    )
    add_setting_arguments(parser)
    parser.set_defaults(bandwidth="1gbit", delay="5ms")
    args = parser.parse_args()
    if args.steps < LEAST_STEPS or args.batch < 2:
        parser.error(f"expected --steps of at least {LEAST_STEPS} and --batch of at least 2")
    run(train_all(args))


if __name__ == "__main__":
    try:
        main()
    except (dc.DynaCommError, ProcessFailed) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
