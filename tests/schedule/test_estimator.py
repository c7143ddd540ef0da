from __future__ import annotations

import random
from typing import Any

import pytest

from dynacomm_async.errors import PlanError
from dynacomm_async.schedule import (
    Costs,
    Estimator,
    LayerCosts,
    LayerTimes,
    LinkEstimator,
    estimator as estimator_module,
)
from dynacomm_async.schedule.linkfit import fit_link


def test_layer_times_are_medians_of_each_layer() -> None:
    times = LayerTimes(2)
    assert not times.known
    assert times.forward_ns == times.backward_ns == ()
    for forward, backward in [((5, 90), (1, 2)), ((7, 80), (3, 4)), ((900, 70), (500, 6))]:
        times.observe(forward, backward)
    assert times.known
    assert times.forward_ns == (7, 80)
    assert times.backward_ns == (3, 4)


def test_slow_steps_do_not_move_layer_times() -> None:
    times = LayerTimes(1)
    for step in range(60):
        slow = 50 if step % 3 == 0 else 1
        times.observe([100 * slow], [200 * slow])
    assert (times.forward_ns, times.backward_ns) == ((100,), (200,))


def test_layer_times_follow_a_lasting_change_within_eight_steps() -> None:
    times = LayerTimes(1)
    for _ in range(50):
        times.observe([100], [100])
    for _ in range(8):
        times.observe([300], [50])
    assert (times.forward_ns, times.backward_ns) == ((300,), (50,))


def test_layer_times_keep_a_copy() -> None:
    times, forward = LayerTimes(1), [1]
    times.observe(forward, [2])
    forward[0] = 9
    assert times.forward_ns == (1,)


@pytest.mark.parametrize(("forward", "backward"), [([1], [1, 1]), ([1, 1], [1]), ([1, -1], [1, 1])])
def test_times_that_do_not_fit_the_model_are_refused(
    forward: list[int], backward: list[int]
) -> None:
    times = LayerTimes(2)
    with pytest.raises(PlanError, match="expected 2"):
        times.observe(forward, backward)
    assert not times.known


def test_a_fast_link_is_not_fitted_more_often_than_time_allows_and_a_jump_is_found_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """64 KiB in half a millisecond: the window spans an eighth of the time between two fits."""
    fits = []

    def fit(*arguments: Any, **options: Any) -> Any:
        fits.append(arguments)
        return fit_link(*arguments, **options)

    monkeypatch.setattr(estimator_module, "fit_link", fit)
    numbers, link = random.Random(1), LinkEstimator()

    def observe(n: int, ns_per_byte: float) -> None:
        for _ in range(n):
            nbytes = numbers.randrange(40_000, 90_000)
            link.observe(nbytes, round(nbytes * ns_per_byte * numbers.gauss(1, 0.01)), 0)
            link.ns_per_byte  # noqa: B018 -- as if somebody asked after every message

    observe(64, 8.0)
    n_first = len(fits)
    observe(2000, 8.0)  # about a second
    assert 1 <= len(fits) - n_first <= 5
    observe(7, 16.0)
    assert link.changes == 1
    assert link.ns_per_byte == pytest.approx(16.0, rel=0.05)


def draw_nbytes(numbers: random.Random) -> int:
    """300 B to 2 MB, every order of magnitude equally often."""
    return int(300 * (2_000_000 / 300) ** numbers.random())


@pytest.mark.parametrize("overhead_ns", [0, 200_000, 2_000_000, 20_000_000])
@pytest.mark.parametrize("ns_per_byte", [8.0, 80.0, 800.0])
@pytest.mark.parametrize("seed", range(8))
def test_overhead_and_rate_are_found_among_jitter_and_outliers(
    seed: int, ns_per_byte: float, overhead_ns: int
) -> None:
    numbers = random.Random(seed)
    link = LinkEstimator()
    for _ in range(100):
        nbytes, messages = draw_nbytes(numbers), int(numbers.random() < 0.7)
        elapsed = messages * overhead_ns + nbytes * ns_per_byte + numbers.uniform(-2e5, 2e5)
        link.observe(nbytes, max(0, int(elapsed * (3 if numbers.random() < 0.05 else 1))), messages)
    assert link.known
    assert abs(link.overhead_ns - overhead_ns) <= max(0.05 * overhead_ns, 200_000)
    assert link.ns_per_byte == pytest.approx(ns_per_byte, rel=0.05)


@pytest.mark.parametrize("ns_per_byte", [8.0, 80.0, 800.0])
@pytest.mark.parametrize("seed", range(8))
def test_overhead_and_rate_are_found_where_the_rate_wanders(seed: int, ns_per_byte: float) -> None:
    numbers = random.Random(seed)
    link = LinkEstimator()
    for _ in range(64):
        nbytes = draw_nbytes(numbers)
        rate = ns_per_byte * numbers.uniform(0.9, 1.1)
        link.observe(nbytes, int(2_000_000 + nbytes * rate + numbers.uniform(-2e5, 2e5)), 1)
    assert abs(link.overhead_ns - 2_000_000) <= 200_000
    assert link.ns_per_byte == pytest.approx(ns_per_byte, rel=0.05)


def test_the_fit_mostly_stands_where_a_third_of_the_times_are_twice_too_long() -> None:
    good = 0
    for seed in range(100):
        numbers = random.Random(seed)
        link = LinkEstimator()
        for _ in range(64):
            nbytes, messages = draw_nbytes(numbers), int(numbers.random() < 0.7)
            elapsed = messages * 1_000_000 + nbytes * 80 + numbers.uniform(-2e5, 2e5)
            factor = 2 if numbers.random() < 0.3 else 1
            link.observe(nbytes, int(max(0, elapsed) * factor), messages)
        good += abs(link.overhead_ns - 1_000_000) < 200_000 and abs(link.ns_per_byte - 80) < 4
    assert good >= 85


def test_exact_times_give_the_exact_link() -> None:
    link = LinkEstimator()
    for nbytes in (1_000, 50_000, 700_000, 2_000_000):
        link.observe(nbytes, 300_000 + 80 * nbytes, 1)
        link.observe(nbytes, 80 * nbytes, 0)
    assert link.known
    assert link.overhead_ns == pytest.approx(300_000, abs=1)
    assert link.ns_per_byte == pytest.approx(80)


def test_nothing_observed_is_nothing_known() -> None:
    link = LinkEstimator()
    assert (link.known, link.overhead_ns, link.ns_per_byte) == (False, 0, 0.0)


def test_the_inside_of_messages_tells_the_rate_but_no_overhead() -> None:
    link = LinkEstimator()
    for _ in range(5):
        link.observe(1_000_000, 80_000_000, 0)
    assert (link.known, link.overhead_ns) == (True, 0)
    assert link.ns_per_byte == pytest.approx(80)


def test_tiny_messages_one_by_one_tell_nothing() -> None:
    link = LinkEstimator()
    for elapsed_ns in range(0, 200_000, 1000):
        link.observe(280, elapsed_ns, 0)
        link.observe(0, elapsed_ns, 0)
    assert not link.known
    for _ in range(100):
        link.observe(3000, 2, 0)
    assert not link.known


def test_messages_of_one_size_cannot_tell_overhead_from_rate() -> None:
    link = LinkEstimator()
    for step in range(64):
        link.observe(50_000, 5_000_000 + 1000 * (step % 7), 1)
    assert (link.known, link.overhead_ns) == (False, 0)


def test_one_other_size_makes_the_difference() -> None:
    link = LinkEstimator()
    for step in range(60):
        link.observe(1_000_000 if step % 10 == 0 else 50_000, 10**6, 1)
        link.observe(1_000_000, 80_000_000, 0)
    assert link.known
    assert link.ns_per_byte > 0


@pytest.mark.parametrize("elapsed_ns", [0, 1_000, 10**12])
def test_no_estimate_is_negative(elapsed_ns: int) -> None:
    for seed in range(50):
        numbers = random.Random(seed)
        link = LinkEstimator()
        for _ in range(20):
            link.observe(draw_nbytes(numbers), numbers.randint(0, elapsed_ns), seed % 2)
            assert link.overhead_ns >= 0
            assert link.ns_per_byte >= 0


def test_a_link_that_becomes_slower_is_followed() -> None:
    numbers = random.Random(0)
    link = LinkEstimator()
    for ns_per_byte in (80, 400):
        for _ in range(64):
            nbytes = draw_nbytes(numbers)
            link.observe(nbytes, 1_000_000 + ns_per_byte * nbytes, 1)
    assert link.ns_per_byte == pytest.approx(400)


def test_overhead_stays_known_while_every_message_comes_alone() -> None:
    numbers = random.Random(0)
    link = LinkEstimator()
    for _ in range(20):
        nbytes = draw_nbytes(numbers)
        link.observe(nbytes, 5_000_000 + 80 * nbytes, 1)
    for _ in range(500):
        link.observe(2_000_000, int(160_000_000 * numbers.uniform(0.98, 1.02)), 0)
    assert link.overhead_ns == pytest.approx(5_000_000, rel=0.05)
    assert link.ns_per_byte == pytest.approx(80, rel=0.02)


def test_what_is_kept_of_old_messages_does_not_hide_a_change_of_rate() -> None:
    numbers = random.Random(0)
    link = LinkEstimator()
    for _ in range(64):
        nbytes = draw_nbytes(numbers)
        link.observe(nbytes, 5_000_000 + 80 * nbytes, 1)
    for _ in range(64):
        link.observe(2_000_000, int(800_000_000 * numbers.uniform(0.98, 1.02)), 0)
    assert link.ns_per_byte == pytest.approx(400, rel=0.02)


@pytest.mark.parametrize("seed", range(8))
def test_messages_of_one_size_on_a_link_with_bursts_keep_the_overhead_that_others_told(
    seed: int,
) -> None:
    numbers = random.Random(seed)
    link = LinkEstimator()
    ns_per_byte, overhead_ns, burst = 84, 100_000, 48 * 1024

    def send(nbytes: int, messages: int, times: float) -> None:
        # The first message finds a full token bucket: what is in it passes at once.
        free = 0 if messages else min(burst, nbytes)
        elapsed_ns = messages * overhead_ns + (nbytes - free) * ns_per_byte
        link.observe(nbytes, round(elapsed_ns * times), messages)

    for _ in range(2):  # warm-up: a message for each layer
        send(9 * 2**20, 0, 1)
        for nbytes in (4096, 20_000, 150_000, 600_000, 2_400_000, 9_400_000) * 6:
            send(nbytes, 1, numbers.uniform(0.95, 1.1))
    for _ in range(10):
        send(115_000, 0, 1)
        for nbytes in [180_262] * 246 + [131_110]:
            send(nbytes, 1, numbers.choice([0.75, 0.9, 1, 1, 1.05, 1.1, 1.8]))
        assert link.ns_per_byte == pytest.approx(ns_per_byte, rel=0.15)
        assert link.overhead_ns < 700_000


def test_equal_layers_back_to_back_keep_what_single_messages_told() -> None:
    link = LinkEstimator()
    for _ in range(5):
        link.observe(100_000, 8_000_000, 0)
        for _ in range(200):
            link.observe(100_000, 10_000_000, 1)
        assert link.known
        assert link.overhead_ns == pytest.approx(2_000_000, rel=0.01)


@pytest.mark.parametrize(("nbytes", "elapsed_ns", "messages"), [(-1, 1, 1), (1, -1, 1), (1, 1, 2)])
def test_an_impossible_observation_is_refused(nbytes: int, elapsed_ns: int, messages: int) -> None:
    with pytest.raises(PlanError, match="expected"):
        LinkEstimator().observe(nbytes, elapsed_ns, messages)


LAYERS = [("conv", 1_000_000), ("fc", 3_000_000)]


def observe_link(link: LinkEstimator, overhead_ns: int, ns_per_byte: int) -> None:
    for nbytes in (10_000, 100_000, 1_000_000, 3_000_000):
        link.observe(nbytes, overhead_ns + ns_per_byte * nbytes, 1)


def test_costs_are_not_known_before_both_links_and_the_layers_are() -> None:
    estimator = Estimator(LAYERS)
    assert estimator.costs() is None
    estimator.times.observe([10, 20], [30, 40])
    assert estimator.costs() is None
    observe_link(estimator.up, 1000, 80)
    assert estimator.costs() is None
    observe_link(estimator.down, 500, 8)
    assert estimator.costs() is not None


def test_measurements_are_joined_to_a_cost_table() -> None:
    estimator = Estimator(LAYERS)
    estimator.times.observe([10, 20], [30, 40])
    observe_link(estimator.up, 1_000_000, 80)
    observe_link(estimator.down, 500_000, 8)
    for late in (1, 2, 1000):
        estimator.observe_latency(5 * late, 7 * late)
        estimator.observe_server(11 * late)
    assert estimator.costs(workers=2, batch=32) == Costs(
        (
            LayerCosts("conv", 1_000_000, 8_000_000, 10, 30, 80_000_000),
            LayerCosts("fc", 3_000_000, 24_000_000, 20, 40, 240_000_000),
        ),
        overhead_up_ns=1_000_000,
        overhead_down_ns=500_000,
        latency_up_ns=10,
        latency_down_ns=14,
        server_ns=22,
        workers=2,
        batch=32,
    )


@pytest.mark.parametrize(
    ("name", "times"), [("observe_latency", (-1, 0)), ("observe_latency", (0, -1))]
)
def test_negative_times_are_refused(name: str, times: tuple[Any, ...]) -> None:
    estimator = Estimator(LAYERS)
    with pytest.raises(PlanError, match="at least 0"):
        getattr(estimator, name)(*times)
    with pytest.raises(PlanError, match="at least 0"):
        estimator.observe_server(-1)


def test_a_link_that_is_not_known_can_still_be_guessed():
    estimator = Estimator([("a", 4096)])
    assert estimator.costs(guess=True) is None  # no step has been computed

    estimator.times.observe([10], [20])
    estimator.down.observe(8192, 4096, 0)

    assert not estimator.known
    assert estimator.costs() is None
    costs = estimator.costs(guess=True)
    assert costs is not None
    assert (costs.layers[0].pull_ns, costs.layers[0].push_ns) == (2048, 0)
    assert (costs.overhead_up_ns, costs.overhead_down_ns) == (0, 0)
