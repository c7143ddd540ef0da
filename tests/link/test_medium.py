from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest

from dynacomm_async.link import Medium, Rates

MS = 1_000_000
MBIT_100 = Rates([(0, 12.5e6)])


def test_an_idle_medium_starts_at_once_and_takes_bytes_over_rate() -> None:
    assert Medium().reserve(5 * MS, 12_500, 1, MBIT_100) == (5 * MS, 6 * MS)


def test_bytes_that_find_the_medium_busy_follow_without_a_gap() -> None:
    medium = Medium()
    medium.reserve(0, 12_500, 1, MBIT_100)
    assert medium.reserve(300_000, 12_500, 0, MBIT_100) == (1 * MS, 2 * MS)


def test_an_idle_medium_does_not_save_time_up() -> None:
    medium = Medium()
    medium.reserve(0, 12_500, 1, MBIT_100)
    assert medium.reserve(10 * MS, 12_500, 1, MBIT_100) == (10 * MS, 11 * MS)


def test_overhead_occupies_once_for_each_message_that_begins() -> None:
    medium = Medium(2 * MS)
    assert medium.reserve(0, 12_500, 1, MBIT_100) == (0, 3 * MS)
    assert medium.reserve(0, 12_500, 0, MBIT_100) == (3 * MS, 4 * MS)
    assert medium.reserve(0, 0, 3, MBIT_100) == (4 * MS, 10 * MS)


def test_a_medium_without_limit_takes_only_the_overhead() -> None:
    unlimited = Rates([(0, None)])
    medium = Medium(2 * MS)
    assert medium.reserve(0, 10**12, 1, unlimited) == (0, 2 * MS)
    assert medium.reserve(0, 10**12, 0, unlimited) == (2 * MS, 2 * MS)


def test_one_medium_for_two_directions_gives_each_its_own_rate_in_turn() -> None:
    slow = Rates([(0, 1.25e6)])
    medium = Medium()
    assert medium.reserve(0, 12_500, 1, MBIT_100) == (0, 1 * MS)
    assert medium.reserve(0, 12_500, 1, slow) == (1 * MS, 11 * MS)
    assert medium.reserve(0, 12_500, 1, MBIT_100) == (11 * MS, 12 * MS)


def test_many_small_pieces_take_exactly_as_long_as_one_large_piece() -> None:
    # 3 bytes at 0.7 bytes per nanosecond: each piece ends between two nanoseconds.
    rates = Rates([(0, 0.7e9)])
    medium = Medium()
    for _ in range(100_000):
        _, end_ns = medium.reserve(0, 3, 0, rates)
    assert end_ns == round(300_000 / 0.7)


def test_a_piece_that_crosses_a_change_of_rate_takes_both_rates() -> None:
    rates = Rates([(0, 12.5e6), (10 * MS, 2.5e6), (20 * MS, None)])
    medium = Medium()
    assert medium.reserve(8 * MS, 25_000 + 5_000, 1, rates) == (8 * MS, 12 * MS)
    # 20,000 more fill the rest of the slow time, and what is left needs none.
    assert medium.reserve(0, 20_000 + 999_999, 0, rates) == (12 * MS, 20 * MS)


@pytest.mark.parametrize("seed", range(5))
def test_any_pieces_on_any_schedule_end_where_the_integral_of_the_rate_says(seed: int) -> None:
    source = random.Random(seed)
    times = [0, *sorted(source.sample(range(1, 50 * MS), 6))]
    steps = [(at_ns, float(source.randint(10**5, 10**8))) for at_ns in times]
    rates, medium = Rates(steps), Medium()
    total = 0
    for _ in range(200):
        nbytes = source.randint(1, 3000)
        total += nbytes
        _, end_ns = medium.reserve(0, nbytes, 0, rates)
        ends = [*(at_ns for at_ns, _ in steps[1:]), math.inf]
        carried = sum(
            Fraction(rate) / 10**9 * (min(end_ns, until) - at_ns)
            for (at_ns, rate), until in zip(steps, ends, strict=True)
            if at_ns < end_ns
        )
        assert abs(carried - total) <= Fraction(0.11)  # half a nanosecond at 100 MB/s, and a bit


def test_rates_say_what_a_duration_carries_now_and_at_most() -> None:
    rates = Rates([(0, 12.5e6), (10 * MS, 125e6)])
    assert rates.nbytes_in(MS, 9 * MS) == pytest.approx(12_500)
    assert rates.nbytes_in(MS, 10 * MS) == pytest.approx(125_000)
    assert rates.most_nbytes_in(MS) == pytest.approx(125_000)
    assert Rates([(0, 1.0), (5, None)]).most_nbytes_in(MS) == math.inf
