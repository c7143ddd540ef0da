"""kill -9 a worker in the middle of a push: the others go on without it, and soon.

Three workers; one is a process behind a slow link, the others are threads. It is killed while its
gradients are on the link, with the reset that its system would send, or, as if the whole machine
had gone, without a word. The round shrinks to the others, and another process joins in its place.
Nothing of the push that was cut off may count: the judge computes every step again in plain NumPy
from what each cell is said to be the mean of, and those cells are those that arrived whole.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter

import pytest

from dynacomm_async import failpoints
from dynacomm_async.link import Link, LinkSettings, parse_fault
from dynacomm_async.optim import SGD, Constant
from dynacomm_async.server import Mode, ParameterServer, Training
from dynacomm_async.wire.grid import LayerSpec

pytestmark = pytest.mark.timing

TRAINING = Training(SGD(0.9), Constant(0.02), weight_decay=0.01)
LAYERS = (LayerSpec("front", 50_000, decay=50_000), LayerSpec("back", 50_000))
HEARTBEAT_S = 1.0
RATE_BYTES_PER_S = 4e6
PUSH_S = 4 * 100_000 / RATE_BYTES_PER_S


class Seen:
    """What the server comes to, and when its steps end."""

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()
        self._ended = asyncio.Event()

    def on_step(self, record) -> None:
        self._ended.set()

    @property
    def n_cut(self) -> int:
        """Pushes that have begun to arrive, and have not arrived."""
        return self.places["server.receiving"] - self.places["server.before-push"]

    async def steps(self, n):
        """Return when so many more steps have ended."""
        for _ in range(n):
            self._ended.clear()
            await self._ended.wait()

    def __enter__(self):
        failpoints.arm(lambda name: self.places.update([name]))
        return self

    def __exit__(self, *exc):
        failpoints.disarm()


class Pace:
    """Lets the others take their time while they are alone: a new process needs a while."""

    def __init__(self) -> None:
        self.alone = threading.Event()

    def hold(self, session, step):
        if self.alone.is_set():
            time.sleep(0.1)


async def lose_one(server, seen, pace, faults, hits, numbers, way):
    """Start the third worker and lose it in a push; return how long the others took to go on."""
    settings = LinkSettings(rate_up_bytes_per_s=RATE_BYTES_PER_S)
    layers = [[spec.name, spec.count, spec.decay] for spec in LAYERS]
    told = {"layers": layers, "cuts": [1], "again": ["run-full"], "retry_s": 0}
    async with (
        Link(settings, server.address) as link,
        faults.WorkerLife(link.address, hits, **told) as life,
    ):
        for _ in range(numbers.randint(2, 3)):
            assert (await life.said()).isdecimal()
        pace.alone.clear()
        await asyncio.sleep(numbers.uniform(0.1, 1) * PUSH_S)  # the moment is the fault
        began = time.monotonic()
        if way == "silent":
            link.fire(parse_fault("stall,for=60s", on_demand=True))
        life.process.kill()
        if way == "reset":
            link.fire(parse_fault("reset", on_demand=True))
        await seen.steps(2)  # what the first needs may have arrived before
        took_s = time.monotonic() - began
        pace.alone.set()
        return took_s


async def lose_workers(toy, faults, hits, *, n_resets, n_silent):
    """Lose workers until so many pushes were cut off by a reset, and some in silence."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    numbers, toy = random.Random(seed), type(toy)(LAYERS)
    steps = 100 * (n_resets + n_silent) + 50
    pace, took_s = Pace(), {"reset": [], "silent": []}
    with Seen() as seen:
        async with ParameterServer(
            LAYERS,
            workers=3,
            steps=steps,
            training=TRAINING,
            initial=toy.initial,
            heartbeat_s=HEARTBEAT_S,
            absence_s=0,
            mode=Mode(on_leave="shrink"),
            on_step=seen.on_step,
        ) as server:
            others = [
                asyncio.create_task(
                    asyncio.to_thread(toy.work, server.address, pace.hold, strategy="layerwise")
                )
                for _ in range(2)
            ]
            for way, n in (("reset", n_resets), ("silent", n_silent)):
                wanted = seen.n_cut + n
                while seen.n_cut < wanted:
                    took = await lose_one(server, seen, pace, faults, hits, numbers, way)
                    took_s[way].append(took)
            pace.alone.clear()
            replicas = await asyncio.gather(*others)
            result = await server.finished()
    parameters, _ = toy.replay_records(result.records, TRAINING)
    for end in (result, *replicas):
        assert end.parameters.tobytes() == parameters.tobytes()
    for way, times in took_s.items():
        print(f"{way}: {len(times)} lost, the others went on after {max(times):.2f} s at most")
    print(f"{seen.n_cut} pushes were cut off in the middle")
    numbers_of_slots = Counter(
        len(slots) for record in result.records for _, slots in record.contributors
    )
    print(f"cells were the mean of (slots: ranges) {dict(numbers_of_slots)}")
    assert set(numbers_of_slots) == {2, 3}
    return took_s


@pytest.mark.slow
def test_a_worker_lost_in_a_push_leaves_the_others_going_on_without_a_trace_of_it(
    toy, faults, hits
):
    asyncio.run(lose_workers(toy, faults, hits, n_resets=3, n_silent=1))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_hundred_workers_lost_in_a_push_hold_nobody_up(toy, faults, hits):
    took_s = asyncio.run(lose_workers(toy, faults, hits, n_resets=100, n_silent=10))
    assert max(took_s["reset"]) <= 1.0
    assert max(took_s["silent"]) <= HEARTBEAT_S + 2.0
