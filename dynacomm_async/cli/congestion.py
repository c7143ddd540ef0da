"""The option that chooses a congestion control."""

from __future__ import annotations

import argparse

__all__ = ["add_congestion_argument"]


def add_congestion_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--congestion`` of a command that is one end of real links."""
    parser.add_argument(
        "--congestion",
        metavar="NAME",
        help="TCP congestion control of what this end sends (default: the system's). bbr nearly "
        "stops a busy connection for 0.2 s in every 10 s, and all wait for each: on links that "
        "lose little try cubic or reno",
    )
