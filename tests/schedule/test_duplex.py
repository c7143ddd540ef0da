"""Full or half duplex, told by a simulated medium."""

from __future__ import annotations

import random

import pytest

from dynacomm_async.errors import PlanError
from dynacomm_async.schedule.duplex import BusyTimes, Duplex, DuplexEstimator
from dynacomm_async.schedule.estimator import Estimator

MS = 10**6


def share(seed: int, *, half: bool) -> list[tuple[int, int, int]]:
    """Send messages both ways at once in slices of 0.1 ms; what the receiver of one way sees.

    Returns for each message what it takes alone, what it took, and the time it shared.
    """
    numbers = random.Random(seed)
    slice_ns = 100_000
    ours = [numbers.randint(1, 60) for _ in range(30)]  # slices of each message, back to back
    other_left = numbers.randint(sum(ours) // 2, 2 * sum(ours))
    seen, now_ns = [], 0
    for length in ours:
        start_ns, shared_ns, left = now_ns, 0, length
        while left:
            both = other_left > 0
            took_ns = slice_ns * (2 if half and both else 1)  # a turn each, or at the same time
            if both:
                shared_ns += took_ns
                other_left -= 1
            now_ns += took_ns
            left -= 1
        jitter_ns = numbers.randint(0, 300_000)
        seen.append((length * slice_ns, now_ns - start_ns + jitter_ns, shared_ns))
    return seen


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_a_medium_that_is_shared_is_told_from_one_that_is_not(seed: int, half: bool) -> None:
    estimator = DuplexEstimator()
    for observation in share(seed, half=half):
        estimator.observe(*observation)
    assert estimator.half is half


def test_nothing_is_said_while_hardly_anything_was_shared() -> None:
    estimator = DuplexEstimator()
    assert estimator.half is None
    for _ in range(100):
        estimator.observe(10 * MS, 20 * MS, 0)
    assert estimator.half is None
    estimator.observe(10 * MS, 20 * MS, 19 * MS)
    assert estimator.half is None
    estimator.observe(1 * MS, 2 * MS, 1 * MS)
    assert estimator.half is True


def test_one_message_that_was_held_up_does_not_decide() -> None:
    estimator = DuplexEstimator()
    for _ in range(10):
        estimator.observe(10 * MS, 10 * MS, 10 * MS)
    estimator.observe(10 * MS, 900 * MS, 10 * MS)
    assert estimator.half is False
    estimator.observe(10 * MS, 900 * MS, 900 * MS)
    assert estimator.half is False


def test_a_path_that_slows_down_for_a_while_is_no_shared_medium() -> None:
    estimator = DuplexEstimator()
    for index in range(240):
        elapsed_ns = 29 * MS if 160 <= index < 210 else 15 * MS
        estimator.observe(15 * MS, elapsed_ns, elapsed_ns)
        assert estimator.half is not True


def test_slowness_for_a_tenth_of_the_shared_time_does_not_decide() -> None:
    for first in range(0, 100, 10):  # wherever it is
        estimator = DuplexEstimator()
        for index in range(100):
            elapsed_ns = 20 * MS if first <= index < first + 10 else 10 * MS
            estimator.observe(10 * MS, elapsed_ns, elapsed_ns)
        assert estimator.half is False


def test_where_messages_contradict_each_other_nothing_is_said() -> None:
    # A reader on a busy machine is late for one message and then finds others there already: few
    # look slowed down, while together they took what a shared medium takes.
    late_reader, hold_ups = DuplexEstimator(), DuplexEstimator()
    for _ in range(20):
        late_reader.observe(10 * MS, 37 * MS, 20 * MS)
        for _ in range(2):
            late_reader.observe(10 * MS, 13 * MS, 13 * MS)
    assert late_reader.half is None
    assert late_reader.tells
    # Most look slowed down by a little, and others make up for it.
    for _ in range(20):
        hold_ups.observe(10 * MS, 17 * MS, 17 * MS)
        hold_ups.observe(20 * MS, 15 * MS, 15 * MS)
    assert hold_ups.half is None


def test_two_directions_that_keep_more_than_six_tenths_of_their_rates_share_no_medium() -> None:
    estimator = DuplexEstimator()
    for _ in range(20):
        estimator.observe(62 * MS, 100 * MS, 100 * MS)
    assert estimator.half is False


def cross(duplex: Duplex, *, slowed: bool) -> None:
    """Take a step that crosses, of three messages that are slowed down or not."""
    for _ in range(3):
        elapsed_ns = (20 if slowed else 10) * MS
        duplex.observe(10 * MS, elapsed_ns, elapsed_ns)
    duplex.end_step(crossing=True)


def wait(duplex: Duplex) -> int:
    """Take steps behind a barrier until it asks for others; return how many."""
    steps = 0
    while not duplex.probing:
        duplex.end_step(crossing=False)
        steps += 1
    return steps


def test_the_first_step_that_crosses_tells_nothing() -> None:
    duplex = Duplex()
    cross(duplex, slowed=True)
    assert duplex.half is None
    cross(duplex, slowed=False)
    assert duplex.half is False
    duplex.end_step(crossing=False)
    cross(duplex, slowed=True)
    assert duplex.half is False


def test_a_shared_medium_is_found_out_in_two_steps_and_then_doubted_ever_more_rarely() -> None:
    duplex, waits = Duplex(), []
    for _ in range(8):
        cross(duplex, slowed=True)
        cross(duplex, slowed=True)
        assert (duplex.half, duplex.probing) == (True, False)
        waits.append(wait(duplex))
        assert duplex.half is True
    assert waits == [3, 6, 12, 24, 48, 96, 96, 96]


def test_a_verdict_that_congestion_control_brought_about_is_revised() -> None:
    duplex = Duplex()
    for _ in range(2):
        cross(duplex, slowed=True)
    assert duplex.half is True
    assert wait(duplex) == 3
    cross(duplex, slowed=True)  # as whenever traffic both ways begins
    assert (duplex.half, duplex.probing) == (True, True)
    cross(duplex, slowed=False)
    assert (duplex.half, duplex.probing) == (False, False)


def test_a_test_in_which_nothing_is_shared_ends_with_nothing_known() -> None:
    duplex = Duplex()
    for _ in range(2):
        cross(duplex, slowed=True)
    wait(duplex)
    steps = 0
    while duplex.probing:
        duplex.end_step(crossing=True)
        steps += 1
    assert duplex.half is None
    assert steps == 8


def test_a_test_that_contradicts_itself_leaves_the_verdict_and_doubts_it_later() -> None:
    duplex = Duplex()
    for _ in range(2):
        cross(duplex, slowed=True)
    wait(duplex)
    steps = 0
    while duplex.probing:
        duplex.observe(10 * MS, 17 * MS, 17 * MS)
        duplex.observe(20 * MS, 15 * MS, 15 * MS)
        duplex.end_step(crossing=True)
        steps += 1
    assert duplex.half is True
    assert steps == 8
    assert wait(duplex) == 6


def test_when_the_link_has_changed_the_verdict_stands_and_is_doubted_at_once() -> None:
    duplex = Duplex()
    for _ in range(2):
        cross(duplex, slowed=True)
    duplex.start_over()
    assert duplex.half is True
    assert wait(duplex) == 1


def pull_over(estimator: Estimator, n: int, ns_per_byte: float, *, half: bool, alone: bool) -> None:
    """Pull messages of four sizes, 1 ms each beside their bytes; four make a step.

    The uplink is busy all the time but where they are alone, or a barrier is kept.
    """
    duplex = estimator.duplex
    crossing = False
    for index in range(n):
        if index % 4 == 0:
            crossing = not alone and (duplex.half is not True or duplex.probing)
        nbytes = (200_000, 150_000, 90_000, 30_000)[index % 4]
        elapsed_ns = round(MS + nbytes * ns_per_byte) * (2 if half and crossing else 1)
        elapsed_ns += 50_000 * (index % 3)
        estimator.observe_pull(nbytes, elapsed_ns, 1, shared_ns=elapsed_ns if crossing else 0)
        if index % 4 == 3:
            estimator.observe_pushes((), crossing=crossing)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("before", [8, 12, 70])  # a verdict takes two steps, of four messages
@pytest.mark.parametrize("slower", [0.25, 2, 3, 10, 50])
def test_a_link_that_becomes_slower_or_faster_is_not_taken_for_another_kind(
    slower: float, before: int, half: bool
) -> None:
    estimator = Estimator([("a", 10**6)])
    pull_over(estimator, 12, 80, half=half, alone=True)
    pull_over(estimator, before, 80, half=half, alone=False)
    pull_over(estimator, 60, 80 * slower, half=half, alone=False)
    assert estimator.duplex.half is half
    assert estimator.down.ns_per_byte == pytest.approx(80 * slower, rel=0.1)


def test_an_uplink_is_followed_beside_a_downlink_too_fast_to_share_anything() -> None:
    estimator = Estimator([("a", 10**6)])
    sizes = (100_000, 60_000, 20_000)
    for step in range(60):
        slow = 80 if step < 20 else 400
        for nbytes in sizes:
            estimator.observe_pull(nbytes, nbytes, 1, shared_ns=nbytes if step > 3 else 0)
        pushes = [(nbytes, MS + nbytes * slow, 1) for nbytes in sizes]
        estimator.observe_pushes(pushes, crossing=step > 3)
    assert estimator.duplex.half is None
    assert estimator.up.ns_per_byte == pytest.approx(400, rel=0.05)


@pytest.mark.parametrize("times", [(-1, 1, 0), (1, -1, 0), (1, 1, -1), (1, 1, 2)])
def test_times_that_cannot_be_are_refused(times: tuple[int, int, int]) -> None:
    with pytest.raises(PlanError):
        DuplexEstimator().observe(*times)


@pytest.mark.parametrize("seed", range(50))
def test_busy_time_within_any_window_is_what_counting_gives(seed: int) -> None:
    numbers = random.Random(seed)
    busy, ticks, now, last_start = BusyTimes(), set(), 0, 0
    for _ in range(20):
        end = now + numbers.randint(0, 8)
        # Two that send at once may both be told of, the earlier beginning last.
        start = numbers.randint(last_start, end)
        last_start = max(last_start, start)
        busy.add(start, end)
        ticks |= set(range(start, end))
        now = end
    for _ in range(50):
        first, last = sorted((numbers.randint(0, now + 3), numbers.randint(0, now + 3)))
        assert busy.within(first, last) == len(ticks & set(range(first, last)))


def test_of_two_that_overlap_the_shared_part_counts_once() -> None:
    busy = BusyTimes()
    for start, end in ((0, 2), (5, 9), (4, 11), (3, 11)):
        busy.add(start, end)
    assert busy.within(0, 20) == 10
    assert busy.within(2, 4) == 1


def test_intervals_come_in_the_order_of_their_ends() -> None:
    busy = BusyTimes()
    busy.add(5, 9)
    for start, end in ((4, 8), (20, 19)):
        with pytest.raises(PlanError, match="expected an interval that ends after the last one"):
            busy.add(start, end)
