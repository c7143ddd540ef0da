"""Steps, hooks, statistics, evaluation, determinism and memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from dynacomm_async import models
from dynacomm_async.errors import ConfigError, ShapeError
from dynacomm_async.nn import (
    BatchNorm,
    Conv2d,
    Dense,
    Dropout,
    Flatten,
    GlobalAvgPool,
    MaxPool,
    Network,
    PadShortcut,
    ReLU,
    Residual,
    shards,
)
from dynacomm_async.nn.kernels import draw_factors, elementwise


class Recorder:
    """Notes every call, and the state of the gradients then."""

    def __init__(self, engine=None):
        self.calls = []
        self.gradients = []
        self._engine = engine

    def _note(self, name, layer):
        self.calls.append((name, layer))
        if self._engine is not None:
            self.gradients.append(self._engine.gradients.copy())

    def before_forward(self, layer):
        self._note("before_forward", layer)

    def after_forward(self, layer):
        self._note("after_forward", layer)

    def before_backward(self, layer):
        self._note("before_backward", layer)

    def after_backward(self, layer):
        self._note("after_backward", layer)


@pytest.fixture
def normalised():
    """A residual network with batch norm, small enough for many steps."""
    parts = [
        Conv2d(8, 3, padding=1, bias=False),
        BatchNorm(),
        ReLU(),
        Residual([Conv2d(16, 3, 2, 1, bias=False), BatchNorm()], [PadShortcut(16, 2)]),
        ReLU(),
        Residual([Conv2d(16, 3, 1, 1), ReLU()], [Conv2d(16, 1, bias=False), BatchNorm()]),
        ReLU(),
        GlobalAvgPool(),
        Dense(4),
    ]
    return Network("normalised", parts, (8, 8, 3), 4)


@pytest.fixture
def pooled():
    """A plain network with every fused operation."""
    parts = [Conv2d(6, 3, padding=1), ReLU(), MaxPool(2), Conv2d(8, 3), ReLU(), Flatten(), Dense(4)]
    return Network("pooled", parts, (9, 8, 1), 4)


@pytest.mark.parametrize("name", ["lenet", "resnet20"])
def test_hooks_go_forward_then_backward_once_for_each_layer(name, make_batch, make_engine):
    network = models.build(name)
    engine = make_engine(network, 2)
    hooks = Recorder()
    assert engine.step(*make_batch(network, 2, 0), hooks) == engine.loss
    count = len(network.layers)
    expected = []
    for layer in range(count):
        expected += [("before_forward", layer), ("after_forward", layer)]
    for layer in reversed(range(count)):
        expected += [("before_backward", layer), ("after_backward", layer)]
    assert hooks.calls == expected


def test_parameters_are_read_only_after_before_forward(normalised, make_batch, make_engine):
    engine = make_engine(normalised, 4)
    images, labels = make_batch(normalised, 4, 0)
    expected = engine.step(images, labels), engine.gradients.copy()
    right = engine.parameters.copy()
    offsets = np.cumsum([0, *(layer.count for layer in normalised.layers)])
    engine.parameters[:] = np.nan

    class Late(Recorder):
        def before_forward(self, layer):
            part = slice(offsets[layer], offsets[layer + 1])
            engine.parameters[part] = right[part]

    assert engine.step(images, labels, Late()) == expected[0]
    assert np.array_equal(engine.gradients, expected[1])


def test_parameters_may_be_overwritten_after_after_backward(normalised, make_batch, make_engine):
    engine = make_engine(normalised, 4)
    images, labels = make_batch(normalised, 4, 0)
    engine.step(images, labels)
    expected = engine.gradients.copy()
    offsets = np.cumsum([0, *(layer.count for layer in normalised.layers)])

    class Early(Recorder):
        def after_backward(self, layer):
            engine.parameters[offsets[layer] : offsets[layer + 1]] = np.nan

    engine.step(images, labels, Early())
    assert np.array_equal(engine.gradients, expected)


def test_gradients_change_only_between_the_backward_hooks(normalised, make_batch, make_engine):
    engine = make_engine(normalised, 4)
    hooks = Recorder(engine)
    offsets = np.cumsum([0, *(layer.count for layer in normalised.layers)])
    engine.gradients[:] = np.inf
    engine.step(*make_batch(normalised, 4, 0), hooks)
    final = engine.gradients.copy()
    for (name, layer), seen in zip(hooks.calls, hooks.gradients, strict=True):
        done = offsets[layer] if name == "after_backward" else offsets[layer + 1]
        if name.endswith("forward"):
            done = len(final)
        assert np.isinf(seen[:done]).all()
        assert np.array_equal(seen[done:], final[done:])


def test_what_a_hook_raises_reaches_the_caller_and_the_engine_lives_on(
    pooled, make_batch, make_engine
):
    engine = make_engine(pooled, 3)
    images, labels = make_batch(pooled, 3, 0)
    expected = engine.step(images, labels), engine.gradients.copy()

    class Broken(Recorder):
        def before_backward(self, layer):
            raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        engine.step(images, labels, Broken())
    assert engine.step(images, labels) == expected[0]
    assert np.array_equal(engine.gradients, expected[1])


def test_step_equals_forward_loss_and_backward(pooled, make_batch, make_engine):
    engine = make_engine(pooled, 3)
    images, labels = make_batch(pooled, 3, 0)
    loss = engine.step(images, labels)
    expected = engine.gradients.copy()
    logits = engine.forward(images).astype(np.float64)
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert loss == pytest.approx(-np.log(softmax[range(3), labels]).mean(), rel=1e-6)
    softmax[range(3), labels] -= 1
    engine.backward((softmax / 3).astype(np.float32))
    np.testing.assert_allclose(engine.gradients, expected, rtol=1e-4, atol=1e-7)


def test_loss_of_huge_logits_is_finite(pooled, make_batch, make_engine):
    engine = make_engine(pooled, 3)
    engine.parameters *= 1e4
    loss = engine.step(*make_batch(pooled, 3, 0))
    assert np.isfinite(loss)
    assert np.isfinite(engine.gradients).all()


def test_batch_statistics_are_the_mean_and_the_unbiased_variance(make_batch, make_engine):
    network = Network("n", [BatchNorm(), GlobalAvgPool(), Dense(3)], (5, 4, 2), 3)
    engine = make_engine(network, 6)
    images, labels = make_batch(network, 6, 0)
    engine.step(images + np.float32(3), labels)
    flat = images.reshape(-1, 2).astype(np.float64) + 3
    expected = [*flat.mean(0), *flat.var(0, ddof=1)]
    np.testing.assert_allclose(engine.batch_statistics, expected, rtol=1e-6)
    assert engine.statistics.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("first", [3000, 0])
def test_variance_is_right_far_from_zero_and_where_the_first_image_is_an_outlier(
    threads, first, monkeypatch
):
    monkeypatch.setattr(shards, "LEAST_FLOPS", 1)
    monkeypatch.setattr(elementwise, "GROUP_FLOATS", 60)
    network = Network("far", [BatchNorm(), Conv2d(2, 3), GlobalAvgPool()], (6, 5, 3), 2)
    engine = network.bind(9, network.initialise(0), threads=threads)
    images = np.random.default_rng(0).standard_normal((9, 6, 5, 3)).astype(np.float32) + 3000
    images[0] = first
    engine.forward(images)
    mean, variance = engine.batch_statistics.reshape(2, -1)
    pixels = images.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(variance, pixels.var(0, ddof=1), rtol=1e-4)


def test_moving_statistics_keeps_nine_tenths(normalised, make_batch, make_engine):
    engine = make_engine(normalised, 4)
    engine.step(*make_batch(normalised, 4, 0))
    before = engine.statistics.copy()
    engine.move_statistics()
    expected = 0.9 * before + 0.1 * engine.batch_statistics
    np.testing.assert_allclose(engine.statistics, expected, rtol=1e-6)


def test_evaluation_uses_running_statistics_for_each_image_alone(
    normalised, make_batch, make_engine
):
    engine = make_engine(normalised, 4)
    images, _ = make_batch(normalised, 11, 0)
    together = engine.predict(images)
    alone = np.concatenate([engine.predict(image[None]) for image in images])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    assert engine.predict(images[:0]).shape == (0, 4)


def test_with_the_batch_own_statistics_evaluation_equals_training(
    normalised, make_batch, make_engine
):
    engine = make_engine(normalised, 64)
    images, _ = make_batch(normalised, 64, 0)
    training = engine.forward(images).copy()
    engine.statistics[:] = engine.batch_statistics
    # The running variance is unbiased: with 64 images of 16 pixels and more that is near.
    np.testing.assert_allclose(engine.predict(images), training, rtol=1e-2, atol=1e-2)


def test_evaluate_gives_mean_loss_and_right_answers(pooled, make_batch, make_engine):
    engine = make_engine(pooled, 4)
    images, labels = make_batch(pooled, 10, 0)
    logits = engine.predict(images).astype(np.float64)
    expected = np.log(np.exp(logits).sum(1)) - logits[range(10), labels]
    loss, correct = engine.evaluate(images, labels)
    assert loss == pytest.approx(expected.mean(), rel=1e-5)
    assert correct == (logits.argmax(1) == labels).sum()


def test_evaluation_does_not_disturb_the_next_step(normalised, make_batch, make_engine):
    engine = make_engine(normalised, 4)
    images, labels = make_batch(normalised, 4, 0)
    expected = engine.step(images, labels), engine.gradients.copy()
    engine.evaluate(*make_batch(normalised, 6, 1))
    assert engine.step(images, labels) == expected[0]
    assert np.array_equal(engine.gradients, expected[1])


@pytest.fixture
def dropping():
    """A network with dropout of images and of features."""
    parts = [Conv2d(6, 3), ReLU(), Dropout(0.2), Flatten(), Dense(50), ReLU(), Dropout(), Dense(4)]
    return Network("dropping", parts, (8, 8, 1), 4)


def test_dropout_follows_from_seed_step_and_slot(dropping, make_batch, make_engine):
    images, labels = make_batch(dropping, 8, 0)
    engine = make_engine(dropping, 8)
    expected = engine.step(images, labels, draw=(3, 7, 1)), engine.gradients.tobytes()
    for draw in [(4, 7, 1), (3, 8, 1), (3, 7, 0), (7, 3, 1)]:
        assert engine.step(images, labels, draw=draw) != expected[0]
    engine.evaluate(images, labels)
    for repeated in (engine, make_engine(dropping, 8)):
        assert repeated.step(images, labels, draw=(3, 7, 1)) == expected[0]
        assert repeated.gradients.tobytes() == expected[1]


def test_dropout_without_anything_to_follow_from_is_refused(dropping, make_batch, make_engine):
    engine = make_engine(dropping, 8)
    images, labels = make_batch(dropping, 8, 0)
    with pytest.raises(ConfigError, match=r"layer drop1: .* expected draw=\(seed, step, slot\)"):
        engine.step(images, labels)
    with pytest.raises(ConfigError, match="layer drop1"):
        engine.forward(images)


def test_evaluation_drops_nothing(dropping, make_batch):
    images, _ = make_batch(dropping, 8, 0)
    parameters = dropping.initialise(0)
    parts = [Conv2d(6, 3), ReLU(), Flatten(), Dense(50), ReLU(), Dense(4)]
    whole = Network("whole", parts, (8, 8, 1), 4)
    ours, expected = (net.bind(8, parameters).predict(images) for net in (dropping, whole))
    assert np.array_equal(ours, expected)


def test_dropped_shares_are_as_asked_and_the_mean_stays():
    for rate in (0.0, 0.1, 0.5, 0.9):
        factors = np.empty(100_001, np.float32)
        draw_factors(factors, rate, (1, 2, 3, 4))
        assert np.isin(factors, [0, np.float32(1 / (1 - rate))]).all()
        assert (factors == 0).mean() == pytest.approx(rate, abs=6e-3)
        part = np.empty(777, np.float32)
        draw_factors(part, rate, (1, 2, 3, 4))
        assert np.array_equal(part, factors[:777])


def test_labels_are_smoothed_in_steps_and_not_in_evaluation(pooled, make_batch):
    images, labels = make_batch(pooled, 3, 0)
    plain = pooled.bind(3, pooled.initialise(0))
    smoothed = pooled.bind(3, pooled.initialise(0), smoothing=0.2)
    targets = np.full((3, 4), 0.2 / 4)
    targets[range(3), labels] += 0.8
    logits = plain.forward(images).astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert smoothed.step(images, labels) == pytest.approx(-(targets * logs).sum(1).mean(), rel=1e-5)
    assert smoothed.evaluate(images, labels) == plain.evaluate(images, labels)
    with pytest.raises(ConfigError, match="label smoothing is 1"):
        pooled.bind(3, smoothing=1)


@pytest.mark.parametrize("offset", [1, 3, 6, 13])
def test_bits_do_not_depend_on_where_the_arenas_lie(offset, make_batch):
    for name in ("lenet", "resnet20"):
        network = models.build(name)
        images, labels = make_batch(network, 4, 0)
        parameters = network.initialise(0)
        engine = network.bind(4, parameters)
        expected = engine.step(images, labels)
        room = np.zeros(2 * network.parameters + 2 * offset, np.float32)
        shifted = room[offset : offset + network.parameters]
        shifted[:] = parameters
        gradients = room[-network.parameters :]
        other = network.bind(4, shifted, gradients)
        assert other.step(images, labels) == expected
        assert other.gradients.tobytes() == engine.gradients.tobytes()


@pytest.mark.parametrize("name", ["lenet", "resnet20", "lenet_smooth"])
def test_two_engines_give_the_same_bits(name, make_batch, make_engine):
    network = models.build(name)
    images, labels = make_batch(network, 4, 0)
    first, second = make_engine(network, 4), make_engine(network, 4)
    first.step(*make_batch(network, 4, 1))
    assert first.step(images, labels) == second.step(images, labels)
    assert first.gradients.tobytes() == second.gradients.tobytes()
    assert first.batch_statistics.tobytes() == second.batch_statistics.tobytes()


@pytest.mark.parametrize("name", ["lenet", "lenet_smooth", "resnet20", "vgg_small"])
def test_a_step_after_the_first_allocates_nothing_large(name, make_batch, make_engine):
    network = models.build(name)
    engine = make_engine(network, 32)
    images, labels = make_batch(network, 32, 0)
    engine.step(images, labels)
    tracemalloc.start()
    try:
        engine.step(images, labels)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # NumPy casts masks through buffers of 8192 elements; activations and columns take megabytes.
    assert peak < 160_000


@pytest.mark.parametrize("name", ["lenet", "resnet20", "vgg_small"])
def test_the_memory_that_an_engine_reports_is_what_it_takes(name):
    network = models.build(name)
    arenas = [np.zeros(network.parameters, np.float32) for _ in range(2)]
    tracemalloc.start()
    try:
        engine = network.bind(16, *arenas)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    use = engine.memory
    assert min(use.activations, use.gradients, use.workspace) > 0
    assert use.total == pytest.approx(held, rel=0.1)


def test_lenet_learns_synthetic_data(make_engine):
    network = models.build("lenet")
    generator = np.random.default_rng(3)
    prototypes = generator.standard_normal((10, 28, 28, 1), dtype=np.float32)
    labels = generator.integers(0, 10, 320)
    images = prototypes[labels]
    images += 0.5 * generator.standard_normal(images.shape, dtype=np.float32)
    engine = make_engine(network, 32)
    for _ in range(4):
        for start in range(0, 256, 32):
            engine.step(images[start : start + 32], labels[start : start + 32])
            engine.parameters -= 0.05 * engine.gradients
    assert engine.evaluate(images[256:], labels[256:])[1] >= 60


def test_images_that_do_not_fit_are_refused(pooled, make_batch, make_engine):
    engine = make_engine(pooled, 3)
    images, labels = make_batch(pooled, 3, 0)
    with pytest.raises(ShapeError, match=r"layer conv1: images .*\(2, 9, 8, 1\).*\(3, 9, 8, 1\)"):
        engine.step(images[:2], labels[:2])
    with pytest.raises(ShapeError, match=r"dtype float64, expected .* float32"):
        engine.forward(images.astype(np.float64))
    with pytest.raises(ShapeError, match="no images to evaluate"):
        engine.evaluate(images[:0], labels[:0])
    with pytest.raises(ShapeError, match="images have shape"):
        engine.predict(images[:, 1:])


def test_labels_that_do_not_fit_are_refused(pooled, make_batch, make_engine):
    engine = make_engine(pooled, 3)
    images, _ = make_batch(pooled, 3, 0)
    with pytest.raises(ShapeError, match="layer fc1: labels run from -1 to 2, expected 0 to 3"):
        engine.step(images, np.array([-1, 0, 2]))
    with pytest.raises(ShapeError, match="labels run from 0 to 4"):
        engine.evaluate(images, np.array([0, 4, 2]))
    with pytest.raises(ShapeError, match=r"labels have shape \(2,\)"):
        engine.step(images, np.array([0, 1]))
    with pytest.raises(ShapeError, match="float64"):
        engine.step(images, np.array([0.0, 1.0, 2.0]))


def test_a_batch_of_one_cannot_be_trained_with_batch_norm(normalised, make_batch, make_engine):
    engine = make_engine(normalised, 1)
    images, labels = make_batch(normalised, 1, 0)
    with pytest.raises(ShapeError, match="layer norm1: a batch of 1 image"):
        engine.step(images, labels)
    assert engine.predict(images).shape == (1, 4)


def test_backward_needs_a_forward(pooled, make_engine):
    with pytest.raises(ShapeError, match="backward needs a forward"):
        make_engine(pooled, 3).backward(np.zeros((3, 4), np.float32))
