"""Options that a cluster's launcher fills in."""

from __future__ import annotations

import argparse
import os
import socket

from dynacomm_async.addresses import Address, is_loopback
from dynacomm_async.cli.output import say
from dynacomm_async.cluster import Place, find_place
from dynacomm_async.errors import ConfigError
from dynacomm_async.worker import DEFAULT_PORT

__all__ = ["ENVIRONMENT", "fill_serve", "fill_work", "own_place"]

ENVIRONMENT = (
    "RANK and WORLD_SIZE (torchrun), SLURM_PROCID and SLURM_NTASKS (srun) or JOB_COMPLETION_INDEX "
    "and WORLD_SIZE (an indexed Kubernetes job)"
)
"""The variables that count, for help texts and errors."""


def own_place() -> Place | None:
    """Return this process's place in a job, if it is part of one.

    Raises:
        ConfigError: a variable does not hold what it should.
    """
    hostname = socket.getfqdn() if "JOB_COMPLETION_INDEX" in os.environ else ""
    return find_place(os.environ, hostname=hostname, port=DEFAULT_PORT)


def fill_serve(args: argparse.Namespace, place: Place | None) -> None:
    """Set ``workers`` and ``listen`` where they were not given."""
    filled = []
    if args.workers is None:
        args.workers = 2
        if place is not None and place.workers is not None:
            args.workers = place.workers
            filled.append(f"--workers {args.workers}")
    if args.listen is None:
        args.listen = f"127.0.0.1:{DEFAULT_PORT}"
        if place is not None and place.server is not None:
            host = place.server.host if is_loopback(place.server.host) else "0.0.0.0"
            args.listen = str(Address(host, place.server.port))
            filled.append(f"--listen {args.listen}")
    _tell(filled, place)


def fill_work(args: argparse.Namespace, place: Place | None) -> None:
    """Set ``server`` where it was not given.

    Raises:
        ConfigError: nothing says where it is.
    """
    if args.server is None:
        if place is None or place.server is None:
            raise ConfigError(
                "where is the server? give --server HOST:PORT, or say it in the environment, by "
                f"MASTER_ADDR, MASTER_PORT and {ENVIRONMENT}"
            )
        args.server = str(place.server)
        _tell([f"--server {args.server}"], place)


def _tell(filled: list[str], place: Place | None) -> None:
    if filled and place is not None:
        size = "" if place.size is None else f" of {place.size}"
        say(f"{place.launcher}, rank {place.rank}{size}: {' '.join(filled)}")
