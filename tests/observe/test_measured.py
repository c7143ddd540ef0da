"""Measured steps: recordings of what the cost model says must give back what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dynacomm_async.errors import ConfigError
from dynacomm_async.observe import join_recordings, measured_steps, median_step
from dynacomm_async.schedule import Costs, LayerCosts, evaluate, make_plan

COSTS = Costs(
    (
        LayerCosts("front", 8, 4_000, 3_000, 5_000, 4_500),
        LayerCosts("middle", 4, 2_000, 7_000, 6_000, 2_500),
        LayerCosts("back", 8, 9_000, 1_000, 2_000, 9_500),
    ),
    overhead_up_ns=500,
    overhead_down_ns=400,
    latency_up_ns=300,
    latency_down_ns=250,
    server_ns=77,
)
STRATEGIES = ("sequential", "layerwise", "ibatch", "bucket", "dynacomm")


def cells_of(segment, layers):
    first = layers[segment.first][1]
    _, begin, count = layers[segment.last]
    return [(first, begin + count - first)]


def without_ranges(timeline):
    transfers = tuple(transfer._replace(ranges=()) for transfer in timeline.transfers)
    return replace(timeline, transfers=transfers)


def play(timeline, books, at_ns, step, *, linked):
    """Write down a step as the cost model has it."""
    server, worker, link = books
    layers = worker.recorder.layers
    for transfer in timeline.transfers:
        up = transfer.direction == "push"
        kind = "GRADIENTS" if up else "PARAMETERS"
        cells = cells_of(transfer.segment, layers)
        start_ns, end_ns = at_ns + transfer.start_ns, at_ns + transfer.end_ns
        sender, receiver = (worker, server) if up else (server, worker)
        if linked:
            sender.passed(True, kind, step, start_ns - 20, start_ns - 10, cells)
            link.carried(up, kind, step, start_ns, end_ns, end_ns + 5)
            receiver.passed(False, kind, step, end_ns + 6, end_ns + 7, cells)
        else:
            sender.passed(True, kind, step, start_ns, start_ns + 1, cells)
            receiver.passed(False, kind, step, start_ns + 2, end_ns, cells)
    for work in timeline.computations:
        start_ns, end_ns = at_ns + work.start_ns, at_ns + work.end_ns
        worker.computed(work.phase, step, work.layer, start_ns, end_ns)
        worker.computed("wait", step, work.layer, end_ns, end_ns)


@pytest.mark.parametrize("linked", [True, False], ids=["link", "no link"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_is_measured_as_it_was(strategy, linked, make_server, make_worker, make_link):
    timeline = evaluate(make_plan(strategy, COSTS), COSTS)
    books = (make_server(), make_worker(host="there", ahead_ns=10**9), make_link())
    for step in range(3):
        play(timeline, books, 5_000 + step * timeline.step_ns, step, linked=linked)
    joined = join_recordings(book.recording for book in books)

    steps = measured_steps(joined)

    assert list(steps) == [0, 1]  # of the last nobody knows when it ended
    assert steps[0] == steps[1] == without_ranges(timeline)


def test_without_a_barrier_a_step_goes_from_backward_to_backward(
    make_server, make_worker, make_link
):
    books = (make_server(), make_worker(), make_link())
    timeline = evaluate(make_plan("layerwise", COSTS), COSTS)
    for step in range(3):
        play(timeline, books, step * timeline.step_ns, step, linked=True)
    joined = join_recordings(book.recording for book in books)

    steps = measured_steps(joined, barrier=False)

    assert list(steps) == [0, 1]
    (turned,) = {steps[0], steps[1]}
    assert (turned.step_ns, turned.forward_ns) == (timeline.step_ns, None)
    begin_ns = timeline.forward_ns
    moved = {
        (work.phase, work.layer): (work.start_ns - begin_ns) % timeline.step_ns
        for work in timeline.computations
    }
    assert {(work.phase, work.layer): work.start_ns for work in turned.computations} == moved
    assert [transfer.direction for transfer in turned.transfers] == ["push"] * 3 + ["pull"] * 3
    assert turned.transfers[3].start_ns == timeline.step_ns - begin_ns


def test_a_step_of_which_something_is_missing_does_not_count(make_server, make_worker, make_link):
    timeline = evaluate(make_plan("layerwise", COSTS), COSTS)
    books = (make_server(), make_worker(), make_link())
    for step in range(4):
        partial = replace(timeline, computations=timeline.computations[1:])
        shown = partial if step == 1 else timeline
        play(shown, books, 10**6 * step, step, linked=True)
    joined = join_recordings(book.recording for book in books)
    assert list(measured_steps(joined)) == [0, 2]


def test_the_median_step_is_one_that_happened():
    timeline = evaluate(make_plan("bucket", COSTS), COSTS)
    steps = {index: replace(timeline, step_ns=ns) for index, ns in enumerate([9, 1, 8, 3, 5])}
    assert median_step(steps) == 4
    assert median_step(steps, [0, 1, 2, 7]) == 2
    assert median_step(steps, [0, 1]) == 1
    assert median_step({}) is None


def test_a_worker_that_is_not_there_is_named(make_server):
    server = make_server()
    with pytest.raises(ConfigError, match="no recording of worker 3 of dynacomm"):
        measured_steps(join_recordings([server.recording]), 3, "dynacomm")
