"""How fast an estimate follows a link that jumps, and what does not throw it off."""

from __future__ import annotations

import random
from math import inf

import pytest
from hypothesis import given, settings, strategies as st

from dynacomm_async.schedule import LinkEstimator
from dynacomm_async.schedule.linkfit import Observation, Prior, fit_link

OVERHEAD_NS = 2_000_000
LAYERS = (660, 9_700, 192_516, 40_692, 3_436)  # bytes, as of a LeNet
WHOLE = (sum(LAYERS),)
PLANS = {"sequential": WHOLE, "two messages": (10_360, 236_644), "layerwise": LAYERS}
WARM_UP = (LAYERS, (660, 202_216, 44_128), LAYERS)
FIRST_PIECE = 16_000
JUMPS = [(80.0, 400.0), (400.0, 80.0), (80.0, 160.0), (160.0, 80.0), (80.0, 100.0)]


class Link:
    """A link that sends messages and lets an estimator see when they arrive."""

    def __init__(self, seed: int, jitter_ns: float, outliers: float = 0.0) -> None:
        self.estimator = LinkEstimator()
        self.overhead_ns = OVERHEAD_NS
        self._numbers = random.Random(seed)
        self._jitter_ns = jitter_ns
        self._outliers = outliers

    def step(self, messages: tuple[int, ...], ns_per_byte: float) -> None:
        """Send a step's messages: the first after a pause, the others back to back."""
        for index, nbytes in enumerate(messages):
            seen = nbytes if index else max(0, nbytes - FIRST_PIECE)
            elapsed_ns = self.overhead_ns * min(index, 1) + seen * ns_per_byte
            elapsed_ns += self._numbers.gauss(0, self._jitter_ns)
            if self._numbers.random() < self._outliers:
                elapsed_ns *= self._numbers.uniform(1, 3)
            self.estimator.observe(seen, max(0, round(elapsed_ns)), min(index, 1))

    def train(self, messages: tuple[int, ...], ns_per_byte: float, steps: int = 40) -> None:
        """Warm up, and follow a plan for some steps; ask as often as a session does."""
        for warm_up in WARM_UP:
            self.step(warm_up, ns_per_byte)
        for _ in range(steps):
            self.step(messages, ns_per_byte)
            assert self.estimator.ns_per_byte >= 0


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("jump", JUMPS, ids=lambda jump: f"{jump[0]:g}-{jump[1]:g}")
@pytest.mark.parametrize("seed", range(8))
def test_eight_steps_after_a_jump_the_new_rate_is_known(seed, jump, plan):
    link = Link(seed, jitter_ns=100_000, outliers=0.02)
    link.train(PLANS[plan], jump[0])
    for _ in range(8):
        link.step(PLANS[plan], jump[1])

    assert link.estimator.ns_per_byte == pytest.approx(jump[1], rel=0.05)
    assert link.estimator.overhead_ns == pytest.approx(OVERHEAD_NS, abs=400_000)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("seed", range(8))
def test_a_small_change_is_found_by_many_observations(seed, plan):
    link = Link(seed, jitter_ns=50_000)
    link.train(PLANS[plan], 80)
    for _ in range(14):
        link.step(PLANS[plan], 85)
    assert link.estimator.ns_per_byte == pytest.approx(85, rel=0.02)


@pytest.mark.parametrize("seed", range(8))
def test_there_and_back_again_the_overhead_stays_what_it_was(seed):
    link = Link(seed, jitter_ns=100_000)
    link.train(WHOLE, 80)
    known_ns = link.estimator.overhead_ns
    for ns_per_byte in (400, 80, 400, 80):
        for _ in range(10):
            link.step(WHOLE, ns_per_byte)
    assert link.estimator.changes == 4
    assert link.estimator.overhead_ns == pytest.approx(known_ns, abs=150_000)


def test_a_message_that_the_jump_cut_in_two_does_not_hide_it():
    link = Link(0, jitter_ns=50_000)
    link.train(WHOLE, 80)
    link.step(WHOLE, 150)
    for _ in range(5):
        link.step(WHOLE, 400)
    assert link.estimator.ns_per_byte == pytest.approx(400, rel=0.02)


@pytest.mark.parametrize("seed", range(20))
def test_single_slow_messages_are_no_change(seed):
    link = Link(seed, jitter_ns=100_000, outliers=0.1)
    link.train(WHOLE, 80, steps=200)
    assert link.estimator.changes == 0
    assert link.estimator.ns_per_byte == pytest.approx(80, rel=0.02)


@pytest.mark.parametrize("busy", [1, 2, 3, 4])
def test_a_busy_moment_of_up_to_four_messages_is_no_change(busy):
    link = Link(0, jitter_ns=50_000)
    link.train(WHOLE, 80)
    for _ in range(busy):
        link.step(WHOLE, 170)
    for _ in range(3):
        link.step(WHOLE, 80)
    assert link.estimator.changes == 0
    assert link.estimator.ns_per_byte == pytest.approx(80, rel=0.02)


def test_after_a_jump_the_rate_is_known_less_exactly_than_before():
    link = Link(0, jitter_ns=200_000)
    link.train(LAYERS, 400)
    before = link.estimator.rate_error
    while not link.estimator.changes:
        link.step(LAYERS, 80)
    assert before < link.estimator.rate_error < 0.2


def test_every_observation_counts_once_however_often_it_is_kept():
    link = Link(0, jitter_ns=0)
    link.train(LAYERS, 80, steps=10)
    n_before = link.estimator.n_observed
    for _ in range(6):
        link.step(WHOLE, 400)
    assert link.estimator.changes == 1
    assert link.estimator.n_observed == n_before + 6


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rates=st.lists(st.floats(5, 2000), min_size=1, max_size=4),
    plan=st.sampled_from(sorted(PLANS)),
    jitter_ns=st.sampled_from([0.0, 50_000.0, 500_000.0]),
)
def test_whatever_a_link_does_estimates_are_finite_and_not_negative(seed, rates, plan, jitter_ns):
    link = Link(seed, jitter_ns, outliers=0.2)
    for ns_per_byte in rates:
        for messages in (*WARM_UP, *[PLANS[plan]] * 12):
            link.step(messages, ns_per_byte)
            assert 0 <= link.estimator.ns_per_byte < inf
            assert 0 <= link.estimator.overhead_ns < inf
            assert link.estimator.rate_error >= 0


def test_a_prior_tells_overhead_from_rate_where_messages_of_one_size_cannot():
    observations = [Observation(1, 100_000, 10_000_000)] * 5
    assert not fit_link(observations).known
    fit = fit_link(observations, Prior(2_000_000, 50_000))
    assert fit.known
    assert fit.overhead_ns == pytest.approx(2_000_000, rel=0.01)
    assert fit.ns_per_byte == pytest.approx(80, rel=0.01)


def test_an_overhead_that_changed_with_the_rate_is_found_too():
    link = Link(0, jitter_ns=50_000)
    link.train(LAYERS, 80)
    link.overhead_ns = 6_000_000
    for _ in range(8):
        link.step(LAYERS, 400)
    assert link.estimator.overhead_ns == pytest.approx(6_000_000, rel=0.05)
    assert link.estimator.ns_per_byte == pytest.approx(400, rel=0.05)


def test_a_fit_that_begins_from_the_last_one_comes_to_the_same():
    numbers = random.Random(0)
    observations = [
        Observation(1, nbytes, round(2e6 + 80 * nbytes + numbers.gauss(0, 50_000)))
        for nbytes in (numbers.randint(100, 1_000_000) for _ in range(64))
    ]
    cold = fit_link(observations)
    warm = fit_link(observations, start=fit_link(observations[:56]))
    assert warm.overhead_ns == pytest.approx(cold.overhead_ns, abs=5_000)
    assert warm.ns_per_byte == pytest.approx(cold.ns_per_byte, rel=1e-3)


@pytest.mark.parametrize(("jitter_ns", "share"), [(100_000, 0.0), (30_000, 0.05)])
def test_a_fit_tells_its_own_errors(jitter_ns, share):
    off, told = [], []
    for seed in range(200):
        numbers = random.Random(seed)
        observations = []
        for _ in range(40):
            nbytes = int(1000 * 1000 ** numbers.random())
            elapsed_ns = 2e6 + 80 * nbytes * numbers.gauss(1, share) + numbers.gauss(0, jitter_ns)
            observations.append(Observation(1, nbytes, round(elapsed_ns)))
        fit = fit_link(observations)
        off.append(abs(fit.ns_per_byte / 80 - 1))
        told.append(fit.rate_error)
    within = sum(error <= 2 * claim for error, claim in zip(off, told, strict=True))
    assert within >= 180  # 95 % of a normal distribution; the claim is an estimate itself
