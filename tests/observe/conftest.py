"""Recordings written by hand: two machines whose clocks differ, and messages between them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from dynacomm_async.recording import (
    Carried,
    ClockOffset,
    Computed,
    Passed,
    Recorder,
    Recording,
)

LAYERS = (("front", 0, 2), ("middle", 2, 1), ("back", 3, 2))


@dataclass
class Book:
    """The recording of one process; its events are told on the server's clock.

    Attributes:
        ahead_ns: how far its clock is ahead of the server's.
    """

    recorder: Recorder
    host: str
    ahead_ns: int = 0

    def passed(self, sent, kind, step, start_ns, end_ns, cells=(), connection=0):
        start_ns, end_ns = start_ns + self.ahead_ns, end_ns + self.ahead_ns
        nbytes = sum(count for _, count in cells)
        event = Passed(connection, sent, kind, step, start_ns, end_ns, nbytes, tuple(cells))
        self.recorder.add(event)

    def carried(self, up, kind, step, start_ns, end_ns, delivered_ns, connection=0):
        times = [time + self.ahead_ns for time in (start_ns, end_ns, delivered_ns)]
        self.recorder.add(Carried(connection, up, kind, step, *times, 99))

    def computed(self, what, step, layer, start_ns, end_ns):
        start_ns, end_ns = start_ns + self.ahead_ns, end_ns + self.ahead_ns
        self.recorder.add(Computed(what, step, layer, start_ns, end_ns))

    @property
    def recording(self) -> Recording:
        return replace(self.recorder.recording(), host=self.host, host_name=self.host)


@pytest.fixture
def make_server():
    def make(callers=("10.0.0.2:5",), *, host="here", run="r", label=""):
        recorder = Recorder(label=label)
        recorder.begin("server")
        for slot, caller in enumerate(callers):
            log = recorder.open_connection(peer=caller)
            log.run, log.slot, log.term = run, slot, slot + 1
        return Book(recorder, host)

    return make


@pytest.fixture
def make_worker():
    def make(slot=0, *, host="here", run="r", ahead_ns=0, doubt_ns=0, label=""):
        recorder = Recorder(label=label)
        recorder.begin("worker")
        recorder.layers = LAYERS
        recorder.clock_offset = ClockOffset(-ahead_ns, doubt_ns)
        log = recorder.open_connection(peer="10.0.0.1:7070")
        log.run, log.slot, log.term = run, slot, slot + 1
        return Book(recorder, host, ahead_ns)

    return make


@pytest.fixture
def make_link():
    def make(local="10.0.0.2:5", *, host="here", ahead_ns=0):
        recorder = Recorder()
        recorder.begin("link")
        recorder.open_connection(local=local, peer="10.0.0.3:6")
        return Book(recorder, host, ahead_ns)

    return make
