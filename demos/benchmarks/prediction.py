"""Does the prediction hold? Measured against predicted steps, over links and numbers of workers.

What it shows
    ``dynacomm compare`` for each of several links: the median measured step of every strategy
    beside what the cost table promised before the measured blocks began. At the end the median
    and the greatest error over all cells, whether DynaComm was ever slower than another strategy
    by more than the 95 % intervals of both medians explain, and where it gained most over the
    better of sequential and layerwise.

Run it::

    python demos/benchmarks/prediction.py                    # 24 links, about 25 minutes
    python demos/benchmarks/prediction.py --bandwidth 100mbit --delay 0ms   # 4 of them
    python demos/benchmarks/prediction.py --netns            # as root: the kernel shapes the links

    With ``--netns`` server and workers live in network namespaces with a switch between them and
    ``tc`` limits every machine's rate (a token bucket each way; the server's is N times as fast
    for N workers, so that each has its own rate): nothing of this library's is in between, and a
    message costs nothing beside its bytes but what it really costs.

What is imitated
    The workers are devices a quarter as fast as a core of this machine (``--slowdown 4``: each
    layer computes, then idles for three times as long), so that a few of them fit on two cores
    without slowing each other down. Times of computing are measured, not assumed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from _machine import describe_machine, format_machine

from dynacomm_async.cli import compare
from dynacomm_async.cli.links import Fleet, fleet_from
from dynacomm_async.errors import DynaCommError
from dynacomm_async.link.units import parse_rate
from dynacomm_async.schedule import PLANNERS, crosses

sys.path.append(str(Path(__file__).parents[1]))
import train_several_machines as several

BANDWIDTHS, OVERHEADS, DELAYS, WORKERS = "50mbit,100mbit,200mbit", "2ms,5ms", "0ms,10ms", "1,2"


@dataclass(frozen=True, slots=True)
class Cell:
    """One strategy on one link.

    Attributes:
        link: what it ran on, in words.
        strategy: its name.
        step_s: median measured step.
        interval_s: 95 % confidence interval of that median.
        predicted_s: what the cost table promised.
        lower_bound_s: below which no schedule can be, by the same table.
    """

    link: str
    strategy: str
    step_s: float
    interval_s: list[float]
    predicted_s: float
    lower_bound_s: float

    @property
    def error(self) -> float:
        """How far the measured step is from the predicted one, relative to it."""
        return self.step_s / self.predicted_s - 1


def measure(args: argparse.Namespace, options: dict[str, str], name: str) -> list[Cell]:
    """Run ``dynacomm compare`` on one link; return a cell for each strategy."""
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    common = ["--model", args.model, "--data", "synthetic:512:64", "--batch", str(args.batch)]
    common += ["--steps", str(args.steps), "--slowdown", args.slowdown]
    given = parser.parse_args([*common, *(f"--{key}={value}" for key, value in options.items())])
    fleet = fleet_from(given)
    if args.netns:
        rate = parse_rate(options["bandwidth"])
        assert rate is not None, "a link without limit needs no shaping"
        server_rate = f"{8 * rate * given.workers:.0f}bit"
        machines = several.build_network(given.workers + 1, options["bandwidth"], server_rate)
        prefixes = tuple(map(tuple, machines))
        fleet = Fleet(fleet.links, fleet.slowdowns, prefixes, f"{several.NETWORK}.1")
    found = compare.compare(given, args.strategies, fleet)
    keys = ("step_s", "interval_s", "predicted_s", "lower_bound_s")
    return [
        Cell(name, strategy, **{key: entry[key] for key in keys})
        for strategy, entry in found.strategies.items()
    ]


def outer(args: argparse.Namespace, options: dict[str, str]) -> list[Cell]:
    """Measure one link in a world of its own, in which its namespaces are made and forgotten."""
    command = [*several.isolation(), sys.executable, __file__, "--netns", "--json"]
    command += [f"--{key}={value}" for key, value in options.items()]
    command += [f"--strategies={','.join(args.strategies)}", f"--model={args.model}"]
    command += [f"--batch={args.batch}", f"--slowdown={args.slowdown}", f"--steps={args.steps}"]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, several.INSIDE: "1"},
    )
    if done.returncode:
        raise DynaCommError(f"the run in namespaces ended with exit code {done.returncode}")
    return [Cell(**cell) for cell in json.loads(done.stdout)["cells"]]


def each_link(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield every combination of the options, in words and as options of ``compare``."""
    lists = [args.workers, args.bandwidth, args.overhead, args.delay]
    if args.netns:
        lists[2:] = [["0ms"], ["0ms"]]
    for workers, bandwidth, overhead, delay in product(*lists):
        name = f"{workers} worker{'s' * (workers != '1')}, {bandwidth}, {overhead}, {delay}"
        yield (
            name,
            {"workers": workers, "bandwidth": bandwidth, "overhead": overhead, "delay": delay},
        )


def format_row(name: str, cells: list[Cell]) -> str:
    """Return one link's line: measured / predicted milliseconds and the error of each strategy."""
    columns = [
        f"{1e3 * cell.step_s:7.0f}/{1e3 * cell.predicted_s:<4.0f}{cell.error:+6.1%}"
        for cell in cells
    ]
    return f"{name:<34}" + "  ".join(columns)


def summarise(cells: list[Cell]) -> dict[str, Any]:
    """Return what the whole table says."""
    errors = [abs(cell.error) for cell in cells]
    worst = max(cells, key=lambda cell: abs(cell.error))
    links: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        links.setdefault(cell.link, {})[cell.strategy] = cell
    slower, gains = [], {}
    for link, row in links.items():
        ours = row.get("dynacomm")
        if ours is None:
            continue
        slower += [
            f"{link}: {other.strategy}"
            for other in row.values()
            if not crosses(other.strategy)
            if ours.interval_s[0] > other.interval_s[1]
        ]
        if {"sequential", "layerwise"} <= row.keys():
            gains[link] = min(row["sequential"].step_s, row["layerwise"].step_s) / ours.step_s
    return {
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "worst": f"{worst.link}: {worst.strategy}",
        "cells": len(cells),
        "within_10_percent": sum(error <= 0.1 for error in errors),
        "dynacomm_slower_than": slower,
        "best_gain": max(gains.items(), key=lambda item: item[1], default=("", 0.0)),
    }


def print_summary(summary: dict[str, Any]) -> None:
    """Say it in sentences."""
    print(
        f"error over {summary['cells']} cells: median {summary['median_error']:.1%}, greatest "
        f"{summary['worst_error']:.1%} ({summary['worst']}); "
        f"{summary['within_10_percent']} within 10 %"
    )
    slower = summary["dynacomm_slower_than"]
    print(
        "dynacomm slower than another strategy with a barrier, beyond both 95 % intervals: "
        + ("; ".join(slower) or "nowhere")
    )
    link, gain = summary["best_gain"]
    if link:
        print(f"greatest gain over the better of sequential and layerwise: {gain:.2f}x ({link})")


def main() -> int:
    """Measure, print, sum up."""
    parser = argparse.ArgumentParser(
        description="Measured against predicted steps, over links and numbers of workers.",
        epilog="example: python demos/benchmarks/prediction.py --bandwidth 100mbit --workers 1",
    )
    for option, default in (
        ("bandwidth", BANDWIDTHS),
        ("overhead", OVERHEADS),
        ("delay", DELAYS),
        ("workers", WORKERS),
        ("strategies", "sequential,layerwise,ibatch,bucket,dynacomm"),
    ):
        parser.add_argument(
            f"--{option}",
            type=lambda text: text.split(","),
            default=default.split(","),
            metavar="A,B",
            help=f"(default: {default})",
        )
    parser.add_argument("--model", default="resnet20", help="(default: resnet20)")
    parser.add_argument("--batch", type=int, default=4, metavar="B", help="(default: 4)")
    parser.add_argument("--slowdown", default="4", metavar="F", help="(default: 4)")
    parser.add_argument("--steps", type=int, default=36, metavar="K", help="a run: %(default)s")
    parser.add_argument("--netns", action="store_true", help="on namespaces shaped by the kernel")
    parser.add_argument("--json", action="store_true", help="print cells and summary as JSON")
    args = parser.parse_args()
    for strategy in args.strategies:
        if strategy not in PLANNERS:
            parser.error(f"--strategies: no {strategy!r}; there are {', '.join(PLANNERS)}")
    os.environ.pop("OPENBLAS_CORETYPE", None)
    if args.netns and several.INSIDE not in os.environ and not several.can_isolate():
        parser.error("--netns needs root, ip, tc, unshare and setpriv (Linux)")
    if not args.json:
        print(format_machine(describe_machine()))
        print(
            f"{args.model}, batch {args.batch}, slowdown {args.slowdown}; "
            "measured/predicted step in ms and the error"
        )
        names = "  ".join(f"{name:^18}" for name in args.strategies)
        print(f"{'workers, rate, overhead, delay':<34}{names}")
    is_outer = args.netns and several.INSIDE not in os.environ
    cells: list[Cell] = []
    for name, options in each_link(args):
        try:
            row = outer(args, options) if is_outer else measure(args, options, name)
        except DynaCommError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        cells += row
        if not args.json:
            print(format_row(name, row), flush=True)
    summary = summarise(cells)
    if args.json:
        print(json.dumps({"cells": [asdict(cell) for cell in cells], "summary": summary}))
    else:
        print_summary(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
