"""Train while the link changes: plans that follow it beside a plan that was made once.

What it shows
    A worker measures its link while it trains and plans anew when the link has moved. Here the
    link has 100 Mbit/s, falls to 20 and comes back, twice under the same training: once with the
    plan thought over after every step, as every session does by itself, and once with the plan that
    the first steps led to, kept to the end.

Run it::

    python demos/adapt.py                        # a minute
    python demos/adapt.py --plot adapt.png       # and a picture; needs matplotlib
    python demos/adapt.py --model resnet20 --data synthetic --batch 64 --phase 15

What to look for
    The log: at which step a change was noticed, what it was taken for, what the old plan would
    have cost and what the new one promises. A change shows in the first messages after it, and is
    believed when five in a row agree; a step or two later the new plan is in use. Then the table:
    at 100 Mbit/s both runs follow about the same plan and take equally long. At 20 the link needs
    longer than the computing, and the old plan starts to send too late. The trained numbers do not
    depend on any of this.

    What there is to gain depends on the setting. With ``--batch 32`` the same network has next to
    nothing to hide transfers behind, and adapting gains nothing at 20 Mbit/s. A plan is tuned for
    the balance of communication and computing, and only where that tips does another one pay.

What it leaves out
    Several workers, of which each would do the same for its own link, and links that wander instead
    of jumping: those are followed through a window of the last messages.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Before NumPy is loaded, here and in the workers: one core computes, one sends and receives.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray

import dynacomm_async as dc
from dynacomm_async.data import Batches, load
from dynacomm_async.link import LinkProcess, LinkSettings, parse_rate
from dynacomm_async.models import build
from dynacomm_async.observe import Canvas
from dynacomm_async.schedule import Estimator
from dynacomm_async.schedule.whatif import with_bandwidth, with_overhead
from dynacomm_async.transport import run
from dynacomm_async.worker import AdaptivePlans, bind_engine, layer_specs, train

SEED = 0
FIRST_THOUGHTS = 6
"""The plan that is made once is made of the steps up to here: three to warm up, three more."""

SETTLED_STEPS = 10
"""So soon after a change the plan in use should be as good as if the change had been told."""

TIMEOUT_S = 300.0
COLOURS = {"adapting": "#0072B2", "made once": "#E69F00"}


class MadeOnce(AdaptivePlans):
    """Thinks in the first steps only."""

    def __init__(self, strategy: str, estimator: Estimator, n_layers: int) -> None:
        super().__init__(strategy, estimator, n_layers)
        self._thoughts = 0

    def refresh(self) -> None:
        self._thoughts += 1
        if self._thoughts <= FIRST_THOUGHTS:
            super().refresh()


# -- a worker, in a process of its own -----------------------------------------------------------


def work(pipe: Connection, address: str, start_ns: int, settings: Mapping[str, Any]) -> None:
    """Train for a while; send when each step began, how long it took, and what was planned."""
    network = build(settings["model"])
    height, width, channels = network.input_shape
    learned, _ = load(
        settings["data"], input_shape=(height, width, channels), classes=network.classes
    )
    batches = Batches(len(learned), workers=1, batch=settings["batch"], seed=SEED)
    kind = AdaptivePlans if settings["adapt"] else MadeOnce

    def batch(step: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        chosen = batches.indices(0, step)
        return learned.images[chosen], learned.labels[chosen]

    def make_plans(grid: Any, estimator: Estimator) -> AdaptivePlans:
        return kind(settings["strategy"], estimator, len(grid.layers))

    with dc.Session(address, layer_specs(network), plans=make_plans) as session:
        engine = bind_engine(session, network, settings["batch"])
        started_s, losses = [], []
        for step in train(session, engine, batch):
            started_s.append((step.started_ns - start_ns) / 1e9)
            losses.append(step.loss)
            if started_s[-1] > settings["seconds"]:
                break
        plans = session.plans
        pipe.send(
            {
                "started_s": started_s,
                "losses": losses,
                "log": list(plans.log),
                "plans": [plans.plan_of(step) for step in range(len(started_s))],
                "costs": plans.costs,
            }
        )


# -- the runs ------------------------------------------------------------------------------------


async def train_once(args: argparse.Namespace, *, adapt: bool) -> dict[str, Any]:
    """Train for three phases of the link; return what the worker found."""
    network = build(args.model)
    fast, slow = parse_rate(args.fast), parse_rate(args.slow)
    link_settings = LinkSettings(
        fast,
        fast,
        overhead_s=args.overhead / 1e3,
        schedule=((0, fast, fast), (args.phase, slow, slow), (2 * args.phase, fast, fast)),
    )
    server = dc.ParameterServer(
        layer_specs(network),
        workers=1,
        steps=1_000_000,  # more than there is time for
        training=dc.Training(dc.SGD(0.9), dc.Constant(0.02)),
        initial=network.initialise(SEED),
        initial_statistics=network.initial_statistics(),
    )
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    async with server, LinkProcess(link_settings, tuple(server.address)) as link:
        settings = {
            "model": args.model,
            "data": args.data,
            "batch": args.batch,
            "strategy": args.strategy,
            "adapt": adapt,
            "seconds": 3 * args.phase,
        }
        arguments = (theirs, str(link.address), time.monotonic_ns(), settings)
        worker = context.Process(target=work, args=arguments, daemon=True)
        worker.start()
        theirs.close()
        try:
            found: dict[str, Any] = await asyncio.to_thread(receive, ours)
        finally:
            worker.kill()
            worker.join()
    return found


def receive(pipe: Connection) -> Any:
    """Return what the worker says."""
    if not pipe.poll(TIMEOUT_S):
        raise dc.DynaCommError(f"the worker said nothing within {TIMEOUT_S:g} s")
    try:
        return pipe.recv()
    except EOFError:
        raise dc.DynaCommError("the worker ended early; its own message is above") from None


# -- what is printed -----------------------------------------------------------------------------


def steps_within(found: Mapping[str, Any], begin_s: float, end_s: float) -> list[int]:
    """Return the steps that began and ended within a time."""
    started_s = found["started_s"]
    return [
        step
        for step in range(len(started_s) - 1)
        if begin_s <= started_s[step] and started_s[step + 1] <= end_s
    ]


def duration_s(found: Mapping[str, Any], step: int) -> float:
    """Return how long a step took."""
    return float(found["started_s"][step + 1] - found["started_s"][step])


def print_log(args: argparse.Namespace, found: Mapping[str, Any]) -> None:
    """Print every change of plan, and where the link changed."""
    lines = [
        (entry.step, f"  {entry}\n      {describe(entry.before)} -> {describe(entry.after)}")
        for entry in found["log"]
    ]
    for number, rate in ((1, args.slow), (2, args.fast)):
        steps = steps_within(found, number * args.phase, 3 * args.phase)
        if steps:
            lines.append((steps[0], f"- the link changes to {rate}, during step {steps[0] - 1}"))
    for _, line in sorted(lines, key=lambda line: line[0]):
        print(line)


def describe(plan: Any) -> str:
    """Say how a plan cuts a step: the layers of each message, in the order sent."""

    def cuts(segments: Sequence[Any]) -> str:
        return " ".join(f"{segment.first}-{segment.last}" for segment in segments)

    return f"pull {cuts(plan.pull)}, push {cuts(plan.push)}"


def print_phases(args: argparse.Namespace, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the median step of each phase under both, and the steps that were done."""
    print(
        f"\n{'link':>10} {'adapting':>20} {'made once':>20} {'gain':>7}   distance to the best plan"
    )
    for number, rate in enumerate((args.fast, args.slow, args.fast)):
        cells, medians = [], []
        for found in runs.values():
            steps = steps_within(found, number * args.phase, (number + 1) * args.phase)
            # The first steps are warm-up, or belong to the change.
            times = [duration_s(found, step) for step in steps[SETTLED_STEPS:]]
            medians.append(statistics.median(times) if times else float("nan"))
            cells.append(f"{medians[-1] * 1e3:7.1f} ms, {len(steps):3} steps")
        distances = ", ".join(
            f"{name} {distance_of_plan(args, found, number, rate)}" for name, found in runs.items()
        )
        gain = medians[1] / medians[0] - 1
        print(f"{rate:>10} {cells[0]:>20} {cells[1]:>20} {gain:>7.1%}   {distances}")
    adapting, once = (len(found["started_s"]) for found in runs.values())
    print(f"in the same time: {adapting} steps adapting, {once} with the plan made once")


def distance_of_plan(
    args: argparse.Namespace, found: Mapping[str, Any], number: int, rate: str
) -> str:
    """Return how much longer a step is under the plan in use than under the best there is.

    Both are predicted, for the rate and overhead that the link was set to and the layers' times
    that the worker measured; the plan is that in use ten steps after the change.
    """
    steps = steps_within(found, number * args.phase, (number + 1) * args.phase)
    bytes_per_s = parse_rate(rate)
    if len(steps) <= SETTLED_STEPS or found["costs"] is None or bytes_per_s is None:
        return "unknown"
    truth = with_bandwidth(found["costs"], bytes_per_s)
    truth = with_overhead(truth, round(args.overhead * 1e6))
    plan = found["plans"][steps[SETTLED_STEPS]]
    best_ns = dc.evaluate(dc.make_plan(args.strategy, truth), truth).step_ns
    return f"{dc.evaluate(plan, truth).step_ns / best_ns - 1:+.1%}"


def plot(args: argparse.Namespace, runs: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw the time of every step over the time it began, and where the plan changed."""
    canvas = Canvas(8.2, 3.6)
    axes = canvas.axes[0][0]
    for name, found in runs.items():
        steps = range(len(found["started_s"]) - 1)
        times_ms = [1e3 * duration_s(found, step) for step in steps]
        axes.plot(found["started_s"][:-1], times_ms, ".-", color=COLOURS[name], lw=1, label=name)
    adapting = runs["adapting"]
    for number, entry in enumerate(adapting["log"]):
        label = "a new plan" if number == 0 else None
        axes.axvline(
            adapting["started_s"][entry.step], color=COLOURS["adapting"], ls=":", label=label
        )
    for number, rate in enumerate((args.fast, args.slow, args.fast)):
        axes.text(number * args.phase, 1.01, f" {rate}", transform=axes.get_xaxis_transform())
        axes.axvline(number * args.phase, color="#777777", lw=0.8)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds since the link was there")
    axes.set_ylabel("step, ms")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    canvas.save(path)


def main() -> None:
    """Train under both, print what came of it."""
    parser = argparse.ArgumentParser(
        description="Train while the link changes from fast to slow and back.",
        epilog="example: python demos/adapt.py --slow 10mbit --plot adapt.png",
    )
    parser.add_argument("--model", default="lenet", help="see dynacomm models (default: lenet)")
    parser.add_argument("--data", default="digits", help="or synthetic (default: digits)")
    parser.add_argument("--batch", type=int, default=1024, metavar="B", help="(default: 1024)")
    parser.add_argument("--strategy", default="dynacomm", help="(default: dynacomm)")
    parser.add_argument("--fast", default="100mbit", metavar="RATE", help="(default: 100mbit)")
    parser.add_argument("--slow", default="20mbit", metavar="RATE", help="(default: 20mbit)")
    parser.add_argument(
        "--overhead", type=float, default=2.0, metavar="MS", help="of a message (default: 2)"
    )
    parser.add_argument(
        "--phase", type=float, default=9.0, metavar="S", help="how long a rate lasts (default: 9)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the steps into a PNG")
    args = parser.parse_args()
    runs = {}
    for name in ("adapting", "made once"):
        print(f"training, plan {name} ...", flush=True)
        runs[name] = run(train_once(args, adapt=name == "adapting"))
    print("\nthe plans of the run that adapts:")
    print_log(args, runs["adapting"])
    print_phases(args, runs)
    shortest = min(len(found["losses"]) for found in runs.values())
    same = runs["adapting"]["losses"][:shortest] == runs["made once"]["losses"][:shortest]
    print(f"losses of the first {shortest} steps: {'identical' if same else 'NOT identical'}")
    if args.plot is not None:
        plot(args, runs, args.plot)
        print(f"written to {args.plot}")


if __name__ == "__main__":
    try:
        main()
    except dc.DynaCommError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
