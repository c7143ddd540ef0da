"""``dynacomm work``: one worker of a run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dynacomm_async.cli.links import slowdown
from dynacomm_async.cli.output import Progress, say
from dynacomm_async.cli.signals import interruptible
from dynacomm_async.cli.workload import Workload, load_workload, number
from dynacomm_async.wire.grid import LayerSpec
from dynacomm_async.worker import Session, bind_engine, layer_specs, train

__all__ = ["add_arguments", "command"]

EXAMPLE = "dynacomm work --server 192.168.1.10:7070"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``work``."""
    parser.add_argument(
        "--server", required=True, metavar="HOST:PORT", help="everything else comes from there"
    )
    parser.add_argument("--run", metavar="ID", help="refuse to join any other run")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where mnist or cifar10 lie")
    parser.add_argument(
        "--retry",
        type=number,
        default=30.0,
        metavar="SECONDS",
        help="how long to look for the server (default: %(default)s)",
    )
    parser.add_argument(
        "--slowdown",
        type=slowdown,
        default=1.0,
        metavar="F",
        help="imitate a slower device: each layer takes F times as long (default: 1)",
    )
    parser.add_argument("--events", action="store_true", help=argparse.SUPPRESS)


def command(args: argparse.Namespace) -> int:
    """Work until the run has ended."""
    with interruptible():
        _work(args)
    return 0


def _work(args: argparse.Namespace) -> None:
    loaded: list[Workload] = []

    def layers(settings: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
        loaded.append(load_workload(settings, args.data_dir))
        return layer_specs(loaded[0].network)

    with Session(args.server, layers, run=args.run, retry_s=args.retry) as session:
        (workload,) = loaded
        welcome = session.welcome
        if not args.events:
            say(f"run {welcome.run}: joined as rank {welcome.slot} (of {welcome.workers})")
        engine = bind_engine(session, workload.network, session.settings["batch"])
        progress = Progress("step", welcome.steps)
        try:
            batches = partial(workload.batch, welcome.slot)
            for step in train(session, engine, batches, slowdown=args.slowdown):
                progress.update(step.index + 1, loss=step.loss, images=engine.batch)
        finally:
            progress.close()
    if not args.events:
        say(f"the run has ended after {welcome.steps} steps")
