"""Rates, durations and schedules as a person types them.

Units are decimal: ``1kbit`` is 1000 bits a second. Rates leave as bytes per second, with None for
"no limit"; durations leave as seconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Final

from dynacomm_async.errors import ConfigError

__all__ = [
    "format_duration",
    "format_rate",
    "parse_duration",
    "parse_rate",
    "parse_schedule",
]

UNLIMITED: Final = "unlimited"

_BITS: Final = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_SECONDS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)\s*([a-z]+)")
_RATE_EXAMPLES: Final = "such as 100mbit, 1.5gbit, 250kbit or unlimited"
_DURATION_EXAMPLES: Final = "such as 5ms, 250us or 1.5s"
_SCHEDULE_EXAMPLE: Final = "such as 0s:100mbit,20s:20mbit or 0s:100mbit/20mbit (down/up)"


def _parse_quantity(text: str, scales: Mapping[str, float]) -> float | None:
    match = _QUANTITY.fullmatch(text.strip().lower())
    if match is None or match[2] not in scales:
        return None
    value = float(match[1]) * scales[match[2]]
    return value if math.isfinite(value) else None


def parse_rate(text: str) -> float | None:
    """Return bytes per second for ``"100mbit"`` and the like, None for ``"unlimited"``.

    Raises:
        ConfigError: not a positive number with bit, kbit, mbit or gbit.
    """
    if text.strip().lower() == UNLIMITED:
        return None
    bits = _parse_quantity(text, _BITS)
    if not bits:
        raise ConfigError(f"{text!r} is not a rate: expected one {_RATE_EXAMPLES}")
    return bits / 8


def parse_duration(text: str) -> float:
    """Return seconds for ``"5ms"`` and the like; a bare ``"0"`` needs no unit.

    Raises:
        ConfigError: not a number of at least 0 with us, ms or s.
    """
    if text.strip() == "0":
        return 0.0
    seconds = _parse_quantity(text, _SECONDS)
    if seconds is None:
        raise ConfigError(f"{text!r} is not a duration: expected one {_DURATION_EXAMPLES}")
    return seconds


def parse_schedule(text: str) -> tuple[tuple[float, float | None, float | None], ...]:
    """Return ``(at_s, down, up)`` for each ``TIME:RATE`` or ``TIME:DOWN/UP`` between commas.

    A single rate holds for both directions. Rates are bytes per second, None for no limit.

    Raises:
        ConfigError: an entry that is not a time and a rate, or times that do not increase.
    """
    entries: list[tuple[float, float | None, float | None]] = []
    for entry in text.split(","):
        time, colon, rates = entry.partition(":")
        if not colon:
            raise ConfigError(
                f"{entry!r} is not an entry of a schedule: expected a schedule {_SCHEDULE_EXAMPLE}"
            )
        down, slash, up = rates.partition("/")
        at_s = parse_duration(time)
        if entries and at_s <= entries[-1][0]:
            raise ConfigError(f"the schedule {text!r} goes back at {entry!r}: times must increase")
        entries.append((at_s, parse_rate(down), parse_rate(up if slash else down)))
    return tuple(entries)


def _format_quantity(value: float, scales: Mapping[str, float]) -> str:
    fitting = [item for item in scales.items() if value >= item[1]] or [next(iter(scales.items()))]
    unit, scale = max(fitting, key=lambda item: item[1])
    return f"{value / scale:.6g}{unit}"


def format_rate(bytes_per_s: float | None) -> str:
    """Return a rate to six digits as :func:`parse_rate` reads it, such as ``"100mbit"``."""
    return UNLIMITED if bytes_per_s is None else _format_quantity(bytes_per_s * 8, _BITS)


def format_duration(seconds: float) -> str:
    """Return a duration to six digits as :func:`parse_duration` reads it, such as ``"5ms"``."""
    return "0s" if seconds == 0 else _format_quantity(seconds, _SECONDS)
