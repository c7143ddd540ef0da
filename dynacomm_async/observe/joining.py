"""Recordings of several processes on one clock, and each message at every place it passed.

The server's clock counts. Processes of one machine share it; for another machine the estimate of
its worker with the shortest round trip is taken, whose uncertainty is said. A message is followed
by its membership (run, rank, term), direction, kind and step, and where several agree in all of
these by their order, which a connection keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

from dynacomm_async.errors import ConfigError
from dynacomm_async.recording import Carried, ClockOffset, ConnectionLog, Passed, Recording

__all__ = ["Crossing", "Joined", "Party", "join_recordings", "layers_of"]

_ROLES = ("server", "link", "worker")


@dataclass(frozen=True, slots=True)
class Party:
    """One recording with its place in the run.

    Attributes:
        recording: its own times are on the clock of its machine.
        name: for people, such as ``"worker 0"``, with the label where it has one.
        label: its own, or that of the server that it belongs to.
        slots: the ranks that it serves: all, one, or those behind a link.
        shift_ns: to be added to its times; then they count from the start of the run.
        uncertainty_ns: by how much that may be wrong.
    """

    recording: Recording
    name: str
    label: str
    slots: tuple[int, ...]
    shift_ns: int
    uncertainty_ns: int


@dataclass(frozen=True, slots=True)
class Crossing:
    """One message on its way, with the times of the common clock.

    Attributes:
        slot: rank of the worker that sent or got it.
        up: whether it went to the server.
        kind: name of the message's kind.
        step: the step or version that it belongs to, else 0.
        payload_nbytes: without prefix and header; 0 where neither end was recorded.
        cells: ``(first, count)`` of each range of cells that it carries.
        sent, carried, received: what its sender, a link and its receiver recorded, if they did.
        sender, link, receiver: index of the party that recorded each, -1 where none did.
    """

    slot: int
    up: bool
    kind: str
    step: int
    payload_nbytes: int
    cells: Sequence[tuple[int, int]]
    sent: Passed | None
    carried: Carried | None
    received: Passed | None
    sender: int
    link: int
    receiver: int


@dataclass(frozen=True, slots=True)
class Joined:
    """A run, or several that took turns, on one clock that starts at 0.

    Attributes:
        parties: server, links and workers, those of one label together.
        crossings: in the order of their memberships, directions, kinds and steps.
        dropped: events that recorders had no room for.
    """

    parties: Sequence[Party]
    crossings: Sequence[Crossing]
    dropped: int


class _Membership(NamedTuple):
    """What both ends of a connection know of it."""

    run: str
    slot: int
    term: int


@dataclass(slots=True)
class _Stations:
    """The messages of one membership, direction, kind and step, in the order of each place.

    Each with the index of the party that recorded it.
    """

    sent: list[tuple[int, Passed]] = field(default_factory=list)
    carried: list[tuple[int, Carried]] = field(default_factory=list)
    received: list[tuple[int, Passed]] = field(default_factory=list)


def join_recordings(recordings: Iterable[Recording]) -> Joined:
    """Put recordings on one clock and find the messages that they have in common.

    Raises:
        ConfigError: there are none, or one of another machine whose clock nobody related to the
            server's.
    """
    rows = list(recordings)
    if not rows:
        raise ConfigError("there are no recordings to join, expected at least one")
    offsets = _find_offsets(rows)
    memberships = _find_memberships(rows)
    start_ns = min(
        (time_ns + offsets[row.host].offset_ns for row in rows for time_ns in _starts_ns(row)),
        default=0,
    )
    order = sorted(range(len(rows)), key=lambda i: _rank(rows, memberships, i))
    labels = _find_labels(rows, memberships)
    parties = []
    for index in order:
        row, offset = rows[index], offsets[rows[index].host]
        slots = tuple(sorted({key.slot for key in memberships[index].values()}))
        label = labels[index]
        name = _name(row, slots) + (f" ({label})" if label else "")
        shift_ns = offset.offset_ns - start_ns
        parties.append(Party(row, name, label, slots, shift_ns, offset.uncertainty_ns))
    crossings = _find_crossings(parties, [memberships[index] for index in order])
    return Joined(parties, crossings, sum(row.dropped for row in rows))


def layers_of(cells: Iterable[Sequence[int]], layers: Sequence[tuple[str, int, int]]) -> list[int]:
    """Return the layers that ranges of cells touch; cells of statistics belong to none.

    Args:
        cells: ``(first, count)`` each.
        layers: name, first cell and number of cells of each layer.
    """
    ranges = list(cells)
    return [
        index
        for index, (_, begin, size) in enumerate(layers)
        if any(first < begin + size and begin < first + count for first, count in ranges)
    ]


def _find_offsets(rows: Sequence[Recording]) -> dict[str, ClockOffset]:
    """Return what to add to the times of each machine."""
    hosts = dict.fromkeys(row.host for row in rows)
    servers = {row.host for row in rows if row.role == "server"}
    if len(servers) > 1:
        raise ConfigError("servers of several machines: join the recordings of one run at a time")
    if len(hosts) == 1:
        return dict.fromkeys(hosts, ClockOffset(0, 0))
    offsets = {}
    for host in hosts:
        estimates = [row.clock_offset for row in rows if row.host == host and row.clock_offset]
        if host in servers:
            offsets[host] = ClockOffset(0, 0)
        elif estimates:
            offsets[host] = min(estimates, key=lambda estimate: estimate.uncertainty_ns)
        else:
            (name,) = {row.host_name for row in rows if row.host == host}
            raise ConfigError(
                f"the clock of {name} is not known: add the recording of a worker that ran there"
            )
    return offsets


def _find_memberships(rows: Sequence[Recording]) -> list[dict[int, _Membership]]:
    """Return for each recording the memberships of its connections, by their numbers.

    A link knows none, but the server knows the address that the link calls it from.
    """
    known = [
        {
            log.number: _Membership(log.run, log.slot, log.term)
            for log in row.connections
            if log.slot is not None
        }
        for row in rows
    ]
    callers = {
        log.peer: memberships[log.number]
        for row, memberships in zip(rows, known, strict=True)
        for log in row.connections
        if row.role == "server" and log.number in memberships
    }
    return [
        _behind(row.connections, callers) if row.role == "link" else memberships
        for row, memberships in zip(rows, known, strict=True)
    ]


def _behind(
    connections: Iterable[ConnectionLog], callers: dict[str, _Membership]
) -> dict[int, _Membership]:
    return {log.number: callers[log.local] for log in connections if log.local in callers}


def _find_labels(rows: Sequence[Recording], known: Sequence[dict[int, _Membership]]) -> list[str]:
    """Return each one's label: its own, its run's, or the run itself where there are several."""
    labels = {
        key.run: row.label
        for row, memberships in zip(rows, known, strict=True)
        for key in memberships.values()
        if row.label
    }
    runs = {key.run for memberships in known for key in memberships.values()}
    found = []
    for row, memberships in zip(rows, known, strict=True):
        run = next((key.run for key in memberships.values()), "")
        found.append(row.label or labels.get(run) or (run if len(runs) > 1 else ""))
    return found


def _rank(
    rows: Sequence[Recording], known: Sequence[dict[int, _Membership]], index: int
) -> tuple[int, int, list[int], int]:
    """Sort by run in the order given, then server, link, worker, then rank."""
    run = next((key.run for key in known[index].values()), None)
    first = next(
        (i for i, keys in enumerate(known) if any(key.run == run for key in keys.values())),
        len(rows),
    )
    slots = sorted(key.slot for key in known[index].values())
    return first, _ROLES.index(rows[index].role), slots, index


def _name(row: Recording, slots: Sequence[int]) -> str:
    if row.role == "server" or not slots:
        return row.role
    which = ", ".join(map(str, slots))
    return f"worker {which}" if row.role == "worker" else f"link of worker {which}"


def _find_crossings(
    parties: Sequence[Party], known: Sequence[dict[int, _Membership]]
) -> list[Crossing]:
    stations: dict[tuple[_Membership, bool, str, int], _Stations] = {}
    for index, (party, memberships) in enumerate(zip(parties, known, strict=True)):
        is_server = party.recording.role == "server"
        shift_ns = party.shift_ns
        for passed in party.recording.passed:
            key = memberships.get(passed.connection)
            if key is None:
                continue
            up = passed.sent != is_server
            at = stations.setdefault((key, up, passed.kind, passed.step), _Stations())
            moved = passed._replace(
                start_ns=passed.start_ns + shift_ns, end_ns=passed.end_ns + shift_ns
            )
            (at.sent if passed.sent else at.received).append((index, moved))
        for carried in party.recording.carried:
            key = memberships.get(carried.connection)
            if key is None:
                continue
            at = stations.setdefault((key, carried.up, carried.kind, carried.step), _Stations())
            through = carried._replace(
                start_ns=carried.start_ns + shift_ns,
                end_ns=carried.end_ns + shift_ns,
                delivered_ns=carried.delivered_ns + shift_ns,
            )
            at.carried.append((index, through))
    order = sorted(stations)
    return [crossing for key in order for crossing in _follow(*key, stations[key])]


def _follow(key: _Membership, up: bool, kind: str, step: int, at: _Stations) -> Iterator[Crossing]:
    for places in zip_longest(at.sent, at.carried, at.received, fillvalue=(-1, None)):
        (sender, sent), (link, carried), (receiver, received) = places
        content = sent or received
        yield Crossing(
            slot=key.slot,
            up=up,
            kind=kind,
            step=step,
            payload_nbytes=0 if content is None else content.payload_nbytes,
            cells=() if content is None else content.cells,
            sent=sent,
            carried=carried,
            received=received,
            sender=sender,
            link=link,
            receiver=receiver,
        )


def _starts_ns(row: Recording) -> Iterator[int]:
    for events in (row.computed, row.passed, row.carried, row.updated):
        yield from (event.start_ns for event in events)
    yield from (event.at_ns for event in row.planned)
