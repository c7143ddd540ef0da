"""The picture of a comparison: one step of each strategy, predicted above measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dynacomm_async.cli.output import say
from dynacomm_async.link.units import parse_duration, parse_rate
from dynacomm_async.observe import (
    Joined,
    TimelineEntry,
    measured_steps,
    median_step,
    plot_timelines,
)
from dynacomm_async.observe.canvas import format_duration, format_rate
from dynacomm_async.schedule import Costs, evaluate, make_plan

__all__ = ["MeasuredSteps", "plot_comparison"]


class MeasuredSteps(NamedTuple):
    """Which steps of a worker count: those of measured blocks, under the strategy's plan."""

    rank: int
    counted: Sequence[int]


def plot_comparison(
    args: argparse.Namespace,
    costs_json: Mapping[str, Any],
    measured: Mapping[str, MeasuredSteps],
    joined: Joined,
) -> None:
    """Draw each strategy's predicted step, and of those that counted the one of median length.

    Raises:
        ConfigError: matplotlib is missing, or it does not know the format.
    """
    costs = Costs.from_json(costs_json)
    entries = []
    for name, (rank, counted) in measured.items():
        predicted = evaluate(make_plan(name, costs), costs)
        steps = measured_steps(joined, rank, name, barrier=predicted.forward_ns is not None)
        median = median_step(steps, counted)
        entries.append(TimelineEntry(name, predicted, None if median is None else steps[median]))
    plot_timelines(entries, args.plot, title=_title(args))
    say(f"drawn in {args.plot}")


def _title(args: argparse.Namespace) -> str:
    workers = f"{args.workers} worker{'s' if args.workers > 1 else ''}"
    up = "" if args.bandwidth_up is None else f", up {_join(args.bandwidth_up, _show_rate)}"
    return (
        f"One training step: {args.model}, {workers}, batch {args.batch}; "
        f"{_join(args.bandwidth, _show_rate)}{up}, {_join(args.delay, _show_time)} delay, "
        f"{_join(args.overhead, _show_time)} overhead a message"
    )


def _join(option: str, show: Callable[[str], str]) -> str:
    """Say an option in words; each worker may have a value of its own."""
    return " / ".join(show(value.strip()) for value in option.split(","))


def _show_rate(text: str) -> str:
    return format_rate(parse_rate(text))


def _show_time(text: str) -> str:
    return format_duration(parse_duration(text))
