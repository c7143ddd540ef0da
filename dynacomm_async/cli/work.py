"""``dynacomm work``: one worker of a run."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dynacomm_async.cli.congestion import add_congestion_argument
from dynacomm_async.cli.links import slowdown
from dynacomm_async.cli.output import Progress, emit, say, step_notes, telling
from dynacomm_async.cli.place import fill_work, own_place
from dynacomm_async.cli.signals import interruptible
from dynacomm_async.cli.tracing import add_own_trace_argument, recorded
from dynacomm_async.cli.workload import Batch, Workload, load_workload, number
from dynacomm_async.nn import KERNELS
from dynacomm_async.observe import describe_plan, explain_worker
from dynacomm_async.recording import Recorder
from dynacomm_async.wire.grid import LayerSpec
from dynacomm_async.worker import Session, bind_engine, layer_specs, train

__all__ = ["add_arguments", "command", "join"]

EXAMPLE = "dynacomm work --server 192.168.1.10:7070"

_EMIT_EVERY_S = 0.1
"""How often a parent hears of steps, at most."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``work``."""
    parser.add_argument(
        "--server",
        metavar="HOST:PORT",
        help="everything else comes from there (default: what a cluster's launcher says)",
    )
    parser.add_argument("--run", metavar="ID", help="refuse to join any other run")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where mnist or cifar10 lie")
    parser.add_argument(
        "--retry",
        type=number,
        default=30.0,
        metavar="SECONDS",
        help="how long to look for the server, at the beginning and when it is lost "
        "(default: %(default)g)",
    )
    parser.add_argument(
        "--slowdown",
        type=slowdown,
        default=1.0,
        metavar="F",
        help="imitate a slower device: each layer takes F times as long (default: 1)",
    )
    parser.add_argument(
        "--explain", action="store_true", help="at the end, say where the time of a step went"
    )
    add_congestion_argument(parser)
    add_own_trace_argument(parser)
    parser.add_argument("--events", action="store_true", help=argparse.SUPPRESS)


def command(args: argparse.Namespace) -> int:
    """Work until the run has ended."""
    if args.server is None:
        fill_work(args, own_place())
    news = nullcontext() if args.events else telling("dynacomm_async.worker.connection")
    with interruptible(), news, recorded(args.trace) as recorder:
        join(args, recorder)
    return 0


def join(args: argparse.Namespace, recorder: Recorder | None = None) -> None:
    """Join the run and work until it has ended.

    Raises:
        DynaCommError: it ended otherwise.
    """
    loaded: list[Workload] = []

    def layers(settings: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
        loaded.append(load_workload(settings, args.data_dir))
        return layer_specs(loaded[0].network)

    with Session(
        args.server,
        layers,
        run=args.run,
        kernels=KERNELS,
        retry_s=args.retry,
        recorder=recorder,
        congestion=args.congestion,
    ) as session:
        (workload,) = loaded
        welcome = session.welcome
        if not args.events:
            say(f"run {welcome.run}: joined as rank {welcome.slot} (of {welcome.workers})")
        batch = session.settings["batch"]
        engine = bind_engine(
            session,
            workload.network,
            batch,
            smoothing=workload.smoothing,
            threads=workload.threads,
        )
        progress = Progress("step", welcome.steps, log=not args.events)
        news = _News(session, args.events)
        try:

            def batches(index: int) -> Batch:
                return workload.batch(welcome.slot, index, session.split_of(index))

            steps = train(session, engine, batches, slowdown=args.slowdown, seed=workload.seed)
            for step in steps:
                progress.update(
                    step.index + 1, loss=step.loss, images=engine.batch, notes=news.tell()
                )
        finally:
            progress.close()
    if not args.events:
        say(f"the run has ended after {welcome.steps} steps")
    if args.explain:
        _explain(session, args.events)


class _News:
    """Tells of steps that have ended and plans that have changed: a person, or the parent."""

    def __init__(self, session: Session, events: bool) -> None:
        self._session = session
        self._events = events
        self._names = [spec.name for spec in session.grid.layers]
        self._told = -1  # the newest step whose change of plan was told
        self._emitted = 0.0

    def tell(self) -> list[str]:
        """Return what a line of progress says of the newest step."""
        account = self._session.metrics.latest
        if not self._events:
            self._tell_plans()
        if account is None:
            return []
        notes = step_notes(account.step_ns / 1e9, account)
        if self._events and time.monotonic() - self._emitted > _EMIT_EVERY_S:
            self._emitted = time.monotonic()
            emit("step", notes=notes)
        return notes

    def _tell_plans(self) -> None:
        for replan in tuple(self._session.plans.log):
            if replan.step > self._told:
                plan = describe_plan(replan.after, self._names)
                say(f"from step {replan.step} on {plan} ({replan.reason})")
                self._told = replan.step


def _explain(session: Session, events: bool) -> None:
    report = session.describe()
    if events:
        whole, brief = explain_worker(report), explain_worker(report, brief=True)
        emit("explained", rank=report.slot, text=whole, brief=brief)
    else:
        print(explain_worker(report))
