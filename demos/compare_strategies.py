"""Compare the scheduling strategies on two links: one where messages are cheap, one where not.

What it shows
    How a step is cut into messages decides what the network costs. The same training runs under
    every strategy over the same emulated link, in turns, and what was measured stands beside what
    the cost model predicts from one table of measured costs. ``dynacomm compare`` is the same from
    the command line, for a model and a link of yours.

Run it::

    python demos/compare_strategies.py                        # about a minute
    python demos/compare_strategies.py --bandwidth 50mbit --strategies sequential,dynacomm
    python demos/compare_strategies.py --model vgg_small --data synthetic --steps 20

What to look for
    On the first link a message costs next to nothing: cutting at every layer (``layerwise``) is
    as good as it gets, and ``sequential`` hides nothing. On the second every message keeps the link
    busy for some milliseconds more: now ``layerwise`` pays for each of its messages, and may be the
    slowest. ``dynacomm`` cuts only where it pays and should be best, or as good as the best, on
    both; that is what its plan is proven to be in the model. The measured steps should follow the
    predictions, and the parameters must be the same, bit for bit, under every strategy.

What it leaves out
    Links that change while training, and real links. The lower bound holds for every schedule,
    also for those that let parts of the model run ahead of others, so no strategy here need reach
    it. A busy machine lengthens the measured steps: look at their order.
"""

from __future__ import annotations

import argparse
import sys

import dynacomm_async as dc
from dynacomm_async.cli.compare import Comparison, add_arguments, compare, print_comparison
from dynacomm_async.cli.links import fleet_from

OVERHEADS = ("0ms", "5ms")


def compare_on(overhead: str, options: list[str], strategies: list[str]) -> Comparison:
    """Return what ``dynacomm compare`` finds on a link with this overhead for each message."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args([*options, f"--overhead={overhead}"])
    return compare(args, strategies, fleet_from(args))


def explain(found: Comparison) -> None:
    """Print how each strategy cut its steps, and which was best."""
    for name, (first_worker, *_) in found.plans.items():
        _, plan = first_worker[-1]
        print(f"  {name}: {len(plan['pull'])} messages down, {len(plan['push'])} up")
    measured = {name: entry["step_s"] for name, entry in found.strategies.items()}
    best = min(measured, key=lambda name: measured[name])
    worst = max(measured, key=lambda name: measured[name])
    print(f"fastest: {best}, {measured[worst] / measured[best]:.2f} times as fast as {worst}")


def main() -> None:
    """Compare on both links."""
    parser = argparse.ArgumentParser(
        description="Compare strategies where messages are cheap and where they are not.",
        epilog="example: python demos/compare_strategies.py --bandwidth 50mbit --workers 1",
    )
    parser.add_argument("--model", default="lenet", help="see dynacomm models (default: lenet)")
    parser.add_argument("--data", default="digits", help="or synthetic (default: digits)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="(default: 2)")
    parser.add_argument("--steps", type=int, default=40, metavar="K", help="of each (default: 40)")
    parser.add_argument("--bandwidth", default="100mbit", metavar="RATE", help="(default: 100mbit)")
    parser.add_argument("--delay", default="2ms", metavar="TIME", help="(default: 2ms)")
    parser.add_argument(
        "--strategies",
        default=",".join(dc.PLANNERS),
        metavar="A,B",
        help="(default: all of %(default)s)",
    )
    args = parser.parse_args()
    names = ("model", "data", "workers", "steps", "bandwidth", "delay")
    options = [f"--{name}={getattr(args, name)}" for name in names]
    for overhead in OVERHEADS:
        print(f"\n{args.bandwidth}, {args.delay} delay, {overhead} overhead a message:", flush=True)
        found = compare_on(overhead, options, args.strategies.split(","))
        print_comparison(found)
        explain(found)


if __name__ == "__main__":
    try:
        main()
    except dc.DynaCommError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
