"""What the plan across the step boundary gains: joint beside DynaComm, real processes and links.

What it shows
    Two networks, one of 20 layers and one whose largest layer is dense, on links on which the
    transfer one way takes about as long as computing a step, at path delays of 0, 20 and 40 ms,
    with one and two workers; then on links on which it takes less than a third, where there is
    little to gain. For each, the measured and the predicted step of both strategies, how many
    times as fast joint is (with the interval that both medians' 95 % intervals allow), and how far
    joint is from the lower bound.

Run it::

    python demos/benchmarks/joint.py                  # 16 runs, about 8 minutes
    python demos/benchmarks/joint.py --quick          # 2 runs, a minute
    python demos/benchmarks/joint.py --netns          # as root: on links that the kernel shapes

What is imitated
    The links (a relay process for each worker), and devices a quarter as fast as a core of this
    machine: see ``prediction.py``, which does the measuring.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from itertools import product

import prediction
from _machine import describe_machine, format_machine
from prediction import Cell

from dynacomm_async.errors import DynaCommError

BALANCED = {"resnet20": "60mbit", "vgg_small": "170mbit"}
"""Where the transfer one way takes about as long as computing, a quarter as fast as here."""

COMPUTING = {"resnet20": "250mbit", "vgg_small": "700mbit"}
"""Where it takes less than a third."""


def list_runs(args: argparse.Namespace) -> list[tuple[str, dict[str, str]]]:
    """Return the model and the options of ``compare`` of every run."""
    overhead = "0ms" if args.netns else args.overhead
    delays = ["0ms"] if args.quick or args.netns else ["0ms", "20ms", "40ms"]
    workers = ["1"] if args.quick else ["1", "2"]
    runs = []
    for rates, own_delays in ((BALANCED, delays), ({} if args.quick else COMPUTING, ["0ms"])):
        for (model, rate), n_workers, delay in product(rates.items(), workers, own_delays):
            link = {"workers": n_workers, "bandwidth": rate, "overhead": overhead, "delay": delay}
            runs.append((model, link))
    return runs


def gain(dynacomm: Cell, joint: Cell) -> tuple[float, float, float]:
    """Return how many times as fast joint is, at least and at most by both intervals."""
    low = dynacomm.interval_s[0] / joint.interval_s[1]
    high = dynacomm.interval_s[1] / joint.interval_s[0]
    return dynacomm.step_s / joint.step_s, low, high


def format_run(name: str, dynacomm: Cell, joint: Cell) -> str:
    """Return one line of the table."""
    times, low, high = gain(dynacomm, joint)
    columns = [
        f"{1e3 * cell.step_s:7.1f} / {1e3 * cell.predicted_s:<6.1f}{cell.error:+6.1%}"
        for cell in (dynacomm, joint)
    ]
    over = joint.step_s / joint.lower_bound_s - 1
    return (
        f"{name:<42}{columns[0]}  {columns[1]}   {times:.2f}x ({low:.2f}-{high:.2f})  {over:+7.1%}"
    )


def main() -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(
        description="What the plan across the step boundary gains over DynaComm's, measured.",
        epilog="example: python demos/benchmarks/joint.py --quick",
    )
    parser.add_argument("--overhead", default="1ms", help="of a message (default: 1ms)")
    parser.add_argument("--batch", type=int, default=4, metavar="B", help="(default: 4)")
    parser.add_argument("--slowdown", default="4", metavar="F", help="(default: 4)")
    parser.add_argument("--steps", type=int, default=36, metavar="K", help="a run: %(default)s")
    parser.add_argument("--quick", action="store_true", help="one worker, no delay, balanced")
    parser.add_argument("--netns", action="store_true", help="on namespaces shaped by the kernel")
    parser.add_argument("--json", action="store_true", help="print the cells as JSON")
    args = parser.parse_args()
    args.strategies = ["dynacomm", "joint"]
    os.environ.pop("OPENBLAS_CORETYPE", None)
    if args.netns and not prediction.several.can_isolate():
        parser.error("--netns needs root, ip, tc, unshare and setpriv (Linux)")
    if not args.json:
        print(format_machine(describe_machine()))
        print(f"batch {args.batch}, slowdown {args.slowdown}; measured / predicted step in ms")
        print(
            f"{'model, workers, rate, overhead, delay':<42}{'dynacomm':^22}  {'joint':^22}   "
            f"{'joint is faster':<17}  over the bound"
        )
    cells = []
    for model, link in list_runs(args):
        args.model = model
        name = ", ".join([model, *link.values()])
        try:
            measure = prediction.outer(args, link) if args.netns else None
            dynacomm, joint = measure or prediction.measure(args, link, name)
        except DynaCommError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        cells += [dynacomm, joint]
        if not args.json:
            print(format_run(name, dynacomm, joint), flush=True)
    if args.json:
        print(json.dumps([asdict(cell) for cell in cells]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
