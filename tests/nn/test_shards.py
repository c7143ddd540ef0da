"""Shards of a batch compute what the whole batch does."""

from __future__ import annotations

import threading
import tracemalloc

import numpy as np
import pytest

from dynacomm_async import models
from dynacomm_async.errors import ConfigError
from dynacomm_async.nn import (
    BatchNorm,
    Branches,
    Conv2d,
    Dense,
    Dropout,
    Flatten,
    MaxPool,
    Network,
    ReLU,
    Residual,
    Tanh,
    shards,
)

DRAW = (3, 1, 4)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "LEAST_FLOPS", 1)


def every_kind():
    """A network in which everything is that shards share or cut."""
    parts = [
        Conv2d(6, 3, padding=1, bias=False),
        BatchNorm(),
        ReLU(0.9),
        MaxPool(2),
        Residual([Conv2d(6, 3, padding=1, groups=6, bias=False), BatchNorm(), Tanh()]),
        Dropout(0.3),
        Branches([[Conv2d(3, 1), ReLU()], [Conv2d(33, 3, padding=1, groups=3), BatchNorm()]]),
        Conv2d(40, 3, padding=1),
        ReLU(),
        MaxPool(2),
        Flatten(),
        Dense(7),
        BatchNorm(),
        Dropout(0.5),
        Dense(4),
    ]
    return Network("every kind", parts, (8, 12, 3), 4)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_shards_give_the_gradients_of_the_whole_batch(threads, make_batch):
    network = every_kind()
    images, labels = make_batch(network, 7, 1, np.float64)
    engines = [
        network.bind(7, network.initialise(0).astype(np.float64), threads=count, smoothing=0.1)
        for count in (1, threads)
    ]
    losses = [engine.step(images, labels, draw=DRAW) for engine in engines]
    whole, cut = engines
    assert (whole.shards, cut.shards) == (1, threads)
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    np.testing.assert_allclose(cut.gradients, whole.gradients, rtol=0, atol=1e-11)
    np.testing.assert_allclose(cut.batch_statistics, whole.batch_statistics, rtol=1e-10)
    for engine in engines:
        engine.move_statistics()
    np.testing.assert_allclose(cut.predict(images[:5]), whole.predict(images[:5]), atol=1e-10)
    logits = [engine.forward(images, draw=DRAW).copy() for engine in engines]
    np.testing.assert_allclose(*logits, atol=1e-10)
    for engine in engines:
        engine.backward(np.ones((7, 4)))
    np.testing.assert_allclose(cut.gradients, whole.gradients, rtol=0, atol=1e-10)


def test_the_same_number_of_shards_gives_the_same_bits(make_batch):
    network = models.build("resnet20")
    images, labels = make_batch(network, 6, 0)
    found = set()
    for _ in range(4):
        engine = network.bind(6, network.initialise(0), threads=2)
        for _ in range(2):
            engine.step(images, labels)
        found.add((engine.gradients.tobytes(), engine.batch_statistics.tobytes(), engine.loss))
    assert len(found) == 1


class Watch:
    """Notes the order of hooks, on which thread, and what gradients were there."""

    def __init__(self, engine):
        self.calls, self.threads, self.gradients = [], set(), {}
        self._engine = engine

    def __getattr__(self, name):
        def note(layer):
            self.calls.append((name, layer))
            self.threads.add(threading.current_thread())
            self.gradients[name, layer] = self._engine.gradients.copy()

        return note


def test_hooks_are_called_in_order_on_the_callers_thread_with_sums_complete(make_batch):
    network = every_kind()
    engine = network.bind(6, network.initialise(0), threads=3)
    images, labels = make_batch(network, 6, 0)
    watch = Watch(engine)
    engine.step(images, labels, watch, draw=DRAW)
    there, back = range(len(network.layers)), range(len(network.layers) - 1, -1, -1)
    forward = [(f"{when}_forward", layer) for layer in there for when in ("before", "after")]
    backward = [(f"{when}_backward", layer) for layer in back for when in ("before", "after")]
    assert watch.calls == forward + backward
    assert watch.threads == {threading.current_thread()}
    end = network.parameters
    for layer in back:
        start = end - network.layers[layer].count
        then = watch.gradients["after_backward", layer][start:end]
        assert then.tobytes() == engine.gradients[start:end].tobytes()
        assert not watch.gradients["before_backward", layer][start:end].any()
        end = start


def test_parameters_may_be_overwritten_when_a_layers_backward_has_ended(make_batch):
    network = every_kind()
    images, labels = make_batch(network, 6, 0)
    expected = network.bind(6, network.initialise(0), threads=2)
    expected.step(images, labels, draw=DRAW)
    engine = network.bind(6, network.initialise(0), threads=2)
    ends = np.cumsum([layer.count for layer in network.layers])

    class Spoil:
        def before_forward(self, layer):
            pass

        after_forward = before_backward = before_forward

        def after_backward(self, layer):
            engine.parameters[ends[layer] - network.layers[layer].count : ends[layer]] = np.nan

    engine.step(images, labels, Spoil(), draw=DRAW)
    assert engine.gradients.tobytes() == expected.gradients.tobytes()


@pytest.mark.parametrize(
    "name", ["before_forward", "after_forward", "before_backward", "after_backward"]
)
def test_what_a_hook_raises_ends_the_step_and_all_threads(name, make_batch):
    network = every_kind()
    images, labels = make_batch(network, 6, 0)
    engine = network.bind(6, network.initialise(0), threads=3)
    expected = engine.step(images, labels, draw=DRAW)
    before = threading.active_count()

    class Failing(Watch):
        def __getattr__(self, asked):
            def call(layer):
                if (asked, layer) == (name, 2):
                    raise KeyboardInterrupt

            return call

    with pytest.raises(KeyboardInterrupt):
        engine.step(images, labels, Failing(engine), draw=DRAW)
    assert threading.active_count() == before
    assert engine.step(images, labels, draw=DRAW) == expected


def test_small_networks_and_batches_are_cut_into_fewer_shards(monkeypatch):
    monkeypatch.undo()
    assert models.build("lenet").bind(32, threads=2).shards == 1
    assert models.build("resnet20").bind(32, threads=2).shards == 2
    assert models.build("resnet20").bind(8, threads=4).shards == 1
    assert models.build("vgg_small").bind(2, threads=4).shards == 2
    with pytest.raises(ConfigError, match="threads is 0"):
        models.build("lenet").bind(32, threads=0)


def test_a_step_of_shards_after_the_first_allocates_nothing_large(make_batch):
    network = models.build("resnet20")
    engine = network.bind(16, network.initialise(0), threads=2)
    images, labels = make_batch(network, 16, 0)
    engine.step(images, labels)
    tracemalloc.start()
    try:
        engine.step(images, labels)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * 160_000  # as in one shard: buffers in which NumPy casts masks


def test_the_memory_of_all_shards_is_reported():
    network = models.build("resnet20")
    arenas = [np.zeros(network.parameters, np.float32) for _ in range(2)]
    tracemalloc.start()
    try:
        engine = network.bind(16, *arenas, threads=2)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert engine.memory.total == pytest.approx(held, rel=0.1)
