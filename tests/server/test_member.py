"""What the server refuses, how it says so, and that nobody else is disturbed by it."""

from __future__ import annotations

import asyncio
import functools
import struct
import threading
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest

from dynacomm_async.errors import PeerError
from dynacomm_async.optim import SGD, Constant
from dynacomm_async.ranges import Range
from dynacomm_async.server.member import Member
from dynacomm_async.server.server import ParameterServer
from dynacomm_async.server.store import LayerOptions, Training
from dynacomm_async.wire.codec import encode
from dynacomm_async.wire.frame import MAGIC, MessageKind, Prefix
from dynacomm_async.wire.grid import Grid, LayerSpec
from dynacomm_async.wire.messages import (
    End,
    Error,
    Gradients,
    Heartbeat,
    Hello,
    Initial,
    Join,
    Leave,
    Subscription,
    Welcome,
)

TRAINING = Training(SGD(0.9), Constant(0.05), weight_decay=0.01)
STEPS = 4


def serve(toy, *, workers=2, **options):
    options = {"initial": toy.initial, "initial_statistics": toy.initial_statistics} | options
    options = {"layers": toy.layers, "training": TRAINING, "run": "the-run"} | options
    options = {"absence_s": 0} | options
    return ParameterServer(workers=workers, steps=STEPS, **options)


@asynccontextmanager
async def training(toy, server, n_workers=2):
    """Workers that train to the right result; in step 2 they wait for the body of the block."""
    loop, reached, go = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def hold(session, step):
        if step == 2:
            loop.call_soon_threadsafe(reached.set)
            assert go.wait(20)

    work = [
        asyncio.create_task(asyncio.to_thread(toy.work, server.address, hold))
        for _ in range(n_workers)
    ]
    waiting = asyncio.create_task(reached.wait())
    try:
        await asyncio.wait([waiting, *work], return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            yield
    finally:
        waiting.cancel()
        go.set()
        replicas = await asyncio.gather(*work)
    result = await server.finished()
    expected, _ = toy.replay(n_workers, STEPS, TRAINING)
    for end in (result, *replicas):
        assert end.parameters.tobytes() == expected.tobytes()


@asynccontextmanager
async def undisturbed(toy, server, when):
    """The body runs before or in the middle of a training that must come out right."""
    if when == "before":
        yield
        async with training(toy, server):
            pass
    else:
        async with training(toy, server):
            yield


BOTH = pytest.mark.parametrize("when", ["before", "during"])


# -- strangers -----------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("hello", "code", "words"),
    [
        (Hello(protocol=99), "protocol-mismatch", "speaks protocol 1, the worker 99; install"),
        (Hello(run="another"), "run-mismatch", "run is 'the-run', not 'another'"),
        (Hello(fingerprint="f" * 32), "model-mismatch", "fingerprint ffffffff, expected"),
    ],
)
async def test_a_hello_that_does_not_fit_is_refused_with_a_sentence(
    toy, connect_raw, when, hello, code, words
):
    async with (
        serve(toy) as server,
        undisturbed(toy, server, when),
        connect_raw(server.address) as raw,
    ):
        raw.send(hello)
        message, _ = await raw.read()
        assert isinstance(message, Error)
        assert (message.code, words in message.text) == (code, True), message


async def test_more_workers_than_ranks_are_refused_with_a_sentence(toy):
    async with serve(toy) as server, training(toy, server):
        with pytest.raises(PeerError, match="all 2 workers of this run have joined") as failure:
            await asyncio.to_thread(toy.work, server.address)
        assert failure.value.code == "run-full"


async def test_ranks_held_by_strangers_count(toy, connect_raw):
    async with serve(toy, workers=1) as server, connect_raw(server.address) as holder:
        holder.send(Hello())
        message, _ = await holder.read()
        assert isinstance(message, Welcome)
        async with connect_raw(server.address) as late:
            late.send(Hello())
            message, _ = await late.read()
            assert isinstance(message, Error)
            assert message.code == "run-full"


async def test_another_model_is_refused_at_the_join_and_its_rank_is_free_again(toy, connect_raw):
    async with serve(toy) as server:
        async with connect_raw(server.address) as raw:
            await raw.join(Grid([LayerSpec("other", 9)]))
            message, _ = await raw.read()
            assert isinstance(message, Error)
            assert message.code == "model-mismatch"
        async with training(toy, server):
            pass


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"count": 4999}, r"'front' with 4999 parameters .*, expected 'front' with 5000"),
        ({"name": "conv"}, r"'conv' with 5000 parameters .*, expected 'front' with 5000"),
        ({"decay": 1}, r"\(1 decay\) .* \(4100 decay\)"),
        ({"statistics": 0}, r"and 0 statistics, .* and 7 statistics"),
        (None, r"3 layers, expected 4"),
    ],
)
async def test_another_model_is_refused_by_the_worker_which_says_where_they_part(
    toy, change, words
):
    layers = toy.layers[:3]
    if change is not None:
        layers = [replace(toy.layers[0], **change), *toy.layers[1:]]
    async with serve(toy) as server:
        with pytest.raises(PeerError, match=words) as failure:
            await asyncio.to_thread(toy.work, server.address, layers=layers)
        assert failure.value.code == "model-mismatch"
        async with training(toy, server):
            pass


async def test_a_second_model_is_refused_by_a_server_that_took_its_model_from_a_worker(
    toy, connect_raw
):
    layers = [replace(toy.layers[0], count=4999), *toy.layers[1:]]
    async with (
        serve(toy, layers=None, initial=None, initial_statistics=None) as server,
        connect_raw(server.address) as first,
    ):
        await first.join(toy.grid, layers=toy.layers)
        await first_heartbeat(first)
        with pytest.raises(PeerError, match=r"4999 parameters .* with 5000") as failure:
            await asyncio.to_thread(toy.work, server.address, layers=layers)
        assert failure.value.code == "model-mismatch"


async def first_heartbeat(raw):
    """Ask for a heartbeat's reply: what was sent before it has been taken in."""
    raw.send(Heartbeat(1, False, 0))
    while True:
        message, _ = await raw.read()
        if isinstance(message, Heartbeat):
            return


async def test_two_models_at_once_leave_one_and_refuse_the_other(toy, connect_raw):
    other = Grid([LayerSpec("other", 9)])
    async with (
        serve(toy, layers=None, initial=None, initial_statistics=None) as server,
        connect_raw(server.address) as first,
        connect_raw(server.address) as second,
    ):
        for raw in (first, second):
            raw.send(Hello())
            welcome, _ = await raw.read()
            assert welcome.layers is None
        for raw, grid in ((second, other), (first, toy.grid)):
            cells = Range(0, grid.n_parameter_cells)
            subscription = Subscription(0, ((cells,),))
            raw.send(Join(grid.fingerprint, subscription, layers=grid.layers))
            if raw is second:
                await first_heartbeat(second)
        message, _ = await first.read()
        assert isinstance(message, Error)
        assert message.code == "model-mismatch"


@pytest.mark.parametrize(
    ("layers", "fingerprint", "words"),
    [
        ((), "", "no layers with parameters"),
        ((LayerSpec("a", 1), LayerSpec("a", 1)), "", "two layers are named 'a'"),
        ((LayerSpec("a", 1),), "", "fingerprint"),
        ((LayerSpec("a", 1),), None, "options for a layer 'front'"),
    ],
)
async def test_a_model_that_cannot_be_is_refused_with_a_sentence_and_not_taken(
    toy, connect_raw, layers, fingerprint, words
):
    options = replace(TRAINING, layers={"front": LayerOptions()})
    async with serve(
        toy, layers=None, initial=None, initial_statistics=None, training=options
    ) as server:
        async with connect_raw(server.address) as raw:
            raw.send(Hello())
            await raw.read()
            if fingerprint is None:
                fingerprint = Grid(layers).fingerprint
            first = Subscription(0, ((Range(0, 1),),))
            raw.send(Join(fingerprint, first, layers=layers))
            message, _ = await raw.read()
            assert isinstance(message, Error)
            assert words in message.text
        assert server.memory_nbytes is None


async def test_other_kernels_are_refused_while_somebody_computes_with_the_first(toy, connect_raw):
    async with serve(toy) as server:
        async with connect_raw(server.address) as first:
            await first.join(toy.grid, kernels="winograd")
            await first_heartbeat(first)
            with pytest.raises(PeerError, match="with 'winograd', this worker with ''") as failure:
                await asyncio.to_thread(toy.work, server.address)
            assert failure.value.code == "kernel-mismatch"
        async with training(toy, server):
            pass


async def test_a_join_without_a_model_on_either_side_is_refused(toy, connect_raw):
    async with (
        serve(toy, layers=None, initial=None, initial_statistics=None) as server,
        connect_raw(server.address) as raw,
    ):
        await raw.join(toy.grid)
        message, _ = await raw.read()
        assert isinstance(message, Error)
        assert message.code == "layers-missing"


def _prefix(kind, header_nbytes, payload_nbytes):
    return Prefix(kind, 0, header_nbytes, payload_nbytes, 0).pack()


GARBAGE = {
    "an HTTP request": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a TLS hello": bytes.fromhex("16030100c8010000c40303") + bytes(200),
    "random bytes": np.random.default_rng(7).bytes(100_000),
    "an unknown kind": struct.pack("<2sBBIQQ", MAGIC, 200, 0, 4, 0, 0) + b"abcd",
    "a giant header": _prefix(MessageKind.HELLO, 2**32 - 1, 0),
    "a header over the limit": _prefix(MessageKind.HELLO, 4097, 0) + bytes(4097),
    "a giant payload": _prefix(MessageKind.HELLO, 0, 2**63),
    "gradients from nowhere": encode(Gradients(0, (Range(0, 1),)), 16384) + bytes(16384),
    "giant gradients from nowhere": _prefix(MessageKind.GRADIENTS, 16, 2**63) + bytes(16),
    "a hello that is no map": _prefix(MessageKind.HELLO, 1, 0) + b"\xc0",
    "a hello of wrong fields": _prefix(MessageKind.HELLO, 1, 0) + b"\x80",
    "a hello with a payload": encode(Hello(), 8) + bytes(8),
    "two hellos": encode(Hello()) + encode(Hello()),
    "gradients after the hello": encode(Hello()) + encode(Gradients(0, (Range(0, 1),)), 4),
    "a server's message": encode(Hello()) + encode(End(3)),
    "initial values after the hello": encode(Hello()) + encode(Initial((Range(0, 1),)), 4),
    "a subscription with holes": encode(Hello())
    + encode(Join("", Subscription(0, ((Range(1, 1),),)))),
}


@BOTH
@pytest.mark.parametrize("garbage", GARBAGE)
async def test_garbage_ends_its_own_connection_and_nothing_else(toy, connect_raw, when, garbage):
    async with (
        serve(toy) as server,
        undisturbed(toy, server, when),
        connect_raw(server.address) as raw,
    ):
        raw.send_bytes(GARBAGE[garbage])
        await raw.read_to_end()


@pytest.mark.parametrize(
    "messages",
    [
        (),
        ((Range(0, 6),),),
        ((Range(0, 7), Range(6, 1)),),
        ((Range(0, 8),),),
        ((Range(0, 7),), (Range(0, 7),)),
    ],
)
async def test_a_join_whose_subscription_is_not_the_model_ends_and_frees_the_rank(
    toy, connect_raw, messages
):
    assert toy.grid.n_parameter_cells == 7
    async with serve(toy) as server:
        async with connect_raw(server.address) as raw:
            await raw.join(toy.grid, subscription=Subscription(0, messages))
            await raw.read_to_end()
        async with training(toy, server):
            pass


async def test_a_join_that_subscribes_to_another_version_ends_and_frees_the_rank(toy, connect_raw):
    everything = ((Range(0, toy.grid.n_parameter_cells),),)
    async with serve(toy) as server:
        async with connect_raw(server.address) as raw:
            await raw.join(toy.grid, subscription=Subscription(3, everything), kernels="other")
            async with asyncio.timeout(5):  # at once, not when its silence has lasted too long
                await raw.read_to_end()
        async with training(toy, server):
            pass


async def test_initial_values_that_nobody_asked_for_end_the_connection_only(toy, connect_raw):
    async with serve(toy) as server:
        async with connect_raw(server.address) as raw:
            await raw.join(toy.grid)
            raw.send(Initial((Range(0, toy.grid.n_cells),)), bytes(4 * toy.grid.n_floats))
            await raw.read_to_end()
        async with training(toy, server):
            pass


async def test_initial_values_from_another_than_the_first_member_end_its_connection(
    toy, connect_raw
):
    everything = Initial((Range(0, toy.grid.n_cells),))
    async with (
        serve(toy, initial=None, initial_statistics=None) as server,
        connect_raw(server.address) as first,
        connect_raw(server.address) as second,
    ):
        assert (await first.join(toy.grid)).upload
        assert not (await second.join(toy.grid)).upload
        second.send(everything, bytes(4 * toy.grid.n_floats))
        await second.read_to_end()


@pytest.fixture
def _hurried(monkeypatch):
    hurried = functools.partial(Member, hello_deadline_s=0.1, join_deadline_s=0.1)
    monkeypatch.setattr("dynacomm_async.server.run.Member", hurried)


@pytest.mark.usefixtures("_hurried")
@pytest.mark.parametrize(
    ("said", "awaited"),
    [(b"", "hello"), (encode(Hello())[:30], "hello"), (encode(Hello()), "join")],
    ids=["nothing", "half a hello", "hello"],
)
async def test_a_stranger_who_falls_silent_is_told_so_and_holds_no_rank(
    toy, connect_raw, said, awaited
):
    async with serve(toy, workers=1) as server:
        async with connect_raw(server.address) as raw:
            raw.send_bytes(said)
            message, _ = await raw.read()
            if isinstance(message, Welcome):
                message, _ = await raw.read()
            assert message == Error(f"{awaited}-timeout", f"no {awaited} came in time")
        async with training(toy, server, 1):
            pass


@pytest.mark.usefixtures("_hurried")
async def test_the_deadlines_are_for_strangers_only(toy, connect_raw):
    async with (
        serve(toy, workers=1) as server,
        training(toy, server, 1),
        connect_raw(server.address) as raw,
    ):
        message, _ = await raw.read()  # by then the member's deadlines have passed too
        assert message.code == "hello-timeout"


# -- members -------------------------------------------------------------------------------------


async def test_a_worker_by_hand_trains_to_the_right_result(toy, connect_raw):
    async with serve(toy, workers=1) as server, connect_raw(server.address) as raw:
        await raw.join(toy.grid)
        for step in range(STEPS):
            parameters = await raw.pull()
            raw.push(step, toy.contribution(parameters, 0, step), toy.grid)
        final = await raw.pull()
        message, statistics = await raw.read()
        raw.send(Leave())
        result = await server.finished()

    expected = toy.replay(1, STEPS, TRAINING)
    assert message == End(STEPS)
    assert final.tobytes() == expected[0].tobytes() == result.parameters.tobytes()
    assert statistics == expected[1].tobytes() == result.statistics.tobytes()
    assert result.losses == [0.5] * STEPS


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("another step", "gradients of step 5, expected step 0"),
        ("twice", "cells 0 to 9 of step 0 were pushed before"),
        ("cells out of range", "expected ascending ranges within 0 to 9"),
        ("no subscription", "the first gradients of step 0 carry no subscription"),
        ("a subscription to another version", "step 0 subscribe to version 3"),
        ("a subscription with holes", "subscription: it covers 1 cells, expected 7"),
        ("two subscriptions", "gradients of step 0 subscribe to version 1"),
        ("a payload too short", "expected"),
        ("joining again", "may not send JOIN"),
    ],
)
async def test_a_member_that_breaks_the_rules_fails_the_run_which_names_it_and_says_why(
    toy, connect_raw, fault, words
):
    n_cells, n_parameter_cells = toy.grid.n_cells, toy.grid.n_parameter_cells
    assert (n_cells, n_parameter_cells) == (10, 7)
    loop, greeted, go = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def layers(settings):
        loop.call_soon_threadsafe(greeted.set)
        return toy.layers

    def hold(session, step):
        assert session.welcome.slot == 0
        assert go.wait(20)

    async with serve(toy) as server, connect_raw(server.address) as raw:
        work = asyncio.to_thread(toy.work, server.address, hold, layers=layers)
        good = asyncio.create_task(work)
        await greeted.wait()
        await raw.join(toy.grid)
        contribution = toy.contribution(await raw.pull(), 1, 0)
        if fault == "another step":
            raw.push(5, contribution, toy.grid)
        elif fault == "twice":
            raw.push(0, contribution, toy.grid, ranges=(Range(0, n_cells),))
            raw.push(0, contribution, toy.grid, subscription=None)
        elif fault == "cells out of range":
            raw.push(0, contribution, toy.grid, ranges=(Range(0, n_cells + 1),))
        elif fault == "no subscription":
            raw.push(0, contribution, toy.grid, subscription=None)
        elif fault == "a subscription to another version":
            everything = ((Range(0, n_parameter_cells),),)
            raw.push(0, contribution, toy.grid, subscription=Subscription(3, everything))
        elif fault == "a subscription with holes":
            raw.push(0, contribution, toy.grid, subscription=Subscription(1, ((Range(0, 1),),)))
        elif fault == "two subscriptions":
            halves = (Range(0, 2),), (Range(2, 5),)
            for cells in halves:
                start, stop = toy.grid.floats(*cells[0])
                raw.push(0, contribution[start:stop], toy.grid, ranges=cells)
        elif fault == "a payload too short":
            raw.push(0, contribution[1:], toy.grid)
        else:
            raw.send(Join(toy.grid.fingerprint, Subscription(0, ())))
        with pytest.raises(PeerError, match=r"worker 1 \(127.0.0.1:.* was lost in step 0") as lost:
            await server.finished()
        go.set()
        with pytest.raises(PeerError) as told:
            await good

    assert words in str(lost.value)
    assert lost.value.code == told.value.code == "worker-lost"
    assert str(told.value) == str(lost.value)


async def test_gradients_before_training_has_begun_end_the_connection_and_free_the_rank(
    toy, connect_raw
):
    async with serve(toy) as server:
        async with connect_raw(server.address) as raw:
            await raw.join(toy.grid)
            raw.push(0, np.zeros(toy.grid.n_floats, np.float32), toy.grid)
            await raw.read_to_end()
        async with training(toy, server):
            pass


@pytest.mark.parametrize("how", ["abort", "leave"])
async def test_a_worker_that_goes_before_training_frees_its_rank(toy, connect_raw, how):
    async with serve(toy) as server:
        async with connect_raw(server.address) as raw:
            await raw.join(toy.grid)
            await first_heartbeat(raw)
            if how == "leave":
                raw.send(Leave())
                await raw.read_to_end()
        async with training(toy, server):
            pass


@pytest.mark.parametrize(("how", "verb"), [("abort", "was lost"), ("leave", "left")])
async def test_a_worker_that_goes_during_training_fails_the_run_for_all_by_name(
    toy, connect_raw, how, verb
):
    async with (
        serve(toy) as server,
        connect_raw(server.address) as first,
        connect_raw(server.address) as second,
    ):
        for raw in (first, second):
            await raw.join(toy.grid)
        for raw in (first, second):
            raw.push(0, toy.contribution(await raw.pull(), raw.welcome.slot, 0), toy.grid)
        for raw in (first, second):
            await raw.pull()
        if how == "abort":
            second.abort()
        else:
            second.send(Leave())
        words = rf"worker 1 \(127.0.0.1:\d+\) {verb} in step 1"
        with pytest.raises(PeerError, match=words) as failure:
            await server.finished()
        message, _ = await first.read()

    assert failure.value.code == "worker-lost"
    assert message == Error("worker-lost", str(failure.value))


async def test_gradients_under_way_when_the_run_fails_do_not_keep_its_reason_from_their_sender(
    toy, connect_raw
):
    async with (
        serve(toy) as server,
        connect_raw(server.address) as first,
        connect_raw(server.address) as second,
    ):
        for raw in (first, second):
            await raw.join(toy.grid)
            await first_heartbeat(raw)
        gradients = toy.contribution(await first.pull(), 0, 0)
        await second.pull()
        second.abort()
        with pytest.raises(PeerError):
            await server.finished()
        first.push(0, gradients, toy.grid)
        message, _ = await first.read()
        assert isinstance(message, Error)
        first.send(Leave())


async def test_a_worker_lost_after_the_last_step_does_not_fail_the_run(toy, connect_raw):
    async with (
        serve(toy, workers=2) as server,
        connect_raw(server.address) as first,
        connect_raw(server.address) as second,
    ):
        for raw in (first, second):
            await raw.join(toy.grid)
        for step in range(STEPS):
            for raw in (first, second):
                parameters = await raw.pull()
                contribution = toy.contribution(parameters, raw.welcome.slot, step)
                raw.push(step, contribution, toy.grid)
        await first.pull()
        second.abort()
        await first.read()
        first.send(Leave())
        result = await server.finished()

    assert result.parameters.tobytes() == toy.replay(2, STEPS, TRAINING)[0].tobytes()


@pytest.mark.parametrize("nbytes", [10, 100, 30_000], ids=["prefix", "header", "payload"])
async def test_a_gradient_message_that_breaks_off_is_a_worker_lost(toy, connect_raw, nbytes):
    everything, subscription = (Range(0, toy.grid.n_cells),), Subscription(1, ((Range(0, 7),),))
    head = encode(Gradients(0, everything, subscription), 4 * toy.grid.n_floats)
    async with serve(toy, workers=1) as server, connect_raw(server.address) as raw:
        await raw.join(toy.grid)
        await raw.pull()
        raw.send_bytes((head + bytes(30_000))[:nbytes])
        raw.hang_up()
        with pytest.raises(PeerError, match=r"was lost in step 0: the connection .* was lost$"):
            await server.finished()


async def test_a_worker_that_comes_after_the_run_has_failed_is_told_that_it_is_over(
    toy, connect_raw
):
    async with serve(toy, workers=1) as server:
        async with connect_raw(server.address) as raw:
            await raw.join(toy.grid)
            await raw.pull()
        with pytest.raises(PeerError):
            await server.finished()
        with pytest.raises(PeerError, match="this run has ended") as failure:
            await asyncio.to_thread(toy.work, server.address)
        assert failure.value.code == "run-over"


async def test_a_model_that_does_not_fit_into_memory_is_refused_with_a_sentence(
    toy, connect_raw, monkeypatch
):
    def no_memory(*args):
        raise MemoryError("cannot allocate 64 GiB")

    async with (
        serve(toy, layers=None, initial=None, initial_statistics=None) as server,
        connect_raw(server.address) as raw,
    ):
        monkeypatch.setattr("dynacomm_async.server.run.Store", no_memory)
        await raw.join(toy.grid, layers=toy.layers)
        message, _ = await raw.read()
        assert isinstance(message, Error)
        assert message.code == "model-refused"
        assert "MemoryError: cannot allocate 64 GiB" in message.text


# -- the server's end ----------------------------------------------------------------------------


@pytest.mark.parametrize("said", [b"", encode(Hello())], ids=["nothing", "hello"])
async def test_a_server_that_stops_does_not_wait_for_silent_strangers(toy, connect_raw, said):
    server = serve(toy)
    await server.__aenter__()
    async with connect_raw(server.address) as raw:
        raw.send_bytes(said)
        if said:
            await raw.read()
        else:
            async with connect_raw(server.address) as other:  # the first one has been accepted
                other.send(Hello())
                await other.read()
        async with asyncio.timeout(3):
            await server.__aexit__(None, None, None)
        message, _ = await raw.read()
        assert message.code == "server-stopped"


async def test_a_server_that_stops_cuts_off_a_worker_that_does_not_read(toy, connect_raw):
    toy = type(toy)((LayerSpec("big", 4_000_000),))
    server = serve(toy, workers=1)
    await server.__aenter__()
    async with connect_raw(server.address) as raw:
        await raw.join(toy.grid)
        await raw.read_a_little()
        async with asyncio.timeout(3):
            await server.__aexit__(None, None, None)


async def test_a_refusal_reaches_a_worker_whose_next_message_crosses_it(toy, connect_raw):
    options = replace(TRAINING, layers={"no such layer": LayerOptions()})
    bare = serve(toy, layers=None, initial=None, initial_statistics=None, training=options)
    async with bare as server, connect_raw(server.address) as raw:
        raw.send(Hello())
        assert isinstance((await raw.read())[0], Welcome)
        cells = ((Range(0, toy.grid.n_parameter_cells),),)
        join = Join(toy.grid.fingerprint, Subscription(0, cells), "", toy.grid.layers)
        everything = Initial((Range(0, toy.grid.n_cells),))
        nbytes = 4 * toy.grid.n_floats
        raw.send_bytes(encode(join) + encode(everything, nbytes) + bytes(nbytes))
        message, _ = await raw.read()
        assert isinstance(message, Error)
        assert message.code == "model-refused"


async def test_a_flood_of_heartbeats_is_answered_for_the_newest_alone_and_keeps_no_queue(
    toy, connect_raw
):
    async with serve(toy) as server, connect_raw(server.address) as raw:
        raw.send(Hello())
        assert isinstance((await raw.read())[0], Welcome)
        questions = b"".join(encode(Heartbeat(number, False, 0)) for number in range(1000))
        raw.send_bytes(questions)
        answers = []
        while not answers or answers[-1] != 999:
            message, _ = await raw.read()
            assert isinstance(message, Heartbeat)
            answers.append(message.number)
        assert answers == sorted(set(answers))
        assert len(answers) < 1000
