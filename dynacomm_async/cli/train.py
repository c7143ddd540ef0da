"""``dynacomm train``: a server and its workers, all on this machine."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any, TextIO

from dynacomm_async.addresses import parse_address
from dynacomm_async.cli.children import Children, Event
from dynacomm_async.cli.keeping import (
    add_fault_arguments,
    check_keeping,
    fault_options,
    mode_of,
    newest_step,
)
from dynacomm_async.cli.links import Fleet, add_fleet_arguments, fleet_from, start_links
from dynacomm_async.cli.output import Progress, check_writable, decimal, print_json, say
from dynacomm_async.cli.serve import add_init_argument, add_output_arguments
from dynacomm_async.cli.signals import run
from dynacomm_async.cli.tracing import Parts, add_trace_argument, write_trace
from dynacomm_async.cli.workload import (
    add_run_arguments,
    add_strategy_argument,
    check_run,
)
from dynacomm_async.errors import DynaCommError
from dynacomm_async.link.process import LinkProcess
from dynacomm_async.server import check_mode

__all__ = ["add_arguments", "command", "train_locally"]

EXAMPLE = "dynacomm train --model resnet20 --data cifar10 --data-dir ./cifar --epochs 10"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``train``."""
    add_run_arguments(parser)
    add_strategy_argument(parser)
    add_fleet_arguments(parser)
    parser.add_argument(
        "--explain",
        action="store_true",
        help="at the end, say where the time of each worker's step went",
    )
    add_init_argument(parser)
    add_fault_arguments(parser)
    add_trace_argument(parser)
    add_output_arguments(parser)


def command(args: argparse.Namespace) -> int:
    """Train, and print the result."""
    if args.save is not None:
        check_writable(args.save)
    if args.trace is not None:
        check_writable(args.trace)
    explained: dict[int, Event] | None = {} if args.explain else None
    try:
        result = train_locally(args, args.strategy, fleet_from(args), explained)
    except KeyboardInterrupt:
        _say_where_it_stopped(args)
        raise
    if args.json:
        print_json(result)
    else:
        print(
            f"{result['steps']} steps, loss {decimal(result['loss'])}, "
            f"test accuracy {result['test_accuracy']:.4f}, "
            f"parameters sha256 {result['parameters_sha256'][:16]}"
        )
    if explained is not None:
        _print_explanations(explained, sys.stderr if args.json else sys.stdout)
    return 0


def _say_where_it_stopped(args: argparse.Namespace) -> None:
    with contextlib.suppress(DynaCommError):
        step = newest_step(args)
        if step is not None:
            say(f"stopped; the same command with --resume goes on from step {step}")


def _print_explanations(explained: Mapping[int, Event], stream: TextIO) -> None:
    """Print the first rank's whole story, and of the others what differs."""
    for rank in sorted(explained):
        print(f"\n{explained[rank]['brief' if rank else 'text']}", file=stream)


def train_locally(
    args: argparse.Namespace,
    strategy: str,
    fleet: Fleet,
    explained: dict[int, Event] | None = None,
) -> Mapping[str, Any]:
    """Start a server, links and workers as processes, wait for the end, return the result.

    Args:
        args: as :func:`dynacomm_async.cli.workload.add_run_arguments` adds them, and ``trace``:
            where the trace goes, or None.
        strategy: name of the scheduling strategy.
        fleet: what lies between server and workers, and how fast these are.
        explained: filled with what each rank says of its steps, as ``text`` and, without what is
            alike at all workers, ``brief``; None: none of them says anything.

    Raises:
        DynaCommError: a setting is wrong, or a process failed.
    """
    _, steps = check_run(args, strategy)  # fail here, with one line, rather than in a child
    if hasattr(args, "on_leave"):
        check_mode(mode_of(args), strategy, workers=args.workers)
        check_keeping(args)
        if args.resume and newest_step(args) == steps:
            # Nobody has anything to do, or is still there to ask.
            args = argparse.Namespace(**{**vars(args), "absence": 0.0})
            fleet = Fleet(links=(), slowdowns=())
    return run(_train(args, strategy, steps, fleet, explained))


async def _train(
    args: argparse.Namespace,
    strategy: str,
    steps: int,
    fleet: Fleet,
    explained: dict[int, Event] | None,
) -> Mapping[str, Any]:
    loop = asyncio.get_running_loop()
    address: asyncio.Future[str] = loop.create_future()
    result: asyncio.Future[Mapping[str, Any]] = loop.create_future()
    progress = Progress("training: step", steps, log=not args.json)
    notes: list[str] = []  # the first worker's on its newest step

    def on_server_event(event: Event) -> None:
        if event["event"] == "listening":
            if event["step"]:
                say(f"going on from step {event['step']} of {steps}")
            address.set_result(event["address"])
        elif event["event"] == "step":
            progress.update(
                event["index"] + 1, loss=event["loss"], images=event["images"], notes=notes
            )
        elif event["event"] == "result":
            result.set_result({key: event[key] for key in event if key != "event"})

    def on_worker_event(number: int, event: Event) -> None:
        if event["event"] == "step" and number == 0:
            notes[:] = event["notes"]
        elif event["event"] == "explained" and explained is not None:
            explained[event["rank"]] = event

    module = "dynacomm_async.cli.main"
    async with contextlib.AsyncExitStack() as stack:
        children = await stack.enter_async_context(Children())
        stack.callback(progress.close)
        parts = stack.enter_context(Parts()) if args.trace is not None else None
        options = [*_serve_options(args, strategy, steps), *_trace_option(parts)]
        await children.start("server", module, "serve", *options, on_event=on_server_event)
        server = parse_address(await children.wait_for(address))
        targets = [server] * len(fleet.links)
        links: list[LinkProcess] = []
        if not fleet.is_local:
            (links,) = await start_links(stack, fleet.links, [server], parts)
            targets = [process.address for process in links]
            stack.callback(children.hush)  # before the links go, which is a loss for the others
        for number, target in enumerate(targets):
            await children.start(
                f"worker {number}",
                module,
                "work",
                "--server",
                str(target),
                f"--slowdown={fleet.slowdowns[number]}",
                "--events",
                *(["--explain"] if explained is not None else []),
                *_trace_option(parts),
                on_event=partial(on_worker_event, number),
            )
        await children.wait_for(result)
        await children.wait_all()
        if parts is not None:
            for process in links:
                await process.stop()
            write_trace(args.trace, parts.join())
    return result.result()


def _trace_option(parts: Parts | None) -> list[str]:
    return [] if parts is None else [f"--trace={parts.add()}"]


def _serve_options(args: argparse.Namespace, strategy: str, steps: int) -> list[str]:
    options = [
        f"--model={args.model}",
        f"--data={args.data}",
        f"--batch={args.batch}",
        f"--threads={getattr(args, 'threads', 1)}",
        f"--seed={args.seed}",
        f"--workers={args.workers}",
        f"--steps={steps}",
        f"--rate={args.rate}",
        f"--rate-schedule={args.rate_schedule}",
        f"--rule={args.rule}",
        f"--weight-decay={args.weight_decay}",
        f"--label-smoothing={args.label_smoothing}",
        f"--strategy={strategy}",
        "--listen=127.0.0.1:0",
        "--events",
    ]
    if args.data_dir is not None:
        options.append(f"--data-dir={args.data_dir}")
    if args.augment is not None:
        options.append(f"--augment={args.augment}")
    if getattr(args, "init", None) is not None:
        options.append(f"--init={args.init}")
    if hasattr(args, "absence"):
        options += fault_options(args)
    if getattr(args, "save", None) is not None:
        options.append(f"--save={args.save}")
    return options
