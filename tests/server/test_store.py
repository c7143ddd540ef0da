"""The store, against whole-vector formulas written down independently, cut up in every way."""

from __future__ import annotations

import hashlib
import itertools
import random

import numpy as np
import pytest

from dynacomm_async.errors import ConfigError, ShapeError
from dynacomm_async.optim import SGD, Adam, Constant, Cosine, StepDecay
from dynacomm_async.ranges import Range
from dynacomm_async.server.store import LayerOptions, Store, Training, parameters_sha256
from dynacomm_async.wire.grid import Grid, LayerSpec

RULES = {
    "sgd": SGD(),
    "momentum": SGD(0.9),
    "nesterov": SGD(0.8, nesterov=True),
    "adam": Adam(),
    "adamw": Adam(0.8, 0.99, decoupled=True),
}
RATES = [Constant(0.05), StepDecay(0.1, 2, 0.3, warmup=2), Cosine(0.2, 6, warmup=1)]


def draw_grid(numbers):
    sizes = [1, 2, 4095, 4096, 4097, 9000, numbers.randint(1, 20_000)]
    layers = []
    for index in range(numbers.randint(1, 5)):
        count = numbers.choice(sizes)
        decay = numbers.choice([0, count, numbers.randint(0, count)])
        layers.append(LayerSpec(f"layer{index}", count, decay, numbers.choice([0, 0, 3, 5000])))
    return Grid(layers)


def draw_options(numbers, grid):
    chosen = [spec.name for spec in grid.layers if numbers.random() < 0.5]
    values = [
        LayerOptions(rate_scale=0.0),
        LayerOptions(rate_scale=0.25, weight_decay=0.02),
        LayerOptions(weight_decay=0.0),
        LayerOptions(rate_scale=3.0),
    ]
    return {name: numbers.choice(values) for name in chosen}


def draw_cuts(numbers, n_cells):
    """Ranges that cover all cells once, in any order."""
    edges = [0, *(cell for cell in range(1, n_cells) if numbers.random() < 0.4), n_cells]
    ranges = [Range(a, b - a) for a, b in itertools.pairwise(edges)]
    numbers.shuffle(ranges)
    return ranges


def draw_contributions(seed, steps, n_workers, n_floats):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((steps, n_workers, n_floats)).astype(np.float32)


def element_options(grid, training):
    """The rate's scale and the weight decay of every parameter."""
    scale, decay = np.ones(grid.n_parameters), np.zeros(grid.n_parameters)
    begin = 0
    for spec in grid.layers:
        own = (training.layers or {}).get(spec.name, LayerOptions())
        scale[begin : begin + spec.count] = own.rate_scale
        weight = training.weight_decay if own.weight_decay is None else own.weight_decay
        decay[begin : begin + spec.decay] = weight
        begin += spec.count
    return scale, decay


def draw_choices(numbers, store, steps):
    """For each step ranges that cover all cells, each with the slots that count: maybe none."""
    slots = range(len(store.contributions))
    cuts = [draw_cuts(numbers, store.grid.n_cells) for _ in range(steps)]
    return [
        [(cells, tuple(slot for slot in slots if numbers.random() < 0.6)) for cells in cut]
        for cut in cuts
    ]


def counted(grid, n_workers, choices):
    """(n_workers, n_floats) bool: whose contribution counts for which element of a step."""
    counts = np.zeros((n_workers, grid.n_floats), np.bool_)
    for cells, slots in choices:
        start, stop = grid.floats(*cells)
        counts[list(slots), start:stop] = True
    return counts


def mean_of_counted(parts, counts, t):
    """The rank-order mean of each element over those that count, NaN where nobody does."""
    total, n = np.full(parts.shape[1], t("nan")), np.zeros(parts.shape[1], np.int64)
    for part, one in zip(parts.astype(t), counts, strict=True):
        total = np.where(one, np.where(n == 0, part, total + part), total)
        n = n + one
    return np.where(n == 0, t("nan"), total / np.maximum(n, 1).astype(t))


def replay_counted(grid, training, parameters, statistics, contributions, choices, dtype):
    """Like :func:`replay`, with those contributions only that were chosen for a range of cells."""
    n_parameters = grid.n_parameters
    p, running = parameters.astype(dtype), statistics.astype(dtype)
    states = (np.zeros_like(p), np.zeros_like(p))
    for step, (parts, chosen) in enumerate(zip(contributions, choices, strict=True)):
        counts = counted(grid, len(parts), chosen)
        mean = mean_of_counted(parts, counts, dtype)
        moves = counts.any(axis=0)
        new = one_step(grid, training, (p, running, *states), mean, step, dtype)
        edge = (slice(0, n_parameters), slice(n_parameters, None))
        p, running, *states = (
            np.where(moves[edge[index == 1]], after, before)
            for index, (after, before) in enumerate(zip(new, (p, running, *states), strict=True))
        )
    return p, running


def replay(grid, training, parameters, statistics, contributions, dtype):
    """All steps on whole vectors, in the precision of ``dtype``."""
    p, running = parameters.astype(dtype), statistics.astype(dtype)
    v, s = np.zeros_like(p), np.zeros_like(p)
    for step, parts in enumerate(contributions):
        total = parts[0].astype(dtype)
        for part in parts[1:]:
            total = total + part.astype(dtype)
        mean = total / dtype(len(parts))
        p, running, v, s = one_step(grid, training, (p, running, v, s), mean, step, dtype)
    return p, running


def one_step(grid, training, before, mean, step, t):
    """Parameters, running statistics and the rule's two states after an update with ``mean``."""
    p, running, v, s = before
    rule = training.rule
    scale, decay = element_options(grid, training)
    g, batch = mean[: grid.n_parameters], mean[grid.n_parameters :]
    momentum = t(np.float32(training.statistics_momentum))
    running = running * (t(1) - momentum) + batch * momentum
    rate = np.array([training.rate.rate(step) * x for x in scale])
    if isinstance(rule, Adam):
        p, v, s = adam(rule, p, g, v, s, step, rate, decay, t)
    else:
        d = np.where(decay != 0, g + p * decay.astype(np.float32).astype(t), g)
        if rule.momentum:
            v = v * t(np.float32(rule.momentum)) + d
            d = d + v * t(np.float32(rule.momentum)) if rule.nesterov else v
        p = p - d * rate.astype(np.float32).astype(t)
    return p, running, v, s


def adam(rule, p, g, m, s, step, rate, decay, t):
    if rule.decoupled:
        p = np.where(decay != 0, p * (1 - rate * decay).astype(t), p)
        d = g
    else:
        d = np.where(decay != 0, g + p * decay.astype(t), g)
    m = m + (d - m) * t(1 - rule.beta1)
    s = s * t(rule.beta2) + d * d * t(1 - rule.beta2)
    size = (rate / (1 - rule.beta1 ** (step + 1))).astype(t)
    root = np.sqrt(s) / t(np.sqrt(1 - rule.beta2 ** (step + 1)))
    return p - m / (root + t(rule.epsilon)) * size, m, s


def train(store, contributions, numbers):
    """Apply every step in random cuts and order."""
    for step, parts in enumerate(contributions):
        for target, part in zip(store.contributions, parts, strict=True):
            target[:] = part
        for cells in draw_cuts(numbers, store.grid.n_cells):
            store.apply(cells, step)


def draw_case(seed):
    numbers = random.Random(seed)
    grid = draw_grid(numbers)
    training = Training(
        rule=list(RULES.values())[seed % len(RULES)],
        rate=numbers.choice(RATES),
        weight_decay=numbers.choice([0.0, 0.01]),
        layers=draw_options(numbers, grid),
        statistics_momentum=numbers.choice([0.1, 0.3]),
    )
    n_workers = numbers.randint(1, 4)
    contributions = draw_contributions(seed, 4, n_workers, grid.n_floats)
    rng = np.random.default_rng(seed + 1000)
    parameters = rng.standard_normal(grid.n_parameters).astype(np.float32)
    statistics = rng.random(grid.n_statistics).astype(np.float32)
    store = Store(grid, n_workers, training)
    store.set_initial(parameters, statistics)
    return numbers, store, parameters, statistics, contributions


@pytest.mark.parametrize("seed", range(40))
def test_steps_equal_the_whole_vector_formulas_bit_for_bit_however_cells_are_cut(seed):
    numbers, store, parameters, statistics, contributions = draw_case(seed)
    train(store, contributions, numbers)

    expected = replay(store.grid, store.training, parameters, statistics, contributions, np.float32)
    assert store.parameters.tobytes() == expected[0].tobytes()
    assert store.statistics.tobytes() == expected[1].tobytes()


@pytest.mark.parametrize("seed", range(10))
def test_steps_stay_close_to_double_precision(seed):
    numbers, store, parameters, statistics, contributions = draw_case(seed)
    train(store, contributions, numbers)

    expected = replay(store.grid, store.training, parameters, statistics, contributions, np.float64)
    for ours, exact in zip((store.parameters, store.statistics), expected, strict=True):
        scale = max(1.0, np.abs(exact).max(initial=0.0))
        np.testing.assert_allclose(ours, exact, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("seed", range(40))
def test_only_the_chosen_contributions_of_a_range_count_and_nobodys_change_nothing(seed):
    numbers, store, parameters, statistics, contributions = draw_case(seed)
    choices = draw_choices(numbers, store, len(contributions))

    for step, (parts, chosen) in enumerate(zip(contributions, choices, strict=True)):
        counts = counted(store.grid, len(parts), chosen)
        for slot, part in enumerate(parts):
            store.contributions[slot][:] = np.where(counts[slot], part, np.float32("nan"))
            store.contributions[slot].flags.writeable = False
        for cells, slots in chosen:
            store.apply(cells, step, slots)
        for contribution in store.contributions:
            contribution.flags.writeable = True

    expected = replay_counted(
        store.grid, store.training, parameters, statistics, contributions, choices, np.float32
    )
    assert store.parameters.tobytes() == expected[0].tobytes()
    assert store.statistics.tobytes() == expected[1].tobytes()


def test_a_range_of_several_blocks_equals_the_whole_vector_formulas():
    grid = Grid([LayerSpec("wide", 300_000, 200_000), LayerSpec("b", 9, 0, 140_000)])
    for seed, rule in enumerate(RULES.values()):
        training = Training(rule, Constant(0.1), 0.01)
        contributions = draw_contributions(seed, 2, 3, grid.n_floats)
        store = Store(grid, 3, training)
        for step, parts in enumerate(contributions):
            for target, part in zip(store.contributions, parts, strict=True):
                target[:] = part
            store.apply(Range(0, grid.n_cells), step)

        zeros = np.zeros(grid.n_parameters, np.float32), np.zeros(grid.n_statistics, np.float32)
        expected = replay(grid, training, *zeros, contributions, np.float32)
        assert store.parameters.tobytes() == expected[0].tobytes()
        assert store.statistics.tobytes() == expected[1].tobytes()


def test_contributions_are_summed_in_rank_order():
    grid = Grid([LayerSpec("only", 2, statistics=2)])
    store = Store(grid, 3, Training(SGD(), Constant(1.0), statistics_momentum=1.0))
    # (1e8 + 1) - 1e8 is 0 in float32, (1e8 - 1e8) + 1 is 1: the order is in the result.
    for target, value in zip(store.contributions, (1e8, 1, -1e8), strict=True):
        target[:] = value

    store.apply(Range(0, grid.n_cells), 0)

    assert store.parameters.tolist() == [0, 0]
    assert store.statistics.tolist() == [0, 0]


def test_a_frozen_layer_keeps_every_bit():
    grid = Grid([LayerSpec("moves", 5000, 5000), LayerSpec("frozen", 5000, 5000)])
    frozen = {"frozen": LayerOptions(rate_scale=0.0)}
    initial = np.random.default_rng(3).standard_normal(10_000).astype(np.float32)
    for rule in RULES.values():
        store = Store(grid, 1, Training(rule, Constant(0.1), 0.01, frozen))
        store.set_initial(initial)
        store.contributions[0][:] = 1
        store.apply(Range(0, grid.n_cells), 0)

        assert (store.parameters[5000:] == initial[5000:]).all()
        assert (store.parameters[:5000] != initial[:5000]).all()


def test_options_for_a_layer_that_the_model_has_not_are_refused_with_the_names_it_has():
    grid = Grid([LayerSpec("conv1", 4), LayerSpec("fc", 4)])

    with pytest.raises(ConfigError, match=r"'conv2'; the model has: conv1, fc"):
        Store(grid, 1, Training(SGD(), Constant(0.1), layers={"conv2": LayerOptions()}))


@pytest.mark.parametrize(
    "values",
    [np.zeros(4, np.float32), np.zeros(5, np.float64), np.zeros((5, 1), np.float32)],
    ids=["short", "double", "matrix"],
)
def test_initial_values_that_do_not_fit_are_refused_with_both_shapes(values):
    store = Store(Grid([LayerSpec("a", 5, statistics=5)]), 1, Training.plain())

    with pytest.raises(ShapeError, match=r"initial parameters: .* expected float32 of \(5,\)"):
        store.set_initial(values)
    with pytest.raises(ShapeError, match=r"initial statistics: .* expected float32 of \(5,\)"):
        store.set_initial(np.zeros(5, np.float32), values)


def test_initial_values_are_copied():
    store = Store(Grid([LayerSpec("a", 5)]), 1, Training.plain())
    values = np.ones(5, np.float32)
    store.set_initial(values)
    values[:] = 7

    assert store.parameters.tolist() == [1] * 5


def test_the_hash_is_sha256_of_the_little_endian_parameters_without_the_statistics():
    store = Store(Grid([LayerSpec("a", 3, statistics=2)]), 1, Training.plain())
    store.set_initial(np.array([1, -2.5, 1e-3], np.float32), np.ones(2, np.float32))

    by_hand = hashlib.sha256(bytes.fromhex("0000803f 000020c0 6f12833a")).hexdigest()
    assert store.parameters_sha256() == by_hand
    assert parameters_sha256(store.parameters.astype(">f4")) == by_hand
    assert parameters_sha256(np.repeat(store.parameters, 2)[::2]) == by_hand


def test_the_memory_held_is_the_arena_the_contributions_and_the_states():
    grid = Grid([LayerSpec("a", 1000, statistics=24)])

    assert Store(grid, 3, Training(SGD(), Constant(0.1))).nbytes == 4 * 4 * 1024
    assert Store(grid, 2, Training(Adam(), Constant(0.1))).nbytes == 4 * (3 * 1024 + 2 * 1000)
