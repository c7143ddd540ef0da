"""``dynacomm serve``: the parameter server of a run."""

from __future__ import annotations

import argparse
import asyncio
import socket
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dynacomm_async.addresses import Address, parse_address
from dynacomm_async.cli.congestion import add_congestion_argument
from dynacomm_async.cli.keeping import add_fault_arguments, open_checkpoints, server_options
from dynacomm_async.cli.output import (
    Progress,
    check_writable,
    decimal,
    emit,
    print_json,
    say,
    say_if_diverged,
    step_notes,
    telling,
)
from dynacomm_async.cli.place import fill_serve, own_place
from dynacomm_async.cli.signals import run
from dynacomm_async.cli.tracing import add_own_trace_argument, recorded
from dynacomm_async.cli.workload import (
    Workload,
    add_run_arguments,
    add_strategy_argument,
    load_workload,
    settings_of,
    steps_of,
    training_of,
    training_options,
)
from dynacomm_async.errors import CheckpointError
from dynacomm_async.models import save_run
from dynacomm_async.recording import Recorder
from dynacomm_async.server import Checkpoints, ParameterServer, RunResult, StepRecord
from dynacomm_async.worker import DEFAULT_PORT, layer_specs

__all__ = [
    "add_arguments",
    "add_init_argument",
    "add_output_arguments",
    "command",
    "conclude",
    "make_server",
]

EXAMPLE = "dynacomm serve --workers 2 --epochs 20 --listen 127.0.0.1:7070"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``serve``."""
    add_run_arguments(parser)
    add_strategy_argument(parser)
    parser.set_defaults(workers=None)  # for a cluster's launcher to say
    parser.add_argument(
        "--listen",
        metavar="HOST:PORT",
        help="where workers connect; port 0 picks a free one "
        f"(default: 127.0.0.1:{DEFAULT_PORT}, or what a cluster's launcher says)",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="allow --listen on an address that other machines reach, without authentication",
    )
    parser.add_argument("--run", metavar="ID", help="id of the run (default: random)")
    add_congestion_argument(parser)
    add_init_argument(parser)
    add_fault_arguments(parser)
    add_own_trace_argument(parser)
    add_output_arguments(parser)
    parser.add_argument("--events", action="store_true", help=argparse.SUPPRESS)


def add_init_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--init``."""
    parser.add_argument(
        "--init",
        type=Path,
        metavar="FILE",
        help="begin with these weights instead of random ones: a .safetensors file with the names "
        "and layouts of PyTorch, what --save wrote, or a checkpoint",
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--save`` and ``--json``."""
    parser.add_argument(
        "--save", type=Path, metavar="FILE.npz", help="write the trained layers here, by name"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def command(args: argparse.Namespace) -> int:
    """Run a server until its run has ended."""
    if None in (args.workers, args.listen):
        fill_serve(args, own_place())
    if args.save is not None:
        check_writable(args.save)
    news = nullcontext() if args.events else telling("dynacomm_async.server")
    with news, recorded(args.trace) as recorder:
        settings = settings_of(args, args.strategy)
        workload = load_workload(settings)
        steps = steps_of(args, workload)
        with open_checkpoints(args) or nullcontext() as checkpoints:
            result, unsaved = run(_serve(args, settings, workload, steps, recorder, checkpoints))
    if isinstance(result, int):
        _print_drained(args, result)
    else:
        conclude(args, workload, result)
    if unsaved is not None:
        raise unsaved
    return 0


def make_server(
    args: argparse.Namespace,
    settings: dict[str, object],
    workload: Workload,
    steps: int,
    **options: Any,
) -> ParameterServer:
    """Return the server that the options of a run ask for; ``options`` say where and for whom."""
    initial, initial_statistics = workload.initial(args.init)
    return ParameterServer(
        layer_specs(workload.network),
        steps=steps,
        training=training_of(training_options(args), steps),
        initial=initial,
        initial_statistics=initial_statistics,
        settings=settings,
        blocks=workload.batches.split.blocks,
        congestion=args.congestion,
        **server_options(args),
        **options,
    )


async def _serve(
    args: argparse.Namespace,
    settings: dict[str, object],
    workload: Workload,
    steps: int,
    recorder: Recorder | None,
    checkpoints: Checkpoints | None,
) -> tuple[RunResult | int, CheckpointError | None]:
    """Return the result, or the step at which a signal has stopped the run.

    A run that has come to its end has a result, even if the disk did not take the last checkpoint:
    why it did not comes second.
    """
    progress = Progress("step", steps, log=not args.events)
    before: StepRecord | None = None
    result: RunResult | int | None = None

    def on_step(record: StepRecord) -> None:
        nonlocal before
        if args.events:
            emit("step", index=record.index, loss=record.loss, images=record.images)
        step_s = None if before is None else (record.ended_ns - before.ended_ns) / 1e9
        before = record
        progress.update(
            record.index + 1, loss=record.loss, images=record.images, notes=step_notes(step_s)
        )

    try:
        async with make_server(
            args,
            settings,
            workload,
            steps,
            workers=args.workers,
            run=args.run,
            listen=parse_address(args.listen, port=DEFAULT_PORT),
            insecure=args.insecure,
            checkpoints=checkpoints,
            resume=args.resume,
            on_step=on_step,
            recorder=recorder,
        ) as server:
            _announce(args, server)
            try:
                result = await server.finished()
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if checkpoints is None or task is None:
                    raise
                task.uncancel()  # from here on a second signal aborts
                result = await server.drain()
            finally:
                progress.close()
    except CheckpointError as error:
        if result is None:
            raise
        return result, error
    return result, None


def _announce(args: argparse.Namespace, server: ParameterServer) -> None:
    if args.events:
        emit("listening", address=str(server.address), step=server.step)
        return
    memory = (server.memory_nbytes or 0) / 2**20
    reachable = _reachable(server.address)
    if server.step >= server.steps:
        what = (
            f"all {server.steps} steps are done; workers that do not know may ask for "
            f"{args.absence:g} s (--absence)"
        )
    else:
        going_on = f"going on from step {server.step} of {server.steps}; " if server.step else ""
        what = f"{going_on}waiting for {args.workers} x `dynacomm work --server {reachable}`"
    say(f"run {server.run}: listening on {server.address}, holding {memory:.1f} MiB; {what}")


def _print_drained(args: argparse.Namespace, step: int) -> None:
    if args.json or args.events:
        print_json({"steps": step, "drained": True})
    else:
        print(f"stopped at step {step}; the same command with --resume goes on from there")


def _reachable(address: Address) -> Address:
    """Return what workers may call this server: its machine's name where it listens everywhere."""
    everywhere = address.host in ("0.0.0.0", "::")
    return Address(socket.gethostname(), address.port) if everywhere else address


def conclude(args: argparse.Namespace, workload: Workload, result: RunResult) -> None:
    """Save what has been trained, if that is asked for, and print how good it is."""
    accuracy = workload.accuracy(result.parameters, result.statistics)
    if args.save is not None:
        save_run(
            args.save, workload.network, result.parameters, result.statistics, model=args.model
        )
    loss = result.losses[-1] if result.losses else None  # none after resuming a run that was over
    summary = {
        "steps": result.steps,
        "parameters_sha256": result.parameters_sha256,
        "loss": loss,
        "test_accuracy": accuracy,
    }
    if not args.events:
        say_if_diverged(loss)
    if args.events:
        emit("result", **summary)
    elif args.json:
        print_json(summary)
    else:
        print(
            f"{result.steps} steps, loss {decimal(loss)}, "
            f"test accuracy {accuracy:.4f}, "
            f"parameters sha256 {result.parameters_sha256[:16]}"
        )
