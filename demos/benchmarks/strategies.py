"""How close each strategy comes to the best that is possible, over 288 settings.

Run it::

    python demos/benchmarks/strategies.py                       # about half a minute
    python demos/benchmarks/strategies.py --networks googlenet  # some of it
    python demos/benchmarks/strategies.py --list 10 --json

VGG-19, GoogLeNet, Inception-v4 and ResNet-152 on links of 1, 5 and 10 Gbit/s each way, machines of
0.3, 1 and 5 TFLOP/s, 0.5 to 10 ms of overhead a message, and 16 or 32 images in a batch: each
strategy plans, the cost model says how long its step is, and that is divided by a time that no
schedule can beat. Look at the mean, at the worst and where it is, and at the last lines, which
count in how many settings DynaComm is behind a simpler strategy, and joint behind DynaComm: in
none, or the program ends with an error.

Parameters and gradients are 32-bit, a layer's backward is twice its forward's work (once for the
first layer), parallel branches come in the order of their definition. Nothing is measured here but
the processor time that planning takes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from _machine import describe_machine, format_machine

from dynacomm_async.models import build, costs_of
from dynacomm_async.nn import Network
from dynacomm_async.schedule import PLANNERS, evaluate, lower_bound_ns

NETWORKS = ("vgg19", "googlenet", "inception_v4", "resnet152")
GBIT_PER_S = (1.0, 5.0, 10.0)
TFLOP_PER_S = (0.3, 1.0, 5.0)
OVERHEADS_MS = (0.5, 2.0, 5.0, 10.0)
BATCHES = (16, 32)


@dataclass(frozen=True)
class Setting:
    """A network, its machine and its link."""

    network: str
    gbit_per_s: float
    tflop_per_s: float
    overhead_ms: float
    batch: int

    def __str__(self) -> str:
        return (
            f"{self.network}, {self.gbit_per_s:g} Gbit/s, {self.tflop_per_s:g} TFLOP/s, "
            f"{self.overhead_ms:g} ms, batch {self.batch}"
        )


@dataclass(frozen=True)
class Result:
    """What the strategies make of one setting; all times in ns but the planning's."""

    setting: Setting
    bound_ns: int
    bound_name: str
    steps_ns: dict[str, int]
    planning_s: dict[str, float]

    def ratio(self, strategy: str) -> float:
        """Return the step over the lower bound."""
        return self.steps_ns[strategy] / self.bound_ns


def judge(setting: Setting, network: Network, strategies: Sequence[str]) -> Result:
    """Plan with every strategy."""
    costs = costs_of(
        network,
        batch=setting.batch,
        flops_per_s=setting.tflop_per_s * 1e12,
        down_bytes_per_s=setting.gbit_per_s * 1e9 / 8,
        overhead_ns=round(setting.overhead_ms * 1e6),
    )
    steps_ns, planning_s = {}, {}
    for name in strategies:
        began = time.process_time()
        plan = PLANNERS[name](costs)
        planning_s[name] = time.process_time() - began
        steps_ns[name] = evaluate(plan, costs).step_ns
    bound = lower_bound_ns(costs)
    return Result(setting, bound.step_ns, bound.name, steps_ns, planning_s)


def summarise(results: Sequence[Result], strategy: str) -> dict[str, object]:
    """Return mean and worst of a strategy's steps over the bound, and its planning times."""
    worst = max(results, key=lambda result: result.ratio(strategy))
    planning_s = [result.planning_s[strategy] for result in results]
    return {
        "mean": statistics.fmean(result.ratio(strategy) for result in results),
        "worst": worst.ratio(strategy),
        "where": str(worst.setting),
        "planning_median_s": statistics.median(planning_s),
        "planning_worst_s": max(planning_s),
    }


def count_behind(results: Sequence[Result], strategy: str, others: Sequence[str]) -> dict[str, int]:
    """Return in how many settings a strategy's step is longer than each of the others'."""
    return {
        other: sum(result.steps_ns[strategy] > result.steps_ns[other] for result in results)
        for other in others
    }


def print_tables(results: Sequence[Result], strategies: Sequence[str], longest: int) -> None:
    """Print means by network and overall, the worst settings, and planning times."""
    networks = list(dict.fromkeys(result.setting.network for result in results))
    print(f"{len(results)} settings, step over lower bound, mean by network")
    print(f"{'':<12}" + "".join(f"{name:>14}" for name in networks) + f"{'all':>10}{'worst':>10}")
    for name in strategies:
        cells = ""
        for network in networks:
            own = [result for result in results if result.setting.network == network]
            cells += f"{summarise(own, name)['mean']:>14.4f}"
        total = summarise(results, name)
        print(f"{name:<12}{cells}{total['mean']:>10.4f}{total['worst']:>10.4f}")
    print("\nworst setting and planning")
    for name in strategies:
        total = summarise(results, name)
        times = f"{total['planning_median_s'] * 1e3:.2f} ms, at most "  # type: ignore[operator]
        times += f"{total['planning_worst_s'] * 1e3:.1f}"  # type: ignore[operator]
        print(f"{name:<12}{total['worst']:.4f} at {total['where']}; plans in {times} ms")
    for name in strategies if longest else ():
        print(f"\nthe {longest} settings where {name} is furthest from the bound")
        for result in sorted(results, key=lambda one: -one.ratio(name))[:longest]:
            print(f"  {result.ratio(name):.4f}  {result.setting}")
    names = sorted({result.bound_name for result in results})
    print(f"\nlower bound: {', '.join(names)}")


def parse_list(text: str, known: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """Return the names in ``"a,b"``; end the program at one that is not known."""
    names = text.split(",")
    for name in names:
        if name not in known:
            parser.error(f"there is no {name!r}, expected some of {','.join(known)}")
    return names


def main() -> int:
    """Judge every setting, print tables or JSON; 1 if a strategy is behind what it contains."""
    parser = argparse.ArgumentParser(
        description="Print each strategy's step over the lower bound for 288 settings.",
        epilog="example: python demos/benchmarks/strategies.py --networks vgg19,googlenet",
    )
    parser.add_argument(
        "--networks", default=",".join(NETWORKS), metavar="A,B", help="some of %(default)s"
    )
    parser.add_argument(
        "--strategies", default=",".join(PLANNERS), metavar="A,B", help="some of %(default)s"
    )
    parser.add_argument(
        "--list", type=int, default=0, metavar="N", help="each strategy's N worst settings too"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    strategies = parse_list(args.strategies, list(PLANNERS), parser)
    networks = {name: build(name) for name in parse_list(args.networks, NETWORKS, parser)}
    axes = itertools.product(networks, GBIT_PER_S, TFLOP_PER_S, OVERHEADS_MS, BATCHES)
    machine, began = describe_machine(), time.perf_counter()
    results = [
        judge(setting, networks[setting.network], strategies)
        for setting in itertools.starmap(Setting, axes)
    ]
    seconds = time.perf_counter() - began
    behind: dict[str, dict[str, int]] = {}
    if "dynacomm" in strategies:
        plainer = ("sequential", "layerwise", "ibatch", "bucket")
        others = [name for name in plainer if name in strategies]
        if others:
            behind["dynacomm"] = count_behind(results, "dynacomm", others)
        if "joint" in strategies:
            behind["joint"] = count_behind(results, "joint", ["dynacomm"])
    if args.json:
        summaries = {name: summarise(results, name) for name in strategies}
        rows = [
            {
                **vars(result.setting),
                "lower_bound_s": result.bound_ns / 1e9,
                "lower_bound": result.bound_name,
                "step_s": {name: step_ns / 1e9 for name, step_ns in result.steps_ns.items()},
            }
            for result in results
        ]
        report = {"machine": machine, "seconds": seconds, "strategies": summaries}
        print(json.dumps({**report, "behind": behind, "settings": rows}))
    else:
        print(format_machine(machine))
        print_tables(results, strategies, args.list)
        for name, counts in behind.items():
            text = ", ".join(f"{other} in {count}" for other, count in counts.items())
            print(f"{name} is behind {text} of {len(results)} settings")
        print(f"{seconds:.1f} s")
    return int(any(count for counts in behind.values() for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
