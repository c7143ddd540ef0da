"""A server and its workers over loopback: the result is that of one process, whatever the plans."""

from __future__ import annotations

import asyncio
import math
import random
import socket
from contextlib import AsyncExitStack

import numpy as np
import pytest

from dynacomm_async.errors import ConfigError, PeerError, ShapeError
from dynacomm_async.link import Link, LinkSettings
from dynacomm_async.optim import SGD, Adam, Constant, StepDecay
from dynacomm_async.ranges import CELL_NBYTES, Range
from dynacomm_async.schedule import Plan
from dynacomm_async.schedule.dispatch import Policy
from dynacomm_async.schedule.plan import PolicyPlan
from dynacomm_async.schedule.planners import PLANNERS
from dynacomm_async.server.server import ParameterServer
from dynacomm_async.server.store import LayerOptions, Training
from dynacomm_async.transport import Address
from dynacomm_async.wire.frame import MessageKind
from dynacomm_async.wire.grid import LayerSpec
from dynacomm_async.wire.messages import Leave, Parameters
from dynacomm_async.worker.planning import FixedPlan
from dynacomm_async.worker.session import Session

TRAINING = Training(
    SGD(0.9, nesterov=True),
    StepDecay(0.05, 4, 0.5),
    weight_decay=0.01,
    layers={"tiny": LayerOptions(rate_scale=2.0), "wide": LayerOptions(weight_decay=0.1)},
)


def serve(toy, *, workers=1, steps=6, training=TRAINING, **options):
    options = {"initial": toy.initial, "initial_statistics": toy.initial_statistics} | options
    options = {"layers": toy.layers} | options
    return ParameterServer(workers=workers, steps=steps, training=training, **options)


async def run_workers(toy, address, n_workers, **options):
    work = [asyncio.to_thread(toy.work, address, **options) for _ in range(n_workers)]
    return sorted(await asyncio.gather(*work), key=lambda replica: replica.slot)


def random_plans(seed):
    """A plans factory with cuts of its own for every session."""
    numbers = random.Random(seed)

    def make(grid, estimator):
        n_layers = len(grid.layers)
        pull, push = (
            [cut for cut in range(1, n_layers) if numbers.random() < 0.5] for _ in range(2)
        )
        return FixedPlan(Plan.from_cuts("random", n_layers, pull, push))

    return make


@pytest.mark.parametrize("n_workers", [1, 2, 3])
async def test_workers_and_server_end_with_the_bits_of_a_single_process(
    toy, n_workers, loop_factory
):
    async with serve(toy, workers=n_workers) as server:
        replicas = await run_workers(toy, server.address, n_workers)
        result = await server.finished()

    parameters, statistics = toy.replay(n_workers, 6, TRAINING)
    assert [replica.slot for replica in replicas] == list(range(n_workers))
    for end in (result, *replicas):
        assert end.parameters.tobytes() == parameters.tobytes()
        assert end.statistics.tobytes() == statistics.tobytes()


@pytest.mark.parametrize("training", [Training.plain(), Training(Adam(), Constant(0.01))])
async def test_other_update_rules_end_with_the_bits_of_a_single_process(toy, training):
    async with serve(toy, workers=2, training=training) as server:
        await run_workers(toy, server.address, 2)
        result = await server.finished()

    parameters, statistics = toy.replay(2, 6, training)
    assert result.parameters.tobytes() == parameters.tobytes()
    assert result.statistics.tobytes() == statistics.tobytes()


@pytest.mark.parametrize("strategy", [*PLANNERS, "random cuts"])
async def test_the_result_is_the_same_under_every_strategy_and_any_cuts(toy, strategy):
    options = {"plans": random_plans(5)} if strategy == "random cuts" else {"strategy": strategy}
    async with serve(toy, workers=2, steps=8) as server:
        await run_workers(toy, server.address, 2, **options)
        result = await server.finished()

    assert result.parameters.tobytes() == toy.replay(2, 8, TRAINING)[0].tobytes()


async def test_a_large_layer_is_updated_a_mebibyte_at_a_time_to_the_same_bits(toy):
    sizes = []

    class Watched:
        n_states = 1

        def __init__(self):
            self._rule = SGD(0.9)

        def update(self, parameters, *args, **options):
            sizes.append(parameters.nbytes)
            self._rule.update(parameters, *args, **options)

    toy = type(toy)((LayerSpec("big", 130 * 4096 + 5, decay=300_000), LayerSpec("small", 7)))
    async with serve(
        toy, workers=2, steps=2, training=Training(Watched(), Constant(0.1))
    ) as server:
        await run_workers(toy, server.address, 2)
        result = await server.finished()

    expected, _ = toy.replay(2, 2, Training(SGD(0.9), Constant(0.1)))
    assert result.parameters.tobytes() == expected.tobytes()
    assert max(sizes) <= 1 << 20


def counts(half, toy):
    """How many messages one direction of a plan makes of the model; a policy's depend on time."""
    if not isinstance(half, Policy):
        return [len(half)]
    sizes = [4 * spec.count for spec in toy.layers]
    uncut = max(sizes) if half.whole_layers else CELL_NBYTES
    room = max(half.cap_nbytes or math.inf, uncut)
    fewest = sum(math.ceil(size / room) for size in (sizes if half.one_layer else [sum(sizes)]))
    return range(fewest, toy.grid.n_cells + 1)


@pytest.mark.parametrize("strategy", [*PLANNERS, "random cuts", "slices"])
async def test_messages_on_the_link_are_those_of_each_steps_plan(toy, strategy):
    n_workers, steps = 2, 7
    slices = PolicyPlan("slices", 4, Policy(8192, one_layer=True), Policy(4096))
    made = {"random cuts": random_plans(9), "slices": lambda *_: FixedPlan(slices)}
    options = {"plans": made[strategy]} if strategy in made else {"strategy": strategy}
    async with serve(toy, workers=n_workers, steps=steps) as server, AsyncExitStack() as stack:
        links = [
            await stack.enter_async_context(Link(LinkSettings(), to=tuple(server.address)))
            for _ in range(n_workers)
        ]
        work = [asyncio.to_thread(toy.work, link.address, **options) for link in links]
        replicas = await asyncio.gather(*work)
        await server.finished()

    for link, replica in zip(links, replicas, strict=True):
        plan_of = replica.session.plans.plan_of
        pushed = link.counters.up.kinds[MessageKind.GRADIENTS].steps
        pulled = link.counters.down.kinds[MessageKind.PARAMETERS].steps
        assert pushed.keys() == set(range(steps))
        assert pulled.keys() == set(range(steps + 1))
        assert not {s: n for s, n in pushed.items() if n not in counts(plan_of(s).push, toy)}
        assert not {s: n for s, n in pulled.items() if n not in counts(plan_of(s).pull, toy)}
        others = {kind for tally in (link.counters.up, link.counters.down) for kind in tally.kinds}
        assert MessageKind.ERROR not in others


async def test_losses_are_the_mean_in_rank_order_and_images_the_sum(toy):
    records = []
    async with serve(toy, workers=3, steps=5, on_step=records.append) as server:
        await run_workers(toy, server.address, 3)
        result = await server.finished()

    expected = [sum(toy.loss(slot, step) for slot in range(3)) / 3 for step in range(5)]
    assert result.losses == expected
    assert [record.images for record in result.records] == [1 + 2 + 3] * 5
    assert [record.index for record in result.records] == list(range(5))
    assert list(result.records) == records
    ends = [record.ended_ns for record in records]
    assert ends == sorted(ends)


async def test_a_step_without_every_loss_has_none(toy):
    async with serve(toy, steps=1) as server:

        def work():
            with Session(server.address) as session:
                for step in session.steps():
                    for spec in toy.layers:
                        step.wait(spec.name)
                    for spec in reversed(toy.layers):
                        step.gradient_ready(spec.name)

        await asyncio.to_thread(work)
        result = await server.finished()

    assert result.losses == [None]


async def test_workers_are_told_the_settings_and_the_layers(toy):
    seen = {}

    def look(session, step):
        seen.update(session.settings, layers=session.welcome.layers, run=session.welcome.run)

    settings = {"model": "toy", "batch": 32, "rate": 0.5, "nested": {"a": [1, 2]}}
    async with serve(toy, steps=1, settings=settings, run="the-run") as server:
        await asyncio.to_thread(toy.work, server.address, look, layers=None)
        await server.finished()

    assert seen == settings | {"layers": toy.layers, "run": "the-run"}


async def test_the_strategy_in_the_settings_is_followed_unless_the_worker_names_another(toy):
    seen = []

    def look(session, step):
        seen.append(session.plans._planner)

    async with serve(toy, workers=2, steps=1, settings={"strategy": "sequential"}) as server:
        await asyncio.gather(
            asyncio.to_thread(toy.work, server.address, look),
            asyncio.to_thread(toy.work, server.address, look, strategy="layerwise"),
        )
        await server.finished()

    assert set(seen) == {PLANNERS["sequential"], PLANNERS["layerwise"]}


# -- a server without a model --------------------------------------------------------------------


async def test_a_server_without_a_model_takes_layers_and_values_from_its_first_member(toy):
    async with serve(toy, workers=2, layers=None, initial=None, initial_statistics=None) as server:
        assert server.memory_nbytes is None
        await run_workers(
            toy,
            server.address,
            2,
            initial=toy.initial,
            initial_statistics=toy.initial_statistics,
        )
        result = await server.finished()

    parameters, statistics = toy.replay(2, 6, TRAINING)
    assert result.parameters.tobytes() == parameters.tobytes()
    assert result.statistics.tobytes() == statistics.tobytes()


async def test_a_server_with_layers_but_no_values_takes_the_values_from_its_first_member(toy):
    async with serve(toy, workers=1, initial=None, initial_statistics=None) as server:
        await run_workers(
            toy,
            server.address,
            1,
            layers=None,
            initial=toy.initial,
            initial_statistics=toy.initial_statistics,
        )
        result = await server.finished()

    assert result.parameters.tobytes() == toy.replay(1, 6, TRAINING)[0].tobytes()


async def test_a_first_member_without_initial_values_is_told_so_and_its_rank_is_free_again(toy):
    async with serve(toy, initial=None, initial_statistics=None) as server:
        with pytest.raises(ShapeError, match="asks this worker for them: pass initial="):
            await asyncio.to_thread(toy.work, server.address)
        with pytest.raises(ShapeError, match=r"initial: float32 of shape \(1,\), expected"):
            await asyncio.to_thread(toy.work, server.address, initial=np.zeros(1, np.float32))
        replica = await asyncio.to_thread(
            toy.work,
            server.address,
            initial=toy.initial,
            initial_statistics=toy.initial_statistics,
        )
        await server.finished()

    assert replica.parameters.tobytes() == toy.replay(1, 6, TRAINING)[0].tobytes()


async def test_neither_side_having_layers_is_one_clear_error(toy):
    async with serve(toy, layers=None, initial=None, initial_statistics=None) as server:
        with pytest.raises(ShapeError, match="neither the server nor this worker has a layer"):
            await asyncio.to_thread(toy.work, server.address, layers=None)


# -- bad settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": 0}, "0 workers, expected at least 1"),
        ({"steps": 0}, "0 steps, expected at least 1"),
        ({"heartbeat_s": 0.0}, "a heartbeat of 0 s, expected over 0"),
        ({"absence_s": -1.0}, "an absence of -1 s, expected 0 or more"),
        ({"layers": None}, "without a layer table"),
        ({"initial": np.zeros(3, np.float32)}, r"float32 of shape \(3,\), expected"),
        ({"layers": []}, "no layers with parameters"),
        ({"settings": {"model": object()}}, "settings cannot be sent to workers .*plain values"),
        ({"settings": {1: "a"}}, "settings cannot be sent to workers .*text keys"),
        ({"settings": {"a": 2**64}}, "settings cannot be sent to workers"),
        ({"settings": {"a": {("b",): 1}}}, "settings cannot be sent to workers"),
        ({"layers": [LayerSpec("a", 1), LayerSpec("a", 1)]}, "two layers are named 'a'"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(toy, options, words):
    with pytest.raises(ConfigError, match=words):
        serve(toy, **options)


async def test_a_port_in_use_and_an_open_address_are_refused(toy):
    async with serve(toy) as server:
        with pytest.raises(ConfigError, match=f"cannot listen on {server.address}: "):
            async with serve(toy, listen=server.address):
                pass
    with pytest.raises(ConfigError, match="lets other machines in"):
        async with serve(toy, listen=Address("0.0.0.0", 0)):
            pass


# -- the end -------------------------------------------------------------------------------------


async def test_leaving_early_tells_the_workers_that_the_server_stopped(toy):
    greeted = asyncio.Event()
    loop = asyncio.get_running_loop()

    def layers(settings):
        loop.call_soon_threadsafe(greeted.set)
        return toy.layers

    async with serve(toy, workers=2) as server:
        work = asyncio.create_task(asyncio.to_thread(toy.work, server.address, layers=layers))
        await greeted.wait()

    with pytest.raises(PeerError, match="stopped before the run ended") as failure:
        await work
    assert failure.value.code == "server-stopped"
    with pytest.raises(PeerError, match="stopped before the run ended"):
        await server.finished()


async def test_an_update_rule_that_raises_fails_the_run_with_its_message(toy):
    class Broken:
        n_states = 0

        def update(self, parameters, gradient, states, *, step, rate, decay):
            if step == 2:
                raise ZeroDivisionError("the rule of the owner broke")

    async with serve(toy, workers=2, training=Training(Broken(), Constant(0.1))) as server:
        work = [asyncio.create_task(asyncio.to_thread(toy.work, server.address)) for _ in "ab"]
        with pytest.raises(PeerError, match="the rule of the owner broke") as failure:
            await server.finished()
        for failed in await asyncio.gather(*work, return_exceptions=True):
            assert isinstance(failed, PeerError)
            assert failed.code == "server-failed"
            assert "the rule of the owner broke" in str(failed)

    assert failure.value.code == "server-failed"
    assert isinstance(failure.value.__cause__, ZeroDivisionError)


async def test_a_callback_that_raises_fails_the_run_and_names_the_kind_of_error(toy):
    def on_step(record):
        raise KeyError(record.index)

    async with serve(toy, on_step=on_step) as server:
        with pytest.raises(PeerError, match=r"failed in step 1: KeyError: 0"):
            await asyncio.to_thread(toy.work, server.address)
        with pytest.raises(PeerError, match=r"failed in step 1: KeyError: 0"):
            await server.finished()


async def test_the_bits_survive_a_slow_link_that_all_workers_share(toy):
    slow = LinkSettings(
        rate_down_bytes_per_s=20e6,
        rate_up_bytes_per_s=10e6,
        delay_s=0.002,
        overhead_s=0.0002,
        half_duplex=True,
        shared=True,
    )
    async with (
        serve(toy, workers=3, steps=5) as server,
        Link(slow, to=tuple(server.address)) as link,
    ):
        replicas = await run_workers(toy, link.address, 3, plans=random_plans(4))
        result = await server.finished()

    parameters, statistics = toy.replay(3, 5, TRAINING)
    for end in (result, *replicas):
        assert end.parameters.tobytes() == parameters.tobytes()
        assert end.statistics.tobytes() == statistics.tobytes()


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
async def test_it_serves_over_ipv6(toy):
    async with serve(toy, listen=Address("::1", 0)) as server:
        await asyncio.to_thread(toy.work, server.address)
        result = await server.finished()

    assert result.parameters.tobytes() == toy.replay(1, 6, TRAINING)[0].tobytes()


async def test_a_model_goes_with_the_member_that_brought_it_if_training_has_not_begun(toy):
    async with serve(toy, workers=2, layers=None, initial=None, initial_statistics=None) as server:
        larger = [LayerSpec(spec.name, spec.count + 1) for spec in toy.grid.layers]
        initial = np.zeros(sum(spec.count for spec in larger), np.float32)
        other = Session(server.address, larger, initial=initial)
        await asyncio.to_thread(other.__enter__)
        async with asyncio.timeout(5):
            while server.memory_nbytes is None:  # noqa: ASYNC110 -- nothing announces it
                await asyncio.sleep(0)
            await asyncio.to_thread(other.close)
            while server.memory_nbytes is not None:  # noqa: ASYNC110
                await asyncio.sleep(0)
        await run_workers(
            toy,
            server.address,
            2,
            initial=toy.initial,
            initial_statistics=toy.initial_statistics,
        )
        result = await server.finished()

    assert result.parameters.tobytes() == toy.replay(2, 6, TRAINING)[0].tobytes()


def test_statistics_without_parameters_are_refused_rather_than_ignored(toy):
    with pytest.raises(ConfigError, match="initial statistics without initial parameters"):
        ParameterServer(toy.layers, workers=1, steps=1, initial_statistics=toy.initial_statistics)


@pytest.mark.parametrize("merged", [False, True])
async def test_the_first_parameters_of_a_step_tell_the_timing_of_the_one_before(
    toy, connect_raw, merged
):
    grid = toy.grid
    gradients = np.ones(grid.n_floats, np.float32)
    pieces = (Range(0, grid.n_parameter_cells), grid.statistics_cells)
    ranges = (Range(0, grid.n_cells),) if merged else pieces
    async with serve(toy, steps=3) as server, connect_raw(server.address) as worker:
        await worker.join(grid)
        await worker.pull()
        for step in range(3):
            worker.push(step, gradients, grid, ranges=ranges)
            message, _ = await worker.read()
            assert isinstance(message, Parameters)
            assert message.version == step + 1
            assert message.timing is not None
        worker.send(Leave())
        assert (await server.finished()).steps == 3
