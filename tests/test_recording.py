"""Recorders: what is kept, what is refused, and the files."""

from __future__ import annotations

import json

import pytest

from dynacomm_async.errors import ConfigError
from dynacomm_async.recording import (
    Carried,
    ClockOffset,
    Computed,
    Passed,
    Planned,
    Recorder,
    Recording,
    Updated,
    read_recordings,
    write_recordings,
)

EVENTS = [
    Computed("forward", 1, 0, 10, 20),
    Passed(0, True, "GRADIENTS", 1, 21, 22, 400, ((0, 2), (4, 1))),
    Carried(0, True, "GRADIENTS", 1, 22, 30, 31, 444),
    Planned(1, 9, {"strategy": "bucket"}),
    Updated(1, 40, 41, 0, 3),
]


def full_recorder() -> Recorder:
    recorder = Recorder(label="a label")
    recorder.begin("worker")
    recorder.clock_offset = ClockOffset(-5, 7)
    recorder.layers = [("w", 0, 3)]
    log = recorder.open_connection(local="127.0.0.1:1", peer="127.0.0.1:2")
    log.run, log.slot, log.term = "r", 0, 1
    for event in EVENTS:
        recorder.add(event)
    return recorder


def test_each_kind_of_event_has_a_list_of_its_own():
    recording = full_recorder().recording()
    kept = (*recording.computed, *recording.passed, *recording.carried, *recording.planned)
    assert [*kept, *recording.updated] == EVENTS


def test_a_recording_does_not_change_any_more():
    recorder = full_recorder()
    recording = recorder.recording()
    recorder.add(EVENTS[0])
    assert len(recording.computed) == 1


def test_events_beyond_the_limit_are_counted_alone():
    recorder = Recorder(limit=2)
    recorder.begin("server")
    for event in EVENTS:
        recorder.add(event)
    recording = recorder.recording()
    assert (len(recording.computed), len(recording.passed), recording.dropped) == (1, 1, 3)
    assert [*recording.carried, *recording.planned, *recording.updated] == []


def test_a_recorder_belongs_to_one_thing():
    recorder = full_recorder()
    with pytest.raises(ConfigError, match="a worker's already: each needs its own"):
        recorder.begin("server")
    with pytest.raises(ConfigError, match="never used: pass it as recorder="):
        Recorder().recording()


def test_a_file_gives_back_what_was_written(tmp_path):
    recording = full_recorder().recording()
    path = tmp_path / "recordings.json"
    write_recordings(path, [recording, recording], traceEvents=[])
    table = json.loads(json.dumps(recording.to_json()))
    assert [read.to_json() for read in read_recordings(path)] == [table, table]
    assert json.loads(path.read_text())["traceEvents"] == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("]", "is not JSON"),
        ("[]", "has no recordings: expected a file that `dynacomm serve`"),
        ('{"traceEvents": []}', "has no recordings"),
        ('{"recordings": [7]}', "not a recording of format 1: 7"),
        ('{"recordings": [{"format": 2}]}', "not a recording of format 1"),
        ('{"recordings": [{"format": 1}]}', "not a recording: KeyError: 'role'"),
    ],
)
def test_a_file_of_something_else_is_refused_by_name(tmp_path, text, complaint):
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint) as refusal:
        read_recordings(path)
    assert str(refusal.value).startswith(str(path))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_recordings(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("role", "clown", "role 'clown'"),
        ("computed", [["forward", 0, 0, 1.5, 2]], "start_ns is 1.5, expected a whole number"),
        ("passed", [[0]], "TypeError"),
        ("updated", 3, "TypeError"),
        ("clock_offset", [1], "TypeError"),
    ],
)
def test_a_recording_with_something_odd_in_it_is_refused(key, value, complaint):
    table = {**full_recorder().recording().to_json(), key: value}
    with pytest.raises(ConfigError, match=complaint):
        Recording.from_json(table)
