"""``dynacomm profile``: measure a model's layers and a link, write a cost table."""

from __future__ import annotations

import argparse
from pathlib import Path

from dynacomm_async.cli.compare import compare
from dynacomm_async.cli.compare_worker import LEAST_STEPS
from dynacomm_async.cli.links import Fleet
from dynacomm_async.cli.output import check_writable, print_json, say, seconds, table, to_json
from dynacomm_async.cli.workload import add_model_arguments
from dynacomm_async.link.options import add_setting_arguments, settings_from
from dynacomm_async.models import build
from dynacomm_async.nn import MemoryUse
from dynacomm_async.schedule import Costs

__all__ = ["add_arguments", "command"]

EXAMPLE = "dynacomm profile --model vgg_small --data synthetic --bandwidth 100mbit -o costs.json"

_STRATEGIES = ["sequential", "layerwise", "bucket"]
"""Which are run does not matter; each of them adds steps from which the link is measured."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``profile``."""
    add_model_arguments(parser)
    add_setting_arguments(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("costs.json"),
        metavar="FILE",
        help="where the cost table goes (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON, too")


def command(args: argparse.Namespace) -> int:
    """Train a few steps with a server and one worker, and keep what was measured."""
    check_writable(args.output)
    measured = argparse.Namespace(
        **vars(args),
        workers=1,
        steps=LEAST_STEPS,
        epochs=None,
        rule="sgd",
        rate_schedule="constant",
        rate=0.0,
        weight_decay=0.0,
        label_smoothing=0.0,
    )
    found = compare(
        measured, _STRATEGIES, Fleet((settings_from(args),), (1.0,)), costs_file=args.output
    )
    use = build(args.model).bind(args.batch, threads=args.threads).memory
    costs = {**found.costs, "memory": _describe(use)}  # a note: readers of costs pass over it
    args.output.write_text(to_json(costs, indent=1) + "\n")
    if args.json:
        print_json(costs)
    else:
        _print_costs(Costs.from_json(costs))
        _print_memory(use, args.batch)
        say(f"written to {args.output}; next: dynacomm plan {args.output}")
    return 0


def _describe(use: MemoryUse) -> dict[str, int]:
    return {
        "activation_bytes": use.activations,
        "gradient_bytes": use.gradients,
        "workspace_bytes": use.workspace,
    }


def _print_memory(use: MemoryUse, batch: int) -> None:
    activations, gradients, workspace = (
        f"{part / 2**20:,.1f}" for part in (use.activations, use.gradients, use.workspace)
    )
    print(
        f"memory beside parameters and gradients, batch {batch}, MiB: {activations} activations, "
        f"{gradients} their gradients, {workspace} workspace"
    )


def _print_costs(costs: Costs) -> None:
    rows = [
        [
            layer.name,
            f"{layer.nbytes:,}",
            *(seconds(ns / 1e9) for ns in (layer.pull_ns, layer.forward_ns)),
            *(seconds(ns / 1e9) for ns in (layer.backward_ns, layer.push_ns)),
        ]
        for layer in costs.layers
    ]
    print(table(["layer", "bytes", "pull", "forward", "backward", "push"], rows))
    print(
        f"overhead of a message: {seconds(costs.overhead_down_ns / 1e9)} down, "
        f"{seconds(costs.overhead_up_ns / 1e9)} up; "
        f"latency: {seconds(costs.latency_down_ns / 1e9)} down, "
        f"{seconds(costs.latency_up_ns / 1e9)} up; server: {seconds(costs.server_ns / 1e9)}"
    )
