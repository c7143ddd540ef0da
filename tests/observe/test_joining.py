"""Recordings on one clock: whose clock counts, and which messages are the same."""

from __future__ import annotations

import pytest

from dynacomm_async.errors import ConfigError
from dynacomm_async.observe import join_recordings
from dynacomm_async.observe.joining import layers_of

CELLS = ((0, 2),)


def names(joined):
    return [party.name for party in joined.parties]


def test_a_message_is_found_at_its_sender_on_the_link_and_at_its_receiver(
    make_server, make_worker, make_link
):
    server, worker, link = make_server(), make_worker(), make_link()
    worker.passed(True, "GRADIENTS", 3, 1000, 1010, CELLS)
    link.carried(True, "GRADIENTS", 3, 1020, 1040, 1060)
    server.passed(False, "GRADIENTS", 3, 1050, 1070, CELLS)

    joined = join_recordings([worker.recording, link.recording, server.recording])

    assert names(joined) == ["server", "link of worker 0", "worker 0"]
    (crossing,) = joined.crossings
    assert (crossing.slot, crossing.up, crossing.kind, crossing.step) == (0, True, "GRADIENTS", 3)
    assert (crossing.sender, crossing.link, crossing.receiver) == (2, 1, 0)
    assert (crossing.sent.start_ns, crossing.sent.end_ns) == (0, 10)
    assert (crossing.carried.start_ns, crossing.carried.delivered_ns) == (20, 60)
    assert (crossing.received.start_ns, crossing.received.end_ns) == (50, 70)
    assert crossing.cells == CELLS


def test_messages_alike_are_told_apart_by_their_order(make_server, make_worker):
    server, worker = make_server(), make_worker()
    for number in range(3):
        server.passed(True, "PARAMETERS", 5, 100 * number, 100 * number + 1, [(number, 1)])
        worker.passed(False, "PARAMETERS", 5, 100 * number + 50, 100 * number + 60, [(number, 1)])
    joined = join_recordings([server.recording, worker.recording])
    assert [
        (crossing.sent.start_ns, crossing.received.start_ns) for crossing in joined.crossings
    ] == [(0, 50), (100, 150), (200, 250)]
    assert not any(crossing.up for crossing in joined.crossings)


def test_another_machines_clock_is_shifted_by_its_workers_best_estimate(
    make_server, make_worker, make_link
):
    server = make_server(["10.0.0.2:5", "10.0.0.2:6"])
    vague = make_worker(0, host="there", ahead_ns=10**12 + 40, doubt_ns=90)
    sure = make_worker(1, host="there", ahead_ns=10**12, doubt_ns=30)
    link = make_link("10.0.0.2:6", host="there", ahead_ns=10**12)
    server.passed(True, "PARAMETERS", 0, 500, 510, CELLS, connection=1)
    link.carried(False, "PARAMETERS", 0, 520, 530, 540)
    sure.passed(False, "PARAMETERS", 0, 545, 550, CELLS)
    vague.computed("forward", 0, 0, 700, 800)

    joined = join_recordings(book.recording for book in (server, vague, sure, link))

    assert {party.name: party.uncertainty_ns for party in joined.parties} == {
        "server": 0,
        "link of worker 1": 30,
        "worker 0": 30,
        "worker 1": 30,
    }
    (crossing,) = joined.crossings
    assert (crossing.sent.start_ns, crossing.carried.start_ns, crossing.received.end_ns) == (
        *(0, 20, 50),
    )


def test_processes_of_one_machine_share_its_clock_whatever_was_estimated(make_server, make_worker):
    server, worker = make_server(), make_worker(doubt_ns=80, ahead_ns=0)
    worker.recorder.clock_offset = worker.recorder.clock_offset._replace(offset_ns=75)
    worker.passed(True, "GRADIENTS", 0, 100, 110)
    server.passed(False, "GRADIENTS", 0, 120, 130)
    joined = join_recordings([server.recording, worker.recording])
    assert {party.uncertainty_ns for party in joined.parties} == {0}
    assert joined.crossings[0].received.start_ns == 20


def test_a_machine_that_nobody_has_timed_is_refused(make_server, make_worker, make_link):
    books = [make_server(), make_worker(host="there"), make_link(host="elsewhere")]
    with pytest.raises(ConfigError, match="clock of elsewhere is not known: add the recording of"):
        join_recordings(book.recording for book in books)


def test_servers_of_several_machines_are_refused(make_server):
    books = [make_server(), make_server(host="there", run="another")]
    with pytest.raises(ConfigError, match="servers of several machines"):
        join_recordings(book.recording for book in books)


def test_nothing_cannot_be_joined():
    with pytest.raises(ConfigError, match="no recordings"):
        join_recordings([])


def test_runs_are_kept_apart_and_named_by_their_labels(make_server, make_worker, make_link):
    books = [
        make_server(run="a", label="first"),
        make_server(["10.0.0.2:9"], run="b", label="second"),
        make_worker(run="b"),
        make_worker(run="a"),
        make_link("10.0.0.2:9"),
    ]
    books[1].passed(True, "PARAMETERS", 0, 10, 20, CELLS)
    books[2].passed(False, "PARAMETERS", 0, 30, 40, CELLS)
    books[3].passed(False, "PARAMETERS", 0, 70, 80, CELLS)
    joined = join_recordings(book.recording for book in books)
    assert names(joined) == [
        "server (first)",
        "worker 0 (first)",
        "server (second)",
        "link of worker 0 (second)",
        "worker 0 (second)",
    ]
    met = [(crossing.sender, crossing.receiver) for crossing in joined.crossings]
    assert sorted(met) == [(-1, 1), (2, 4)]


def test_a_connection_that_was_never_welcomed_belongs_to_nobody(make_server, make_worker):
    server, worker = make_server(), make_worker()
    worker.recorder.open_connection(peer="nobody yet")
    worker.passed(True, "HELLO", 0, 1, 2, connection=1)
    assert join_recordings([server.recording, worker.recording]).crossings == []


def test_layers_are_those_that_the_cells_touch():
    layers = (("a", 0, 3), ("b", 3, 1), ("c", 4, 5))
    assert layers_of([(0, 1)], layers) == [0]
    assert layers_of([(2, 2)], layers) == [0, 1]
    assert layers_of([(3, 1), (8, 1)], layers) == [1, 2]
    assert layers_of([(9, 4)], layers) == []
