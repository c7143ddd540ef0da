"""Workers that join and leave while training runs; quorums; staleness.

The judge is always the same: a replay in NumPy of the server's log, from what each worker says that
it has contributed. Failures are made by hand: a worker's line is cut where it stands.
"""

from __future__ import annotations

import asyncio
import math
import threading
from itertools import pairwise

import numpy as np
import pytest

from dynacomm_async.errors import ConfigError
from dynacomm_async.optim import SGD, Constant
from dynacomm_async.ranges import Range
from dynacomm_async.schedule import PLANNERS, Plan
from dynacomm_async.server import Mode, ParameterServer
from dynacomm_async.server.store import Training
from dynacomm_async.split import Split
from dynacomm_async.wire.messages import (
    End,
    Have,
    Heartbeat,
    Hello,
    Leave,
    Membership,
    Parameters,
    Resume,
    Skip,
    Subscribe,
    Subscription,
)
from dynacomm_async.worker import FixedPlan

TRAINING = Training(SGD(0.9), Constant(0.05), weight_decay=0.01)
STEPS = 8
BARRIER = [name for name in PLANNERS if name not in ("joint", "priority")]


def one_message(grid, estimator):
    return FixedPlan(Plan.from_cuts("one", len(grid.layers), [], []))


async def until(condition):
    """Give the loop turns until something holds that it will do."""
    while not condition():  # noqa: ASYNC110 -- nothing on this loop's side could set an event
        await asyncio.sleep(0)


class Leaving(Exception):
    """A worker of a test goes."""


class Run:
    """A server, its log, and what its workers have made."""

    def __init__(self, toy, **options):
        options = {"initial": toy.initial, "initial_statistics": toy.initial_statistics} | options
        options = {"steps": STEPS, "training": TRAINING, "absence_s": 0.0} | options
        self.toy, self.log, self.made, self.records = toy, [], {}, []
        self.training = options["training"]
        self.splits = {}  # by slot and step
        options = {"on_applied": self.log.append, "on_step": self.records.append} | options
        self.server = ParameterServer(toy.layers, **options)

    def worker(self, at_step=lambda session, step: None, **options):
        """A worker in a thread; ``at_step`` may raise Leaving."""
        board = {}

        def look(session, step):
            slot = session.welcome.slot
            board["session"] = session
            self.splits[slot, step] = session.board.split_of(step)
            at_step(session, step)

        def work():
            try:
                return self.toy.work(self.server.address, look, self.made, **options)
            except Leaving:
                return None

        return asyncio.create_task(asyncio.to_thread(work))

    def judge(self, result):
        parameters, statistics = self.toy.replay_log(self.log, self.made, self.training)
        assert result.parameters.tobytes() == parameters.tobytes()
        assert result.statistics.tobytes() == statistics.tobytes()
        assert np.isfinite(result.parameters).all()


def leave_at(step, slot=None):
    """Go when a step begins, before anything of it has been pushed."""

    def look(session, now):
        if now == step and slot in (None, session.welcome.slot):
            raise Leaving

    return look


# -- a roster that changes -----------------------------------------------------------------------


async def test_without_a_worker_that_left_the_others_go_on_and_their_mean_is_over_who_is_left(toy):
    run = Run(toy, workers=3, mode=Mode(on_leave="shrink"))
    async with run.server as server:
        workers = [run.worker(leave_at(3, slot=1)) for _ in range(3)]
        result = await server.finished()
        await asyncio.gather(*workers)
    run.judge(result)
    who = [{slots for _, slots in record.contributors} for record in result.records]
    assert who == [{(0, 1, 2)}] * 3 + [{(0, 2)}] * 5
    assert result.losses[4] == (toy.loss(0, 4) + toy.loss(2, 4)) / 2


async def test_a_worker_that_vanishes_in_a_step_leaves_the_cells_it_had_pushed(toy, connect_raw):
    grid = toy.grid
    run = Run(toy, workers=2, mode=Mode(on_leave="shrink"))
    front = Range(0, 2)
    async with run.server as server, connect_raw(server.address) as raw:
        other = run.worker(plans=one_message)
        welcome = await raw.join(grid)
        contribution = toy.contribution(await raw.pull(), welcome.slot, 0)
        run.made[welcome.slot, 0] = contribution
        start, stop = grid.floats(*front)
        raw.push(0, contribution[start:stop], grid, ranges=(front,))
        raw.send(Heartbeat(1, False, 0))
        await raw.read()
        raw.abort()
        result = await server.finished()
        await other
    run.judge(result)
    first = {slots: cells for cells, slots in result.records[0].contributors}
    assert first[0, 1] == front
    assert sum(cells.count for cells, slots in result.records[0].contributors) == grid.n_cells
    assert result.records[1].contributors == ((Range(0, grid.n_cells), (1 - welcome.slot,)),)


@pytest.mark.parametrize("strategy", ["joint", "dynacomm"])
async def test_a_newcomer_takes_part_from_the_next_step_and_the_data_are_divided_anew(
    toy, strategy
):
    loop, joined, go = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    run = Run(toy, workers=3, steps=12, blocks=10, mode=Mode(on_leave="shrink"))

    def stay(session, step):
        if session.welcome.slot == 0 and step == 5:
            loop.call_soon_threadsafe(joined.set)  # not yet: it is let in now
            assert go.wait(20)

    def go_at_2(session, step):
        leave_at(2, slot=1)(session, step)
        stay(session, step)

    async with run.server as server:
        workers = [run.worker(go_at_2, strategy=strategy) for _ in range(3)]
        await joined.wait()
        late = run.worker(strategy=strategy)
        await until(lambda: len(server.members) == 3)
        go.set()
        result = await server.finished()
        replicas = await asyncio.gather(*workers, late)
    run.judge(result)
    who = [max(slots for _, slots in record.contributors) for record in result.records]
    assert who[:2] == [(0, 1, 2)] * 2
    assert who[2:6] == [(0, 2)] * 4
    assert who[-1] == (0, 1, 2)
    first = who.index((0, 1, 2), 5)
    assert first in (6, 7)
    for replica in replicas:
        if replica is not None:
            assert replica.parameters.tobytes() == result.parameters.tobytes()
    # Everybody knows the same split of a step, and it is the one that follows from the members.
    split, expected = Split(10, (0, 1, 2)), {}
    for step in range(12):
        # One that leaves in a step has had its share of it.
        members = (0, 1, 2) if step <= 2 or step >= first else (0, 2)
        if members != split.members:
            split = split.anew(step, members)
        expected[step] = split
    assert {step for _, step in run.splits} == set(range(12))
    for (_, step), known in run.splits.items():
        assert known == expected[step]


async def test_training_waits_when_nobody_is_left_and_goes_on_with_whoever_comes(toy):
    run = Run(toy, workers=2, mode=Mode(on_leave="shrink"))
    async with run.server as server:
        workers = [run.worker(leave_at(3)) for _ in range(2)]
        await asyncio.gather(*workers)
        late = run.worker()
        result = await server.finished()
        replica = await late
    run.judge(result)
    assert result.parameters.tobytes() == replica.parameters.tobytes()
    assert [len(record.contributors[0][1]) for record in result.records] == [2] * 3 + [1] * 5


async def test_a_place_that_is_kept_can_be_taken_by_a_newcomer_who_computes_the_step_anew(toy):
    run = Run(toy, workers=2, mode=Mode(on_leave="wait"), absence_s=60.0)
    async with run.server as server:
        workers = [run.worker(leave_at(3, slot=1), strategy="dynacomm") for _ in range(2)]
        late = None
        done, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_COMPLETED)
        assert done.pop().result() is None
        late = run.worker(strategy="dynacomm")
        result = await server.finished()
        await asyncio.gather(*workers, late)
    expected, _ = toy.replay(2, STEPS, TRAINING)
    assert result.parameters.tobytes() == expected.tobytes(), "as if nobody had gone"
    run.judge(result)


async def test_a_place_that_nobody_takes_is_given_up_after_the_absence(toy):
    run = Run(toy, workers=2, mode=Mode(on_leave="wait"), absence_s=0.3)
    async with run.server as server:
        workers = [run.worker(leave_at(3, slot=1), strategy="layerwise") for _ in range(2)]
        result = await server.finished()
        await asyncio.gather(*workers)
    run.judge(result)
    assert [record.contributors[0][1] for record in result.records] == [(0, 1)] * 3 + [(0,)] * 5


async def test_a_full_roster_trains_to_the_same_bits_in_every_synchronous_mode(toy):
    expected, _ = toy.replay(2, STEPS, TRAINING)
    for mode in (Mode(on_leave="shrink"), Mode(on_leave="wait"), Mode(quorum=2)):
        strategies = PLANNERS if mode.may_cross else BARRIER
        for strategy in strategies:
            run = Run(toy, workers=2, mode=mode)
            async with run.server as server:
                workers = [run.worker(strategy=strategy) for _ in range(2)]
                result = await server.finished()
                await asyncio.gather(*workers)
            assert result.parameters.tobytes() == expected.tobytes(), (mode, strategy)


# -- quorums -------------------------------------------------------------------------------------


async def test_a_quorum_goes_on_without_the_slow_which_skips_to_where_training_is(toy):
    """Rank 2 computes steps 0 and 1, if it is in time for them, then sleeps through some."""
    loop, slept, wake = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    run = Run(toy, workers=3, mode=Mode(quorum=2), steps=10)

    def sleepy(session, step):
        if session.welcome.slot == 2 and step == 2 and not wake.is_set():
            loop.call_soon_threadsafe(slept.set)
            asleep.set()
            assert wake.wait(20)
        if session.welcome.slot != 2 and step == 2:
            assert asleep.wait(20)  # or they might have made this step without it too
        if session.welcome.slot != 2 and step == 8:
            assert late.wait(20)

    late, asleep = threading.Event(), threading.Event()
    seen = []

    def look(session, step):
        if session.welcome.slot == 2:
            seen.append(step)
            if step > 2:
                late.set()
        sleepy(session, step)

    async with run.server as server:
        workers = [run.worker(look, strategy="dynacomm") for _ in range(3)]
        await slept.wait()
        await until(lambda: len(run.records) >= 7)
        wake.set()
        result = await server.finished()
        replicas = await asyncio.gather(*workers)
    run.judge(result)
    assert all(len(record.contributors[0][1]) == 2 for record in result.records)
    assert all(record.contributors[0][1] == (0, 1) for record in result.records[2:7])
    assert seen[0] <= 2
    jump = next(after for before, after in pairwise(seen) if before == 2)
    assert jump > 3, "what had been made without it was skipped"
    for replica in replicas:
        assert replica.parameters.tobytes() == result.parameters.tobytes()


async def test_one_told_to_skip_by_hand_subscribes_anew_and_its_late_gradients_are_dropped(
    toy, connect_raw
):
    grid = toy.grid
    run = Run(toy, workers=3, mode=Mode(quorum=2), steps=3)
    async with run.server as server, connect_raw(server.address) as raw:
        others = [run.worker(strategy="dynacomm") for _ in range(2)]
        welcome = await raw.join(grid)
        await raw.pull()
        skips, version = [], 0
        while version < 3:
            message, _ = await raw.read()
            if isinstance(message, Skip):
                assert (message.code, message.step) == ("quorum", version)
                skips.append(message.step)
                version += 1
                everything = ((Range(0, grid.n_parameter_cells),),)
                raw.send(Subscribe(Subscription(version, everything)))
            else:
                assert isinstance(message, Parameters)
                assert message.version == version
        late = np.full(grid.n_floats, np.nan, np.float32)  # would be noticed
        raw.push(2, late, grid)
        while not isinstance(message, End):
            message, payload = await raw.read()
            if isinstance(message, Parameters):
                final = payload
        raw.send(Leave())
        result = await server.finished()
        await asyncio.gather(*others)
    run.judge(result)
    assert skips == [0, 1, 2]
    assert final == result.parameters.tobytes()
    assert welcome.slot not in {slot for applied in run.log for slot in applied.slots}


async def test_one_that_was_away_while_a_quorum_went_on_comes_back_to_where_training_is(
    toy, connect_raw
):
    grid = toy.grid
    run = Run(toy, workers=3, mode=Mode(quorum=2), steps=5, absence_s=30.0)
    go = threading.Event()

    def hold(session, step):
        if step == 4:
            assert go.wait(20)

    async with run.server as server:
        others = [run.worker(hold, strategy="dynacomm") for _ in range(2)]
        async with connect_raw(server.address) as raw:
            welcome = await raw.join(grid)
            await raw.pull()
        await until(lambda: len(run.records) >= 4)
        async with connect_raw(server.address) as raw:
            member = Membership(welcome.slot, welcome.term, 1, welcome.incarnation)
            raw.send(Hello(run=welcome.run, member=member))
            back, _ = await raw.read()
            assert back.resumed
            everything = ((Range(0, grid.n_parameter_cells),),)
            raw.send(Resume(Subscription(0, everything)))
            have, _ = await raw.read()
            assert have == Have(0, (Range(0, grid.n_cells),))
            skip, _ = await raw.read()
            assert isinstance(skip, Skip)
            assert skip.step == 3
            raw.send(Subscribe(Subscription(4, everything)))
            message, _ = await raw.read()
            assert isinstance(message, Parameters)
            assert message.version == 4
            raw.send(Leave())
            await raw.read_to_end()
        go.set()
        result = await server.finished()
        await asyncio.gather(*others)
    run.judge(result)


# -- staleness -----------------------------------------------------------------------------------


def leads(log, n_cells):
    """How far ahead of the slowest each update's worker was: steps that it had finished more."""
    done = dict.fromkeys(range(3), 0)
    for step, cells, (slot,), _ in log:
        yield step - min(done.values()) // n_cells
        done[slot] += cells.count


@pytest.mark.parametrize("bound", [0, 1, 3, math.inf])
@pytest.mark.parametrize("strategy", ["joint", "layerwise"])
async def test_stale_contributions_are_applied_once_each_and_the_bound_is_kept(
    toy, bound, strategy
):
    if bound == 0 and strategy == "joint":
        strategy = "dynacomm"
    far = threading.Event()

    def applied(update):
        run.log.append(update)
        if update.step >= min(2 + bound, 13):
            far.set()

    def look(session, step):
        if session.welcome.slot == 1 and step == 2:
            assert far.wait(20)  # until somebody is as far ahead as the bound allows

    run = Run(toy, workers=3, mode=Mode(staleness=bound), steps=20, on_applied=applied)
    async with run.server as server:
        workers = [run.worker(look, strategy=strategy) for _ in range(3)]
        result = await server.finished()
        replicas = await asyncio.gather(*workers)
    run.judge(result)
    keys = [
        (slot, step, cell)
        for step, cells, slots, _ in run.log
        for slot in slots
        for cell in range(cells.first, cells.first + cells.count)
    ]
    everything = {
        (slot, step, cell)
        for slot in range(3)
        for step in range(20)
        for cell in range(toy.grid.n_cells)
    }
    assert len(keys) == len(everything)
    assert set(keys) == everything
    furthest = max(leads(run.log, toy.grid.n_cells))
    assert furthest == bound if bound < math.inf else furthest > 10
    for replica in replicas:
        assert replica.parameters.tobytes() == result.parameters.tobytes()
    assert [record.index for record in result.records] == list(range(20))
    assert result.losses[5] == sum(toy.loss(slot, 5) for slot in range(3)) / 3


async def test_who_leaves_under_staleness_holds_nobody_up_and_a_newcomer_begins_with_the_slowest(
    toy,
):
    run = Run(toy, workers=3, mode=Mode(staleness=2), steps=16)
    begun = []

    def look(session, step):
        begun.append((session.welcome.slot, step))

    def go(session, step):
        leave_at(4, slot=2)(session, step)
        if step == 9 and session.welcome.slot != 2:
            assert arrived.wait(20)

    arrived = threading.Event()

    def late_look(session, step):
        arrived.set()
        look(session, step)

    async with run.server as server:
        workers = [run.worker(go) for _ in range(3)]
        await until(lambda: any(record.index == 5 for record in run.records))
        late = run.worker(late_look)
        result = await server.finished()
        await asyncio.gather(*workers, late)
    run.judge(result)
    slot, first = begun[0]
    assert slot == 2
    assert 5 <= first <= 10
    assert begun == [(2, step) for step in range(first, 16)]


# -- what does not go together -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "strategy"),
    [(Mode(quorum=2), "joint"), (Mode(on_leave="wait"), "priority"), (Mode(staleness=0), "joint")],
)
def test_a_strategy_that_does_not_hold_is_refused_by_name(toy, mode, strategy):
    with pytest.raises(ConfigError, match=f"{strategy} sends parameters before a step is over"):
        Run(toy, workers=2, mode=mode, settings={"strategy": strategy})


def test_a_quorum_that_cannot_be_reached_is_refused(toy):
    with pytest.raises(ConfigError, match="a quorum of 3 among 2 workers"):
        Run(toy, workers=2, mode=Mode(quorum=3))


async def test_workers_keep_a_barrier_by_themselves_where_the_mode_needs_one(toy):
    run = Run(toy, workers=1, mode=Mode(quorum=1), steps=2)
    async with run.server as server:
        replica = await run.worker()
        await server.finished()
    assert replica.session.settings["strategy"] == "dynacomm"
