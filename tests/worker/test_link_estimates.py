"""What a session makes of a real, emulated link, also where that changes under it.

The bounds are generous: on a busy machine the emulator is late, and the link really is slower.
``demos/benchmarks/estimates.py`` prints exact figures.
"""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from dynacomm_async.link import LinkProcess, LinkSettings
from dynacomm_async.schedule import Plan
from dynacomm_async.schedule.planners import PLANNERS
from dynacomm_async.server import ParameterServer
from dynacomm_async.worker import Session

pytestmark = pytest.mark.timing

BYTES_PER_S = 5e6
NS_PER_BYTE = 1e9 / BYTES_PER_S
OVERHEAD_S = 0.005
LAYERS = {"a": 500, "b": 20_000, "c": 3_000, "d": 30_000}
RATE_ERROR, OVERHEAD_ERROR = 0.3, 0.5


def train(address, strategy, n_steps=None):
    """Train to the end or for some steps; return both directions' estimates and the log."""
    with Session(address, LAYERS, strategy=strategy, retry_s=10) as session:
        for step in session.steps():
            for layer in LAYERS:
                step.wait(layer)
            for layer in reversed(LAYERS):
                session.gradients[session.slice_of(layer)] = 0
                step.gradient_ready(layer)
            if step.index + 1 == n_steps:
                break
        estimator = session.estimator
        if strategy == "joint":
            plans = [session.plans.plan_of(step) for step in range(session.welcome.steps)]
            return estimator.duplex.half, plans
        return [
            (link.ns_per_byte, link.overhead_ns, link.changes)
            for link in (estimator.down, estimator.up)
        ], list(session.plans.log)


async def run_over(settings, strategy, steps):
    initial = np.zeros(sum(LAYERS.values()), np.float32)
    server = ParameterServer(LAYERS, workers=1, steps=steps, initial=initial)
    async with server, LinkProcess(settings, tuple(server.address)) as link:
        return await asyncio.to_thread(train, str(link.address), strategy)


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", [name for name in PLANNERS if name in ("sequential", "layerwise", "dynacomm")]
)
async def test_rate_and_overhead_of_an_emulated_link_are_found_under_every_kind_of_plan(strategy):
    settings = LinkSettings(BYTES_PER_S, BYTES_PER_S / 2, overhead_s=OVERHEAD_S)
    expected = pytest.approx([NS_PER_BYTE, 2 * NS_PER_BYTE], rel=RATE_ERROR)
    overheads = pytest.approx(2 * [1e9 * OVERHEAD_S], rel=OVERHEAD_ERROR)
    found = []
    # Three steps tell overheads. This machine may stand still in those, but not every time.
    for _ in range(3):
        links, log = await run_over(settings, strategy, steps=15)
        assert log[0].reason.startswith("first estimate: ")
        found.append([list(values) for values in zip(*links, strict=True)][:2])
        if found[-1] == [expected, overheads]:
            return
    pytest.fail(f"rates and overheads were {found}, expected {[expected, overheads]}")


@pytest.mark.slow
async def test_a_link_that_becomes_slower_is_noticed_under_one_message_a_step():
    slower = BYTES_PER_S / 4
    settings = LinkSettings(
        BYTES_PER_S,
        BYTES_PER_S,
        overhead_s=OVERHEAD_S,
        # A step takes 0.1 s at first; a start that takes longer than this sees the slow link only.
        schedule=((0.0, BYTES_PER_S, BYTES_PER_S), (2.5, slower, slower)),
    )
    links, _ = await run_over(settings, "sequential", steps=40)

    for ns_per_byte, _, _ in links:
        assert ns_per_byte == pytest.approx(4 * NS_PER_BYTE, rel=RATE_ERROR)


@pytest.mark.slow
async def test_a_medium_that_both_directions_share_is_found_out_and_then_steps_keep_a_barrier():
    settings = LinkSettings(BYTES_PER_S, BYTES_PER_S, overhead_s=0.001, half_duplex=True)
    half, plans = await run_over(settings, "joint", steps=60)

    assert half is True
    # It is tried whether that is still so, but ever more rarely.
    late = [isinstance(plan, Plan) and plan.barrier for plan in plans[30:]]
    assert sum(late) > len(late) / 2
