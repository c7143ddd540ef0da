"""``dynacomm trace``: join what the processes of a run have recorded."""

from __future__ import annotations

import argparse
from pathlib import Path

from dynacomm_async.cli.output import check_writable, say
from dynacomm_async.cli.tracing import write_trace
from dynacomm_async.observe import join_recordings
from dynacomm_async.recording import read_recordings

__all__ = ["add_arguments", "command"]

EXAMPLE = "dynacomm trace server.json worker0.json worker1.json -o run.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``trace``."""
    parser.add_argument(
        "recordings",
        type=Path,
        nargs="+",
        metavar="FILE.json",
        help="from --trace of `dynacomm serve`, `work` and `link`",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE.json", help="the joined trace"
    )


def command(args: argparse.Namespace) -> int:
    """Join, and say how well the clocks are known."""
    check_writable(args.output)
    joined = join_recordings(row for path in args.recordings for row in read_recordings(path))
    write_trace(args.output, joined)
    for party in joined.parties:
        where = f"{party.name} on {party.recording.host_name}"
        if party.uncertainty_ns:
            say(f"{where}: its clock is known within {party.uncertainty_ns / 1e6:.3f} ms")
        else:
            say(f"{where}: the clock that counts")
    if joined.dropped:
        say(f"{joined.dropped} events came after a recorder's limit and are missing")
    say(f"open {args.output} in https://ui.perfetto.dev or chrome://tracing")
    return 0
