"""A real run, recorded everywhere: each planned message at sender, link and receiver, in order."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest

from dynacomm_async.link import Link, LinkSettings, precise_loop
from dynacomm_async.observe import (
    Joined,
    join_recordings,
    measured_steps,
    median_step,
    trace_of,
)
from dynacomm_async.recording import Recorder, Recording
from dynacomm_async.server.server import ParameterServer
from dynacomm_async.worker import Session

STEPS = 6
LINK = LinkSettings(
    rate_down_bytes_per_s=50e6, rate_up_bytes_per_s=20e6, delay_s=0.002, overhead_s=0.001
)


@dataclass
class Run:
    """A recorded run of two workers, each behind a link of its own."""

    recordings: list[Recording]
    sessions: dict[int, Session]
    links: list[Link]

    @property
    def joined(self) -> Joined:
        return join_recordings(self.recordings)


@pytest.fixture(autouse=True)
def loop_factory():
    """The links' own loop, whose timers are not early by half a millisecond."""
    return precise_loop


async def run_recorded(toy) -> Run:
    """Train over two links; server, links and workers are all in this process."""
    recorders = [Recorder() for _ in range(5)]
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(
            ParameterServer(
                toy.layers,
                workers=2,
                steps=STEPS,
                initial=toy.initial,
                initial_statistics=toy.initial_statistics,
                recorder=recorders[0],
            )
        )
        links = [
            await stack.enter_async_context(Link(LINK, server.address, recorder=recorder))
            for recorder in recorders[1:3]
        ]
        work = [
            asyncio.to_thread(toy.work, link.address, recorder=recorder, strategy="dynacomm")
            for link, recorder in zip(links, recorders[3:], strict=True)
        ]
        replicas = await asyncio.gather(*work)
        await server.finished()
    return Run(
        [recorder.recording() for recorder in recorders],
        {replica.slot: replica.session for replica in replicas},
        links,
    )


async def test_every_planned_message_is_seen_at_each_place_and_in_causal_order(toy):
    run = await run_recorded(toy)
    joined = run.joined

    for slot, session in run.sessions.items():
        for step in range(STEPS + 1):
            mine = [c for c in joined.crossings if (c.slot, c.step) == (slot, step)]
            plan = session.plans.plan_of(step)
            pulled = [c.cells for c in mine if c.kind == "PARAMETERS"]
            assert pulled == [
                (session.grid.layers_cells(*segment),) for segment in map(ends, plan.pull)
            ]
            pushed = [c.cells for c in mine if c.kind == "GRADIENTS"]
            if step < STEPS:
                expected = [
                    (session.grid.layers_cells(*segment),) for segment in map(ends, plan.push)
                ]
                expected[0] += (session.grid.statistics_cells,)
                assert pushed == expected
    assert {crossing.kind for crossing in joined.crossings} == {
        *("HELLO", "WELCOME", "HEARTBEAT", "JOIN", "PARAMETERS", "GRADIENTS", "END", "LEAVE")
    }
    for crossing in joined.crossings:
        sent, carried, received = crossing.sent, crossing.carried, crossing.received
        assert sent is not None
        assert carried is not None
        assert received is not None
        assert sent.start_ns <= sent.end_ns
        assert sent.start_ns < received.start_ns <= received.end_ns
        assert carried.start_ns + LINK.overhead_s * 1e9 <= carried.end_ns + 1
        # Its end on the medium, its delay, its delivery, its arrival.
        assert carried.end_ns + LINK.delay_s * 1e9 <= carried.delivered_ns + 1000
        assert sent.start_ns < carried.delivered_ns
        assert received.end_ns + 1000 >= carried.end_ns + LINK.delay_s * 1e9
        assert crossing.payload_nbytes < carried.nbytes


async def test_the_links_events_are_those_that_they_have_counted(toy):
    run = await run_recorded(toy)
    for link, recording in zip(run.links, run.recordings[1:3], strict=True):
        for up, tally in ((True, link.counters.up), (False, link.counters.down)):
            carried = [event for event in recording.carried if event.up == up]
            assert len(carried) == tally.messages
            assert sum(event.nbytes for event in carried) == tally.nbytes
            steps = Counter((event.kind, event.step) for event in carried)
            assert steps == {
                (kind.name, step): count
                for kind, counted in tally.kinds.items()
                for step, count in counted.steps.items()
            }
            # One medium each way: no two messages at once, each as long as its bytes take.
            for before, after in pairwise(carried):
                assert before.end_ns <= after.start_ns + 1
            rate = LINK.rate_up_bytes_per_s if up else LINK.rate_down_bytes_per_s
            for event in carried:
                least_ns = (LINK.overhead_s + event.nbytes / rate) * 1e9
                assert event.end_ns - event.start_ns >= least_ns - 2


async def test_the_computing_thread_never_does_two_things_and_waits_for_what_is_missing(toy):
    run = await run_recorded(toy)
    joined = run.joined
    for index, party in enumerate(joined.parties):
        if party.recording.role != "worker":
            continue
        works = party.recording.computed
        assert all(before.end_ns <= after.start_ns for before, after in pairwise(works))
        done = [(work.what, work.step, work.layer) for work in works if work.what != "wait"]
        n_layers = len(toy.layers)
        assert done == [
            (what, step, layer)
            for step in range(STEPS)
            for what, order in (("forward", range(n_layers)), ("backward", range(n_layers)[::-1]))
            for layer in order
        ]
        arrived = {}
        for crossing in joined.crossings:
            if crossing.kind == "PARAMETERS" and crossing.receiver == index:
                for first, count in crossing.cells:
                    for cell in range(first, first + count):
                        arrived[crossing.step, cell] = crossing.received.end_ns - party.shift_ns
        for work in works:
            if work.what == "forward":
                _, first, count = party.recording.layers[work.layer]
                needed_ns = max(arrived[work.step, cell] for cell in range(first, first + count))
                assert needed_ns <= work.start_ns


async def test_every_cell_is_updated_once_a_step_between_its_last_push_and_its_next_pull(toy):
    run = await run_recorded(toy)
    updates = run.recordings[0].updated
    n_cells = toy.grid.n_cells
    for step in range(STEPS):
        cells = Counter(
            cell
            for update in updates
            if update.step == step
            for cell in range(update.first_cell, update.first_cell + update.n_cells)
        )
        assert cells == dict.fromkeys(range(n_cells), 1)


async def test_the_estimated_offset_is_within_its_uncertainty(toy):
    run = await run_recorded(toy)
    for recording in run.recordings[3:]:
        offset_ns, uncertainty_ns = recording.clock_offset
        assert abs(offset_ns) <= uncertainty_ns  # one process: the truth is 0
        assert uncertainty_ns >= (LINK.delay_s + LINK.overhead_s) * 1e9


async def test_on_machines_apart_order_holds_within_the_stated_uncertainty(toy):
    """The same recordings, as if one worker's machine had booted an hour later."""
    run = await run_recorded(toy)
    recordings = [
        shift(row, -3600 * 10**9) if i == 4 else row for i, row in enumerate(run.recordings)
    ]
    joined = join_recordings(recordings)
    far = [party.uncertainty_ns for party in joined.parties]
    assert sorted(far)[:4] == [0, 0, 0, 0]
    assert max(far) > 0
    for crossing in joined.crossings:
        doubt_ns = far[crossing.sender] + far[crossing.receiver]
        assert crossing.sent.start_ns <= crossing.received.start_ns + doubt_ns


async def test_the_measured_steps_follow_each_other_without_a_gap(toy):
    joined = (await run_recorded(toy)).joined
    steps = measured_steps(joined, 1)
    assert list(steps) == list(range(STEPS))
    begins = [
        min(c.carried.start_ns for c in joined.crossings if key(c) == (1, "PARAMETERS", step))
        for step in range(STEPS + 1)
    ]
    lengths = [after - before for before, after in pairwise(begins)]
    assert [steps[step].step_ns for step in range(STEPS)] == lengths
    assert sorted(lengths)[(STEPS - 1) // 2] == steps[median_step(steps)].step_ns
    for step in steps.values():
        assert all(0 <= work.start_ns <= work.end_ns <= step.step_ns for work in step.computations)
        assert step.transfers[0].start_ns == 0
        # A link that was woken late counts up to 20 ms back.
        assert max(transfer.end_ns for transfer in step.transfers) <= step.step_ns + 20_000_000


async def test_the_trace_is_what_viewers_take(toy):
    run = await run_recorded(toy)
    trace = trace_of(run.joined)
    assert json.loads(json.dumps(trace, allow_nan=False)) == trace
    check_format(trace)
    assert trace == trace_of(join_recordings(run.recordings[::-1]))
    events = trace["traceEvents"]
    assert min(event["ts"] for event in events if event["ph"] != "M") == 0
    categories = Counter(event["cat"] for event in events if event["ph"] == "X")
    crossings = Counter(crossing.kind for crossing in run.joined.crossings)
    assert categories["push"] == 3 * crossings["GRADIENTS"]
    assert categories["pull"] == 3 * crossings["PARAMETERS"]
    assert categories["forward"] == categories["backward"] == 2 * STEPS * len(toy.layers)
    assert categories["step"] == 2 * STEPS
    arrows = Counter(event["ph"] for event in events if event["ph"] in "stf")
    assert arrows["s"] == arrows["f"] == len(run.joined.crossings)
    assert 0 < arrows["t"] <= arrows["s"]
    plans = [event for event in events if event["ph"] == "i"]
    changes = sum(len(session.plans.changes) for session in run.sessions.values())
    assert len(plans) == changes > 0


async def test_nothing_is_recorded_where_nobody_asks(toy, monkeypatch):
    def refuse(*args: object) -> None:
        raise AssertionError("something was recorded")

    monkeypatch.setattr(Recorder, "__init__", refuse)
    monkeypatch.setattr(Recorder, "add", refuse)
    async with ParameterServer(toy.layers, workers=1, steps=2, initial=toy.initial) as server:
        async with Link(LINK, server.address) as link:
            replica = await asyncio.to_thread(toy.work, link.address)
        await server.finished()
    assert replica.session.recorder is None


def ends(segment) -> tuple[int, int]:
    return segment.first, segment.last


def key(crossing) -> tuple[int, str, int]:
    return crossing.slot, crossing.kind, crossing.step


def shift(row: Recording, by_ns: int) -> Recording:
    """The same recording on a machine whose clock differs."""

    def move(event):
        times = {name: getattr(event, name) + by_ns for name in event._fields if name[-3:] == "_ns"}
        return event._replace(**times)

    lists = {
        name: [move(event) for event in getattr(row, name)]
        for name in ("computed", "passed", "carried", "planned", "updated")
    }
    offset = row.clock_offset._replace(offset_ns=row.clock_offset.offset_ns - by_ns)
    return replace(row, host="another", host_name="another", clock_offset=offset, **lists)


def check_format(trace: dict) -> None:
    """What the Trace Event Format asks for, and Perfetto beyond it: no overlap on a thread."""
    named = {"process_name": set(), "thread_name": set()}
    free: dict[tuple[int, int], float] = {}
    open_arrows: dict[int, str] = {}
    spans: dict[tuple[int, int], list[tuple[float, float]]] = {}
    last = 0.0
    for event in trace["traceEvents"]:
        where = (event["pid"], event["tid"])
        assert type(event["pid"]) is type(event["tid"]) is int
        if event["ph"] == "M":
            if event["name"] in named:
                named[event["name"]].add(where)
            continue
        assert type(event["ts"]) in (int, float)
        assert event["ts"] >= last
        last = event["ts"]
        assert (where[0], 0) in named["process_name"]
        assert where in named["thread_name"]
        if event["ph"] == "X":
            assert event["ts"] >= free.get(where, 0)
            assert event["dur"] > 0
            free[where] = event["ts"] + event["dur"]
            spans.setdefault(where, []).append((event["ts"], free[where]))
        elif event["ph"] in "stf":
            begin, end = spans[where][-1]  # an arrow touches the span that lasts
            assert begin <= event["ts"] < end
            before = open_arrows.get(event["id"], "")
            assert (before == "") == (event["ph"] == "s")
            assert before != "f"
            open_arrows[event["id"]] = event["ph"]
        else:
            assert (event["ph"], event["s"]) == ("i", "p")
    assert set(open_arrows.values()) <= {"f"}
