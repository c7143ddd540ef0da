"""``dynacomm compare``: the same training under several strategies, measured and predicted."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TextIO

from dynacomm_async.addresses import parse_address
from dynacomm_async.cli.children import Children, Event
from dynacomm_async.cli.compare_plot import MeasuredSteps, plot_comparison
from dynacomm_async.cli.compare_worker import LEAST_STEPS
from dynacomm_async.cli.links import Fleet, add_fleet_arguments, fleet_from, start_links
from dynacomm_async.cli.output import (
    Progress,
    check_writable,
    print_json,
    say,
    seconds,
    table,
    to_json,
)
from dynacomm_async.cli.signals import run
from dynacomm_async.cli.tracing import Parts, add_trace_argument, write_trace
from dynacomm_async.cli.workload import add_run_arguments, check_run, training_options
from dynacomm_async.errors import ConfigError
from dynacomm_async.link.process import LinkProcess
from dynacomm_async.observe import Joined, check_plotting
from dynacomm_async.schedule import (
    PLANNERS,
    Costs,
    bound_of_all_ns,
    evaluate,
    find_planner,
    forecast,
)

__all__ = ["Comparison", "add_arguments", "command", "compare", "print_comparison"]

EXAMPLE = "dynacomm compare --model vgg_small --data synthetic --bandwidth 200mbit --delay 5ms"

_DISTURBED = 1.3
"""A measured step over the predicted one, at the median of the strategies, that is no accident."""


@dataclass(slots=True)
class Comparison:
    """What a comparison found.

    Attributes:
        costs: the one cost table that all predictions come from.
        strategies: by name, the fields of the JSON output.
        plans: by name, for each worker process its list of ``[first step, plan]``.
        links: by name, the counters of each worker process's link, in the same order; where the
            link is shared, those of that one link.
        measured: by name, which steps of the first worker process counted.
        joined: everything that was recorded, if that was asked for.
        explained_costs: the first worker process's link and layers, as text.
        explained: by name, its plan and where the time of its steps went, as text.
        guessed: whether the link could not be measured, and the costs are guesses.
    """

    costs: dict[str, Any] = field(default_factory=dict)
    strategies: dict[str, dict[str, Any]] = field(default_factory=dict)
    plans: dict[str, list[list[Any]]] = field(default_factory=dict)
    links: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    measured: dict[str, MeasuredSteps] = field(default_factory=dict)
    joined: Joined | None = None
    explained_costs: str = ""
    explained: dict[str, str] = field(default_factory=dict)
    guessed: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the command's JSON output."""
        return {"strategies": self.strategies, "costs": self.costs}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``compare``."""
    add_run_arguments(parser, steps=60)
    parser.add_argument(
        "--strategies",
        default="all",
        metavar="A,B,...",
        help=f"all, or some of {','.join(PLANNERS)} (default: all)",
    )
    add_fleet_arguments(parser)
    parser.set_defaults(bandwidth="100mbit", delay="5ms")
    parser.add_argument(
        "--save-costs", type=Path, metavar="FILE", help="write the measured cost table here"
    )
    add_trace_argument(parser)
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="draw one step of each strategy, predicted above measured",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="say where the time of the first worker's step went under each strategy",
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")


def command(args: argparse.Namespace) -> int:
    """Compare, and print what was found."""
    strategies = parse_strategies(args.strategies)
    fleet = fleet_from(args)
    if args.plot is not None:
        check_plotting()
    for path in (args.trace, args.plot):
        if path is not None:
            check_writable(path)
    record = args.trace is not None or args.plot is not None
    found = compare(args, strategies, fleet, costs_file=args.save_costs, record=record)
    if found.joined is not None:
        if args.trace is not None:
            write_trace(args.trace, found.joined)
        if args.plot is not None:
            plot_comparison(args, found.costs, found.measured, found.joined)
    if args.json:
        print_json(found.to_json())
    else:
        print_comparison(found)
    if args.explain:
        _print_explanations(found, sys.stderr if args.json else sys.stdout)
    return 0


def _print_explanations(found: Comparison, stream: TextIO) -> None:
    """Print the costs that all strategies share, then each strategy's story."""
    sections = {"What a step costs the first worker process": found.explained_costs}
    for name in found.strategies:
        sections[f"Strategy {name}, as that worker saw it"] = found.explained[name]
    for title, text in sections.items():
        print(f"\n{title}\n{'=' * len(title)}\n{text}", file=stream)


def parse_strategies(text: str) -> list[str]:
    """Return the strategies in ``"a,b"`` or ``"all"``.

    Raises:
        ConfigError: no such strategy, or one twice.
    """
    names = list(PLANNERS) if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        find_planner(name)
    if len(set(names)) < len(names):
        raise ConfigError(f"--strategies {text}: each strategy may be named once")
    return names


def compare(
    args: argparse.Namespace,
    strategies: Sequence[str],
    fleet: Fleet,
    *,
    costs_file: Path | None = None,
    record: bool = False,
) -> Comparison:
    """Run every strategy in interleaved blocks; see :mod:`dynacomm_async.cli.compare_worker`.

    Args:
        costs_file: where the cost table is saved, before the measured blocks begin.
        record: whether all processes record what they do.

    Raises:
        DynaCommError: a setting is wrong, or a process failed.
    """
    settings, steps = check_run(args, strategies[0])
    if steps < LEAST_STEPS:
        raise ConfigError(f"{steps} steps are too few to compare, expected {LEAST_STEPS} or more")
    if costs_file is not None:
        check_writable(costs_file)
    specification = {
        "settings": settings,
        "training": training_options(args),
        "steps": steps,
        "strategies": list(strategies),
    }
    return run(_compare(specification, fleet, costs_file, record))


async def _compare(
    specification: Mapping[str, Any], fleet: Fleet, costs_file: Path | None, record: bool
) -> Comparison:
    steps, strategies = specification["steps"], specification["strategies"]
    n_workers = specification["settings"]["workers"]
    found = Comparison(plans={name: [[] for _ in range(n_workers)] for name in strategies})
    loop = asyncio.get_running_loop()
    addresses: asyncio.Future[Mapping[str, str]] = loop.create_future()
    progress = Progress("comparing: step", steps * len(strategies))
    tables: dict[int, Event] = {}

    def on_server_event(event: Event) -> None:
        if event["event"] == "listening":
            addresses.set_result(event["addresses"])
        elif event["event"] == "result":
            entry = found.strategies.setdefault(event["strategy"], {})
            entry.update(parameters_sha256=event["parameters_sha256"], loss=event["loss"])

    def on_worker_event(process: int, event: Event) -> None:
        if event["event"] == "costs":
            tables[process] = event
            if len(tables) == n_workers:
                on_costs()
        elif event["event"] == "measured":
            found.plans[event["strategy"]][process] = event["plans"]
            if process == 0:
                entry = found.strategies.setdefault(event["strategy"], {})
                entry.update(_judge(event, found.costs))
                found.measured[event["strategy"]] = MeasuredSteps(event["rank"], event["counted"])
                found.explained[event["strategy"]] = event["explanation"]
        elif event["event"] == "progress" and process == 0:
            progress.update(event["done"])

    def on_costs() -> None:
        found.costs, *others = [tables[process]["costs"] for process in range(n_workers)]
        if others:
            found.costs["others"] = others
        found.explained_costs = tables[0]["explanation"]
        found.guessed = not all(event["known"] for event in tables.values())
        if found.guessed:
            say("the link is too fast or too uneven to be measured: its costs are guesses")
        if costs_file is not None:
            costs_file.write_text(to_json(found.costs, indent=1) + "\n")

    module = "dynacomm_async.cli.compare_"
    async with contextlib.AsyncExitStack() as stack:
        children = await stack.enter_async_context(Children())
        stack.callback(progress.close)
        parts = stack.enter_context(Parts()) if record else None
        machines = fleet.machines or ((),) * (1 + n_workers)
        server = await children.start(
            "server", f"{module}server", on_event=on_server_event, machine=machines[0]
        )
        server.tell({**specification, "host": fleet.host, "trace": _part(parts)})
        listening = await children.wait_for(addresses)
        links: dict[str, list[LinkProcess]] = {}
        if not fleet.machines:
            servers = [parse_address(listening[name]) for name in strategies]
            rows = await start_links(stack, fleet.links, servers, parts)
            links = dict(zip(strategies, rows, strict=True))
            stack.callback(children.hush)  # before the links go, which is a loss for the others
        for process in range(n_workers):
            worker = await children.start(
                f"worker {process}",
                f"{module}worker",
                on_event=partial(on_worker_event, process),
                machine=machines[1 + process],
            )
            behind = {name: str(row[process].address) for name, row in links.items()}
            slowdown = fleet.slowdowns[process]
            own = {"addresses": behind or listening, "slowdown": slowdown, "trace": _part(parts)}
            worker.tell({**specification, **own})
        await children.wait_all()
        for name, row in links.items():
            found.links[name] = [await each.stop() for each in dict.fromkeys(row)]
        if parts is not None:
            found.joined = parts.join()
    found.strategies = {name: _ordered(found.strategies[name]) for name in strategies}
    return found


def _part(parts: Parts | None) -> str | None:
    return None if parts is None else str(parts.add())


def _judge(event: Event, table_json: Mapping[str, Any]) -> dict[str, Any]:
    """Return a strategy's figures beside what the cost table promised."""
    costs = Costs.from_json(table_json)
    run_of_all = forecast(find_planner(event["strategy"]), costs)
    busy_s = evaluate(run_of_all.plans[0], costs).busy_ns / 1e9
    step_s, compute_s = event["step_s"], event["compute_s"]
    wait_s = run_of_all.waits_ns[0] / 1e9  # for a slower worker: no transfer's fault
    return {
        "step_s": step_s,
        "predicted_s": run_of_all.step_ns / 1e9,
        "lower_bound_s": bound_of_all_ns(costs).step_ns / 1e9,
        "hidden_fraction": 1 - (step_s - wait_s - compute_s) / busy_s if busy_s else 0.0,
        "waits_s": [wait_ns / 1e9 for wait_ns in run_of_all.waits_ns],
        "interval_s": event["interval_s"],
    }


def _ordered(entry: Mapping[str, Any]) -> dict[str, Any]:
    keys = ["step_s", "predicted_s", "lower_bound_s", "hidden_fraction", "parameters_sha256"]
    return {key: entry[key] for key in [*keys, "loss", "interval_s", "waits_s"]}


def print_comparison(found: Comparison) -> None:
    """Print the table, and whether the results are the same."""
    rows = [
        [
            name,
            seconds(entry["step_s"]),
            "-".join(f"{1e3 * edge:.0f}" for edge in entry["interval_s"]),
            seconds(entry["predicted_s"]),
            seconds(entry["lower_bound_s"]),
            f"{entry['step_s'] / entry['lower_bound_s']:.2f}" if entry["lower_bound_s"] else "-",
            f"{max(entry['hidden_fraction'], 0):.0%}",
        ]
        for name, entry in found.strategies.items()
    ]
    header = ["strategy", "measured step", "95 % sure (ms)", "predicted step", "lower bound"]
    header += ["x bound", "hidden"]
    print(table(header, rows))
    costs = Costs.from_json(found.costs)
    compute_ns = sum(layer.forward_ns + layer.backward_ns for layer in costs.layers)
    print(
        "x bound: how many times the measured step is as long as no schedule could go below;\n"
        "hidden: the share of transfer that cost no time, waiting for other workers left out;\n"
        f"at most the {seconds(compute_ns / 1e9)} that a step computes can hide any"
    )
    if costs.others:
        _print_waits(found)
    _print_disturbance(found)
    hashes = {entry["parameters_sha256"] for entry in found.strategies.values()}
    if len(hashes) == 1:
        print(f"parameters: bit-identical under every strategy, sha256 {hashes.pop()[:16]}")
    else:
        print("parameters: NOT the same under every strategy; please report this as a bug")


def _print_disturbance(found: Comparison) -> None:
    """Say so where something that is no strategy's doing has made the steps long."""
    entries = [entry for entry in found.strategies.values() if entry["predicted_s"]]
    if found.guessed or not entries:
        return
    ratio = median(entry["step_s"] / entry["predicted_s"] for entry in entries)
    if ratio > _DISTURBED:
        print(
            f"steps took {ratio:.1f} times as long as predicted; if more wants to run here than "
            "there are processors,\nan idle machine or fewer --workers tell strategies apart better"
        )


def _print_waits(found: Comparison) -> None:
    """Say who waits for whom in every step, where it is more than a tenth of it."""
    for name, entry in found.strategies.items():
        slowest = entry["waits_s"].index(min(entry["waits_s"]))
        waits = [
            f"worker {worker} {seconds(wait_s)}"
            for worker, wait_s in enumerate(entry["waits_s"])
            if worker != slowest and wait_s > entry["predicted_s"] / 10
        ]
        if waits:
            print(f"waiting for worker {slowest} under {name}: {', '.join(waits)} of every step")
