"""Side by side: one model, one network, trained by us, by PyTorch's DDP and by Flower.

What it shows
    The same model, initial values, data, batches and update rule (plain SGD), on the same shaped
    links, trained by

    - this library: PyTorch through ``dynacomm_async.adapters.torch``, under each strategy;
    - ``ddp``: PyTorch's DistributedDataParallel, which sums gradients by ring all-reduce over gloo,
      with several sizes of its buckets: ``ddp:default`` (25 MiB, the first one 1 MiB), ``ddp:N``
      (N MiB, the first one too);
    - ``flower``: Flower's ``start_server`` and ``start_client`` (deprecated, and its fast way; the
      SuperLink that replaces it polls every few seconds), federated averaging with one local step
      a round.

    All systems are up at the same time (with VGG and 4 workers each takes 2 to 8 GB) and take
    turns, block by block, so that drifts of the machine touch all alike. Printed for each cell: the
    median step (the first of a block does not count), bytes on the workers' and the server's wire,
    processor seconds and peak memory of a worker and of the server, the loss after the same number
    of steps, the step over its lower bound; then how we compare, and where DDP wins, why.

Run it, as root (it makes network namespaces and shapes their links by ``tc``)::

    python demos/benchmarks/end_to_end.py --models resnet18 --workers 2 --rates 100mbit \\
        --systems joint,ddp:default,flower             # one cell, about 4 minutes
    python demos/benchmarks/end_to_end.py --imitate    # everything; hours
    python demos/benchmarks/end_to_end.py --quick      # narrow networks: whether it runs

What is imitated
    Machines are network namespaces on one switch. Every worker's link is shaped to the rate, each
    way; the server's is N times as fast for N workers (``--servers fast``), or as slow as one
    worker's (``slow``: a bad place for a parameter server). With ``--imitate`` no worker computes:
    each layer sleeps for as long as it was measured to take alone on a core, and so it is for all
    systems. Otherwise N workers and a server share this machine's cores, and what is printed is as
    much about those as about the links.

The lower bound is that of any schedule with a parameter server, at the nominal rate less the
headers of full packets, for layers that compute as fast as alone on a core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata, util
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from _end_to_end_cell import Failure, Measured, System, measure_all, profile, several
from _machine import describe_machine, format_machine

from dynacomm_async.errors import ConfigError
from dynacomm_async.link.units import parse_rate
from dynacomm_async.schedule import PLANNERS, Costs, LayerCosts, lower_bound_ns
from dynacomm_async.transport import allowed_congestion

MODELS = ("resnet18", "vgg11", "transformer")
OURS = "joint,dynacomm,sequential,layerwise,ibatch,bucket"
PEERS = "ddp:default,ddp:1,ddp:4,ddp:25,flower"

_CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")

WIRE_SHARE = 1448 / 1514
"""What is payload of a full packet on Ethernet, IP and TCP headers with timestamps taken off."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A cell: what is trained on what.

    Attributes:
        model: its name.
        workers: how many.
        rate: of each worker's link each way, as tc reads it.
        server: ``fast``: N times the rate; ``slow``: the same as a worker's.
    """

    model: str
    workers: int
    rate: str
    server: str

    @property
    def rate_bytes_per_s(self) -> float:
        """Bytes of payload that a worker's link carries in a second."""
        rate = parse_rate(self.rate)
        assert rate is not None, "checked when the command line was read"
        return WIRE_SHARE * rate

    @property
    def server_rate(self) -> str:
        """The server's, as tc reads it."""
        factor = self.workers if self.server == "fast" else 1
        return f"{8 * factor * self.rate_bytes_per_s / WIRE_SHARE:.0f}bit"

    def describe(self, nbytes: int) -> str:
        """Return it in words."""
        pace = f"{self.workers} times that" if self.server == "fast" else "the same"
        return (
            f"{self.model} ({nbytes / 1e6:.1f} MB), {self.workers} workers at {self.rate}, "
            f"the server's link {pace}"
        )


def lower_bound_s(layers: Sequence[Sequence[Any]], setting: Setting) -> float:
    """Return a time below which no schedule with a parameter server can be."""
    rate = setting.rate_bytes_per_s
    rows = []
    for name, shapes, forward_s, backward_s in layers:
        nbytes = nbytes_of(shapes)
        pull_ns = int(1e9 * nbytes / rate)
        times = (pull_ns, int(1e9 * forward_s), int(1e9 * backward_s), pull_ns)
        rows.append(LayerCosts(name, nbytes, *times))
    costs = Costs(tuple(rows), 0, 0, workers=setting.workers, shared_link=setting.server == "slow")
    return lower_bound_ns(costs).step_ns / 1e9


def nbytes_of(shapes: Sequence[Sequence[int]]) -> int:
    """Return the size of float32 arrays."""
    total = 0
    for shape in shapes:
        size = 4
        for axis in shape:
            size *= axis
        total += size
    return total


# -- what came of it -----------------------------------------------------------------------------


def compare(found: Mapping[str, Measured]) -> dict[str, Any]:
    """Return how joint compares with the best of DDP and with Flower; as far as they ran."""
    ddp = [name for name in found if name.startswith("ddp")]
    best = min(ddp, key=lambda name: found[name].median_s, default=None)
    ratios: dict[str, Any] = {"best_ddp": best}
    if "joint" in found:
        step_s = found["joint"].median_s
        ratios["joint_over_ddp"] = step_s / found[best].median_s if best else None
        flower = found.get("flower")
        ratios["joint_over_flower"] = step_s / flower.median_s if flower else None
    return ratios


def explain(setting: Setting, nbytes: int, compute_s: float, ratios: Mapping[str, Any]) -> str:
    """Say why DDP wins, where it does."""
    if (ratios.get("joint_over_ddp") or 0) <= 1:
        return ""
    n = setting.workers
    ring = 2 * (n - 1) / n
    if setting.server == "slow":
        return (
            "DDP wins: the server's link is as slow as a worker's and carries every worker's "
            f"gradients and parameters, {n} x {nbytes / 1e6:.0f} MB each way, where in a ring no "
            f"link carries more than {ring:.3g} x that. Give the server a faster link."
        )
    transfer_s = nbytes / setting.rate_bytes_per_s
    if transfer_s < compute_s:
        return (
            f"DDP wins: one transfer takes {transfer_s:.2f} s, computing {compute_s:.2f} s, so "
            "either hides most of its communication; what is left is processor time and the end "
            "of a step, and nothing limits a worker's link"
        )
    if n == 2:
        return (
            "DDP wins: with 2 workers a ring carries as much over a worker's link as a parameter "
            "server does, so neither can be much faster than the other (see --explain for ours)"
        )
    return (
        f"DDP wins though a worker's link carries 1 x {nbytes / 1e6:.1f} MB each way for us and "
        f"{ring:.3g} x for a ring: what limits us here is not the link (see --explain)"
    )


def to_json(
    setting: Setting, profiled: Mapping[str, Any], found: Mapping[str, Measured]
) -> dict[str, Any]:
    """Return all that is known of a cell."""
    layers = profiled["layers"]
    nbytes = sum(nbytes_of(layer[1]) for layer in layers)
    compute_s = sum(layer[2] + layer[3] for layer in layers)
    bound_s = lower_bound_s(layers, setting)
    ratios = compare(found)
    common = min(len(measured.losses) for measured in found.values())
    return {
        **asdict(setting),
        "nbytes": nbytes,
        "compute_s": compute_s,
        "compute_cpu_s": profiled["cpu_s"],
        "lower_bound_s": bound_s,
        "systems": {
            name: {
                **asdict(measured),
                "median_s": measured.median_s,
                "over_bound": measured.median_s / bound_s,
                "transport_cpu_s": measured.cpu_worker_s - profiled["cpu_s"],
                "loss": measured.losses[common - 1],
                "loss_step": common - 1,
            }
            for name, measured in found.items()
        },
        **ratios,
        "explanation": explain(setting, nbytes, compute_s, ratios),
    }


def print_cell(cell: Mapping[str, Any], setting: Setting) -> None:
    """Print a cell as a table and sentences."""
    print(f"\n{setting.describe(cell['nbytes'])}")
    print(
        f"computing {cell['compute_s']:.3f} s a step alone, one transfer "
        f"{cell['nbytes'] / setting.rate_bytes_per_s:.3f} s, "
        f"lower bound {cell['lower_bound_s']:.3f} s"
    )
    step = next(iter(cell["systems"].values()))["loss_step"]
    print(
        f"  {'':12} {'step':>8} {'over':>6} {'MB a step of a worker':^21} {'of the server':^15} "
        f"{'CPU s a step: worker':^27} {'':>6} {'peak MB':^13} {'loss, step':>10}\n"
        f"  {'':12} {'s':>8} {'bound':>6} {'up':>10}{'down':>11} {'up':>7}{'down':>8} "
        f"{'all':>14}{'beside computing':>17} {'server':>6} {'worker':>6}{'server':>7} {step:>8}"
    )
    for name, row in sorted(cell["systems"].items(), key=lambda item: item[1]["median_s"]):
        print(
            f"  {name:12} {row['median_s']:8.3f} {row['over_bound']:5.2f}x "
            f"{row['up_nbytes'] / 1e6:10.1f}{row['down_nbytes'] / 1e6:11.1f} "
            f"{row['server_up_nbytes'] / 1e6:7.0f}{row['server_down_nbytes'] / 1e6:8.0f} "
            f"{row['cpu_worker_s']:14.3f}{row['transport_cpu_s']:17.3f} {row['cpu_server_s']:6.3f} "
            f"{row['peak_worker_nbytes'] / 1e6:6.0f}{row['peak_server_nbytes'] / 1e6:7.0f} "
            f"{row['loss']:10.5f}"
        )
    if cell.get("joint_over_ddp"):
        print(
            f"  joint is {1 / cell['joint_over_ddp']:.2f}x as fast as DDP's best "
            f"({cell['best_ddp']})"
        )
    if cell.get("joint_over_flower"):
        print(f"  joint is {1 / cell['joint_over_flower']:.2f}x as fast as Flower")
    if cell["explanation"]:
        print(f"  {cell['explanation']}")
    for name, row in cell["systems"].items():
        if row["explanation"]:
            print(f"\n{name}:\n{row['explanation']}")
    sys.stdout.flush()


def versions() -> dict[str, str]:
    """Return which versions of what were measured."""
    found = {}
    for name in ("torch", "flwr", "grpcio", "uvloop", "dynacomm_async"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


# -- the command ---------------------------------------------------------------------------------


def outer(args: argparse.Namespace, setting: Setting, profiled: Mapping[str, Any]) -> Any:
    """Measure a cell in a world of its own, whose networks and processes die with it."""
    request = {"setting": asdict(setting), "profiled": profiled, "args": vars(args)}
    process = subprocess.Popen(
        [*several.isolation(), sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, several.INSIDE: "1"},
    )
    try:
        out, _ = process.communicate(json.dumps(request))
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        raise Failure(out.strip() or f"ended with exit code {process.returncode}")
    return json.loads(out)


def inner() -> int:
    """Measure the cell that standard input describes, in a world made for it."""
    request = json.load(sys.stdin)
    args, profiled = argparse.Namespace(**request["args"]), request["profiled"]
    setting = Setting(**request["setting"])
    systems = [System.named(name) for name in args.systems]
    spec = {**common_spec(args, setting.model), "workers": setting.workers}
    spec["layers"] = profiled["layers"]
    blocks = split(args.steps, args.blocks)
    try:
        found = asyncio.run(
            measure_all(
                systems,
                spec,
                rate=setting.rate,
                server_rate=setting.server_rate,
                blocks=blocks,
                congestion=args.congestion,
            )
        )
    except Failure as error:
        print(error)
        return 1
    print(json.dumps(to_json(setting, profiled, found)))
    return 0


def common_spec(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """Return what every process is told."""
    return {
        "model": model,
        "batch": args.batch,
        "quick": args.quick,
        "imitated": args.imitate,
        "explain": args.explain,
        "layers": [],
    }


def split(steps: int, n_blocks: int) -> list[int]:
    """Return numbers as equal as can be, with the sum ``steps``."""
    n_blocks = min(n_blocks, steps)
    edges = [steps * block // n_blocks for block in range(n_blocks + 1)]
    return [end - first for first, end in pairwise(edges)]


def chosen(choices: Sequence[str]) -> Any:
    """Return a reader of comma-separated choices, for argparse."""

    def read(text: str) -> list[str]:
        values = text.split(",")
        for value in values:
            if value not in choices:
                raise argparse.ArgumentTypeError(f"no {value!r}; there are {', '.join(choices)}")
        return values

    return read


def rates(text: str) -> list[str]:
    """Return comma-separated rates, for argparse."""
    for value in text.split(","):
        try:
            if parse_rate(value) is None:
                raise ConfigError("without a limit there is nothing to compare")
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return text.split(",")


def systems(text: str) -> list[str]:
    """Return names of systems, for argparse."""
    for name in text.split(","):
        kind, _, size = name.partition(":")
        if kind in PLANNERS or name in ("ddp", "ddp:default", "flower"):
            continue
        if kind != "ddp" or not size.replace(".", "", 1).isdigit() or not float(size):
            raise argparse.ArgumentTypeError(
                f"no {name!r}; there are {', '.join(PLANNERS)}, ddp:default, ddp:N for buckets of "
                "N MiB, and flower"
            )
    return text.split(",")


def positive(text: str) -> int:
    """Return a whole number from 1, for argparse."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train one model by us, by PyTorch's DDP and by Flower on shaped links.",
        epilog="example: python demos/benchmarks/end_to_end.py --models resnet18 --workers 2 "
        "--rates 100mbit --systems joint,ddp:default,flower",
    )
    add = parser.add_argument
    add("--models", type=chosen(MODELS), default=MODELS, metavar="A,B", help="(default: all)")
    add(
        "--workers",
        type=lambda text: [positive(value) for value in text.split(",")],
        default=[2, 4],
        metavar="N,N",
        help="how many (default: 2,4)",
    )
    add(
        "--rates",
        type=rates,
        default=["100mbit", "1gbit"],
        metavar="R,R",
        help="of each worker's link (default: 100mbit,1gbit)",
    )
    add(
        "--servers",
        type=chosen(("fast", "slow")),
        default=["fast", "slow"],
        metavar="A,B",
        help="the server's link: fast (N times a worker's), slow (the same); (default: both)",
    )
    add(
        "--systems",
        type=systems,
        default=f"{OURS},{PEERS}".split(","),
        metavar="A,B",
        help=f"what trains (default: {OURS},{PEERS})",
    )
    add(
        "--congestion",
        choices=allowed_congestion(),
        help="control of all systems (default: this machine's). bbr probes each connection's round "
        "trip for 0.2 s in every 10 s, most of all what is never idle",
    )
    add("--batch", type=positive, default=8, metavar="B", help="of a worker (default: 8)")
    add("--steps", type=positive, default=8, metavar="K", help="that count (default: 8)")
    add("--blocks", type=positive, default=2, metavar="N", help="turns of each (default: 2)")
    add("--imitate", action="store_true", help="sleep for as long as computing would take")
    add("--quick", action="store_true", help="narrow networks: whether it runs, no figures")
    add("--explain", action="store_true", help="print where our first worker's time went")
    add("--json", action="store_true", help="print cells as JSON")
    return parser.parse_args()


def refuse(args: argparse.Namespace) -> str | None:
    """Return why it cannot run here, if so."""
    if not several.can_isolate():
        return "it needs Linux, root, and the commands ip, tc, unshare, mount and setpriv"
    missing = [] if util.find_spec("torch") else ["torch"]
    if "flower" in args.systems and not util.find_spec("flwr"):
        missing.append("flwr")
    if missing:
        return f'{", ".join(missing)} not installed: pip install "dynacomm_async[peers]"'
    return None


def main() -> int:
    """Measure every cell and print it."""
    args = parse_args()
    reason = refuse(args)
    if reason is not None:
        print(f"end_to_end: {reason}", file=sys.stderr)
        return 1
    control = args.congestion or _CONTROL.read_text().strip()
    machine = {**describe_machine(), **versions(), "congestion_control": control}
    if not args.json:
        named = ", ".join(f"{name} {version}" for name, version in versions().items())
        named += f", TCP {control}"
        how = "imitated computing (sleep)" if args.imitate else "real computing, one thread each"
        print(f"{format_machine(machine)}\n{named}\nbatch {args.batch}, {how}")
    cells = []
    for model in args.models:
        try:
            profiled = asyncio.run(profile(common_spec(args, model)))
            for n, rate, server in product(args.workers, args.rates, args.servers):
                setting = Setting(model, n, rate, server)
                cells.append(outer(args, setting, profiled))
                if not args.json:
                    print_cell(cells[-1], setting)
        except Failure as error:
            print(f"end_to_end: {error}", file=sys.stderr)
            return 1
    if args.json:
        print(json.dumps({"machine": machine, "cells": cells}))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(inner() if several.INSIDE in os.environ else main())
    except KeyboardInterrupt:
        sys.exit(130)
