"""The link's command line: the same options for every command that puts a link in between."""

from __future__ import annotations

import argparse
from pathlib import Path

from dynacomm_async.addresses import Address, parse_address
from dynacomm_async.errors import ConfigError
from dynacomm_async.link.fault import parse_fault
from dynacomm_async.link.settings import LinkSettings
from dynacomm_async.link.units import (
    UNLIMITED,
    parse_duration,
    parse_rate,
    parse_schedule,
)

__all__ = [
    "add_arguments",
    "add_setting_arguments",
    "addresses_from",
    "arguments_of",
    "settings_from",
]


def add_setting_arguments(parser: argparse.ArgumentParser, description: str | None = None) -> None:
    """Add the options that describe the link itself; see :func:`settings_from`."""
    group = parser.add_argument_group("the link", description)
    group.add_argument(
        "--bandwidth",
        default=UNLIMITED,
        metavar="RATE",
        help="rate from server to worker, and back unless --bandwidth-up is given, "
        "such as 100mbit (default: %(default)s)",
    )
    group.add_argument("--bandwidth-up", metavar="RATE", help="rate from worker to server")
    group.add_argument(
        "--delay", default="0ms", metavar="TIME", help="one-way delay (default: %(default)s)"
    )
    group.add_argument(
        "--overhead",
        default="0ms",
        metavar="TIME",
        help="occupies the link once per message, before its bytes (default: %(default)s)",
    )
    group.add_argument(
        "--half-duplex", action="store_true", help="both directions take turns on one medium"
    )
    group.add_argument(
        "--shared", action="store_true", help="all connections share one link, not one each"
    )
    group.add_argument(
        "--schedule",
        metavar="TIME:RATE,...",
        help="rates that change with time since the link's start, such as 0s:100mbit,20s:20mbit; "
        "DOWN/UP in place of RATE sets the two directions apart",
    )
    _add_fault_argument(parser)


def _add_fault_argument(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "faults of the link",
        "KIND is reset, cut, stall, slice, slow-close or down; WAY is up, down or both (default); "
        "WHEN is bytes=N of a connection or time=T of the link. Behind it, with commas: every=, "
        "for=, size=, seed=, connection=. As in reset:up@bytes=100000, stall:both@time=2s,for=3s, "
        "cut:down@bytes=5000,connection=0, slice:down,size=7, slow-close:up,for=1s and "
        "down@time=5s,for=2s,every=30s.",
    )
    group.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="KIND:WAY@WHEN,...",
        help="something that goes wrong; may be given several times",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every option of a link that runs as a process of its own."""
    parser.add_argument(
        "--listen",
        required=True,
        metavar="HOST:PORT",
        help="where clients connect; port 0 picks a free one",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="allow --listen on an address that other machines reach, without authentication",
    )
    parser.add_argument("--to", required=True, metavar="HOST:PORT", help="the server")
    add_setting_arguments(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help='print {"listening": "host:port"} when ready and the counters at the end',
    )
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE.json",
        help="record when each message was on the link; join it with the recordings of server "
        "and workers by `dynacomm trace`",
    )
    parser.add_argument(
        "--until-stdin-closes",
        action="store_true",
        help="also end when standard input closes, as when the parent process has gone",
    )


def settings_from(args: argparse.Namespace) -> LinkSettings:
    """Return the settings that the options of :func:`add_setting_arguments` describe.

    Raises:
        ConfigError: one of them cannot be read; the sentence names the option.
    """
    try:
        option = "--bandwidth"
        down = parse_rate(args.bandwidth)
        option = "--bandwidth-up"
        up = down if args.bandwidth_up is None else parse_rate(args.bandwidth_up)
        option = "--delay"
        delay_s = parse_duration(args.delay)
        option = "--overhead"
        overhead_s = parse_duration(args.overhead)
        option = "--schedule"
        schedule = () if args.schedule is None else parse_schedule(args.schedule)
        option = "--fault"
        faults = tuple(map(parse_fault, args.fault))
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from error
    return LinkSettings(
        rate_down_bytes_per_s=down,
        rate_up_bytes_per_s=up,
        delay_s=delay_s,
        overhead_s=overhead_s,
        half_duplex=args.half_duplex,
        shared=args.shared,
        schedule=schedule,
        faults=faults,
    )


def addresses_from(args: argparse.Namespace) -> tuple[Address, Address]:
    """Return ``(listen, to)`` of the options of :func:`add_arguments`.

    Raises:
        ConfigError: not an address, or no port to connect to.
    """
    listen, to = parse_address(args.listen), parse_address(args.to)
    if to.port == 0:
        raise ConfigError(f"--to {args.to!r} has port 0: expected the port of the server")
    return listen, to


def arguments_of(settings: LinkSettings) -> list[str]:
    """Return options that :func:`settings_from` reads as exactly these settings."""
    arguments = [
        f"--bandwidth={_rate(settings.rate_down_bytes_per_s)}",
        f"--bandwidth-up={_rate(settings.rate_up_bytes_per_s)}",
        f"--delay={float(settings.delay_s)!r}s",
        f"--overhead={float(settings.overhead_s)!r}s",
    ]
    if settings.schedule:
        entries = (
            f"{float(at_s)!r}s:{_rate(down)}/{_rate(up)}" for at_s, down, up in settings.schedule
        )
        arguments.append(f"--schedule={','.join(entries)}")
    if settings.half_duplex:
        arguments.append("--half-duplex")
    if settings.shared:
        arguments.append("--shared")
    arguments += [f"--fault={fault}" for fault in settings.faults]
    return arguments


def _rate(bytes_per_s: float | None) -> str:
    # Not format_rate: multiplying by 8 is exact, six digits are not.
    return UNLIMITED if bytes_per_s is None else f"{float(bytes_per_s) * 8!r}bit"
