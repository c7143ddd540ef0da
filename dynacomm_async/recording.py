"""What one process did and when: every message each way, what it computed and what it waited for.

A :class:`Recorder` is handed to a session, a server or a link, which append to it; without one
nothing is recorded and nothing is paid. What it has taken down is a :class:`Recording`: plain
values that can be saved. :mod:`dynacomm_async.observe` joins the recordings of a run on one clock.

Times are nanoseconds of ``time.monotonic_ns`` in the process. On one machine all processes share
that clock (``host`` says which machine it was); across machines the worker's estimate of its offset
from the server's counts.
"""

from __future__ import annotations

import json
import os
import platform
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeAlias

from dynacomm_async.errors import ConfigError

__all__ = [
    "Carried",
    "ClockOffset",
    "Computed",
    "ConnectionLog",
    "Passed",
    "Planned",
    "Recorder",
    "Recording",
    "Role",
    "Updated",
    "read_recordings",
    "write_recordings",
]

Role: TypeAlias = Literal["server", "worker", "link"]
Cells: TypeAlias = Sequence[tuple[int, int]]

_FORMAT = 1
_MOST_EVENTS = 4_000_000
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Computed(NamedTuple):
    """What the computing thread did for a layer; ``"wait"``: it lacked the parameters."""

    what: Literal["forward", "backward", "wait"]
    step: int
    layer: int
    start_ns: int
    end_ns: int


class Passed(NamedTuple):
    """One message at one end of a connection.

    Attributes:
        connection: which of the recording's connections.
        sent: whether it left here; otherwise it came.
        kind: name of the message's kind, such as ``"GRADIENTS"``.
        step: the step or version that it belongs to, else 0.
        start_ns: when it was handed over to be sent, or its first piece was here.
        end_ns: when (nearly) all of it had left this process, or its last byte was here.
        payload_nbytes: without prefix and header.
        cells: ``(first, count)`` of each range of cells that it carries.
    """

    connection: int
    sent: bool
    kind: str
    step: int
    start_ns: int
    end_ns: int
    payload_nbytes: int
    cells: Cells


class Carried(NamedTuple):
    """One message on an emulated link.

    Attributes:
        connection: which of the recording's connections.
        up: whether it went to the server.
        kind: name of the message's kind.
        step: the step or version that it belongs to, else 0.
        start_ns: when it began to occupy the medium, its overhead included; on the link's own
            clock, which may count a few milliseconds back to make up for a late wake-up.
        end_ns: when its last byte had passed the medium, on the same clock.
        delivered_ns: when its last byte was handed to the receiver's socket.
        nbytes: the whole message: prefix, header and payload.
    """

    connection: int
    up: bool
    kind: str
    step: int
    start_ns: int
    end_ns: int
    delivered_ns: int
    nbytes: int


class Planned(NamedTuple):
    """From ``step`` on the worker follows another plan; ``plan`` is its JSON form."""

    step: int
    at_ns: int
    plan: dict[str, Any]


class Updated(NamedTuple):
    """The server applied a step's gradients to a run of cells."""

    step: int
    start_ns: int
    end_ns: int
    first_cell: int
    n_cells: int


class ClockOffset(NamedTuple):
    """What to add to this process's times to get the server's.

    The server's answer to the heartbeat with the shortest round trip was stamped somewhere within
    that round trip, so the middle is wrong by half of it at most (Cristian, "Probabilistic clock
    synchronization", 1989, doi 10.1007/BF01784024; NTP's clock filter, RFC 5905, picks likewise).
    Since then clocks drift apart, by some microseconds a second.
    """

    offset_ns: int
    uncertainty_ns: int


@dataclass(slots=True)
class ConnectionLog:
    """One connection, as this process knows it.

    Attributes:
        number: from 0.
        local: own address as the peer sees it; a link's is the one that it calls the server from.
        peer: the peer's address.
        run: id of the run, known from the welcome on.
        slot: the worker's rank, None before the welcome; a link never knows it.
        term: of the membership.
    """

    number: int
    local: str = ""
    peer: str = ""
    run: str = ""
    slot: int | None = None
    term: int = 0


@dataclass(frozen=True, slots=True)
class Recording:
    """What one process has done so far; the attributes are those of :class:`Recorder`."""

    role: Role
    label: str
    host: str
    host_name: str
    pid: int
    clock_offset: ClockOffset | None
    layers: Sequence[tuple[str, int, int]]
    connections: Sequence[ConnectionLog]
    computed: Sequence[Computed]
    passed: Sequence[Passed]
    carried: Sequence[Carried]
    planned: Sequence[Planned]
    updated: Sequence[Updated]
    dropped: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values; :meth:`from_json` is the inverse."""
        rows = {name: [list(row) for row in getattr(self, name)] for name in _ROWS}
        return {
            "format": _FORMAT,
            "role": self.role,
            "label": self.label,
            "host": self.host,
            "host_name": self.host_name,
            "pid": self.pid,
            "clock_offset": None if self.clock_offset is None else list(self.clock_offset),
            "layers": [list(row) for row in self.layers],
            "connections": [
                [log.number, log.local, log.peer, log.run, log.slot, log.term]
                for log in self.connections
            ],
            **rows,
            "dropped": self.dropped,
        }

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Return the recording in what :meth:`to_json` made.

        Raises:
            ConfigError: it is none, or that of another version.
        """
        if not isinstance(value, Mapping) or value.get("format") != _FORMAT:
            raise ConfigError(f"not a recording of format {_FORMAT}: {reprlib.repr(value)}")
        offset = value.get("clock_offset")
        try:
            return cls(
                role=_role(value["role"]),
                label=str(value["label"]),
                host=str(value["host"]),
                host_name=str(value["host_name"]),
                pid=int(value["pid"]),
                clock_offset=None if offset is None else ClockOffset(*map(int, offset)),
                layers=[(str(name), int(a), int(n)) for name, a, n in value["layers"]],
                connections=[ConnectionLog(*row) for row in value["connections"]],
                dropped=int(value["dropped"]),
                **{name: _read_rows(kind, value[name]) for name, kind in _ROWS.items()},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a recording: {type(error).__name__}: {error}") from error


@dataclass(slots=True)
class Recorder:
    """Takes down what one session, one server or one link does. Only ever appended to.

    Example::

        recorder = Recorder()
        with Session("127.0.0.1:7070", layers={"w": 10}, recorder=recorder) as session:
            ...
        write_recordings(Path("worker.json"), [recorder.recording()])

    Attributes:
        label: for people, to tell several of one process apart, such as a strategy's name.
        limit: how many events are kept, about 200 bytes each; later ones are only counted.
        role: whose it is, from when it was handed over.
        clock_offset: of a worker, measured when it joined; see :class:`ClockOffset`.
        layers: of a worker: name, first cell and number of cells of each layer in forward order.
        connections: in the order in which they were opened.
        computed, passed, carried, planned, updated: the events of each kind, in the order in which
            they ended.
        dropped: events that came after the limit.
    """

    label: str = ""
    limit: int = _MOST_EVENTS
    role: Role | None = None
    clock_offset: ClockOffset | None = None
    layers: Sequence[tuple[str, int, int]] = ()
    connections: list[ConnectionLog] = field(default_factory=list)
    computed: list[Computed] = field(default_factory=list)
    passed: list[Passed] = field(default_factory=list)
    carried: list[Carried] = field(default_factory=list)
    planned: list[Planned] = field(default_factory=list)
    updated: list[Updated] = field(default_factory=list)
    dropped: int = 0
    _n_events: int = 0

    def begin(self, role: Role) -> None:
        """Say whose it is.

        Raises:
            ConfigError: it has been somebody's before.
        """
        if self.role is not None:
            raise ConfigError(f"this recorder is a {self.role}'s already: each needs its own")
        self.role = role

    def open_connection(self, local: str = "", peer: str = "") -> ConnectionLog:
        """Return the entry of a new connection; whoever learns more of it fills it in."""
        log = ConnectionLog(len(self.connections), local, peer)
        self.connections.append(log)
        return log

    def add(self, event: Computed | Passed | Carried | Planned | Updated) -> None:
        """Append an event. Any thread may."""
        if self._n_events >= self.limit:
            self.dropped += 1
            return
        self._n_events += 1
        getattr(self, _NAMES[type(event)]).append(event)

    def recording(self) -> Recording:
        """Return what has been taken down so far; later events are not in it.

        Raises:
            ConfigError: it was never handed to anything.
        """
        if self.role is None:
            raise ConfigError("this recorder was never used: pass it as recorder= to something")
        return Recording(
            role=self.role,
            label=self.label,
            host=_host(),
            host_name=platform.node(),
            pid=os.getpid(),
            clock_offset=self.clock_offset,
            layers=tuple(self.layers),
            connections=tuple(self.connections),
            computed=tuple(self.computed),
            passed=tuple(self.passed),
            carried=tuple(self.carried),
            planned=tuple(self.planned),
            updated=tuple(self.updated),
            dropped=self.dropped,
        )


_ROWS: dict[str, Any] = {
    "computed": Computed,
    "passed": Passed,
    "carried": Carried,
    "planned": Planned,
    "updated": Updated,
}
"""The attributes that hold events, and their kinds."""

_NAMES = {kind: name for name, kind in _ROWS.items()}


def write_recordings(path: Path, recordings: Iterable[Recording], **more: Any) -> None:
    """Write ``{"recordings": [...]}`` as JSON, beside whatever else the file shall hold.

    Raises:
        OSError: the file cannot be written.
    """
    rows = [recording.to_json() for recording in recordings]
    path.write_text(json.dumps({**more, "recordings": rows}, separators=(",", ":")) + "\n")


def read_recordings(path: Path) -> list[Recording]:
    """Return the recordings in a file of :func:`write_recordings`.

    Raises:
        ConfigError: no such file, or there are none in it.
    """
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    rows = value.get("recordings") if isinstance(value, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ConfigError(
            f"{path} has no recordings: expected a file that `dynacomm serve`, `work` or `link` "
            "wrote with --trace"
        )
    try:
        return [Recording.from_json(row) for row in rows]
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _role(value: object) -> Role:
    if value == "server" or value == "worker" or value == "link":
        return value
    raise ValueError(f"role {value!r}, expected server, worker or link")


def _read_rows(kind: Any, rows: Iterable[Sequence[Any]]) -> list[Any]:
    """Return the events in their JSON form; times must be whole numbers to be joined."""
    events = [kind(*row) for row in rows]
    fields = [name for name in kind._fields if name.endswith("_ns")]
    for event in events:
        for name in fields:
            if type(getattr(event, name)) is not int:
                raise ValueError(f"{name} is {getattr(event, name)!r}, expected a whole number")
    return events


def _host() -> str:
    """Return what tells one running machine from another: processes on it share a clock."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return platform.node()
