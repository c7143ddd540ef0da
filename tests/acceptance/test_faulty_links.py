"""Links that deliver badly, but deliver: training over them ends with the very same bits."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from dynacomm_async.link import Link, LinkSettings, parse_fault
from dynacomm_async.optim import SGD, Constant
from dynacomm_async.server import ParameterServer, Training

STEPS, N_WORKERS = 4, 2
TRAINING = Training(SGD(0.9), Constant(0.05), weight_decay=0.01)
FAULTS = {
    "primes": ("slice:{},size=7919",),
    "random": ("slice:{},size=random,seed=11",),
    "stalls": ("stall:{}@bytes=50000,every=50000,for=0.02s",),
    "outage": ("down:{}@bytes=100000,for=0.1s",),
    "slow end": ("slow-close:{},for=0.05s",),
    "all": (
        "slice:{},size=random,seed=12",
        "stall:{}@bytes=60000,every=40000,for=0.02s",
        "slow-close:{},for=0.05s",
    ),
}


@pytest.mark.parametrize("way", ["up", "down", "both"])
@pytest.mark.parametrize("faults", FAULTS)
async def test_a_link_that_slices_stalls_and_ends_late_changes_no_bit(
    toy, loop_factory, faults, way
):
    settings = LinkSettings(
        delay_s=0.001, faults=tuple(parse_fault(text.format(way)) for text in FAULTS[faults])
    )
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(
            ParameterServer(
                toy.layers,
                workers=N_WORKERS,
                steps=STEPS,
                training=TRAINING,
                initial=toy.initial,
                initial_statistics=toy.initial_statistics,
            )
        )
        links = [
            await stack.enter_async_context(Link(settings, server.address))
            for _ in range(N_WORKERS)
        ]
        replicas = await asyncio.gather(
            *(asyncio.to_thread(toy.work, link.address) for link in links)
        )
        while not all(all(link.faults.values()) for link in links):  # noqa: ASYNC110 - no event says it
            await asyncio.sleep(0.001)  # the ends of the streams are still under way
    parameters, statistics = toy.replay(N_WORKERS, STEPS, TRAINING)
    for replica in replicas:
        assert replica.parameters.tobytes() == parameters.tobytes()
        assert replica.statistics.tobytes() == statistics.tobytes()
