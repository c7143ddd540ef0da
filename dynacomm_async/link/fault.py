"""What can go wrong on a link, as a person types it. Pure: :mod:`gate` makes it happen.

    KIND[:WAY][@TRIGGER=VALUE][,NAME=VALUE...]

KIND is one of ``reset`` (RST to both sides), ``cut`` (both sides get an orderly end), ``stall``
(bytes stop, the connection stays), ``slice`` (bytes arrive in small pieces), ``slow-close`` (the
end of the stream arrives late) and ``down`` (new connections are refused, old ones hang and hear
nothing). WAY is ``up``, ``down`` or ``both`` (default). The trigger is ``bytes=N``, delivered on a
connection in that direction (``both``: in the two together), or ``time=T`` since the link's start;
``every`` repeats it. Without a trigger a fault holds from the start of each connection.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Final

from dynacomm_async.errors import ConfigError
from dynacomm_async.link.units import parse_duration

__all__ = ["FAULT_KINDS", "RANDOM_SIZE", "Fault", "parse_fault"]

FAULT_KINDS: Final = ("reset", "cut", "stall", "slice", "slow-close", "down")
RANDOM_SIZE: Final = 0
"""A slice's ``size`` where pieces are of 1 to 1460 bytes, drawn with the fault's seed."""

_WAYS: Final = ("up", "down", "both")
_LASTING: Final = ("stall", "slow-close", "down")
_AT_ONCE: Final = ("slice", "slow-close")
_NAMES: Final = ("bytes", "time", "every", "for", "size", "seed", "connection")
_FORM = re.compile(r"(?P<kind>[a-z-]+)(?::(?P<way>[a-z]+))?(?:[@,](?P<rest>.+))?")
_EXAMPLE: Final = "such as reset:up@bytes=100000, stall:both@time=2s,for=3s or slice:down,size=7"


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a link.

    Attributes:
        kind: one of :data:`FAULT_KINDS`.
        way: ``"up"``, ``"down"`` or ``"both"``: where it acts and whose bytes it counts. Resets
            and cuts end both directions and ``down`` stops both, so there it only counts.
        at_nbytes: it happens once exactly this many bytes were delivered; None: not by bytes.
        at_s: it happens this long after the link's start; None: not by time.
        every: repeated after so many bytes or seconds more, by its trigger; None: once (by bytes:
            once on each connection).
        for_s: how long stall, slow-close and down last.
        size: bytes a piece of slice; :data:`RANDOM_SIZE` for random ones.
        seed: of random pieces.
        connection: the only connection it concerns, by number from 0; None: all.

    Raises:
        ConfigError: values that do not go together; the sentence says which.
    """

    kind: str
    way: str = "both"
    at_nbytes: int | None = None
    at_s: float | None = None
    every: float | None = None
    for_s: float | None = None
    size: int | None = None
    seed: int = 0
    connection: int | None = None

    def __post_init__(self) -> None:
        _check(self.kind in FAULT_KINDS, _unknown("fault", self.kind, FAULT_KINDS))
        _check(self.way in _WAYS, _unknown("direction", self.way, _WAYS))
        _check(self.at_nbytes is None or self.at_s is None, "bytes and time together: give one")
        _check(self.at_nbytes is None or self.at_nbytes > 0, "bytes must be above 0")
        for name, value in (("time", self.at_s), ("for", self.for_s)):
            _check(value is None or 0 <= value < math.inf, f"{name} must be 0 or more and finite")
        _check(
            self.every is None or (self.triggered and 0 < self.every < math.inf),
            "every must be above 0 and needs bytes= or time= before it",
        )
        whole = self.every is None or self.at_nbytes is None or self.every == int(self.every)
        _check(whole, "every must be whole bytes")
        lasts = self.kind in _LASTING
        _check(
            lasts == (self.for_s is not None), f"{self.kind} {'needs' if lasts else 'has no'} for="
        )
        sized = self.kind == "slice"
        _check(
            sized == (self.size is not None), f"{self.kind} {'needs' if sized else 'has no'} size="
        )
        _check(self.size is None or self.size >= 0, "size must be at least 1, or random")
        _check(self.connection is None or self.connection >= 0, "connections count from 0")
        _check(self.seed >= 0, "seed must be 0 or more")
        _check(self.kind != "down" or self.connection is None, "down concerns all connections")

    @property
    def triggered(self) -> bool:
        """Whether bytes or time say when it happens."""
        return self.at_nbytes is not None or self.at_s is not None

    def __str__(self) -> str:
        """Return exactly what :func:`parse_fault` reads as this fault; its name in counters."""
        by_bytes = self.at_nbytes is not None
        values = {
            "bytes": self.at_nbytes,
            "time": _seconds(self.at_s),
            "every": int(self.every) if by_bytes and self.every else _seconds(self.every),
            "for": _seconds(self.for_s),
            "size": "random" if self.size == RANDOM_SIZE else self.size,
            "seed": self.seed or None,
            "connection": self.connection,
        }
        rest = ",".join(f"{name}={value}" for name, value in values.items() if value is not None)
        mark = ("@" if self.triggered else ",") if rest else ""
        return f"{self.kind}:{self.way}{mark}{rest}"


def parse_fault(text: str, *, on_demand: bool = False) -> Fault:
    """Return the fault that ``text`` describes; see the module's docstring.

    Args:
        text: such as ``"reset:up@bytes=100000"``.
        on_demand: it is to happen now, so it must have no trigger. Otherwise resets, cuts, stalls
            and downs need one.

    Raises:
        ConfigError: not a fault; one line that says why, with an example.
    """
    try:
        match = _FORM.fullmatch(text.strip())
        _check(match is not None, "not of the form KIND:WAY@TRIGGER=VALUE,NAME=VALUE")
        assert match is not None
        fault = Fault(match["kind"], match["way"] or "both", **_values(match["rest"] or ""))
        if on_demand:
            _check(not fault.triggered, "fired by hand it happens now: leave bytes= and time= out")
        else:
            _check(fault.triggered or fault.kind in _AT_ONCE, "say when: @bytes=N or @time=T")
    except ConfigError as error:
        raise ConfigError(f"{text!r} is not a fault: {error}; expected one {_EXAMPLE}") from error
    return fault


def _values(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    seen: set[str] = set()
    for entry in filter(None, text.split(",")):
        name, _, value = entry.partition("=")
        _check(name not in seen, f"{name} twice")
        if name in ("time", "for"):
            found["at_s" if name == "time" else "for_s"] = parse_duration(value)
        elif name == "every" and "bytes" not in seen:
            found["every"] = parse_duration(value)
        elif name == "size" and value == "random":
            found["size"] = RANDOM_SIZE
        elif name in ("bytes", "every", "size", "seed", "connection"):
            _check(value.isdecimal(), f"{name}={value} is not a whole number")
            _check(name != "size" or int(value) > 0, "size must be at least 1, or random")
            found["at_nbytes" if name == "bytes" else name] = int(value)
        else:
            raise ConfigError(_unknown("name", name, _NAMES))
        seen.add(name)
    return found


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{float(value)!r}s"


def _unknown(what: str, name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"unknown {what} {name!r}{hint}, known are {', '.join(known)}"


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)
