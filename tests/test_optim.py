"""Update rules and schedules: against double-precision formulas, PyTorch and themselves, cut up."""

from __future__ import annotations

import math
import pickle
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from dynacomm_async.errors import ConfigError, ShapeError
from dynacomm_async.optim import (
    SGD,
    Adam,
    Constant,
    Cosine,
    Schedule,
    StepDecay,
    UpdateRule,
    parse_rule,
    parse_schedule,
)

RULES = ["sgd", "momentum:0.9", "nesterov:0.8", "adam", "adam:0.8:0.99:1e-6", "adamw"]


def make_states(rule: UpdateRule, n):
    return tuple(np.zeros(n, np.float32) for _ in range(rule.n_states))


def draw(seed, n, steps):
    """Parameters and one gradient per step, over many magnitudes, denormals and zeros included."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.integers(-30, 3, (steps + 1, n))
    values = (rng.standard_normal((steps + 1, n)) * scale).astype(np.float32)
    values[1:, rng.random(n) < 0.1] = 0
    return values[0], values[1:]


def run_doubles(rule, parameters, gradients, rates, decay):
    """The formulas in float64, written down independently of the library."""
    p = parameters.astype(np.float64)
    v, s = np.zeros_like(p), np.zeros_like(p)
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        g = gradient.astype(np.float64)
        if isinstance(rule, Adam):
            if rule.decoupled:
                p = p - rate * decay * p
            else:
                g = g + decay * p
            v = rule.beta1 * v + (1 - rule.beta1) * g
            s = rule.beta2 * s + (1 - rule.beta2) * g**2
            mean, square = v / (1 - rule.beta1**t), s / (1 - rule.beta2**t)
            p = p - rate * mean / (np.sqrt(square) + rule.epsilon)
        else:
            g = g + decay * p
            v = rule.momentum * v + g
            p = p - rate * (g + rule.momentum * v if rule.nesterov else v)
    return p


def run_rule(rule, parameters, gradients, rates, decay):
    p = parameters.copy()
    states = make_states(rule, p.size)
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True)):
        rule.update(p, gradient, states, step=step, rate=rate, decay=decay)
    return p


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("text", RULES)
def test_a_rule_follows_its_formula_in_double_precision(text, decay):
    rng = np.random.default_rng(1)
    n = 70_001  # two blocks and a ragged third
    parameters = rng.standard_normal(n).astype(np.float32)
    gradients = rng.standard_normal((5, n)).astype(np.float32)
    rates = [0.1, 0.1, 0.05, 0.02, 0.01]
    rule = parse_rule(text)
    ours = run_rule(rule, parameters, gradients, rates, decay)
    np.testing.assert_allclose(
        ours, run_doubles(rule, parameters, gradients, rates, decay), rtol=2e-6, atol=2e-6
    )


@pytest.mark.peers
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("text", RULES)
def test_a_rule_agrees_with_pytorch(text, decay):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    rng = np.random.default_rng(2)
    parameters = rng.standard_normal(4099).astype(np.float32)
    gradients = rng.standard_normal((6, 4099)).astype(np.float32)
    rates = [0.1, 0.1, 0.05, 0.05, 0.02, 0.02]
    rule = parse_rule(text)
    tensor = torch.nn.Parameter(torch.from_numpy(parameters.copy()))
    if isinstance(rule, Adam):
        make = torch.optim.AdamW if rule.decoupled else torch.optim.Adam
        options = {"betas": (rule.beta1, rule.beta2), "eps": rule.epsilon}
    else:
        make = torch.optim.SGD
        options = {"momentum": rule.momentum, "nesterov": rule.nesterov}
    peer = make([tensor], lr=rates[0], weight_decay=decay, **options)
    for gradient, rate in zip(gradients, rates, strict=True):
        peer.param_groups[0]["lr"] = rate
        tensor.grad = torch.from_numpy(gradient.copy())
        peer.step()
    ours = run_rule(rule, parameters, gradients, rates, decay)
    np.testing.assert_allclose(ours, tensor.detach().numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("text", RULES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_cut_in_any_order_gives_the_bits_of_the_whole(text, data):
    n = data.draw(st.sampled_from([1, 7, 64, 1000, 33_000]))
    seed = data.draw(st.integers(0, 1000))
    parameters, gradients = draw(seed, n, 3)
    whole, pieces = parse_rule(text), parse_rule(text)
    p, q = parameters.copy(), parameters.copy()
    p_states, q_states = make_states(whole, n), make_states(pieces, n)
    for step, gradient in enumerate(gradients):
        settings_of_step = {"step": step, "rate": 0.1 / (step + 1), "decay": 0.01}
        whole.update(p, gradient, p_states, **settings_of_step)
        edges = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=8))})
        cuts = list(pairwise(edges))
        for begin, end in data.draw(st.permutations(cuts)):
            pieces.update(
                q[begin:end],
                gradient[begin:end],
                tuple(state[begin:end] for state in q_states),
                **settings_of_step,
            )
    assert p.tobytes() == q.tobytes()
    assert [s.tobytes() for s in p_states] == [s.tobytes() for s in q_states]


@pytest.mark.parametrize("text", RULES)
def test_unaligned_memory_gives_the_same_bits(text):
    parameters, gradients = draw(5, 1003, 2)
    memory = bytearray(4 * 1003 + 4)
    shifted = np.frombuffer(memory, np.float32, 1003, offset=4)
    shifted[:] = parameters
    rule = parse_rule(text)
    states = make_states(rule, 1003)
    for step, gradient in enumerate(gradients):
        rule.update(shifted, gradient, states, step=step, rate=0.1, decay=0.01)
    expected = run_rule(rule, parameters, gradients, [0.1, 0.1], 0.01)
    assert shifted.tobytes() == expected.tobytes()


@pytest.mark.parametrize("text", RULES)
def test_the_gradient_is_only_read(text):
    rule = parse_rule(text)
    gradient = np.ones(10, np.float32)
    gradient.flags.writeable = False
    rule.update(np.ones(10, np.float32), gradient, make_states(rule, 10), step=0, rate=1, decay=1)


@pytest.mark.parametrize("text", RULES)
def test_an_update_allocates_far_less_than_the_vector(text):
    n = 2_000_000
    rule = parse_rule(text)
    p, g, states = np.ones(n, np.float32), np.ones(n, np.float32), make_states(rule, n)
    tracemalloc.start()
    rule.update(p, g, states, step=0, rate=0.1, decay=0.1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * n / 100


@pytest.mark.parametrize("text", RULES)
def test_a_rule_that_was_pickled_by_reference_to_read_only_memory_still_updates(text):
    rule = parse_rule(text)
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(rule, protocol=5, buffer_callback=buffers.append)
    frozen = [memoryview(bytes(buffer)) for buffer in buffers]  # as frameworks keep them
    other = pickle.loads(pickled, buffers=frozen)
    parameters, gradients = draw(6, 1000, 3)
    ends = [run_rule(each, parameters, gradients, [0.1] * 3, 0.01) for each in (rule, other)]

    assert other == rule
    assert ends[0].tobytes() == ends[1].tobytes()


@pytest.mark.parametrize("text", RULES)
def test_an_empty_range_is_allowed(text):
    rule = parse_rule(text)
    empty = np.empty(0, np.float32)
    rule.update(empty, empty, make_states(rule, 0), step=0, rate=0.1, decay=0.0)


def test_rules_say_how_many_states_they_keep():
    counts = {"sgd": 0, "momentum": 1, "nesterov": 1, "adam": 2, "adamw": 2}
    assert {name: parse_rule(name).n_states for name in counts} == counts


@pytest.mark.parametrize(
    ("part", "array", "message"),
    [
        (0, np.ones(4), "parameters: float64"),
        (0, np.ones((2, 2), np.float32), "parameters: float32 of shape (2, 2)"),
        (1, np.ones(3, np.float32), "gradient: float32 of shape (3,), expected float32 of (4,)"),
        (2, (np.ones(5, np.float32),), "state 0: float32 of shape (5,)"),
        (2, (), "1 state arrays, not 0"),
        (2, [np.ones(4, np.float32)], "1 state arrays, not list"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_before_anything_is_written(part, array, message):
    arguments = [np.ones(4, np.float32), np.ones(4, np.float32), (np.zeros(4, np.float32),)]
    arguments[part] = array
    with pytest.raises(ShapeError) as caught:
        SGD(0.9).update(*arguments, step=0, rate=1.0, decay=0.0)
    assert message in str(caught.value)
    assert (np.asarray(arguments[0]) == 1).all()


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("sgd", SGD()),
        ("momentum", SGD(0.9)),
        ("momentum:0.5", SGD(0.5)),
        ("nesterov:0.5", SGD(0.5, nesterov=True)),
        (" adam ", Adam()),
        ("adam:0.8:0.9", Adam(0.8, 0.9)),
        ("adamw:0.8:0.9:1e-6", Adam(0.8, 0.9, 1e-6, decoupled=True)),
    ],
)
def test_a_rule_is_parsed_from_its_text(text, rule):
    assert parse_rule(text) == rule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown update rule ''"),
        ("adm", "did you mean adam?"),
        ("lion", "known: sgd, momentum:0.9"),
        ("sgd:0.9", "at most 0 numbers"),
        ("adam:1:2:3:4", "at most 3 numbers"),
        ("momentum:fast", "'fast' is not a number"),
        ("momentum:1", "momentum is 1.0"),
        ("momentum:nan", "momentum is nan"),
        ("momentum:-0.1", "momentum is -0.1"),
        ("nesterov:0", "momentum above 0"),
        ("adam:1", "beta1 is 1.0"),
        ("adamw:0.9:-1", "beta2 is -1.0"),
        ("adam:0.9:0.9:0", "epsilon is 0.0"),
        ("adam:0.9:0.9:inf", "epsilon is inf"),
    ],
)
def test_a_nonsense_rule_is_refused_in_one_line(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_rule(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_constant_rate_stays():
    assert {Constant(0.1).rate(step) for step in range(100)} == {0.1}


def test_step_decay_multiplies_every_so_many_steps():
    schedule = StepDecay(1.0, every=10, factor=0.5)
    assert [schedule.rate(step) for step in (0, 9, 10, 19, 20, 35)] == [1, 1, 0.5, 0.5, 0.25, 0.125]


def test_the_cosine_falls_from_base_to_floor_and_stays_there():
    schedule = Cosine(1.0, steps=10, floor=0.2)
    rates = [schedule.rate(step) for step in range(13)]
    assert rates[0] == 1.0
    assert rates[5] == pytest.approx(0.6)
    assert rates[10:] == pytest.approx([0.2] * 3)
    assert all(a > b for a, b in pairwise(rates[:11]))


@pytest.mark.parametrize(
    "schedule",
    [
        Constant(0.5, warmup=4),
        StepDecay(0.5, every=100, factor=0.1, warmup=4),
        Cosine(0.5, steps=50, warmup=4),
    ],
)
def test_warm_up_rises_linearly_to_the_base(schedule: Schedule):
    assert [schedule.rate(step) for step in range(5)] == [0.125, 0.25, 0.375, 0.5, 0.5]


def test_warm_up_does_not_shift_the_steps_of_the_decay():
    assert StepDecay(1.0, every=2, factor=0.5, warmup=4).rate(3) == 0.5
    assert StepDecay(1.0, every=2, factor=0.5, warmup=4).rate(1) == 0.5


@pytest.mark.peers
def test_the_cosine_agrees_with_pytorch():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    peer = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.01)
    ours = Cosine(0.3, steps=20, floor=0.01)
    for step in range(21):
        assert ours.rate(step) == pytest.approx(peer.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        peer.step()


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("constant", Constant(0.3)),
        ("constant,warmup:5", Constant(0.3, warmup=5)),
        ("step:100:0.1", StepDecay(0.3, 100, 0.1)),
        ("step:100:0.1,warmup:20", StepDecay(0.3, 100, 0.1, warmup=20)),
        ("cosine", Cosine(0.3, 1000)),
        ("cosine:0.01, warmup:20", Cosine(0.3, 1000, 0.01, warmup=20)),
    ],
)
def test_a_schedule_is_parsed_from_its_text(text, schedule):
    assert parse_schedule(text, base=0.3, steps=1000) == schedule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown schedule ''"),
        ("cosin", "did you mean cosine?"),
        ("linear", "known: constant, step:EVERY:FACTOR"),
        ("constant:3", "wrong numbers"),
        ("step", "wrong numbers"),
        ("step:10", "wrong numbers"),
        ("step:1.5:0.1", "'1.5' is not a whole number"),
        ("step:10:x", "'x' is not a number"),
        ("step:0:0.1", "every 0 steps"),
        ("step:10:0", "decay factor is 0.0"),
        ("step:10:nan", "decay factor is nan"),
        ("cosine:1", "floor is 1.0"),
        ("cosine,warmup:1000", "1000 steps with 1000 of warm-up"),
        ("cosine,warmup", "'' is not a whole number"),
        ("cosine,warmup:-1", "warm-up is -1 steps"),
        ("cosine,warm:3", "unknown option"),
        ("cosine,warmup:3,warmup:4", "unknown option"),
    ],
)
def test_a_nonsense_schedule_is_refused_in_one_line(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_schedule(text, base=0.3, steps=1000)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("base", [-0.1, math.nan, math.inf])
def test_a_rate_that_cannot_be_is_refused(base):
    with pytest.raises(ConfigError, match="learning rate"):
        parse_schedule("constant", base=base, steps=None)


def test_only_the_cosine_needs_the_number_of_steps():
    parse_schedule("constant", base=0.1, steps=None)
    parse_schedule("step:5:0.1", base=0.1, steps=None)
    with pytest.raises(ConfigError, match="number of steps"):
        parse_schedule("cosine", base=0.1, steps=None)
