"""What comes at an awkward moment while the roster changes: workers by hand, one case each."""

from __future__ import annotations

import asyncio
import math
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest

from dynacomm_async.errors import PeerError
from dynacomm_async.optim import SGD, Constant
from dynacomm_async.ranges import Range
from dynacomm_async.server import Checkpoints, Mode, ParameterServer
from dynacomm_async.server.saving import Saving
from dynacomm_async.server.store import Training
from dynacomm_async.wire.grid import LayerSpec
from dynacomm_async.wire.messages import (
    End,
    Error,
    Have,
    Hello,
    Join,
    Leave,
    Membership,
    Parameters,
    Resume,
    Skip,
    Subscription,
    Welcome,
)

TRAINING = Training(SGD(0.9), Constant(0.05), weight_decay=0.01)
CELL = 4096
FRONT = Range(0, 1)
MEBIBYTE = 1 << 18  # floats: so much is updated before others have a turn


def serve(toy, **options):
    options = {"initial": toy.initial, "initial_statistics": toy.initial_statistics} | options
    return ParameterServer(toy.layers, **{"training": TRAINING, "absence_s": 0.0} | options)


def zeros(grid):
    return np.zeros(grid.n_floats, np.float32)


def whole(version, grid):
    return Subscription(version, ((Range(0, grid.n_parameter_cells),),))


async def until(condition):
    while not condition():  # noqa: ASYNC110 -- nothing on this loop's side could set an event
        await asyncio.sleep(0)


async def read_until(worker, kind):
    while True:
        message, payload = await worker.read()
        if isinstance(message, kind):
            return message, payload


async def greet(worker, **said):
    """Say hello; return the answer, a welcome or an error."""
    worker.send(Hello(**said))
    return (await worker.read())[0]


def membership(welcome, connection=1):
    return Membership(welcome.slot, welcome.term, connection, welcome.incarnation)


async def leave(worker):
    worker.send(Leave())
    await worker.read_to_end()


async def take_part(worker, grid, first=None):
    """Push nothing but zeros, step by step, to the end; return the first step.

    Args:
        first: of which the parameters have been read already.
    """
    if first is not None:
        worker.push(first, zeros(grid), grid)
    while True:
        message, _ = await read_until(worker, Parameters | End)
        if isinstance(message, End):
            await leave(worker)
            return first
        if first is None:
            first = message.version
        if message.version < worker.welcome.steps:
            worker.push(message.version, zeros(grid), grid)


async def begin(grid, *workers):
    """Join with all of them and read the first parameters."""
    for worker in workers:
        await worker.join(grid)
    for worker in workers:
        await worker.pull()


# -- the last step -------------------------------------------------------------------------------


async def test_a_newcomer_in_the_last_step_hears_that_the_run_is_over_and_does_not_hold_it_up(
    toy, connect_raw
):
    grid, log = toy.grid, []
    options = {"workers": 2, "steps": 1, "mode": Mode(on_leave="shrink")}
    async with (
        serve(toy, **options, on_applied=log.append) as server,
        connect_raw(server.address) as one,
        connect_raw(server.address) as other,
        connect_raw(server.address) as late,
    ):
        await begin(grid, one, other)
        await leave(other)
        one.push(0, zeros(grid)[:CELL], grid, ranges=(FRONT,))
        await until(lambda: log)  # nobody else can take part in the step any more
        await late.join(grid)
        await until(lambda: len(server.members) == 2)
        rest = (Range(1, grid.n_cells - 1),)
        one.push(0, zeros(grid)[CELL:], grid, ranges=rest, subscription=None)
        await read_until(one, End)
        await leave(one)
        message, _ = await read_until(late, Error)
        assert message.code == "run-over"
        await late.close()
        assert (await server.finished()).steps == 1


@pytest.mark.parametrize("cells", ["all", "a part"])
async def test_a_run_ends_when_whoever_is_last_leaves_in_the_last_step(toy, connect_raw, cells):
    grid = toy.grid
    async with (
        serve(toy, workers=1, steps=1, mode=Mode(on_leave="shrink"), absence_s=30.0) as server,
        connect_raw(server.address) as worker,
    ):
        await begin(grid, worker)
        if cells == "all":
            worker.push(0, zeros(grid), grid)
        else:
            worker.push(0, zeros(grid)[:CELL], grid, ranges=(FRONT,))
        await leave(worker)
        assert (await server.finished()).steps == 1


async def test_the_end_carries_parameters_that_whoever_has_left_has_still_changed(connect_raw, toy):
    toy = type(toy)(layers=(LayerSpec("big", 6 * MEBIBYTE),))
    grid, ones = toy.grid, np.ones(6 * MEBIBYTE, np.float32)
    log = []
    options = {"workers": 2, "steps": 1, "mode": Mode(staleness=math.inf)}
    async with (
        serve(toy, **options, on_applied=log.append) as server,
        connect_raw(server.address) as one,
        connect_raw(server.address) as other,
    ):
        await begin(grid, one, other)
        one.push(0, ones, grid)
        await until(lambda: sum(applied.cells.count for applied in log) == grid.n_cells)
        other.push(0, ones, grid)
        other.send(Leave())
        _, payload = await read_until(one, Parameters)
        await read_until(one, End)
        await leave(one)
        result = await server.finished()
    assert sum(applied.cells.count for applied in log) == 2 * grid.n_cells
    assert payload == result.parameters.tobytes()


# -- a stranger's hello --------------------------------------------------------------------------


@asynccontextmanager
async def a_stranger_greeted_while_one_is_away(toy, connect_raw):
    """Yield the server, who has stayed, who is away, the stranger, its welcome, and a connection
    for who comes back."""
    async with (
        serve(toy, workers=2, steps=2, absence_s=60.0) as server,
        connect_raw(server.address) as other,
        connect_raw(server.address) as stranger,
        connect_raw(server.address) as back,
    ):
        async with connect_raw(server.address) as away:
            await begin(toy.grid, away, other)
        await until(lambda: len(server.members) == 1)
        yield server, other, away, stranger, await greet(stranger), back


@pytest.mark.parametrize("how", ["leaves", "is cut off"])
async def test_a_stranger_that_goes_before_it_joins_evicts_nobody_who_is_away(
    toy, connect_raw, how
):
    async with a_stranger_greeted_while_one_is_away(toy, connect_raw) as scene:
        _, _, away, stranger, welcome, back = scene
        assert welcome.slot == away.welcome.slot  # it could have the step done anew
        assert welcome.term > away.welcome.term
        if how == "leaves":
            await leave(stranger)
        else:
            await stranger.close()
        again = await greet(back, run=welcome.run, member=membership(away.welcome))
        assert isinstance(again, Welcome), again
        assert (again.slot, again.term) == (away.welcome.slot, away.welcome.term)
        assert again.resumed


async def test_a_newcomer_is_refused_where_whom_it_was_to_replace_has_come_back(toy, connect_raw):
    grid = toy.grid
    async with a_stranger_greeted_while_one_is_away(toy, connect_raw) as scene:
        server, other, away, stranger, welcome, back = scene
        await greet(back, run=welcome.run, member=membership(away.welcome))
        back.welcome = away.welcome
        back.send(Resume(whole(0, grid), ()))
        assert isinstance((await back.read())[0], Have)
        stranger.send(Join(grid.fingerprint, whole(0, grid)))
        error, _ = await read_until(stranger, Error)
        assert error.code == "run-full"
        assert "has come back" in error.text
        await stranger.close()
        await asyncio.gather(take_part(back, grid), take_part(other, grid, 0))
        assert (await server.finished()).steps == 2


async def test_a_newcomer_that_joins_too_late_to_do_a_step_anew_leaves_the_place_to_its_member(
    toy, connect_raw
):
    grid, log = toy.grid, []
    async with (
        serve(toy, workers=2, steps=2, absence_s=60.0, on_applied=log.append) as server,
        connect_raw(server.address) as other,
        connect_raw(server.address) as late,
        connect_raw(server.address) as back,
    ):
        async with connect_raw(server.address) as away:
            await begin(grid, away, other)
            away.push(0, zeros(grid)[:CELL], grid, ranges=(FRONT,))
            away.hang_up()
            await away.read_to_end()
        await until(lambda: len(server.members) == 1)
        welcome = await greet(late)
        other.push(0, zeros(grid), grid)
        await until(lambda: log)
        late.send(Join(grid.fingerprint, whole(0, grid)))
        error, _ = await read_until(late, Error)
        assert error.code == "run-full"
        again = await greet(back, run=welcome.run, member=membership(away.welcome))
        assert isinstance(again, Welcome), again
        assert again.term == away.welcome.term


async def test_a_membership_of_an_earlier_life_without_a_trace_takes_nobodys_place(
    toy, connect_raw
):
    grid = toy.grid
    async with (
        serve(toy, workers=2, steps=1, run="same") as server,
        connect_raw(server.address) as worker,
    ):
        old = await worker.join(grid)
    async with (
        serve(toy, workers=2, steps=1, run="same", absence_s=30.0) as server,
        connect_raw(server.address) as present,
        connect_raw(server.address) as late,
        connect_raw(server.address) as other,
    ):
        new = await present.join(grid)
        assert new.slot == old.slot
        assert new.term != old.term
        refusal = await greet(late, run="same", member=membership(old))
        assert isinstance(refusal, Error), refusal
        assert refusal.code == "term-outdated"
        await other.join(grid)
        await present.pull()  # its line is as it was


@pytest.mark.parametrize("who", [(), (0,)], ids=["nobody", "one of two"])
async def test_a_run_that_was_over_for_some_goes_on_for_more_steps_with_everybody(
    toy, connect_raw, tmp_path, who
):
    """Its last checkpoint may have been made when some, or all, had left already."""
    grid, checkpoints = toy.grid, Checkpoints(tmp_path)
    options = {"workers": 2, "checkpoints": checkpoints, "absence_s": 60.0}
    async with (
        serve(toy, steps=1, **options) as server,
        connect_raw(server.address) as one,
        connect_raw(server.address) as other,
    ):
        await begin(grid, one, other)
        for worker in (one, other):
            worker.push(0, zeros(grid), grid)
        for worker in (one, other):
            await read_until(worker, End)
            await leave(worker)
        await server.finished()
    state = checkpoints.load()
    checkpoints.save(replace(state, roster=dict.fromkeys(who, 1)))
    async with (
        serve(toy, steps=2, resume=True, **options) as server,
        connect_raw(server.address) as newcomer,
    ):
        answer = await greet(newcomer)
        assert isinstance(answer, Error), answer  # nobody may take the step on alone
        assert answer.code == "place-kept"
    checkpoints.close()


# -- contributions that were there ---------------------------------------------------------------


async def test_a_step_of_which_a_member_has_cells_from_before_its_return_is_not_undone(
    toy, connect_raw, tmp_path
):
    grid = toy.grid
    poison = np.full(grid.n_floats, np.nan, np.float32)
    checkpoints = Checkpoints(tmp_path)
    apart = Subscription(1, ((FRONT,), (Range(1, grid.n_parameter_cells - 1),)))
    options = {"absence_s": 30.0, "checkpoints": checkpoints, "checkpoint_every": 100}
    async with serve(toy, workers=1, steps=1, **options) as server:
        async with connect_raw(server.address) as worker:
            await begin(grid, worker)
            ones = np.ones(CELL, np.float32)
            worker.push(0, ones, grid, ranges=(FRONT,), subscription=apart)
            message, payload = await worker.read()
            assert (message.version, message.ranges) == (1, (FRONT,))
        async with connect_raw(server.address) as back:
            welcome = worker.welcome
            await greet(back, run=welcome.run, member=membership(welcome))
            back.send(Resume(apart, (FRONT,)))
            message, _ = await back.read()
            assert message == Have(0, (FRONT,))
            rest = (Range(1, grid.n_cells - 1),)
            back.push(0, poison[CELL:], grid, ranges=rest, subscription=None)
            message, _ = await back.read()
            assert isinstance(message, Skip)
            await read_until(back, End)
            await leave(back)
            result = await server.finished()
    checkpoints.close()
    assert result.parameters[:CELL].tobytes() == payload
    assert not np.array_equal(result.parameters[:CELL], toy.initial[:CELL])
    assert np.array_equal(result.parameters[CELL:], toy.initial[CELL:])


async def test_an_update_that_diverges_when_a_newcomer_has_its_makers_place_ends_the_run(
    toy, connect_raw
):
    toy = type(toy)(layers=(LayerSpec("big", 16 * MEBIBYTE),))
    grid, huge = toy.grid, np.zeros(16 * MEBIBYTE, np.float32)
    huge[-1] = 1e20  # the last that is applied
    training = Training(SGD(), Constant(1e38), max_gradient=1e30)
    options = {"steps": 5, "mode": Mode(staleness=math.inf), "training": training}
    async with (
        serve(toy, workers=2, **options) as server,
        connect_raw(server.address) as one,
        connect_raw(server.address) as other,
        connect_raw(server.address) as late,
    ):
        await begin(grid, one, other)
        one.push(0, huge, grid)
        one.send(Leave())
        await until(lambda: server.members == [other.welcome.slot])
        welcome = await greet(late)
        assert welcome.slot == one.welcome.slot
        late.send(Join(grid.fingerprint, whole(0, grid)))
        for worker in (late, other):
            error, _ = await read_until(worker, Parameters | Error)
            assert isinstance(error, Error), error
            assert "not finite" in error.text
            await worker.close()
        with pytest.raises(PeerError, match="not finite"):
            await server.finished()


async def test_refusals_that_are_steps_apart_are_one_workers_fault_and_training_goes_on(
    toy, connect_raw
):
    grid = toy.grid
    poison = np.full(grid.n_floats, np.nan, np.float32)
    bad = {(0, 1), (1, 4), (0, 7)}

    async def work(worker, step=0):
        while True:
            is_bad = (worker.welcome.slot, step) in bad
            worker.push(step, poison if is_bad else zeros(grid), grid)
            message, _ = await read_until(worker, Parameters | End | Error)
            if not isinstance(message, Parameters):
                return message
            step = message.version

    async with (
        serve(toy, workers=2, steps=9, refusals=2, mode=Mode(on_leave="shrink")) as server,
        connect_raw(server.address) as one,
        connect_raw(server.address) as other,
    ):
        await begin(grid, one, other)
        first, second = await asyncio.gather(work(one), work(other))
        assert first.code == "quarantined"
        assert isinstance(second, End)
        await leave(other)
        await one.close()
        assert (await server.finished()).steps == 9


# -- newcomers -----------------------------------------------------------------------------------


async def test_a_newcomer_gets_the_free_place_that_is_furthest_behind_so_that_the_run_ends(
    toy, connect_raw
):
    grid, log = toy.grid, []
    async with serve(
        toy, workers=2, steps=4, mode=Mode(staleness=math.inf), on_applied=log.append
    ) as server:
        async with connect_raw(server.address) as fast, connect_raw(server.address) as slow:
            await begin(grid, fast, slow)
            for step in range(4):
                fast.push(step, zeros(grid), grid)
                if step < 3:
                    await fast.pull()
            slow.push(0, zeros(grid), grid)
            await slow.pull()
            await until(lambda: sum(applied.cells.count for applied in log) == 5 * grid.n_cells)
            fast.abort()
            await until(lambda: server.members == [slow.welcome.slot])
            slow.abort()
            await until(lambda: server.members == [])
        async with connect_raw(server.address) as late:
            welcome = await late.join(grid)
            assert welcome.slot == slow.welcome.slot
            assert await take_part(late, grid) == 1
        assert (await server.finished()).steps == 4


async def test_a_newcomer_cut_off_before_its_first_parameters_joins_again_in_its_place(
    toy, connect_raw
):
    grid = toy.grid
    async with (
        serve(toy, workers=2, steps=3, absence_s=60.0) as server,
        connect_raw(server.address) as other,
        connect_raw(server.address) as back,
    ):
        async with connect_raw(server.address) as gone:
            await begin(grid, gone, other)
            gone.push(0, zeros(grid), grid)
            gone.hang_up()
            await gone.read_to_end()
        await until(lambda: len(server.members) == 1)
        async with connect_raw(server.address) as late:
            welcome = await late.join(grid)
            assert (welcome.slot, welcome.version) == (gone.welcome.slot, 0)
            await until(lambda: len(server.members) == 2)
            other.push(0, zeros(grid), grid)
            await other.pull()  # version 1, with which the newcomer has begun
        await until(lambda: len(server.members) == 1)
        again = await greet(back, run=welcome.run, member=membership(welcome))
        assert (again.slot, again.term, again.version) == (welcome.slot, welcome.term, 1)
        back.welcome = again
        back.send(Join(grid.fingerprint, whole(again.version, grid)))
        first, _ = await asyncio.gather(take_part(back, grid), take_part(other, grid, 1))
        assert first == 1
        assert (await server.finished()).steps == 3


async def test_a_newcomer_in_the_place_of_one_who_was_away_comes_back_to_it_like_any_member(
    toy, connect_raw
):
    grid, log = toy.grid, []
    async with (
        serve(toy, workers=2, steps=1, absence_s=60.0, on_applied=log.append) as server,
        connect_raw(server.address) as other,
        connect_raw(server.address) as back,
    ):
        async with connect_raw(server.address) as away:
            await begin(grid, away, other)
        await until(lambda: len(server.members) == 1)
        other.push(0, zeros(grid), grid)
        async with connect_raw(server.address) as heir:
            welcome = await heir.join(grid)
            await heir.pull()
            heir.push(0, zeros(grid)[:CELL], grid, ranges=(FRONT,))
            await until(lambda: log)  # nobody else can compute the step any more
        await until(lambda: len(server.members) == 1)
        again = await greet(back, run=welcome.run, member=membership(welcome))
        assert isinstance(again, Welcome), again
        assert (again.term, again.resumed) == (welcome.term, True)
        back.send(Resume(whole(1, grid), ()))
        assert (await back.read())[0] == Have(0, (FRONT,))
        rest = (Range(1, grid.n_cells - 1),)
        back.push(0, zeros(grid)[CELL:], grid, ranges=rest, subscription=None)
        for worker in (back, other):
            await read_until(worker, End)
            await leave(worker)
        assert (await server.finished()).steps == 1


@pytest.mark.parametrize("joins", ["before", "after"])
async def test_a_place_that_is_given_out_anew_while_the_first_checkpoint_is_written_is_no_hole(
    toy, connect_raw, tmp_path, monkeypatch, joins
):
    grid, checkpoints = toy.grid, Checkpoints(tmp_path)
    writing, written = asyncio.Event(), asyncio.Event()
    save_first = Saving.save_first

    async def save_slowly(saving, make):
        await save_first(saving, make)
        writing.set()
        await written.wait()

    monkeypatch.setattr(Saving, "save_first", save_slowly)
    options = {"steps": 4, "mode": Mode(on_leave="shrink"), "checkpoints": checkpoints}
    async with (
        serve(toy, workers=2, **options) as server,
        connect_raw(server.address) as one,
        connect_raw(server.address) as other,
        connect_raw(server.address) as late,
    ):
        await one.join(grid)
        await other.join(grid)
        await writing.wait()
        await leave(other)
        late.welcome = await greet(late)
        assert late.welcome.slot == other.welcome.slot
        if joins == "after":
            written.set()
            await one.pull()
        late.send(Join(grid.fingerprint, whole(0, grid)))
        await until(lambda: len(server.members) == 2)
        written.set()
        first = 0 if joins == "after" else None
        await asyncio.gather(take_part(one, grid, first), take_part(late, grid))
        result = await server.finished()
    checkpoints.close()
    cells = Range(0, grid.n_cells)
    assert result.records[-1].contributors == ((cells, (0, 1)),)


async def test_what_the_owners_on_step_raises_when_somebody_leaves_ends_the_run(toy, connect_raw):
    grid, log = toy.grid, []

    def on_step(record):
        raise KeyError("the owner's")

    options = {"steps": 4, "mode": Mode(staleness=1), "on_step": on_step}
    async with (
        serve(toy, workers=2, **options, on_applied=log.append) as server,
        connect_raw(server.address) as fast,
        connect_raw(server.address) as slow,
    ):
        await begin(grid, fast, slow)
        fast.push(0, zeros(grid), grid)
        await fast.pull()
        fast.push(1, zeros(grid), grid)
        await until(lambda: sum(applied.cells.count for applied in log) == 2 * grid.n_cells)
        await leave(slow)  # so the lowest clock is 2
        error, _ = await read_until(fast, Error)
        assert error.code == "server-failed"
        await fast.close()
        with pytest.raises(PeerError, match="the owner's"):
            await server.finished()
