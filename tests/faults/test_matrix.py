"""Every fault of a link, each way: training ends well, or with a named error before its deadline.

The link lies between server and workers; neither knows of it. Where training ends well, the judge
is a replay in plain NumPy: of synchronous training, or of the log of applied cells. A fault that
never happened fails the test.
"""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import AsyncExitStack
from typing import NamedTuple

import pytest

from dynacomm_async.errors import ChannelBroken, DynaCommError, PeerError
from dynacomm_async.link import Link, LinkSettings, parse_fault
from dynacomm_async.optim import SGD, Constant
from dynacomm_async.server import Mode, ParameterServer, Training
from dynacomm_async.transport import new_event_loop

TRAINING = Training(SGD(0.9), Constant(0.05), weight_decay=0.01)
STEPS, N_WORKERS = 4, 2
HEARTBEAT_S, ABSENCE_S, RETRY_S = 1.0, 1.5, 0.8
DEADLINE_S = 28.0
"""Far beyond what any case needs: what has not ended by then hangs."""


class Case(NamedTuple):
    """What a link does.

    Attributes:
        faults: as on the command line, with the direction left open.
        delay_s: one-way.
        rate: bytes a second in the direction that the case is about.
        lost: whether there is no way to get through.
    """

    faults: tuple[str, ...] = ()
    delay_s: float = 0.0
    rate: float | None = None
    lost: bool = False


CASES = {
    "latency": Case(delay_s=0.02),
    "bandwidth": Case(rate=1e6),
    "slices of a prime": Case(("slice:{},size=7919",)),
    "random slices": Case(("slice:{},size=random,seed=11",)),
    "short stalls": Case(("stall:{}@bytes=50000,every=50000,for=0.05s",)),
    "stalls longer than the limit": Case(("stall:{}@bytes=160000,for=60s",)),
    "resets": Case(("reset:{}@bytes=60000",)),
    "a reset of every connection at once": Case(("reset:{}@bytes=20",), lost=True),
    "a byte limit": Case(("cut:{}@bytes=60000",)),
    "a byte limit that nothing fits into": Case(("cut:{}@bytes=20",), lost=True),
    "slow close": Case(("slow-close:{},for=0.2s",)),
    "down for a while": Case(("down:{}@bytes=100000,for=0.2s",)),
    "down for good": Case(("down:{}@bytes=100000,for=600s",), lost=True),
    "all that can be borne": Case(
        (
            "slice:{},size=random,seed=12",
            "stall:{}@bytes=60000,every=40000,for=0.02s",
            "reset:{}@bytes=90000",
            "slow-close:{},for=0.05s",
        ),
        delay_s=0.002,
        rate=4e6,
    ),
}


def settings_of(case, way):
    return LinkSettings(
        rate_up_bytes_per_s=case.rate if way != "down" else None,
        rate_down_bytes_per_s=case.rate if way != "up" else None,
        delay_s=case.delay_s,
        faults=tuple(parse_fault(text.format(way)) for text in case.faults),
    )


MODES = {
    "synchronous": Mode(),
    "stale": Mode(on_leave="end", staleness=1),
    "asynchronous": Mode(on_leave="end", staleness=math.inf),
}


def serve(toy, mode, log):
    return ParameterServer(
        toy.layers,
        workers=N_WORKERS,
        steps=STEPS,
        training=TRAINING,
        initial=toy.initial,
        initial_statistics=toy.initial_statistics,
        heartbeat_s=HEARTBEAT_S,
        absence_s=ABSENCE_S,
        mode=mode,
        on_applied=log.append,
    )


async def have_happened(links):
    """Wait until each fault has; the ends of some streams may still be under way."""
    while not all(all(link.faults.values()) for link in links):  # noqa: ASYNC110 -- no event says it
        await asyncio.sleep(0.001)


@pytest.fixture(
    params=[
        pytest.param(new_event_loop, id="default"),
        pytest.param(asyncio.new_event_loop, id="stock", marks=pytest.mark.soak),
    ]
)
def loop_factory(request):
    return request.param


QUICK = {("synchronous", "up"), ("synchronous", "down"), ("stale", "both")}
"""What the short form has of modes and ways."""


@pytest.mark.parametrize(
    ("mode", "way"),
    [
        pytest.param(mode, way, marks=() if (mode, way) in QUICK else pytest.mark.soak)
        for mode in MODES
        for way in ("up", "down", "both")
    ],
)
@pytest.mark.parametrize("name", CASES)
async def test_training_over_a_faulty_link_ends_well_or_says_why_not(
    toy, loop_factory, name, mode, way
):
    case, log, made = CASES[name], [], {}
    settings = settings_of(case, way)
    async with asyncio.timeout(DEADLINE_S), AsyncExitStack() as stack:
        server = await stack.enter_async_context(serve(toy, MODES[mode], log))
        links = [
            await stack.enter_async_context(Link(settings, server.address))
            for _ in range(N_WORKERS)
        ]
        began = time.monotonic()
        ends = await asyncio.gather(
            *(
                asyncio.to_thread(toy.work, link.address, made=made, retry_s=RETRY_S)
                for link in links
            ),
            return_exceptions=True,
        )
        took_s = time.monotonic() - began
        await have_happened(links)
        if case.lost:
            for end in ends:
                assert isinstance(end, ChannelBroken | PeerError), end
            if server.memory_nbytes and "down" in name:  # it had begun: it has to end as well
                with pytest.raises(DynaCommError, match="was lost in step"):
                    await server.finished()
            return
        for end in ends:
            if isinstance(end, BaseException):
                raise end
        result = await server.finished()
    assert took_s > 2 * STEPS * case.delay_s  # it was there
    if case.rate is not None:
        assert took_s > 4 * STEPS * toy.grid.n_parameters / case.rate
    parameters, statistics = toy.replay_log(log, made, TRAINING)
    ends = [result, *ends] if mode == "synchronous" else [result]  # else each has its own last pull
    for end in ends:
        assert end.parameters.tobytes() == parameters.tobytes()
        assert end.statistics.tobytes() == statistics.tobytes()
    if mode == "synchronous":
        assert parameters.tobytes() == toy.replay(N_WORKERS, STEPS, TRAINING)[0].tobytes()
