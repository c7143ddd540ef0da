"""Options of ``serve`` and ``train`` for what may fail: connections, workers, the server itself."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynacomm_async.cli.workload import number, positive

if TYPE_CHECKING:
    from dynacomm_async.server import Checkpoints, Mode

__all__ = [
    "add_fault_arguments",
    "check_keeping",
    "fault_options",
    "mode_of",
    "newest_step",
    "open_checkpoints",
    "server_options",
]


def add_fault_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what concerns workers that are lost, slow or sick, and checkpoints."""
    group = parser.add_argument_group("workers that are lost, slow or sick")
    group.add_argument(
        "--heartbeat",
        type=number,
        default=15.0,
        metavar="SECONDS",
        help="a connection that carries nothing for so long is lost (default: %(default)g)",
    )
    group.add_argument(
        "--absence",
        type=number,
        default=120.0,
        metavar="SECONDS",
        help="how long a lost worker's place is kept, while training waits (default: %(default)g)",
    )
    group.add_argument(
        "--on-leave",
        metavar="WHAT",
        help="when a worker is gone for good: end the run; shrink: go on with the others, and take "
        "newcomers in; wait: the same, but for --absence seconds a newcomer may take its place and "
        "compute its step anew (default: end; shrink with --quorum or --staleness)",
    )
    group.add_argument(
        "--quorum",
        type=positive,
        metavar="K",
        help="a step is made of the first K contributions; the others skip it",
    )
    group.add_argument(
        "--staleness",
        type=_steps_ahead,
        metavar="S",
        help="apply each contribution as it arrives; nobody is more than S steps ahead of the "
        "slowest (inf: asynchronous training)",
    )
    group.add_argument(
        "--max-gradient",
        type=number,
        default=1e9,
        metavar="X",
        help="gradients above X, or not finite, are refused (default: %(default)g)",
    )
    group.add_argument(
        "--refusals",
        type=positive,
        default=3,
        metavar="N",
        help="a worker whose gradients were refused so often is expelled (default: %(default)s)",
    )
    group = parser.add_argument_group("checkpoints")
    group.add_argument(
        "--checkpoint-dir", type=Path, metavar="DIR", help="save checkpoints in this directory"
    )
    group.add_argument(
        "--checkpoint-every",
        type=positive,
        metavar="STEPS",
        help="steps from one checkpoint to the next (default: 100)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest good checkpoint in --checkpoint-dir; begin anew if it is empty",
    )


def _steps_ahead(text: str) -> float:
    """Return a whole number of steps from 0, or infinity, for argparse."""
    if text in ("inf", "infinity"):
        return math.inf
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0, or inf")
    return int(text)


def mode_of(args: argparse.Namespace) -> Mode:
    """Return what becomes of training when workers are slow or gone.

    Raises:
        ConfigError: the options do not go together.
    """
    from dynacomm_async.server import Mode

    return Mode(on_leave=args.on_leave, quorum=args.quorum, staleness=args.staleness)


def check_keeping(args: argparse.Namespace) -> None:
    """Make sure that options of checkpoints do not stand alone.

    Raises:
        ConfigError: one does.
    """
    from dynacomm_async.errors import ConfigError

    options = {"--resume": args.resume, "--checkpoint-every": args.checkpoint_every is not None}
    for option, is_given in options.items():
        if is_given and args.checkpoint_dir is None:
            raise ConfigError(f"{option} without --checkpoint-dir: say where the checkpoints are")


def open_checkpoints(args: argparse.Namespace) -> Checkpoints | None:
    """Open ``--checkpoint-dir``; None where there is none.

    Raises:
        ConfigError: another server uses it, or options that need it stand alone.
        CheckpointError: it cannot be written to.
    """
    from dynacomm_async.server import Checkpoints

    check_keeping(args)
    return None if args.checkpoint_dir is None else Checkpoints(args.checkpoint_dir)


def newest_step(args: argparse.Namespace) -> int | None:
    """Return the step of the newest good checkpoint in ``--checkpoint-dir``; None: there is none.

    Raises:
        DynaCommError: another server uses the directory, or it cannot be read.
    """
    from dynacomm_async.server import Checkpoints

    if args.checkpoint_dir is None or not args.checkpoint_dir.is_dir():
        return None
    with Checkpoints(args.checkpoint_dir) as checkpoints:
        steps = [checkpoint.step for checkpoint in checkpoints.list() if checkpoint.healthy]
    return steps[-1] if steps else None


def server_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what a :class:`~dynacomm_async.ParameterServer` is to be told of them."""
    options = {
        "heartbeat_s": args.heartbeat,
        "absence_s": args.absence,
        "mode": mode_of(args),
        "refusals": args.refusals,
    }
    if args.checkpoint_every is not None:
        options["checkpoint_every"] = args.checkpoint_every
    return options


def fault_options(args: argparse.Namespace) -> list[str]:
    """Return the same options for a process of its own."""
    options = [
        f"--heartbeat={args.heartbeat}",
        f"--absence={args.absence}",
        f"--max-gradient={args.max_gradient}",
        f"--refusals={args.refusals}",
    ]
    names = ("on_leave", "quorum", "staleness", "checkpoint_dir", "checkpoint_every")
    given = {name: getattr(args, name) for name in names}
    options += [
        f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None
    ]
    if args.resume:
        options.append("--resume")
    return options
