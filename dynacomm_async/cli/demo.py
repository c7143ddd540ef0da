"""``dynacomm demo``: the whole of it in a minute, on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dynacomm_async.cli.compare import Comparison, compare, print_comparison
from dynacomm_async.cli.links import add_fleet_arguments, fleet_from
from dynacomm_async.cli.output import check_writable, print_json, say, to_json
from dynacomm_async.cli.tracing import add_trace_argument
from dynacomm_async.cli.train import train_locally
from dynacomm_async.cli.workload import add_run_arguments, check_run
from dynacomm_async.errors import ConfigError
from dynacomm_async.schedule import PLANNERS
from dynacomm_async.worker import DEFAULT_STRATEGY

__all__ = ["add_arguments", "command"]

EXAMPLE = "dynacomm demo --bandwidth 50mbit"

_COMPARED_STEPS = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``demo``."""
    add_run_arguments(parser, steps=440)
    add_fleet_arguments(parser)
    parser.set_defaults(
        bandwidth="100mbit",
        delay="1ms",
        overhead="1ms",
        rate=0.05,
        rate_schedule="cosine",
        weight_decay=1e-3,
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("dynacomm-results"),
        metavar="DIR",
        help="where the files go (default: %(default)s)",
    )
    add_trace_argument(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def command(args: argparse.Namespace) -> int:
    """Compare all strategies on a slow link, then train to the end under the best."""
    fleet = fleet_from(args)
    if args.trace is not None:
        check_writable(args.trace)
    check_run(args, DEFAULT_STRATEGY)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {args.output}: {error.strerror}") from error
    files = {name: args.output / name for name in ("costs.json", "comparison.json", "model.npz")}
    say(
        f"a server and {args.workers} workers, each a process, behind emulated links "
        f"({args.bandwidth}, {args.delay} delay, {args.overhead} overhead a message)"
    )
    say(f"1. {args.model} on {args.data} under {len(PLANNERS)} strategies, in turns")
    short = argparse.Namespace(**{**vars(args), "steps": _COMPARED_STEPS, "epochs": None})
    found = compare(short, list(PLANNERS), fleet, costs_file=files["costs.json"])
    files["comparison.json"].write_text(to_json(found.to_json(), indent=1) + "\n")
    if not args.json:
        print_comparison(found)
    say(f"2. training to the end under {DEFAULT_STRATEGY}")
    long = argparse.Namespace(**{**vars(args), "save": files["model.npz"]})
    result = train_locally(long, DEFAULT_STRATEGY, fleet)
    _print_result(args, found, result, [str(path) for path in files.values()])
    return 0


def _print_result(
    args: argparse.Namespace, found: Comparison, result: Any, files: list[str]
) -> None:
    if args.json:
        print_json(
            {
                "test_accuracy": result["test_accuracy"],
                "strategies": found.strategies,
                "files": files,
            }
        )
        return
    print(f"test accuracy {result['test_accuracy']:.4f} after {result['steps']} steps")
    print(f"files: {', '.join(files)}")
