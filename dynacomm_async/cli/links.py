"""The fleet that a command imitates: the links of its workers, and how fast each computes."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from dynacomm_async.addresses import Address
from dynacomm_async.cli.tracing import Parts
from dynacomm_async.errors import ConfigError
from dynacomm_async.link.options import add_setting_arguments, settings_from
from dynacomm_async.link.process import LinkProcess
from dynacomm_async.link.settings import LinkSettings

__all__ = ["Fleet", "add_fleet_arguments", "fleet_from", "slowdown", "start_links"]

_PER_WORKER = ("bandwidth", "bandwidth_up", "delay", "overhead")
"""Options that may give every worker a value of its own, separated by commas."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """The workers that a command imitates.

    Attributes:
        links: one for each worker; all the same where they share one.
        slowdowns: how many times as long each worker's layers take as they compute.
        machines: for the server, then for each worker, what to put before a command so that it
            runs on that machine, such as ``("ip", "netns", "exec", "machine1")``; then nothing is
            imitated between them. Empty: all is done here, behind ``links``.
        host: the name of the server's machine on the network; for ``machines``.
    """

    links: tuple[LinkSettings, ...]
    slowdowns: tuple[float, ...]
    machines: tuple[tuple[str, ...], ...] = ()
    host: str = "127.0.0.1"

    @property
    def is_local(self) -> bool:
        """Whether nothing lies between server and workers."""
        return all(link == LinkSettings() for link in self.links)


def add_fleet_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of :func:`fleet_from`, beside ``--workers``."""
    add_setting_arguments(
        parser,
        "--bandwidth, --bandwidth-up, --delay and --overhead may give each worker its own value, "
        "such as 100mbit,25mbit for two",
    )
    parser.add_argument(
        "--slowdown",
        default="1",
        metavar="F[,F...]",
        help="imitate slower devices: each layer takes F times as long, the processor idle; one "
        "number, or one for each worker (default: 1)",
    )


def slowdown(text: str) -> float:
    """Return a finite number from 1, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return value


def fleet_from(args: argparse.Namespace) -> Fleet:
    """Return the fleet that the command line describes.

    Raises:
        ConfigError: an option cannot be read, has values for another number of workers, or
            differs between workers who share a link.
    """
    each: list[argparse.Namespace] = [argparse.Namespace(**vars(args)) for _ in range(args.workers)]
    for option in _PER_WORKER:
        text = getattr(args, option)
        if text is not None:
            for worker, value in zip(each, _spread(option, text, args.workers), strict=True):
                setattr(worker, option, value)
    links = tuple(map(settings_from, each))
    if args.shared and len(set(links)) > 1:
        raise ConfigError("--shared: workers who share a link cannot have links of their own")
    try:
        slowdowns = tuple(map(slowdown, _spread("slowdown", args.slowdown, args.workers)))
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"--slowdown: {error}") from None
    return Fleet(links, slowdowns)


def _spread(option: str, text: str, n_workers: int) -> list[str]:
    values = [value.strip() for value in text.split(",")]
    if len(values) not in (1, n_workers):
        raise ConfigError(
            f"--{option.replace('_', '-')} {text} has {len(values)} values, expected one, "
            f"or one for each of {n_workers} workers"
        )
    return values * (n_workers // len(values))


async def start_links(
    stack: contextlib.AsyncExitStack,
    links: Sequence[LinkSettings],
    servers: Sequence[Address],
    parts: Parts | None = None,
) -> list[list[LinkProcess]]:
    """Start a link process for each server and worker, or for each server where it is shared.

    Args:
        stack: ends them when it is left.
        links: one for each worker.
        parts: where they leave their recordings; None: they record nothing.

    Returns:
        For each server one link for each worker; the same one where it is shared.

    Raises:
        ConfigError: a link did not start; none is left half started.
    """
    own = links[:1] if links[0].shared else links
    rows = [
        [LinkProcess(link, server, trace=None if parts is None else parts.add()) for link in own]
        for server in servers
    ]
    # All at once, for there may be many; and none is left half started when one fails.
    starts = [process.__aenter__() for row in rows for process in row]
    results = await asyncio.gather(*starts, return_exceptions=True)
    stack.push_async_callback(_stop, [p for p in results if isinstance(p, LinkProcess)])
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [(row * len(links))[: len(links)] for row in rows]


async def _stop(links: Sequence[LinkProcess]) -> None:
    await asyncio.gather(*(process.stop() for process in links))
