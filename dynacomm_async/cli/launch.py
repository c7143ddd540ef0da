"""``dynacomm launch``: the same command for every process of a job on a cluster."""

from __future__ import annotations

import argparse
from pathlib import Path

from dynacomm_async.addresses import parse_address
from dynacomm_async.cli import on_ray, serve, work
from dynacomm_async.cli.place import ENVIRONMENT, own_place
from dynacomm_async.cli.workload import number
from dynacomm_async.cluster import Place
from dynacomm_async.errors import ConfigError
from dynacomm_async.worker import DEFAULT_PORT

__all__ = ["add_arguments", "command"]

EXAMPLE = "dynacomm launch --on ray --workers 4 --checkpoint-dir /shared/run-1 --insecure"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``launch``: those of ``serve``, and what its workers need."""
    parser.description = (
        "Rank 0 of a job serves, all other ranks work, each with the same command line; which rank "
        f"a process has it learns from {ENVIRONMENT}, and where rank 0 is from MASTER_ADDR and "
        "MASTER_PORT or the launcher's own variables. Options are those of `dynacomm serve`; "
        "workers take a port in --listen for theirs, and add -RANK to the name in --trace: "
        "`srun --ntasks 5 dynacomm launch --insecure --epochs 10`. With --on ray one command "
        "starts all of them as actors on a Ray cluster."
    )
    parser.add_argument(
        "--on",
        choices=("environment", "ray"),
        default="environment",
        help="who says what runs where: the variables of this process's environment, or Ray "
        "(default: %(default)s)",
    )
    serve.add_arguments(parser)
    parser.add_argument(
        "--server",
        metavar="HOST:PORT",
        help="where workers find rank 0 (default: what the environment says)",
    )
    parser.add_argument(
        "--retry",
        type=number,
        default=120.0,
        metavar="SECONDS",
        help="how long workers look for it, since nodes start at different times "
        "(default: %(default)s)",
    )
    on_ray.add_arguments(parser)


def command(args: argparse.Namespace) -> int:
    """Serve or work, until the run has ended."""
    if args.on == "ray":
        return on_ray.command(args)
    place = own_place()
    if place is None:
        raise ConfigError(
            f"no launcher has started this process: expected {ENVIRONMENT} in the environment; "
            "by hand, use `dynacomm serve` and `dynacomm work`"
        )
    if place.rank == 0:
        if args.workers is None and place.workers is None:
            raise ConfigError(_without_workers(place))
        return serve.command(args)
    return work.command(worker_options(args, place))


def worker_options(args: argparse.Namespace, place: Place) -> argparse.Namespace:
    """Return what ``dynacomm work`` takes, from the options of a launch."""
    server = args.server
    if server is None and place.server is not None and args.listen is not None:
        port = parse_address(args.listen, port=DEFAULT_PORT).port
        server = str(place.server._replace(port=port))
    trace: Path | None = args.trace
    if trace is not None:
        trace = trace.with_stem(f"{trace.stem}-{place.rank}")
    return argparse.Namespace(
        server=server,
        run=args.run,
        data_dir=args.data_dir,
        retry=args.retry,
        slowdown=1.0,
        explain=False,
        congestion=args.congestion,
        trace=trace,
        events=False,
    )


def _without_workers(place: Place) -> str:
    if place.size is None:
        return (
            f"{place.launcher} does not say how many processes there are: give --workers (one "
            "fewer), or put WORLD_SIZE into the environment"
        )
    return (
        "this job has one process, which serves, and none that works: start at least two, "
        "or give --workers for those that join from elsewhere"
    )
