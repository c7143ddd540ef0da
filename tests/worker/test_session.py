"""A session, embedded in code that blocks: what it promises, and what it says when it cannot."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time

import numpy as np
import pytest

from dynacomm_async.errors import (
    ChannelBroken,
    ConfigError,
    LocalProtocolError,
    PeerError,
    PlanError,
    RemoteProtocolError,
)
from dynacomm_async.optim import SGD, Constant
from dynacomm_async.ranges import Range
from dynacomm_async.schedule import Plan
from dynacomm_async.server.checkpoint import Checkpoints
from dynacomm_async.server.server import ParameterServer
from dynacomm_async.server.store import Training
from dynacomm_async.transport import Address, LoopThread
from dynacomm_async.wire.grid import Grid, LayerSpec
from dynacomm_async.wire.messages import End, Error, Gradients, Heartbeat, Parameters
from dynacomm_async.worker import reaching
from dynacomm_async.worker.planning import FixedPlan, Plans
from dynacomm_async.worker.session import Session

TRAINING = Training(SGD(0.9), Constant(0.05))
PAIR = Grid([LayerSpec("front", 5000), LayerSpec("back", 10)])
LAYERWISE = FixedPlan(Plan.from_cuts("by hand", 2, [1], [1]))


def serve(toy, *, workers=1, steps=3, **options):
    options = {"layers": toy.layers, "initial": toy.initial, "training": TRAINING} | options
    options = {"initial_statistics": toy.initial_statistics} | options
    return ParameterServer(workers=workers, steps=steps, **options)


def finish(session, step):
    for spec in session.grid.layers:
        step.wait(spec.name)
    for spec in reversed(session.grid.layers):
        step.gradient_ready(spec.name)


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, None], ids=["stock", "default"])
async def test_sessions_share_a_thread_of_their_owner_on_either_loop(toy, factory):
    with LoopThread(factory) if factory else LoopThread() as io:
        async with serve(toy, workers=2) as server:
            work = [asyncio.to_thread(toy.work, server.address, io=io) for _ in "ab"]
            replicas = await asyncio.gather(*work)
            result = await server.finished()
        assert asyncio.run_coroutine_threadsafe(_count_tasks(), io.loop).result() == 1

    parameters, statistics = toy.replay(2, 3, TRAINING)
    for end in (*replicas, result):
        assert end.parameters.tobytes() == parameters.tobytes()
        assert end.statistics.tobytes() == statistics.tobytes()


async def _count_tasks():
    return len(asyncio.all_tasks())


async def test_layers_may_be_a_function_of_the_servers_settings(toy):
    seen = []

    def make_layers(settings):
        seen.append(dict(settings))
        return toy.layers

    async with serve(toy, settings={"model": "toy"}) as server:
        replica = await asyncio.to_thread(toy.work, server.address, layers=make_layers)
    assert seen == [{"model": "toy"}]
    assert replica.parameters.tobytes() == toy.replay(1, 3, TRAINING)[0].tobytes()


async def test_layers_may_be_named_by_index(toy):
    def work(address):
        with Session(address, toy.layers) as session:
            assert session.slice_of("tiny") == session.slice_of(1) == slice(5000, 5003)
            for step in session.steps():
                for index in range(4):
                    step.wait(index)
                for index in reversed(range(4)):
                    step.gradient_ready(index)

    async with serve(toy) as server:
        await asyncio.to_thread(work, server.address)
        assert (await server.finished()).steps == 3


async def test_compute_time_counts_what_lies_between_waits_and_not_the_waits(toy):
    def work(address):
        with Session(address) as session:
            for step in session.steps():
                began = time.monotonic_ns()
                finish(session, step)
                assert 0 < step.compute_ns <= time.monotonic_ns() - began

    async with serve(toy) as server:
        await asyncio.to_thread(work, server.address)


# -- overlap -------------------------------------------------------------------------------------


async def test_a_layer_can_be_computed_while_the_parameters_of_the_next_are_not_even_sent(
    listen_raw,
):
    loop, front_is_here = asyncio.get_running_loop(), asyncio.Event()

    def work(address):
        with Session(address, plans=lambda grid, estimator: LAYERWISE) as session:
            for step in session.steps():
                step.wait("front")
                assert session.parameters[:5000].tolist() == [1.0] * 5000
                loop.call_soon_threadsafe(front_is_here.set)
                finish(session, step)
            return session.parameters.tolist()

    async with listen_raw() as server:
        work = asyncio.create_task(asyncio.to_thread(work, server.address))
        peer = await server.greet(PAIR)
        peer.send(Parameters(0, (Range(0, 2),)), np.ones(5000, np.float32).tobytes())
        await front_is_here.wait()
        peer.send(Parameters(0, (Range(2, 1),)), np.ones(10, np.float32).tobytes())
        await end_by_hand(peer)
        assert await work == [2.0] * 5010


async def test_a_gradient_leaves_while_the_one_in_front_of_it_is_still_being_computed(listen_raw):
    back_has_left = threading.Event()

    def work(address):
        with Session(address, plans=lambda grid, estimator: LAYERWISE) as session:
            for step in session.steps():
                step.wait("front")
                step.wait("back")
                session.gradients[5000:] = 7
                step.gradient_ready("back")
                assert back_has_left.wait(10)
                session.gradients[:5000] = 8
                step.gradient_ready("front")

    async with listen_raw() as server:
        work = asyncio.create_task(asyncio.to_thread(work, server.address))
        peer = await server.greet(PAIR)
        peer.send(Parameters(0, (Range(0, 3),)), bytes(4 * 5010))
        message, payload = await peer.read()
        assert isinstance(message, Gradients)
        assert message.ranges == (Range(2, 1),)
        assert payload == np.full(10, 7, np.float32).tobytes()
        back_has_left.set()
        await end_by_hand(peer, n_gradients=1)
        await work


async def end_by_hand(peer, n_gradients=2):
    """Take the gradients of the only step; send the final parameters, all 2, and the end."""
    for _ in range(n_gradients):
        message, _ = await peer.read()
        assert isinstance(message, Gradients)
    for first, count, n in ((0, 2, 5000), (2, 1, 10)):
        peer.send(Parameters(1, (Range(first, count),)), np.full(n, 2, np.float32).tobytes())
    peer.send(End(1))
    await peer.read_to_end()


# -- misuse --------------------------------------------------------------------------------------


async def misuse(toy, body):
    """Run ``body(session, step)`` in the first step of a session that then goes."""

    def work(address):
        with Session(address, toy.layers) as session:
            step = next(session.steps())
            body(session, step)

    async with serve(toy) as server:
        await asyncio.to_thread(work, server.address)
        with pytest.raises(PeerError, match=r"worker 0 .* left in step 0"):
            await server.finished()


async def test_a_gradient_before_all_parameters_were_waited_for_is_an_error(toy, listen_raw):
    def work(address):
        with Session(address, plans=lambda grid, estimator: LAYERWISE) as session:
            step = next(session.steps())
            step.wait("front")
            with pytest.raises(LocalProtocolError, match="'front' is ready before all parameters"):
                step.gradient_ready("front")

    async with listen_raw() as server:
        work = asyncio.create_task(asyncio.to_thread(work, server.address))
        peer = await server.greet(PAIR)
        peer.send(Parameters(0, (Range(0, 2),)), bytes(4 * 5000))
        await peer.read_to_end()
        await work


async def test_a_gradient_twice_is_an_error_by_step_and_name(toy):
    def body(session, step):
        for spec in toy.layers:
            step.wait(spec.name)
        step.gradient_ready("wide")
        with pytest.raises(LocalProtocolError, match=r"step 0: .* 'wide' is ready twice"):
            step.gradient_ready("wide")

    await misuse(toy, body)


@pytest.mark.parametrize("name", ["conv9", 4, -1])
async def test_a_layer_that_the_model_has_not_is_an_error_with_the_names_it_has(toy, name):
    def body(session, step):
        for call in (step.wait, step.gradient_ready, session.slice_of):
            with pytest.raises(ConfigError, match=r"no layer .* front, tiny, wide, last"):
                call(name)

    await misuse(toy, body)


async def test_a_step_left_without_all_its_gradients_names_those_that_are_missing(toy):
    def work(address):
        with Session(address, toy.layers) as session:
            for step in session.steps():
                for spec in toy.layers:
                    step.wait(spec.name)
                step.gradient_ready("last")
                step.gradient_ready("tiny")

    async with serve(toy) as server:
        with pytest.raises(LocalProtocolError, match=r"step 0 was left .* of front, wide$"):
            await asyncio.to_thread(work, server.address)
        with pytest.raises(PeerError, match="left in step 0"):
            await server.finished()


async def test_a_closed_session_says_so(toy):
    def body(session, step):
        for spec in toy.layers:
            step.wait(spec.name)
        session.close()
        session.close()
        with pytest.raises(LocalProtocolError, match="the session is closed"):
            step.gradient_ready("last")

    await misuse(toy, body)


@pytest.mark.parametrize(
    ("address", "options"),
    [("nowhere:port", {}), ("", {}), ("127.0.0.1", {"strategy": "dynacom"})],
)
def test_settings_that_cannot_be_are_refused_at_once(address, options):
    with pytest.raises(ConfigError):
        Session(address, {"a": 1}, **options)


# -- leaving early, and losing the others --------------------------------------------------------


async def test_an_error_in_the_callers_code_goes_through_and_tells_the_others(toy):
    def work(address):
        with Session(address) as session:
            for step in session.steps():
                step.wait("front")
                if session.slot == 1 and step.index == 1:
                    raise ZeroDivisionError("the caller's own")
                finish(session, step)

    async with serve(toy, workers=2) as server:
        workers = [asyncio.to_thread(work, server.address) for _ in "ab"]
        ends = await asyncio.gather(*workers, return_exceptions=True)
        with pytest.raises(PeerError, match=r"worker 1 \(.*\) left in step 1") as failure:
            await server.finished()

    by_type = {type(end): end for end in ends}
    assert str(by_type[ZeroDivisionError]) == "the caller's own"
    assert by_type[PeerError].code == "worker-lost"
    assert str(by_type[PeerError]) == str(failure.value)


async def test_a_session_whose_server_does_not_read_is_left_within_two_seconds(listen_raw):
    grid = Grid([LayerSpec("big", 8_000_000)])
    took_s = []

    def work(address):
        with Session(address) as session:
            step = next(session.steps())
            finish(session, step)
            began = time.monotonic()
        took_s.append(time.monotonic() - began)

    async with listen_raw() as server:
        work = asyncio.create_task(asyncio.to_thread(work, server.address))
        peer = await server.greet(grid)
        peer.send(Parameters(0, (Range(0, grid.n_cells),)), bytes(32_000_000))
        await peer.read_a_little()
        await work
    assert took_s[0] < 2


@pytest.mark.parametrize("when", ["waiting for parameters", "computing", "waiting for the end"])
async def test_a_server_that_vanishes_ends_a_session_without_patience_wherever_it_stands(
    listen_raw, when
):
    loop, computing, go = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def work(address):
        with Session(address, retry_s=0) as session:
            for step in session.steps():
                step.wait("front")
                step.wait("back")
                loop.call_soon_threadsafe(computing.set)
                if when == "computing":
                    assert go.wait(10)
                finish(session, step)

    async with listen_raw() as server:
        work = asyncio.create_task(asyncio.to_thread(work, server.address))
        peer = await server.greet(PAIR)
        if when != "waiting for parameters":
            peer.send(Parameters(0, (Range(0, 3),)), bytes(4 * 5010))
            await computing.wait()
        if when == "waiting for the end":
            await peer.read()
        peer.abort()
        go.set()
        with pytest.raises(ChannelBroken, match=r"the connection to 127.0.0.1:\d+ was lost"):
            await work


async def test_an_error_of_the_servers_reaches_the_waiting_caller_with_its_code(listen_raw):
    def work(address):
        with Session(address) as session:
            next(session.steps()).wait("back")

    async with listen_raw() as server:
        work = asyncio.create_task(asyncio.to_thread(work, server.address))
        peer = await server.greet(PAIR)
        peer.send(Error("worker-lost", "somebody went"))
        with pytest.raises(PeerError, match="somebody went") as failure:
            await work
        assert failure.value.code == "worker-lost"


@pytest.mark.parametrize(
    ("message", "nbytes", "words"),
    [
        (Parameters(0, (Range(0, 4),)), 4 * 5010, "cells that the model has not"),
        (Parameters(0, (Range(0, 3),)), 4 * 5009, "payload of 20036 bytes, expected 20040"),
        (Parameters(0, (Range(2, 1), Range(2, 1))), 80, "have arrived twice"),
        (Gradients(0, (Range(0, 3),)), 4 * 5010, "may not send GRADIENTS"),
        (End(1), 0, "may not send END"),
    ],
)
async def test_a_server_that_breaks_the_rules_is_not_trusted_any_more(
    listen_raw, message, nbytes, words
):
    def work(address):
        with Session(address) as session:
            next(session.steps()).wait("back")

    async with listen_raw() as server:
        work = asyncio.create_task(asyncio.to_thread(work, server.address))
        peer = await server.greet(PAIR)
        peer.send(message, bytes(nbytes))
        with pytest.raises(RemoteProtocolError, match=words):
            await work


async def test_the_first_parameters_say_which_step_a_newcomer_begins_with_and_no_later_ones_do(
    listen_raw,
):
    def work(address):
        with Session(address) as session:
            step = next(session.steps())
            begun.append(step.index)
            step.wait("back")

    begun = []
    async with listen_raw() as server:
        work = asyncio.create_task(asyncio.to_thread(work, server.address))
        peer = await server.greet(PAIR, steps=9)
        for version in (3, 4):
            peer.send(Parameters(version, (Range(0, 1),)), bytes(4 * 4096))
        with pytest.raises(RemoteProtocolError, match="parameters of version 4, expected 3"):
            await work
    assert begun in ([3], [])  # the second message may be quicker than the caller


async def test_a_server_of_something_else_is_one_clear_error(listen_raw):
    async with listen_raw() as server:
        work = asyncio.create_task(asyncio.to_thread(Session(server.address).__enter__))
        peer = await server.accept()
        peer.send_bytes(b"SSH-2.0-OpenSSH_9.6 and more than a prefix\r\n")
        with pytest.raises(RemoteProtocolError, match="not a dynacomm message"):
            await work


# -- no server -----------------------------------------------------------------------------------


@pytest.fixture
def closed_address():
    """An address at which nobody listens: its port is taken, and refuses."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield Address(*holder.getsockname())


def test_no_server_is_one_clear_sentence_once_the_patience_is_over(closed_address):
    began = time.monotonic()
    with pytest.raises(ChannelBroken) as failure, Session(closed_address, retry_s=0.5):
        pass

    assert str(failure.value).startswith(f"no server at {closed_address} (tried for 0.5 s: ")
    assert "refused" in str(failure.value)
    assert str(failure.value).endswith("; start it, or check --server HOST:PORT")
    assert time.monotonic() - began < 2


async def test_a_server_that_starts_late_is_found(toy, monkeypatch):
    loop, failed = asyncio.get_running_loop(), asyncio.Event()
    connect = reaching.connect

    async def watched(*args, **options):
        try:
            return await connect(*args, **options)
        except ChannelBroken:
            loop.call_soon_threadsafe(failed.set)
            raise

    monkeypatch.setattr(reaching, "connect", watched)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        address = Address(*holder.getsockname())
        work = asyncio.create_task(asyncio.to_thread(toy.work, address))
        await failed.wait()
    async with serve(toy, listen=address) as server:
        replica = await work
        await server.finished()

    assert replica.parameters.tobytes() == toy.replay(1, 3, TRAINING)[0].tobytes()


async def test_a_server_that_comes_back_elsewhere_is_asked_for_and_followed(toy, tmp_path):
    loop, under_way, unknown = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    places: list[Address] = []
    options = {"steps": 6, "checkpoint_every": 1}

    def find():
        if places:
            return places[0]
        loop.call_soon_threadsafe(unknown.set)
        raise ChannelBroken("nobody knows where it is")

    def at_step(session, index):
        if index == 3:
            loop.call_soon_threadsafe(under_way.set)

    work = asyncio.create_task(asyncio.to_thread(toy.work, find, at_step))
    await unknown.wait()
    with Checkpoints(tmp_path) as checkpoints:
        async with serve(toy, checkpoints=checkpoints, **options) as server:
            places[:] = [server.address]
            await under_way.wait()
            places.clear()
            unknown.clear()
            await server.drain()
        await unknown.wait()
        async with serve(toy, checkpoints=checkpoints, resume=True, **options) as server:
            places[:] = [server.address]
            result = await server.finished()
    replica = await work

    for end in (replica, result):
        assert end.parameters.tobytes() == toy.replay(1, 6, TRAINING)[0].tobytes()


def test_an_address_that_stays_unknown_is_said_in_one_sentence():
    def find():
        raise ChannelBroken("its name is not in the directory")

    with pytest.raises(ChannelBroken) as failure, Session(find, retry_s=0):
        pass
    assert str(failure.value) == (
        "no server at an unknown address (tried for 0 s: its name is not in the directory); "
        "start it, or check --server HOST:PORT"
    )


async def test_a_link_that_answers_before_its_server_does_is_asked_again(listen_raw):
    def work(address):
        with Session(address, retry_s=10) as session:
            return session.welcome.run

    async with listen_raw() as server:
        work = asyncio.create_task(asyncio.to_thread(work, server.address))
        for _ in range(2):
            (await server.accept()).abort()
        peer = await server.greet(PAIR)
        await peer.read_to_end()
        assert await work == "by-hand"


def test_an_interrupt_while_nobody_answers_leaves_nothing_running(closed_address, monkeypatch):
    connect = reaching.connect

    async def interrupt(*args, **options):
        try:
            return await connect(*args, **options)
        finally:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    async def count_what_does_not_end():
        others = asyncio.all_tasks() - {asyncio.current_task()}
        return len((await asyncio.wait(others, timeout=5))[1]) if others else 0

    monkeypatch.setattr(reaching, "connect", interrupt)
    with LoopThread() as io:
        with pytest.raises(KeyboardInterrupt), Session(closed_address, io=io):
            pass
        assert io.submit(count_what_does_not_end()).result() == 0


async def test_a_peer_that_never_answers_is_named_once_the_greeting_is_overdue(monkeypatch):
    monkeypatch.setattr("dynacomm_async.worker.reaching._GREETING_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = Address(*silent.getsockname())
        with pytest.raises(TimeoutError, match="accepts connections but has not answered"):
            await asyncio.to_thread(Session(address).__enter__)


def test_a_session_that_was_never_entered_holds_nothing_and_may_be_closed():
    session = Session("127.0.0.1:1", {"w": 1})
    session.close()
    with pytest.raises(LocalProtocolError, match="not open"):
        session.post(print)


# -- what a planner of one's own may get wrong ---------------------------------------------------


class Failing(Plans):
    """Plans well until step 2."""

    def __init__(self, n_layers, mistake):
        super().__init__()
        self._n_layers, self._mistake = n_layers, mistake

    def _choose(self, step):
        if step == 2 and self._mistake == "raise":
            raise ValueError("out of ideas")
        n_layers = self._n_layers + (step == 2)
        return Plan.from_cuts("mine", n_layers, [], [])

    def refresh(self):
        if self._mistake == "refresh":
            raise ValueError("out of ideas")


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("raise", "ValueError: out of ideas"),
        ("refresh", "ValueError: out of ideas"),
        ("layers", "the plan for step 2 has 4 layers, expected 3"),
    ],
)
async def test_a_failing_planner_ends_the_session_with_its_words_and_nothing_hangs(mistake, words):
    layers = {"a": 5, "b": 7, "c": 9}
    initial = np.zeros(21, np.float32)
    async with ParameterServer(layers, workers=1, steps=9, initial=initial) as server:

        def work():
            plans = Failing(3, mistake)
            with Session(server.address, plans=lambda grid, estimator: plans) as session:
                for step in session.steps():
                    for layer in layers:
                        step.wait(layer)
                    for layer in reversed(layers):
                        step.gradient_ready(layer)

        async with asyncio.timeout(10):
            with pytest.raises((LocalProtocolError, PlanError), match=words):
                await asyncio.to_thread(work)
            with pytest.raises(PeerError, match="worker 0"):
                await server.finished()


async def test_a_machine_that_does_not_answer_is_given_up_when_patience_is_over():
    with socket.socket() as full:  # a backlog that is full lets no connection through, nor refuses
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = Address(*full.getsockname())
        waiting = [socket.socket() for _ in range(4)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(address)
        async with asyncio.timeout(10):
            with pytest.raises(ChannelBroken, match=r"no server at .* does not answer"):
                await asyncio.to_thread(Session(address, {"w": 1}, retry_s=0.5).__enter__)
        for sock in waiting:
            sock.close()


async def test_a_worker_that_has_joined_answers_heartbeats(listen_raw):
    async with listen_raw() as server:
        session = Session(server.address)
        entering = asyncio.create_task(asyncio.to_thread(session.__enter__))
        peer = await server.greet(PAIR)
        await entering
        peer.send(Heartbeat(7, False, 0))
        answer, _ = await peer.read()
        assert isinstance(answer, Heartbeat)
        assert (answer.number, answer.reply) == (7, True)
        await asyncio.to_thread(session.close)
