"""A run as a trace that browsers draw: https://ui.perfetto.dev or chrome://tracing.

The JSON object form of the Trace Event Format (Google, "Trace Event Format", 2016). Every recording
is a process, every track a thread; spans are complete events (``X``), plans are instants (``i``),
and arrows (``s``, ``t``, ``f``) lead each message from its sender over the link to its receiver.
Times are microseconds from the start of the run, to an eighth: that has an exact floating-point
form, so that neighbours never overlap by a rounding error, which viewers would not draw.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dynacomm_async.observe.joining import Crossing, Joined, Party, layers_of
from dynacomm_async.recording import Passed

__all__ = ["trace_of"]

_UPDATES = _PLANS = 1
_STEPS, _COMPUTE, _MESSAGES = 2, 3, 4
"""Tracks of a process, in the order in which viewers show them. Messages take two for each rank."""

_TRACKS = 10_000
"""A thread's number is that of its track, with the process in front: viewers take a thread that has
its process's number for the main one."""


@dataclass(slots=True)
class _Span:
    """Something that took time on a track; ``start`` and ``end`` are eighths of microseconds."""

    pid: int
    tid: int
    start: int
    end: int
    name: str
    category: str
    args: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the event."""
        return {
            "name": self.name,
            "cat": self.category,
            "ph": "X",
            "ts": self.start / 8,
            "dur": (self.end - self.start) / 8,
            "pid": self.pid,
            "tid": self.tid,
            "args": self.args,
        }


def trace_of(joined: Joined) -> dict[str, Any]:
    """Return the trace as plain values, to be written as JSON.

    The events are in the order of time, after those that name processes and threads; the same
    recordings give the same trace. ``otherData`` says how each process's clock was related to the
    server's, and how far off that may be.
    """
    builder = _Builder(joined)
    return {
        "traceEvents": builder.events(),
        "displayTimeUnit": "ms",
        "otherData": {
            "clock": "microseconds since the start of the run, on the server's clock",
            "dropped_events": joined.dropped,
            "processes": [_describe(pid, party) for pid, party in enumerate(joined.parties, 1)],
        },
    }


def _describe(pid: int, party: Party) -> dict[str, Any]:
    recording = party.recording
    estimate = recording.clock_offset
    return {
        "pid": pid,
        "name": party.name,
        "host": recording.host_name,
        "process": recording.pid,
        "clock_uncertainty_us": party.uncertainty_ns / 1e3,
        "offset_estimated_over_connection_us": estimate and estimate.offset_ns / 1e3,
        "uncertainty_of_estimate_us": estimate and estimate.uncertainty_ns / 1e3,
    }


class _Builder:
    """Collects the events of a trace."""

    def __init__(self, joined: Joined) -> None:
        self._joined = joined
        self._threads: dict[tuple[int, int], str] = {}
        self._spans: list[_Span] = []
        self._instants: list[dict[str, Any]] = []
        self._arrows: list[list[_Span]] = []
        self._tables: dict[str, Sequence[tuple[str, int, int]]] = {
            party.label: () for party in joined.parties
        }
        for party in joined.parties:
            if party.recording.layers:
                self._tables[party.label] = party.recording.layers

    def events(self) -> list[dict[str, Any]]:
        """Return all events in order."""
        for pid, party in enumerate(self._joined.parties, 1):
            if party.recording.role == "worker":
                self._add_work(pid, party)
            self._add_updates(pid, party)
        for crossing in self._joined.crossings:
            self._add_crossing(crossing)
        self._part()
        timed = [span.to_json() for span in self._spans] + self._instants + self._flows()
        # Stable: a span comes before the arrow that begins with it.
        timed.sort(key=lambda event: (event["ts"], event["pid"], event["tid"]))
        return [*self._names(), *timed]

    def _add_work(self, pid: int, party: Party) -> None:
        recording, shift_ns = party.recording, party.shift_ns
        begins: dict[int, int] = {}
        for work in recording.computed:
            layer = recording.layers[work.layer][0]
            name = f"wait for {layer}" if work.what == "wait" else f"{work.what} {layer}"
            start_ns, end_ns = work.start_ns + shift_ns, work.end_ns + shift_ns
            args = {"step": work.step, "layer": work.layer}
            self._span(pid, _COMPUTE, "compute", start_ns, end_ns, name, work.what, args)
            begins.setdefault(work.step, start_ns)
        last_ns = max((work.end_ns + shift_ns for work in recording.computed), default=0)
        edges = [*begins.values(), last_ns]
        for (step, start_ns), end_ns in zip(begins.items(), edges[1:], strict=True):
            self._span(pid, _STEPS, "steps", start_ns, end_ns, f"step {step}", "step", {})
        for change in recording.planned:
            thread = self._thread(pid, _PLANS, "plans")
            self._instants.append(
                {
                    "name": f"{change.plan.get('strategy', 'plan')} from step {change.step}",
                    "cat": "plan",
                    "ph": "i",
                    "s": "p",
                    "ts": _eighths(change.at_ns + shift_ns) / 8,
                    "pid": pid,
                    "tid": thread,
                    "args": {"from_step": change.step, "plan": change.plan},
                }
            )

    def _add_updates(self, pid: int, party: Party) -> None:
        layers = self._tables[party.label]
        for update in party.recording.updated:
            args = {"step": update.step, "first_cell": update.first_cell, "cells": update.n_cells}
            name = f"update {_name_layers([(update.first_cell, update.n_cells)], layers)}"
            start_ns = update.start_ns + party.shift_ns
            end_ns = update.end_ns + party.shift_ns
            self._span(pid, _UPDATES, "update", start_ns, end_ns, name, "update", args)

    def _add_crossing(self, crossing: Crossing) -> None:
        """Add a message wherever it was recorded."""
        spans = []
        if crossing.sent is not None:
            spans.append(self._end(crossing, crossing.sent, crossing.sender))
        carried = crossing.carried
        if carried is not None:
            direction = "up from" if crossing.up else "down to"
            spans.append(
                self._span(
                    crossing.link + 1,
                    _MESSAGES + 2 * crossing.slot + crossing.up,
                    f"{direction} worker {crossing.slot}",
                    carried.start_ns,
                    carried.end_ns,
                    *self._title(crossing, crossing.link),
                    {
                        "step": crossing.step,
                        "bytes": carried.nbytes,
                        "delivered_us": carried.delivered_ns / 1e3,
                    },
                )
            )
        if crossing.received is not None:
            spans.append(self._end(crossing, crossing.received, crossing.receiver))
        if len(spans) > 1:
            self._arrows.append(spans)

    def _end(self, crossing: Crossing, passed: Passed, party: int) -> _Span:
        verb = "sent" if passed.sent else "received"
        thread = verb
        if self._joined.parties[party].recording.role == "server":
            thread += f" {'to' if passed.sent else 'from'} worker {crossing.slot}"
        return self._span(
            party + 1,
            _MESSAGES + 2 * crossing.slot + crossing.up,
            thread,
            passed.start_ns,
            passed.end_ns,
            *self._title(crossing, party),
            {
                "step": crossing.step,
                "payload_bytes": passed.payload_nbytes,
                "cells": [list(cells) for cells in passed.cells],
            },
        )

    def _title(self, crossing: Crossing, party: int) -> tuple[str, str]:
        """Return name and category of a message."""
        what = {"PARAMETERS": "pull", "GRADIENTS": "push"}.get(crossing.kind)
        if what is None:
            return crossing.kind.lower(), "control"
        layers = self._tables[self._joined.parties[party].label]
        return f"{what} {_name_layers(crossing.cells, layers)}", what

    def _span(
        self,
        pid: int,
        track: int,
        thread: str,
        start_ns: int,
        end_ns: int,
        name: str,
        category: str,
        args: dict[str, Any],
    ) -> _Span:
        tid = self._thread(pid, track, thread)
        span = _Span(pid, tid, _eighths(start_ns), _eighths(end_ns), name, category, args)
        self._spans.append(span)
        return span

    def _thread(self, pid: int, track: int, name: str) -> int:
        """Return the number of a thread and remember its name."""
        tid = pid * _TRACKS + track
        self._threads.setdefault((pid, tid), name)
        return tid

    def _part(self) -> None:
        """Keep the spans of a track apart, and let none vanish: viewers would not show it."""
        self._spans.sort(key=lambda span: (span.pid, span.tid, span.start, span.end))
        track, free = (0, 0), 0
        for span in self._spans:
            if (span.pid, span.tid) != track:
                track, free = (span.pid, span.tid), 0
            span.start = max(span.start, free)
            free = span.end = max(span.end, span.start + 1)

    def _flows(self) -> list[dict[str, Any]]:
        """Return arrows along each message; they touch each span while it lasts.

        They leave out a link that made up for a late wake-up of its own by counting the message as
        through before it was sent.
        """
        events = []
        for number, spans in enumerate(self._arrows, 1):
            points: list[tuple[_Span, int]] = []
            for span in spans:
                at = max(span.start, points[-1][1] + 1 if points else 0)
                if at < span.end:
                    points.append((span, at))
            for index, (span, time) in enumerate(points if len(points) > 1 else ()):
                phase = "s" if index == 0 else "f" if index == len(points) - 1 else "t"
                event = {
                    "name": "message",
                    "cat": "message",
                    "ph": phase,
                    "id": number,
                    "ts": time / 8,
                    "pid": span.pid,
                    "tid": span.tid,
                }
                if phase == "f":
                    event["bp"] = "e"
                events.append(event)
        return events

    def _names(self) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []

        def say(what: str, pid: int, tid: int, **args: Any) -> None:
            events.append({"name": what, "ph": "M", "pid": pid, "tid": tid, "args": args})

        for pid, party in enumerate(self._joined.parties, 1):
            say("process_name", pid, 0, name=party.name)
            say("process_sort_index", pid, 0, sort_index=pid)
        for (pid, tid), name in sorted(self._threads.items()):
            say("thread_name", pid, tid, name=name)
            say("thread_sort_index", pid, tid, sort_index=tid)
        return events


def _eighths(time_ns: int) -> int:
    return time_ns * 8 // 1000


def _name_layers(cells: Iterable[Sequence[int]], layers: Sequence[tuple[str, int, int]]) -> str:
    found = [layers[index][0] for index in layers_of(cells, layers)]
    if not found:
        return "statistics" if layers else "cells"
    return found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}"
