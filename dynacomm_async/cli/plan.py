"""``dynacomm plan``: what each strategy makes of a cost table, without any training."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynacomm_async.cli.output import check_writable, print_json, say, seconds, table
from dynacomm_async.cli.timeline import draw_timeline
from dynacomm_async.errors import ConfigError
from dynacomm_async.observe import TimelineEntry, check_plotting, plot_timelines
from dynacomm_async.schedule import (
    PLANNERS,
    AnyPlan,
    Costs,
    Timeline,
    bound_of_all_ns,
    crosses,
    evaluate,
    find_planner,
    forecast,
    make_plan,
)

__all__ = ["add_arguments", "command", "describe_plan", "read_costs"]

_PHASES = ("forward_s", "backward_s")

EXAMPLE = "dynacomm plan costs.json --strategy all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``plan``."""
    parser.add_argument("costs", type=Path, metavar="costs.json", help="from `dynacomm profile`")
    parser.add_argument(
        "--strategy",
        default="all",
        metavar="NAME",
        help=f"all, or one of {', '.join(PLANNERS)} (default: all)",
    )
    parser.add_argument(
        "--timeline", action="store_true", help="draw each strategy's step, predicted, as text"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw each strategy's step, predicted"
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")


def command(args: argparse.Namespace) -> int:
    """Plan, and print the plans."""
    if args.strategy != "all":
        find_planner(args.strategy)
    names = list(PLANNERS) if args.strategy == "all" else [args.strategy]
    if args.plot is not None:
        check_plotting()
        check_writable(args.plot)
    costs = read_costs(args.costs)
    plans = [describe_plan(name, costs) for name in names]
    if args.plot is not None:
        timelines = [evaluate(make_plan(name, costs), costs) for name in names]
        plot_timelines(
            [TimelineEntry(*pair) for pair in zip(names, timelines, strict=True)], args.plot
        )
        say(f"drawn in {args.plot}")
    if args.json:
        print_json(plans)
        return 0
    rows = [
        [
            plan["strategy"],
            _count(plan, "pull"),
            _count(plan, "push"),
            *("-" if plan[key] is None else seconds(plan[key]) for key in _PHASES),
            seconds(plan["step_s"]),
            *([seconds(plan["wait_s"])] if costs.others else []),
            f"{plan['step_s'] / plan['lower_bound_s']:.3f}" if plan["lower_bound_s"] else "-",
        ]
        for plan in plans
    ]
    waiting = ["waiting"] if costs.others else []
    header = ["strategy", "pulls", "pushes", "forward", "backward", "step", *waiting]
    print(table([*header, "x lower bound"], rows))
    if costs.others:
        print(
            "forward and backward: of the first worker; step: of all, who set out together;\n"
            "waiting: how long the first worker is done before the slowest"
        )
    bound = bound_of_all_ns(costs)
    print(f"lower bound {seconds(bound.step_ns / 1e9)} ({bound.name})")
    for name in names if args.timeline else ():
        print(f"\n{name}\n{draw_timeline(evaluate(make_plan(name, costs), costs))}")
    return 0


def read_costs(path: Path) -> Costs:
    """Return the cost table in a file.

    Raises:
        ConfigError: no such file, or not a cost table; the sentence says what is wrong.
    """
    try:
        return Costs.from_json(json.loads(path.read_text()))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:  # no text, no JSON, or beyond all reason
        raise ConfigError(f"{path} is not JSON: {error}") from error


def describe_plan(strategy: str, costs: Costs) -> dict[str, Any]:
    """Return a strategy's plan and what it promises, in seconds.

    Where the strategy needs no barrier between steps, the messages are those of the simulated
    step, with what each carries as byte ranges, and ``plan`` is the rule that makes them.
    """
    run = forecast(find_planner(strategy), costs)
    plan = run.plans[0]
    timeline = evaluate(plan, costs)
    bound = bound_of_all_ns(costs)
    return {
        "strategy": strategy,
        **(_list_messages(plan, timeline) if crosses(strategy) else plan.to_json()),
        "forward_s": _seconds(None if crosses(strategy) else timeline.forward_ns),
        "backward_s": _seconds(None if crosses(strategy) else timeline.backward_ns),
        "step_s": run.step_ns / 1e9,
        "wait_s": run.waits_ns[0] / 1e9,
        "lower_bound_s": bound.step_ns / 1e9,
        "lower_bound": bound.name,
    }


def _list_messages(plan: AnyPlan, timeline: Timeline) -> dict[str, Any]:
    sent = sorted(timeline.transfers, key=lambda transfer: transfer.start_ns)
    return {
        "messages": [
            {"direction": one.direction, "ranges": [list(part) for part in one.ranges]}
            for one in sent
        ],
        "plan": plan.to_json(),
    }


def _seconds(duration_ns: int | None) -> float | None:
    return None if duration_ns is None else duration_ns / 1e9


def _count(plan: Mapping[str, Any], direction: str) -> str:
    """How many messages go one way."""
    if "messages" not in plan:
        return str(len(plan[direction]))
    return str([message["direction"] for message in plan["messages"]].count(direction))
