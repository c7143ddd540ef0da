"""Members that fall silent, come back, come back too late, or never do."""

from __future__ import annotations

import ast
import asyncio
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import dynacomm_async
from dynacomm_async.errors import ChannelBroken, PeerError
from dynacomm_async.link import Link, LinkSettings
from dynacomm_async.optim import SGD, Constant
from dynacomm_async.ranges import Range
from dynacomm_async.server.server import ParameterServer
from dynacomm_async.server.store import Training
from dynacomm_async.wire.codec import encode
from dynacomm_async.wire.grid import Grid, LayerSpec
from dynacomm_async.wire.messages import (
    PROTOCOL_VERSION,
    Error,
    Gradients,
    Have,
    Heartbeat,
    Hello,
    Join,
    Leave,
    Membership,
    Parameters,
    Resume,
    Subscription,
    Welcome,
)
from dynacomm_async.worker.session import Session

pytestmark = pytest.mark.timing

TRAINING = Training(SGD(0.9), Constant(0.05), weight_decay=0.01)
STEPS = 4
LIMIT_S = 0.6


def serve(toy, *, workers=1, **options):
    options = {"initial": toy.initial, "initial_statistics": toy.initial_statistics} | options
    options = {"layers": toy.layers, "training": TRAINING, "run": "the-run"} | options
    return ParameterServer(workers=workers, steps=STEPS, **options)


def whole(version, grid):
    return Subscription(version, ((Range(0, grid.n_parameter_cells),),))


def membership(welcome, connection):
    return Membership(welcome.slot, welcome.term, connection, welcome.incarnation)


async def come_back(raw, welcome, connection):
    raw.send(Hello(run=welcome.run, member=membership(welcome, connection)))
    message, _ = await raw.read()
    return message


# -- by hand: what is sent again, and what is not ------------------------------------------------


async def test_only_what_is_missing_is_asked_for_and_sent_again(toy, connect_raw):
    grid = toy.grid
    front, back = Range(0, 2), Range(2, grid.n_cells - 2)
    async with serve(toy) as server:
        async with connect_raw(server.address) as raw:
            welcome = await raw.join(grid)
            contribution = toy.contribution(await raw.pull(), 0, 0)
            start, stop = grid.floats(*front)
            raw.push(0, contribution[start:stop], grid, ranges=(front,))
            raw.send(Heartbeat(1, False, 0))  # answered behind the push
            await raw.read()
        for connection in (1, 2):  # the second break comes before anything has been sent
            async with connect_raw(server.address) as raw:
                again = await come_back(raw, welcome, connection)
                assert (again.resumed, again.term) == (True, welcome.term)
                raw.send(Resume(whole(1, grid)))
                message, _ = await raw.read()
                assert message == Have(0, (front,))
        async with connect_raw(server.address) as raw:
            await come_back(raw, welcome, 3)
            raw.send(Resume(whole(1, grid)))
            await raw.read()
            payload = contribution[stop:].tobytes()
            raw.send(Gradients(0, (back,)), payload)
            assert len(await raw.pull()) == grid.n_parameters
        async with connect_raw(server.address) as raw:
            await come_back(raw, welcome, 4)
            raw.send(Resume(whole(1, grid), (Range(0, 3), Range(4, grid.n_parameter_cells - 4))))
            assert (await raw.read())[0] == Have(1)
            message, payload = await raw.read()
            assert isinstance(message, Parameters)
            assert message.ranges == (Range(3, 1),)
            expected, _ = one_step(toy)
            start, stop = grid.floats(3, 1)
            assert payload == expected[start:stop].tobytes()


def one_step(toy):
    return toy.replay(1, 1, TRAINING)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"term": 10**6}, "term-outdated"),
        ({"slot": 7}, "term-outdated"),
        ({"connection": 0}, "connection-outdated"),
    ],
)
async def test_the_past_is_refused_by_name(toy, connect_raw, change, code):
    async with serve(toy) as server, connect_raw(server.address) as first:
        welcome = await first.join(toy.grid)
        await first.pull()
        async with connect_raw(server.address) as late:
            late.send(Hello(member=membership(welcome, 1)._replace(**change)))
            message, _ = await late.read()
            assert isinstance(message, Error)
            assert message.code == code
        first.send(Heartbeat(1, False, 0))  # and nobody was disturbed
        assert isinstance((await first.read())[0], Heartbeat)


async def test_a_newer_connection_of_a_member_ends_the_older_one(toy, connect_raw):
    async with serve(toy) as server, connect_raw(server.address) as old:
        welcome = await old.join(toy.grid)
        await old.pull()
        async with connect_raw(server.address) as new:
            assert (await come_back(new, welcome, 1)).resumed
            await old.read_to_end()
            new.send(Resume(whole(0, toy.grid)))
            assert (await new.read())[0] == Have(0)
            assert len(await new.pull()) == toy.grid.n_parameters


async def test_a_member_that_comes_back_to_a_version_that_cannot_be_is_not_trusted(
    toy, connect_raw
):
    async with serve(toy) as server:
        async with connect_raw(server.address) as raw:
            welcome = await raw.join(toy.grid)
            await raw.pull()
        async with connect_raw(server.address) as raw:
            await come_back(raw, welcome, 1)
            raw.send(Resume(whole(5, toy.grid)))
            await raw.read_to_end()
        with pytest.raises(PeerError, match="comes back to version 5, expected 0 or 1"):
            await server.finished()


# -- replacement ---------------------------------------------------------------------------------


async def test_a_former_member_that_returns_after_its_replacement_is_refused_by_name(
    toy, connect_raw
):
    """It was stopped; another has taken its place; it wakes up and goes on as if nothing was."""
    loop, joined, go = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def hold(session, step):
        loop.call_soon_threadsafe(joined.set)
        assert go.wait(20)

    async with serve(toy, heartbeat_s=0.2) as server, connect_raw(server.address) as former:
        welcome = await former.join(toy.grid)
        contribution = toy.contribution(await former.pull(), 0, 0)
        await former.read_to_end()  # its silence was noticed
        work = asyncio.create_task(asyncio.to_thread(toy.work, server.address, hold))
        await joined.wait()
        former.push(0, contribution * 1000, toy.grid)  # of no effect
        async with connect_raw(server.address) as again:
            message = await come_back(again, welcome, 1)
            assert isinstance(message, Error)
            assert message.code == "term-outdated"
        go.set()
        replica = await work
        result = await server.finished()
    expected, _ = toy.replay(1, STEPS, TRAINING)
    assert result.parameters.tobytes() == replica.parameters.tobytes() == expected.tobytes()


async def test_a_worker_that_dies_in_the_middle_of_a_message_is_replaced_without_a_trace(
    toy, connect_raw
):
    everything = (Range(0, toy.grid.n_cells),)
    async with serve(toy) as server:
        async with connect_raw(server.address) as raw:
            await raw.join(toy.grid)
            await raw.pull()
            junk = np.full(toy.grid.n_floats, 1e6, np.float32)
            head = encode(Gradients(0, everything, whole(1, toy.grid)), 4 * toy.grid.n_floats)
            raw.send_bytes(head + junk.tobytes()[:-4])
            raw.hang_up()
            await raw.read_to_end()
        replica = await asyncio.to_thread(toy.work, server.address)
        result = await server.finished()
    expected, _ = toy.replay(1, STEPS, TRAINING)
    assert result.parameters.tobytes() == replica.parameters.tobytes() == expected.tobytes()


async def test_a_worker_that_stays_away_is_given_up_after_the_limit(toy, connect_raw):
    async with serve(toy, absence_s=0.2) as server:
        async with connect_raw(server.address) as raw:
            await raw.join(toy.grid)
            await raw.pull()
        words = r"worker 0 .* was lost in step 0: .*; it did not come back within 0.2 s"
        with pytest.raises(PeerError, match=words) as failure:
            await server.finished()
    assert failure.value.code == "worker-lost"


# -- silence -------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["idle", "inside a message"])
async def test_a_silent_worker_is_noticed_within_one_and_a_half_limits(toy, connect_raw, where):
    everything = (Range(0, toy.grid.n_cells),)
    async with (
        serve(toy, heartbeat_s=LIMIT_S, absence_s=0) as server,
        connect_raw(server.address) as raw,
    ):
        await raw.join(toy.grid)
        await raw.pull()
        if where != "idle":
            nbytes = 4 * toy.grid.n_floats
            head = encode(Gradients(0, everything, whole(1, toy.grid)), nbytes)
            raw.send_bytes(head + bytes(100))
        began = time.monotonic()
        with pytest.raises(PeerError, match=r"nothing has come over it for 0\.6 s"):
            await server.finished()
        assert LIMIT_S - 0.1 < time.monotonic() - began < 1.5 * LIMIT_S + 0.3
        await raw.read_to_end()


async def test_a_silent_server_is_noticed_within_one_and_a_half_limits(listen_raw):
    grid = Grid([LayerSpec("front", 10)])
    began = []

    def work(address):
        with Session(address, retry_s=0) as session:
            began.append(time.monotonic())
            next(session.steps()).wait("front")

    async with listen_raw() as server:
        work = asyncio.create_task(asyncio.to_thread(work, server.address))
        peer = await server.accept()
        await peer.read()
        peer.send(Welcome(PROTOCOL_VERSION, "r", 0, 1, 1, grid.layers, 0, 1, False, silence_ms=600))
        message = None
        while not isinstance(message, Join):
            message, _ = await peer.read()
            if isinstance(message, Heartbeat):
                peer.send(Heartbeat(message.number, True, 0))
        message, _ = await peer.read()
        assert isinstance(message, Heartbeat)
        with pytest.raises(ChannelBroken, match=r"nothing has come over it for 0\.6 s"):
            await work
        assert LIMIT_S - 0.1 < time.monotonic() - began[0] < 1.5 * LIMIT_S + 0.3


async def test_idle_members_hear_each_other_for_as_long_as_it_takes(toy):
    """Two workers, one of which thinks for many limits: nobody is given up."""

    def think(session, step):
        if session.welcome.slot == 0 and step == 1:
            time.sleep(1.0)  # the caller's own computing, and five limits

    async with serve(toy, workers=2, heartbeat_s=0.2, absence_s=0) as server:
        work = [asyncio.to_thread(toy.work, server.address, think, retry_s=0) for _ in "ab"]
        await asyncio.gather(*work)
        result = await server.finished()
    assert result.parameters.tobytes() == toy.replay(2, STEPS, TRAINING)[0].tobytes()


async def test_a_worker_that_leaves_ends_the_run_at_once_however_long_absences_may_be(
    toy, connect_raw
):
    async with serve(toy) as server, connect_raw(server.address) as raw:
        await raw.join(toy.grid)
        await raw.pull()
        raw.send(Leave())
        with pytest.raises(PeerError, match="left in step 0"):
            await server.finished()


def test_no_limit_looks_at_a_clock_that_can_be_set():
    """Row 22: wall clocks jump; only monotonic ones may time anything."""
    root = Path(dynacomm_async.__file__).parent
    for piece in ("server", "worker", "transport", "wire", "link"):
        for path in (root / piece).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module == "time":
                    assert {name.name for name in node.names} & {"time", "time_ns"} == set(), path
                if isinstance(node, ast.Attribute) and node.attr in {"time", "time_ns"}:
                    owner = ast.unparse(node.value)
                    assert owner not in {"time", "datetime"}, f"{path}:{node.lineno}"


@pytest.mark.slow
async def test_a_link_that_collapses_in_the_middle_of_a_message_slows_training_and_kills_nobody(
    toy,
):
    """From 100 to 1 Mbit/s: a message then takes four limits; both ends wait for it in peace."""
    model = type(toy)((LayerSpec("large", 60_000, decay=9), LayerSpec("small", 10)))
    fast, slow, collapses_s = 12.5e6, 125_000, 1.5
    nbytes = model.initial.nbytes
    settings = LinkSettings(fast, fast, schedule=((0, fast, fast), (collapses_s, slow, slow)))
    async with (
        serve(model, heartbeat_s=0.5, absence_s=0, initial_statistics=None) as server,
        Link(settings, to=tuple(server.address)) as link,
    ):
        began = time.monotonic()

        def wait_for_the_moment(session, step):
            if step == 2:  # its push is half through when the link collapses
                threading.Event().wait(began + collapses_s - nbytes / fast / 2 - time.monotonic())

        replica = await asyncio.to_thread(
            model.work, link.address, wait_for_the_moment, strategy="sequential", retry_s=0
        )
        result = await server.finished()
        took_s = time.monotonic() - began
        assert took_s > collapses_s + 3 * nbytes / slow  # one push, two pulls and a part
    expected, _ = model.replay(1, STEPS, TRAINING)
    assert result.parameters.tobytes() == replica.parameters.tobytes() == expected.tobytes()
