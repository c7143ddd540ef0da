"""Options of ``serve`` and ``train`` for what may fail: connections, workers, the server itself."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynacomm_async.cli.workload import number, positive

if TYPE_CHECKING:
    from dynacomm_async.server import Checkpoints

__all__ = ["add_fault_arguments", "fault_options", "open_checkpoints", "server_options"]


def add_fault_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--heartbeat``, ``--absence`` and what concerns checkpoints."""
    parser.add_argument(
        "--heartbeat",
        type=number,
        default=15.0,
        metavar="SECONDS",
        help="a connection that carries nothing for so long is lost (default: %(default)g)",
    )
    parser.add_argument(
        "--absence",
        type=number,
        default=120.0,
        metavar="SECONDS",
        help="how long a lost worker's place is kept, while training waits (default: %(default)g)",
    )
    parser.add_argument(
        "--checkpoint-dir", type=Path, metavar="DIR", help="save checkpoints in this directory"
    )
    parser.add_argument(
        "--checkpoint-every",
        type=positive,
        default=100,
        metavar="STEPS",
        help="steps from one checkpoint to the next (default: %(default)s)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest good checkpoint in --checkpoint-dir; begin anew if it is empty",
    )


def open_checkpoints(args: argparse.Namespace) -> Checkpoints | None:
    """Open ``--checkpoint-dir``; None where there is none.

    Raises:
        ConfigError: another server uses it, or ``--resume`` stands alone.
        CheckpointError: it cannot be written to.
    """
    from dynacomm_async.errors import ConfigError
    from dynacomm_async.server import Checkpoints

    if args.checkpoint_dir is None:
        if args.resume:
            raise ConfigError("--resume without --checkpoint-dir: say where the checkpoints are")
        return None
    return Checkpoints(args.checkpoint_dir)


def server_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what a :class:`~dynacomm_async.ParameterServer` is to be told of them."""
    return {
        "heartbeat_s": args.heartbeat,
        "absence_s": args.absence,
        "checkpoint_every": args.checkpoint_every,
    }


def fault_options(args: argparse.Namespace) -> list[str]:
    """Return the same options for a process of its own."""
    options = [
        f"--heartbeat={args.heartbeat}",
        f"--absence={args.absence}",
        f"--checkpoint-every={args.checkpoint_every}",
    ]
    if args.checkpoint_dir is not None:
        options.append(f"--checkpoint-dir={args.checkpoint_dir}")
    if args.resume:
        options.append("--resume")
    return options
