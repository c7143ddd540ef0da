"""What does not fit is refused by an error of its own, from its header alone; nothing changes."""

from __future__ import annotations

import gc
import tracemalloc
from dataclasses import replace

import pytest

from dynacomm_async.errors import PeerError
from dynacomm_async.optim import SGD, Constant
from dynacomm_async.ranges import Range
from dynacomm_async.server import ParameterServer, Store, Training
from dynacomm_async.wire.codec import encode
from dynacomm_async.wire.grid import LayerSpec
from dynacomm_async.wire.messages import (
    Error,
    Gradients,
    Heartbeat,
    Hello,
    Initial,
    Join,
    Report,
    Subscription,
)

LAYERS = (LayerSpec("front", 5000, statistics=7), LayerSpec("wide", 256 * 4096))
PUSHED, REST, EVERYTHING = Range(0, 2), Range(2, 257), Range(0, 259)
LITTLE_NBYTES = 1 << 20
"""More than the buffers of both ends of a connection, and far less than the payload, 4 MiB."""


@pytest.fixture
def toy(toy):
    return replace(toy, layers=LAYERS)


def serve(toy):
    return ParameterServer(
        toy.layers,
        workers=1,
        steps=2,
        training=Training(SGD(0.9), Constant(0.05)),
        initial=toy.initial,
        initial_statistics=toy.initial_statistics,
        run="the-run",
        absence_s=0,
    )


def everything():
    """The bytes of every array of the one store in this process."""
    gc.collect()  # those of runs that are over
    (store,) = [found for found in gc.get_objects() if isinstance(found, Store)]
    return [array.tobytes() for array in (store.arena, *store.states, *store.contributions)]


async def send_header(raw, message, nbytes):
    """Send a header alone; return the stream until its end, and how much memory that took."""
    tracemalloc.start()
    try:
        raw.send_bytes(encode(message, nbytes))
        return await raw.read_to_end(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


async def fail_in_the_middle_of_a_push(toy, connect_raw, message, nbytes, words):
    async with serve(toy) as server, connect_raw(server.address) as raw:
        await raw.join(toy.grid)
        contribution = toy.contribution(await raw.pull(), 0, 0)
        start, stop = toy.grid.floats(*PUSHED)
        raw.push(0, contribution[start:stop], toy.grid, ranges=(PUSHED,))
        raw.send(Heartbeat(1, False, 0))  # answered behind the push
        await raw.read()
        before = everything()
        assert before[-1].startswith(contribution[start:stop].tobytes())
        _, peak_nbytes = await send_header(raw, message, nbytes)
        with pytest.raises(PeerError, match=words):
            await server.finished()
        assert everything() == before
    assert peak_nbytes < LITTLE_NBYTES


def gradients(*ranges, step=0, subscription=None):
    return Gradients(step, ranges, subscription, Report(0.5, 4))


PAYLOADS = {
    "shape: one value less": lambda right: right - 4,
    "shape: one value more": lambda right: right + 4,
    "dtype: float64": lambda right: right * 2,
    "dtype: float16": lambda right: right // 2,
    "count: no multiple of a float": lambda right: right + 1,
    "count: nothing": lambda right: 0,
    "count: a tebibyte": lambda right: 1 << 40,
    "count: all that 64 bits can say": lambda right: (1 << 64) - 1,
}


@pytest.mark.parametrize("declare", PAYLOADS.values(), ids=PAYLOADS)
async def test_a_payload_of_another_shape_dtype_or_count_is_refused_unread(
    toy, connect_raw, declare
):
    start, stop = toy.grid.floats(*REST)
    right = 4 * (stop - start)
    words = f"GRADIENTS declares a payload of {declare(right)} bytes, expected {right}"
    await fail_in_the_middle_of_a_push(toy, connect_raw, gradients(REST), declare(right), words)


HEADERS = {
    "range: one cell too many": (
        gradients(Range(2, 258)),
        "cells 2 to 259, expected ascending ranges within 0 to 258",
    ),
    "range: far outside": (gradients(Range(2**30, 1)), "expected ascending ranges within 0 to 258"),
    "range: backwards": (gradients(Range(4, 1), Range(2, 1)), "cells 2 to 2, expected ascending"),
    "range: overlapping": (gradients(Range(2, 3), Range(4, 2)), "cells 4 to 5, expected ascending"),
    "range: pushed before": (gradients(PUSHED), "cells 0 to 1 of step 0 were pushed before"),
    "step: the next": (gradients(REST, step=1), "gradients of step 1, expected step 0"),
    "step: a later one": (
        gradients(REST, step=7, subscription=Subscription(8, ((Range(0, 258),),))),
        "gradients of step 7, expected step 0",
    ),
    "kind: unasked": (Initial((EVERYTHING,)), "may not send INITIAL"),
}


@pytest.mark.parametrize(("message", "words"), HEADERS.values(), ids=HEADERS)
async def test_cells_or_a_step_that_must_not_come_are_refused_unread(
    toy, connect_raw, message, words
):
    await fail_in_the_middle_of_a_push(toy, connect_raw, message, 1 << 30, words)


STRANGERS = {
    "protocol": (lambda grid: [Hello(protocol=99)], "protocol-mismatch"),
    "run": (lambda grid: [Hello(run="another")], "run-mismatch"),
    "model, at the hello": (lambda grid: [Hello(fingerprint="f" * 32)], "model-mismatch"),
    "model, at the join": (
        lambda grid: [Hello(), Join("f" * 32, Subscription(0, ((Range(0, 258),),)))],
        "model-mismatch",
    ),
}


@pytest.mark.parametrize(("say", "code"), STRANGERS.values(), ids=STRANGERS)
async def test_strangers_of_another_run_or_model_are_told_so_and_the_run_waits_for_others(
    toy, connect_raw, say, code
):
    async with serve(toy) as server:
        before = everything()
        async with connect_raw(server.address) as raw:
            *first, last = say(toy.grid)
            for message in first:
                raw.send(message)
                await raw.read()
            raw.send(last)
            told, _ = await raw.read()
            assert isinstance(told, Error)
            assert told.code == code
        assert everything() == before
        async with connect_raw(server.address) as raw:
            await raw.join(toy.grid)
            assert (await raw.pull()).tobytes() == toy.initial.tobytes()
