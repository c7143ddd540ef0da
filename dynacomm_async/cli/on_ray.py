"""``dynacomm launch --on ray``: server and workers as actors on a Ray cluster."""

from __future__ import annotations

import argparse
import math
import os
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynacomm_async.cli import serve, work
from dynacomm_async.cli.output import Progress, check_writable, say
from dynacomm_async.cli.signals import interruptible
from dynacomm_async.cli.workload import (
    check_run,
    load_workload,
    settings_of,
    steps_of,
)
from dynacomm_async.errors import ConfigError, DynaCommError
from dynacomm_async.server import ParameterServer, RunResult, StepRecord

if TYPE_CHECKING:
    from dynacomm_async.adapters.ray import ServerPlace

__all__ = ["add_arguments", "command"]

_KNOWN = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
"""Resources that Ray knows by a name of their own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``launch`` for Ray."""
    group = parser.add_argument_group(
        "on Ray",
        "One command for all: Ray places the server and the workers on its nodes, and starts each "
        "anew, elsewhere if need be, when its process or node is lost. --checkpoint-dir must be a "
        "folder that all nodes share.",
    )
    group.add_argument(
        "--address",
        metavar="ADDRESS",
        help="the Ray cluster's; local: a new one on this machine for this run (default: "
        "RAY_ADDRESS, else the one that runs on this machine, else local)",
    )
    for who, what in (("server", "the server"), ("worker", "each worker")):
        group.add_argument(
            f"--{who}-resources",
            type=resources,
            default={"CPU": 1.0},
            metavar="NAME=AMOUNT,...",
            help=f"what {what} needs: CPU, GPU, memory (bytes) or a name of yours (default: CPU=1)",
        )
    group.add_argument(
        "--restarts",
        type=_restarts,
        default=-1,
        metavar="N",
        help="how often each is started anew before the run fails; -1: always (default: -1)",
    )


def resources(text: str) -> dict[str, float]:
    """Return amounts by name, for argparse."""
    amounts = {}
    for part in text.split(","):
        name, _, amount = part.partition("=")
        try:
            amounts[name] = float(amount)
        except ValueError:
            amounts[name] = -1.0
        if not name or not 0 <= amounts[name] < math.inf:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not NAME=AMOUNT with an amount from 0, such as CPU=1"
            )
    return amounts


def _restarts(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = -2
    if count < -1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from -1")
    return count


def command(args: argparse.Namespace) -> int:
    """Train on Ray, and print the result."""
    _check(args)
    _, steps = check_run(args, args.strategy)
    ray, adapter = _import()
    # Ray prints its own view of every loss among the results; the adapter's news tells it.
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        try:
            with interruptible():
                _connect(ray, args)
            with interruptible():  # again: Ray has put a handler of its own in SIGTERM's place
                result = _train(adapter, args, steps)
        except ray.exceptions.RayError as error:
            raise DynaCommError(f"Ray: {_first_line(error)}") from error
        finally:
            ray.shutdown()
    serve.conclude(args, load_workload(settings_of(args, args.strategy)), result)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot work, before Ray is asked for anything.

    Raises:
        ConfigError: an option is missing or has no meaning.
    """
    for name in ("listen", "server", "trace"):
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name} has no meaning with --on ray: leave it out")
    if args.checkpoint_dir is None:
        raise ConfigError(
            "--on ray needs --checkpoint-dir DIR, a folder that all nodes share: "
            "from there a server that was lost goes on"
        )
    if args.save is not None:
        check_writable(args.save)
    if args.workers is None:
        args.workers = 2


def _import() -> tuple[Any, Any]:
    """Return Ray and its adapter.

    Raises:
        ConfigError: Ray is not installed.
    """
    try:
        return import_module("ray"), import_module("dynacomm_async.adapters.ray")
    except ImportError as error:
        raise ConfigError(
            f'--on ray needs Ray: pip install "dynacomm_async[ray]" ({error})'
        ) from None


def _connect(ray: Any, args: argparse.Namespace) -> None:
    """Connect to the cluster that is meant, or start one.

    Raises:
        ConfigError: there is none at the address.
    """
    options = {"log_to_driver": False, "logging_level": "error"}
    address = args.address or os.environ.get("RAY_ADDRESS")
    if address != "local":
        try:
            ray.init(address=address or "auto", **options)
            return
        except (ConnectionError, ValueError) as error:
            if address is not None:
                text = f"no Ray cluster at {address!r}: {_first_line(error)}"
                raise ConfigError(text) from error
    cpus = args.server_resources.get("CPU", 0) + args.workers * args.worker_resources.get("CPU", 0)
    ray.init(
        address="local",
        num_cpus=max(math.ceil(cpus), os.cpu_count() or 1),
        include_dashboard=False,
        **options,
    )
    say("a Ray cluster has been started on this machine for this run")


def _train(adapter: Any, args: argparse.Namespace, steps: int) -> RunResult:
    progress = Progress("training: step", steps, log=True)

    def on_step(record: StepRecord) -> None:
        progress.update(record.index + 1, loss=record.loss, images=record.images)

    try:
        result: RunResult = adapter.train(
            partial(_make_server, args),
            partial(_work, args),
            workers=args.workers,
            checkpoint_dir=args.checkpoint_dir,
            resume=args.resume,
            run=args.run,
            insecure=args.insecure,
            restarts=args.restarts,
            server_options=ray_options(args.server_resources),
            worker_options=ray_options(args.worker_resources),
            on_step=on_step,
            on_news=lambda news: say(str(news)),
        )
    except Exception as error:
        if isinstance(error, (DynaCommError, OSError)):
            raise
        raise DynaCommError(f"{type(error).__name__}: {_first_line(error)}") from error
    finally:
        progress.close()
    return result


def ray_options(amounts: dict[str, float]) -> dict[str, Any]:
    """Return resources as an actor's options have them."""
    options: dict[str, Any] = {"num_cpus": 0.0}
    own = {name: amount for name, amount in amounts.items() if name not in _KNOWN}
    options.update((_KNOWN[name], amount) for name, amount in amounts.items() if name in _KNOWN)
    return {**options, "resources": own}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# -- in the actors -------------------------------------------------------------------------------


def _make_server(args: argparse.Namespace, **options: Any) -> ParameterServer:
    settings = settings_of(args, args.strategy)
    workload = load_workload(settings)
    return serve.make_server(args, settings, workload, steps_of(args, workload), **options)


def _work(args: argparse.Namespace, server: ServerPlace) -> None:
    work.join(
        argparse.Namespace(
            server=server,
            run=args.run,
            data_dir=args.data_dir,
            retry=args.retry,
            slowdown=1.0,
            explain=False,
            congestion=args.congestion,
            events=False,
        )
    )
