"""``dynacomm link``: the link emulator as a process of its own."""

from __future__ import annotations

import argparse
import logging

from dynacomm_async.cli.output import check_writable
from dynacomm_async.link.options import add_arguments
from dynacomm_async.link.process import run_link

__all__ = ["add_arguments", "command"]

EXAMPLE = (
    "dynacomm link --listen 127.0.0.1:7071 --to 127.0.0.1:7070 --bandwidth 100mbit --delay 5ms"
)


def command(args: argparse.Namespace) -> int:
    """Relay until told to end."""
    if args.trace is not None:
        check_writable(args.trace)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_link(args)
    return 0
