"""Connections that are cut at any byte, in either direction: the result is that of no cut at all.

The judge is a replay in plain NumPy; what the server counts is not asked.
"""

from __future__ import annotations

import asyncio
import random

import pytest

from dynacomm_async.optim import SGD, Constant
from dynacomm_async.server.server import ParameterServer
from dynacomm_async.server.store import Training
from dynacomm_async.wire.grid import LayerSpec

TRAINING = Training(SGD(0.9), Constant(0.05), weight_decay=0.01)
LAYERS = (
    LayerSpec("a", 5, decay=2, statistics=3),
    LayerSpec("b", 4097, decay=4097),
    LayerSpec("c", 1),
    LayerSpec("d", 700, decay=1),
)
STEPS = 3


def serve(toy, n_workers, **options):
    options = {"initial": toy.initial, "initial_statistics": toy.initial_statistics} | options
    return ParameterServer(toy.layers, workers=n_workers, steps=STEPS, training=TRAINING, **options)


def check(toy, n_workers, result, arenas):
    parameters, statistics = toy.replay(n_workers, STEPS, TRAINING)
    assert result.parameters.tobytes() == parameters.tobytes()
    assert result.statistics.tobytes() == statistics.tobytes()
    for arena in arenas:
        assert arena.tobytes() == parameters.tobytes() + statistics.tobytes()


QUICK = {1, 3, 5}
"""Seeds of the short form: the least cuts."""


@pytest.mark.parametrize(
    "seed",
    [pytest.param(seed, marks=() if seed in QUICK else pytest.mark.soak) for seed in range(25)],
)
async def test_random_cuts_end_with_the_bits_of_a_single_process(toy, loop_factory, faults, seed):
    print(f"seed {seed}")
    toy, numbers = type(toy)(LAYERS), random.Random(seed)
    longest = numbers.choice([30_000, 60_000, 120_000])

    def budgets():
        while True:
            yield numbers.randint(1, longest)

    async with serve(toy, 2) as server:
        breaking = faults.Breaking(server, budgets(), numbers)
        arenas = await asyncio.gather(
            *(faults.work_in_memory(toy, breaking, numbers) for _ in range(2))
        )
        result = await server.finished()
    assert breaking.cuts > 0
    check(toy, 2, result, arenas)


async def test_one_cut_at_each_place_of_the_stream_changes_no_bit(toy, loop_factory, faults):
    """A single worker; the first connection is cut after n bytes, for many n."""
    toy = type(toy)(LAYERS)
    n_cuts = 0
    for nbytes in [*range(1, 1200, 97), *range(1200, 140_000, 7919)]:
        numbers = random.Random(nbytes)
        budgets = iter([nbytes])
        async with serve(toy, 1) as server:
            limited = faults.Breaking(server, _then_none(budgets), numbers)
            arenas = [await faults.work_in_memory(toy, limited, numbers)]
            result = await server.finished()
        n_cuts += limited.cuts
        check(toy, 1, result, arenas)
    assert n_cuts > 20


def _then_none(budgets):
    yield from budgets
    while True:
        yield None
