"""Communication hides behind computing: a check that fails when it does not.

A server by hand holds the last parameters back until the first layer is being computed, and the
first layer's gradient is computed only when the last layer's has arrived at the server. Whoever
waits for everything before computing, or sends nothing before all is computed, is found out by
the order of events, not by a clock: patience runs out only where overlap is lost.
"""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from dynacomm_async.models import mlp
from dynacomm_async.schedule import Costs, LayerCosts, Plan, evaluate, make_plan
from dynacomm_async.testing import simulate, simulator
from dynacomm_async.wire.grid import Grid
from dynacomm_async.wire.messages import End, Gradients, Parameters
from dynacomm_async.worker import FixedPlan, Session, bind_engine, layer_specs, train
from dynacomm_async.worker.step import LayerComputed, StepMachine

BATCH = 4


class Witness:
    """Sees in which order things happen; ``lost`` names the passes whose overlap is lost.

    Patience is long, but for what is bound to come too late: there is no need to wait for that.
    """

    def __init__(self, hopeless):
        self._patience_s = {
            name: 0.2 if name == hopeless else 20 for name in ("forward", "backward")
        }
        self.lost = []
        self._loop = asyncio.get_running_loop()
        self._forward_began = asyncio.Event()
        self._push_arrived = threading.Event()

    # for the thread that computes

    def forward_of_first_begins(self):
        self._loop.call_soon_threadsafe(self._forward_began.set)

    def backward_of_first_begins(self):
        if not self._push_arrived.wait(self._patience_s["backward"]):
            self.lost.append("backward")

    # for the server

    async def before_last_pull(self):
        try:
            async with asyncio.timeout(self._patience_s["forward"]):
                await self._forward_began.wait()
        except TimeoutError:
            self.lost.append("forward")

    def first_push_is_here(self):
        self._push_arrived.set()


async def serve_by_hand(peer, grid, witness):
    """The only step of a run: every layer is a message of its own, both ways."""
    cells = [grid.layer_cells(layer) for layer in range(len(grid.layers))]

    def send(version, layer):
        first, last = grid.floats(*cells[layer])
        peer.send(Parameters(version, (cells[layer],)), bytes(4 * (last - first)))

    for layer in range(len(cells)):
        if layer == len(cells) - 1:
            await witness.before_last_pull()
        send(0, layer)
    for layer in reversed(range(len(cells))):
        message, _ = await peer.read()
        assert isinstance(message, Gradients)
        assert message.ranges == (cells[layer],)
        witness.first_push_is_here()
    for layer in range(len(cells)):
        send(1, layer)
    peer.send(End(1))
    await peer.read_to_end()


async def find_lost_overlap(listen_raw, wrap_step, *, hopeless=None):
    """Train one step of a network of the engine; ``wrap_step`` may spoil it."""
    network, witness = mlp(), Witness(hopeless)
    grid = Grid(layer_specs(network))
    n_layers = len(grid.layers)
    every = range(1, n_layers)
    plan = Plan.from_cuts("by hand", n_layers, every, every)

    class Watched:
        """An engine that tells the witness when the first layer is computed."""

        def __init__(self, engine):
            self.network, self.batch = engine.network, engine.batch
            self._engine = engine

        @property
        def loss(self):
            return self._engine.loss

        def step(self, images, labels, hooks, **options):
            hooks._step = wrap_step(hooks._step)
            before_forward, before_backward = hooks.before_forward, hooks.before_backward

            def forward(layer):
                before_forward(layer)
                if layer == 0:
                    witness.forward_of_first_begins()

            def backward(layer):
                before_backward(layer)
                if layer == 0:
                    witness.backward_of_first_begins()

            hooks.before_forward, hooks.before_backward = forward, backward
            self._engine.step(images, labels, hooks, **options)

    def work(address):
        images = np.zeros((BATCH, *network.input_shape), np.float32)
        with Session(address, plans=lambda grid, estimator: FixedPlan(plan)) as session:
            engine = Watched(bind_engine(session, network, BATCH))
            list(train(session, engine, lambda index: (images, np.zeros(BATCH, np.int64))))
            return list(session.metrics.steps)

    async with listen_raw() as server:
        working = asyncio.create_task(asyncio.to_thread(work, server.address))
        peer = await server.greet(grid)
        await serve_by_hand(peer, grid, witness)
        assert len(await working) == 1
    return witness.lost


class Wrapped:
    """A step with another behaviour."""

    def __init__(self, step):
        self._step = step

    def __getattr__(self, name):
        return getattr(self._step, name)


class PushesLast(Wrapped):
    """The classic: every gradient waits until the backward pass is over."""

    def __init__(self, step):
        super().__init__(step)
        self._held = []

    def gradient_ready(self, layer):
        self._held.append(layer)
        if layer == 0:
            for held in self._held:
                self._step.gradient_ready(held)


class PullsFirst(Wrapped):
    """Waits for all parameters before it computes anything."""

    def wait(self, layer):
        for each in range(len(self._step.session.grid.layers)):
            self._step.wait(each)


async def test_layers_are_computed_while_others_are_on_their_way_both_ways(listen_raw):
    assert await find_lost_overlap(listen_raw, lambda step: step) == []


@pytest.mark.parametrize(("wrap", "lost"), [(PushesLast, "backward"), (PullsFirst, "forward")])
async def test_the_check_finds_a_wait_that_costs_the_overlap_of_a_pass(listen_raw, wrap, lost):
    assert await find_lost_overlap(listen_raw, wrap, hopeless=lost) == [lost]


# -- on the fake clock ---------------------------------------------------------------------------


def even_costs(n_layers):
    layers = tuple(LayerCosts(f"layer{n}", 1, 10, 10, 10, 10) for n in range(n_layers))
    return Costs(layers, overhead_up_ns=0, overhead_down_ns=0)


def hidden_on_the_fake_clock(plan, costs):
    timeline = evaluate(plan, costs)
    return 1 - (simulate(plan, costs) - timeline.compute_ns) / timeline.busy_ns


class PushesLastMachine(StepMachine):
    """The same mistake in the step logic."""

    def __init__(self, layers, push, statistics=None):
        super().__init__(layers, push, statistics)
        self._held = []

    def handle(self, event):
        if not isinstance(event, LayerComputed):
            return super().handle(event)
        self._held.append(event)
        if event.layer:
            return []
        handle = super().handle
        return [instruction for held in self._held for instruction in handle(held)]


@pytest.mark.parametrize("n_layers", [2, 3, 10, 100])
def test_the_step_logic_hides_all_but_one_layer_of_many_and_half_of_that_if_pushes_wait(
    n_layers, monkeypatch
):
    # Each way one layer's transfer cannot hide: the first pull and the last push.
    costs = even_costs(n_layers)
    plan = make_plan("dynacomm", costs)
    assert hidden_on_the_fake_clock(plan, costs) == pytest.approx(1 - 1 / n_layers)

    monkeypatch.setattr(simulator, "StepMachine", PushesLastMachine)
    assert hidden_on_the_fake_clock(plan, costs) == pytest.approx((1 - 1 / n_layers) / 2)
