"""``dynacomm sweep``: what each strategy would make of other links, batches and workers."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from dynacomm_async.cli.output import check_writable, print_json, say, seconds, table
from dynacomm_async.cli.plan import read_costs
from dynacomm_async.errors import ConfigError
from dynacomm_async.link.units import format_rate, parse_duration, parse_rate
from dynacomm_async.observe import check_plotting, plot_sweep
from dynacomm_async.schedule import PLANNERS, Costs
from dynacomm_async.schedule.whatif import (
    judge,
    with_bandwidth,
    with_batch,
    with_latency,
    with_overhead,
    with_speed,
    with_workers,
)

__all__ = ["add_arguments", "command", "sweep"]

EXAMPLE = "dynacomm sweep costs.json --bandwidth 10mbit,100mbit,1gbit --overhead 0ms,1ms,5ms"

T = TypeVar("T")

_SPEEDS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Links that are tried where no bandwidth is named, relative to the table's own."""

_MOST_ROWS = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``sweep``."""
    parser.add_argument("costs", type=Path, metavar="costs.json", help="from `dynacomm profile`")
    parser.add_argument(
        "--bandwidth",
        metavar="RATE,...",
        help="each way, such as 10mbit,100mbit (default: an eighth to eight times the table's)",
    )
    parser.add_argument("--overhead", metavar="TIME,...", help="of a message (default: as it is)")
    parser.add_argument("--latency", metavar="TIME,...", help="each way (default: as it is)")
    parser.add_argument("--batch", metavar="B,...", help="images in a step (default: as it is)")
    parser.add_argument("--workers", metavar="N,...", help="workers (default: as it is)")
    parser.add_argument(
        "--shared", action="store_true", help="all workers share one link (default: as it is)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw who wins where")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def command(args: argparse.Namespace) -> int:
    """Plan for every combination, and print who wins."""
    if args.plot is not None:
        check_plotting()
        check_writable(args.plot)
    costs = read_costs(args.costs)
    if args.shared:
        costs = replace(costs, shared_link=True)
    rows = sweep(costs, _axes(args, costs))
    if args.plot is not None:
        plot_sweep(rows, args.plot)
    if args.json:
        print_json(rows)
    else:
        _print_rows(rows)
    if args.workers is not None and not costs.shared_link:
        say("each worker has a link of its own, so their number changes nothing (see --shared)")
    if args.plot is not None:
        say(f"drawn in {args.plot}")
    return 0


def sweep(costs: Costs, axes: Sequence[tuple[str, Sequence[Any]]]) -> list[dict[str, Any]]:
    """Return one row for each combination: the settings, each strategy's step, the bound.

    Args:
        axes: ``(name, values)`` of what is varied; see ``_CHANGES``.

    Raises:
        ConfigError: too many combinations, or a value that cannot be.
    """
    names = [name for name, _ in axes]
    n_rows = prod(len(values) for _, values in axes)
    if n_rows > _MOST_ROWS:
        raise ConfigError(f"{n_rows} combinations are too many, expected at most {_MOST_ROWS}")
    rows = []
    for values in itertools.product(*(values for _, values in axes)):
        changed = costs
        for name, value in zip(names, values, strict=True):
            changed = _CHANGES[name](changed, value)
        rows.append({**_settings(changed), **_judge(changed)})
    return rows


_CHANGES: dict[str, Callable[[Costs, Any], Costs]] = {
    "bandwidth": with_bandwidth,
    "speed": with_speed,
    "overhead": with_overhead,
    "latency": with_latency,
    "batch": with_batch,
    "workers": with_workers,
}


def _settings(costs: Costs) -> dict[str, Any]:
    nbytes = sum(layer.nbytes for layer in costs.layers)
    rates = {}
    for way, total_ns in (
        ("down", sum(layer.pull_ns for layer in costs.layers)),
        ("up", sum(layer.push_ns for layer in costs.layers)),
    ):
        rates[f"{way}_bytes_per_s"] = nbytes * 1e9 / total_ns if total_ns else None
    return {
        **rates,
        "overhead_s": max(costs.overhead_up_ns, costs.overhead_down_ns) / 1e9,
        "latency_s": max(costs.latency_up_ns, costs.latency_down_ns) / 1e9,
        "batch": costs.batch,
        "workers": costs.workers,
        "link": "shared" if costs.shared_link else "own",
    }


def _judge(costs: Costs) -> dict[str, Any]:
    verdict = judge(costs)
    return {
        "step_s": {name: step_ns / 1e9 for name, step_ns in verdict.steps_ns.items()},
        "lower_bound_s": verdict.lower_bound_ns / 1e9,
        "best": verdict.best,
        "choice": verdict.choice,
    }


def _axes(args: argparse.Namespace, costs: Costs) -> list[tuple[str, Sequence[Any]]]:
    """What was asked for; without a bandwidth, the table's own link slower and faster."""
    axes: list[tuple[str, Sequence[Any]]] = [
        ("bandwidth", _values(args, "bandwidth", _rate)),
        ("overhead", _values(args, "overhead", _nanoseconds)),
        ("latency", _values(args, "latency", _nanoseconds)),
        ("batch", _values(args, "batch", _count)),
        ("workers", _values(args, "workers", _count)),
    ]
    if args.bandwidth is None and any(layer.pull_ns or layer.push_ns for layer in costs.layers):
        axes[0] = ("speed", _SPEEDS)
    return [(name, values) for name, values in axes if values]


def _values(args: argparse.Namespace, option: str, parse: Callable[[str], T]) -> list[T]:
    text = getattr(args, option)
    try:
        parsed = [] if text is None else [parse(part.strip()) for part in text.split(",")]
    except ConfigError as error:
        raise ConfigError(f"--{option}: {error}") from error
    return list(dict.fromkeys(parsed))


def _rate(text: str) -> float:
    rate = parse_rate(text)
    if rate is None:
        raise ConfigError("a sweep needs rates, not 'unlimited'")
    return rate


def _nanoseconds(text: str) -> int:
    return round(parse_duration(text) * 1e9)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ConfigError(f"{text!r} is not a whole number from 1")
    return int(text)


def _print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Settings that are the same in all rows are said once."""
    columns = {name: [show(row) for row in rows] for name, show in _SHOWN.items()}
    fixed = {name: cells[0] for name, cells in columns.items() if len(set(cells)) == 1}
    varied = {name: cells for name, cells in columns.items() if name not in fixed}
    cells = [
        [
            *(column[index] for column in varied.values()),
            *(seconds(row["step_s"][name]) for name in PLANNERS),
            seconds(row["lower_bound_s"]),
            str(row["choice"]),
        ]
        for index, row in enumerate(rows)
    ]
    print(table([*varied, *PLANNERS, "lower bound", "choice"], cells))
    if fixed:
        print("; ".join(f"{name} {value}" for name, value in fixed.items()))
    print("choice: the simplest strategy whose step is within 1 % of the fastest")


def _bandwidth(row: Mapping[str, Any]) -> str:
    down, up = format_rate(row["down_bytes_per_s"]), format_rate(row["up_bytes_per_s"])
    return down if down == up else f"{down} down, {up} up"


_SHOWN: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "bandwidth": _bandwidth,
    "overhead": lambda row: seconds(row["overhead_s"]),
    "latency": lambda row: seconds(row["latency_s"]),
    "batch": lambda row: "unknown" if row["batch"] is None else str(row["batch"]),
    "workers": lambda row: str(row["workers"]),
}
