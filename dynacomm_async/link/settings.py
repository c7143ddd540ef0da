"""What a link is like: rates, delay, overhead, and who shares it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dynacomm_async.errors import ConfigError
from dynacomm_async.link.fault import Fault

__all__ = ["LinkSettings"]


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """An emulated link. "Up" is from client to server, "down" from server to client.

    Attributes:
        rate_down_bytes_per_s: rate from server to client; None for no limit.
        rate_up_bytes_per_s: rate from client to server; None for no limit.
        delay_s: one-way delay, the same in each direction; does not occupy the link.
        overhead_s: occupies the link once per protocol message, before its bytes.
        half_duplex: up and down take turns on one medium.
        shared: all connections take turns on one link; otherwise each has a link of its own.
        schedule: ``(at_s, down, up)`` in increasing ``at_s``: the rates (bytes per second or
            None) from that time after the link has started until the next entry.
        faults: what goes wrong, and when.

    Raises:
        ConfigError: a rate that is not positive, a time that is negative, NaN or infinite, or
            a schedule whose times do not increase.
    """

    rate_down_bytes_per_s: float | None = None
    rate_up_bytes_per_s: float | None = None
    delay_s: float = 0.0
    overhead_s: float = 0.0
    half_duplex: bool = False
    shared: bool = False
    schedule: tuple[tuple[float, float | None, float | None], ...] = ()
    faults: tuple[Fault, ...] = ()

    def __post_init__(self) -> None:
        _check_rate("rate_down_bytes_per_s", self.rate_down_bytes_per_s)
        _check_rate("rate_up_bytes_per_s", self.rate_up_bytes_per_s)
        _check_time("delay_s", self.delay_s)
        _check_time("overhead_s", self.overhead_s)
        before_s = -1.0
        for at_s, down, up in self.schedule:
            _check_time("a time in schedule", at_s)
            _check_rate("a rate in schedule", down)
            _check_rate("a rate in schedule", up)
            if at_s <= before_s:
                raise ConfigError(f"schedule goes back to {at_s} s: times must increase")
            before_s = at_s


def _check_rate(name: str, bytes_per_s: float | None) -> None:
    if bytes_per_s is not None and not (math.isfinite(bytes_per_s) and bytes_per_s > 0):
        raise ConfigError(
            f"{name} is {bytes_per_s}: expected bytes per second above 0, or None for no limit"
        )


def _check_time(name: str, seconds: float) -> None:
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ConfigError(f"{name} is {seconds}: expected seconds, 0 or more")
