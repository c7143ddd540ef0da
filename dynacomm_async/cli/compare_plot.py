"""The picture of a comparison: one step of each strategy, predicted above measured."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dynacomm_async.cli.output import say
from dynacomm_async.observe import TimelineEntry, plot_timelines
from dynacomm_async.observe.joining import Joined
from dynacomm_async.observe.measured import measured_steps, median_step
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
        steps = measured_steps(joined, rank, name)
        median = median_step(steps, counted)
        entries.append(
            TimelineEntry(
                name,
                evaluate(make_plan(name, costs), costs),
                None if median is None else steps[median],
            )
        )
    plot_timelines(entries, args.plot, title=_title(args))
    say(f"drawn in {args.plot}")


def _title(args: argparse.Namespace) -> str:
    workers = f"{args.workers} worker{'s' if args.workers > 1 else ''}"
    return (
        f"One training step: {args.model}, {workers}, batch {args.batch}; "
        f"link {args.bandwidth}, {args.delay} delay, {args.overhead} overhead a message"
    )
