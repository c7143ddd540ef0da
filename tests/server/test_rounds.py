"""Rounds, against a model that is nothing but sets."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings, strategies as st

from dynacomm_async.errors import LocalProtocolError, RemoteProtocolError
from dynacomm_async.ranges import Range
from dynacomm_async.server.clocks import StaleRounds
from dynacomm_async.server.rounds import Rounds


def cells_of(ranges):
    return {cell for first, count in ranges for cell in range(first, first + count)}


class Model:
    """Who has pushed which cell: a dict of sets."""

    def __init__(self, n_cells, n_workers):
        self.step = 0
        self.everything = set(range(n_cells))
        self.pushed = {slot: set() for slot in range(n_workers)}
        self.applied = set()

    def allows(self, slot, step, ranges):
        flat = [cell for first, count in ranges for cell in range(first, first + count)]
        ascending = all(a < b for a, b in itertools.pairwise(flat))
        fits = set(flat) <= self.everything
        return step == self.step and ascending and fits and not self.pushed[slot] & set(flat)

    def push(self, slot, ranges):
        before = set.intersection(*self.pushed.values())
        self.pushed[slot] |= cells_of(ranges)
        return set.intersection(*self.pushed.values()) - before

    def apply(self, cells):
        self.applied |= cells
        if self.applied != self.everything:
            return False
        self.step += 1
        self.applied = set()
        self.pushed = {slot: set() for slot in self.pushed}
        return True


@st.composite
def partition(draw, n_cells):
    """All cells in messages of ascending ranges, in any order."""
    cuts = draw(st.sets(st.integers(1, n_cells - 1), max_size=8)) if n_cells > 1 else set()
    edges = [0, *sorted(cuts), n_cells]
    ranges = [Range(a, b - a) for a, b in itertools.pairwise(edges)]
    ranges = draw(st.permutations(ranges))
    messages = []
    while ranges:
        n = draw(st.integers(1, min(3, len(ranges))))
        messages.append(sorted(ranges[:n]))
        ranges = ranges[n:]
    return messages


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), n_cells=st.integers(1, 40), n_workers=st.integers(1, 4))
def test_any_order_of_workers_and_ranges_completes_what_all_have_pushed_and_ends_each_step_once(
    data, n_cells, n_workers
):
    rounds, model = Rounds(n_cells, n_workers), Model(n_cells, n_workers)
    for step in range(2):
        due = [
            (slot, message)
            for slot in range(n_workers)
            for message in data.draw(partition(n_cells))
        ]
        waiting, ends = [], 0
        for slot, message in data.draw(st.permutations(due)):
            rounds.check(slot, step, message)
            complete = rounds.push(slot, step, message)
            assert all(count > 0 for _, count in complete)
            assert cells_of(complete) == model.push(slot, message)
            assert sum(count for _, count in complete) == len(cells_of(complete))
            waiting += complete
            if waiting and data.draw(st.booleans()):
                cells = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
                ended = rounds.apply(cells)
                assert ended == model.apply(cells_of([cells]))
                ends += ended
        while waiting:
            cells = waiting.pop()
            ended = rounds.apply(cells)
            assert ended == model.apply(cells_of([cells]))
            ends += ended
        assert ends == 1
        assert rounds.step == model.step == step + 1


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_push_is_refused_exactly_when_the_model_refuses_it(data):
    rounds, model = Rounds(6, 2), Model(6, 2)
    ranges = st.lists(
        st.builds(Range, st.integers(0, 7), st.integers(1, 3)), min_size=1, max_size=3
    )
    for _ in range(data.draw(st.integers(1, 8))):
        slot, step = data.draw(st.integers(0, 1)), data.draw(st.sampled_from([0, 0, 0, 1]))
        message = data.draw(ranges)
        if model.allows(slot, step, message):
            rounds.check(slot, step, message)
            for cells in rounds.push(slot, step, message):
                rounds.apply(cells)
                model.applied |= cells_of([cells])
            model.push(slot, message)
            if model.applied == model.everything:
                model.apply(set())
        else:
            with pytest.raises(RemoteProtocolError):
                rounds.check(slot, step, message)


@pytest.mark.parametrize("step", [0, 4, 6, 999])
def test_gradients_of_another_step_are_refused_by_both_numbers(step):
    rounds = Rounds(3, 1, step=5)

    with pytest.raises(RemoteProtocolError, match=f"gradients of step {step}, expected step 5"):
        rounds.check(0, step, [Range(0, 3)])


@pytest.mark.parametrize(
    "ranges",
    [
        [Range(3, 1)],
        [Range(0, 4)],
        [Range(2, 2)],
        [Range(1, 1), Range(0, 1)],
        [Range(0, 2), Range(1, 1)],
        [Range(0, 1), Range(0, 1)],
    ],
)
def test_cells_out_of_range_or_out_of_order_or_twice_in_a_message_are_refused(ranges):
    with pytest.raises(RemoteProtocolError, match="expected ascending ranges within 0 to 2"):
        Rounds(3, 2).check(0, 0, ranges)


def test_a_cell_that_was_pushed_before_is_refused_from_the_same_worker_only():
    rounds = Rounds(4, 2)
    rounds.push(0, 0, [Range(1, 2)])

    rounds.check(1, 0, [Range(0, 4)])
    with pytest.raises(RemoteProtocolError, match="cells 2 to 3 of step 0 were pushed before"):
        rounds.check(0, 0, [Range(2, 2)])


def test_a_refused_push_changes_nothing():
    rounds = Rounds(4, 1)
    with pytest.raises(RemoteProtocolError):
        rounds.check(0, 0, [Range(0, 2), Range(1, 3)])

    assert rounds.push(0, 0, [Range(0, 4)]) == [Range(0, 4)]
    assert rounds.apply(Range(0, 4))


# -- members that leave and come -----------------------------------------------------------------

ALL = [Range(0, 4)]


def test_one_who_leaves_shrinks_only_cells_that_are_not_complete():
    rounds = Rounds(4, 3)
    assert rounds.push(0, 0, ALL) == []
    assert rounds.push(2, 0, [Range(0, 2)]) == []
    assert rounds.push(1, 0, [Range(0, 1)]) == [Range(0, 1)]

    assert rounds.leave(2) == []
    assert rounds.push(1, 0, [Range(1, 3)]) == [Range(1, 3)]

    assert rounds.contributors(Range(0, 4)) == [
        (Range(0, 2), (0, 1, 2)),
        (Range(2, 2), (0, 1)),
    ]


def test_cells_that_were_waiting_for_the_one_who_leaves_are_complete_at_once():
    rounds = Rounds(4, 3)
    rounds.push(0, 0, ALL)
    rounds.push(1, 0, [Range(0, 1), Range(2, 2)])
    rounds.push(2, 0, [Range(2, 1)])

    assert rounds.leave(2) == [Range(0, 1), Range(3, 1)]


def test_when_the_last_one_leaves_the_step_ends_with_what_there_is():
    rounds = Rounds(4, 1)
    rounds.push(0, 0, [Range(1, 1)])

    assert rounds.leave(0) == [Range(0, 1), Range(2, 2)]
    assert rounds.contributors(Range(0, 4)) == [
        (Range(0, 1), ()),
        (Range(1, 1), (0,)),
        (Range(2, 2), ()),
    ]
    assert rounds.apply(Range(0, 4))
    assert (rounds.step, rounds.members, rounds.short) == (1, (), 1)


def test_a_step_to_which_nothing_was_pushed_waits_for_whoever_comes():
    rounds = Rounds(4, 2)
    assert rounds.leave(0) == rounds.leave(1) == []

    rounds.enter(1)
    assert (rounds.step, rounds.members, rounds.short) == (0, (1,), 0)
    assert rounds.push(1, 0, ALL) == ALL


def test_a_newcomer_takes_part_from_the_next_step_of_which_nothing_has_been_sent():
    rounds = Rounds(4, 2, members=[0])
    rounds.enter(1)
    assert not rounds.takes_part(1, 0)
    with pytest.raises(RemoteProtocolError, match="worker 1 takes no part in step 0"):
        rounds.check(1, 0, ALL)

    rounds.push(0, 0, [Range(0, 1)])
    assert rounds.upcoming == (0, 1)
    assert rounds.takes_part(1, 1)

    rounds = Rounds(4, 2, members=[0])
    rounds.push(0, 0, [Range(0, 1)])
    rounds.enter(1)
    assert rounds.upcoming == (0,)
    rounds.push(0, 0, [Range(1, 3)])
    rounds.apply(Range(0, 4))
    assert (rounds.members, rounds.takes_part(1, 1)) == ((0,), False)


def test_the_work_of_a_step_stays_divided_as_it_was_when_a_member_leaves():
    rounds = Rounds(4, 3)
    rounds.leave(1)
    assert rounds.members == (0, 1, 2)
    for slot in (0, 2):
        rounds.push(slot, 0, ALL)
    rounds.apply(Range(0, 4))
    assert rounds.members == (0, 2)


# -- behind a barrier ----------------------------------------------------------------------------


def test_a_replacement_computes_the_whole_step_anew():
    rounds = Rounds(4, 2, barrier=True)
    rounds.push(0, 0, ALL)
    rounds.push(1, 0, [Range(0, 3)])
    rounds.hold(1)
    assert (rounds.waiting, rounds.takes_part(1, 0)) == ((1,), False)

    rounds.enter(1)
    assert rounds.waiting == ()
    assert rounds.have(1, 0) == []
    assert rounds.push(1, 0, [Range(3, 1)]) == []
    assert rounds.push(1, 0, [Range(0, 3)]) == ALL
    assert rounds.contributors(Range(0, 4)) == [(Range(0, 4), (0, 1))]


def test_a_replacement_of_one_who_had_pushed_everything_begins_with_the_next_step():
    rounds = Rounds(4, 2, barrier=True)
    rounds.push(1, 0, ALL)
    rounds.hold(1)
    assert rounds.waiting == ()

    rounds.enter(1)
    assert not rounds.takes_part(1, 0)
    assert rounds.push(0, 0, ALL) == ALL
    assert rounds.takes_part(1, 1)
    assert rounds.contributors(Range(0, 4)) == [(Range(0, 4), (0, 1))]


def test_when_waiting_is_given_up_what_the_lost_member_pushed_counts():
    rounds = Rounds(4, 2, barrier=True)
    rounds.push(1, 0, [Range(1, 2)])
    rounds.hold(1)
    rounds.push(0, 0, ALL)

    assert rounds.leave(1) == ALL
    assert rounds.contributors(Range(0, 4)) == [
        (Range(0, 1), (0,)),
        (Range(1, 2), (0, 1)),
        (Range(3, 1), (0,)),
    ]


def test_leaving_after_the_step_is_complete_completes_nothing_again():
    rounds = Rounds(4, 2, barrier=True)
    rounds.push(0, 0, ALL)
    assert rounds.push(1, 0, ALL) == ALL
    assert rounds.leave(1) == []


def test_without_a_barrier_a_replacement_must_come_before_a_cell_has_changed():
    rounds = Rounds(4, 2)
    rounds.push(1, 0, [Range(0, 2)])
    rounds.hold(1)
    assert rounds.replaceable
    assert rounds.push(0, 0, [Range(0, 1)]) == [Range(0, 1)]
    assert not rounds.replaceable

    with pytest.raises(LocalProtocolError, match="too late to replace slot 1"):
        rounds.enter(1)
    assert rounds.leave(1) == []
    assert rounds.push(0, 0, [Range(1, 3)]) == [Range(1, 3)]


def test_a_quorum_holds_no_slot():
    with pytest.raises(LocalProtocolError, match="waits for nobody in particular"):
        Rounds(4, 2, quorum=1).hold(0)


def test_the_first_whole_contributions_make_a_quorum_and_the_others_are_to_skip():
    rounds = Rounds(4, 3, quorum=2)
    rounds.push(2, 0, [Range(0, 3)])
    assert rounds.push(1, 0, ALL) == []
    assert rounds.check(2, 0, [Range(3, 1)])
    assert rounds.push(0, 0, ALL) == ALL
    assert rounds.contributors(Range(0, 4)) == [(Range(0, 4), (0, 1))]
    assert [rounds.skips(slot) for slot in range(3)] == [-1, -1, 0]

    assert rounds.push(2, 0, [Range(3, 1)]) == []  # it was on its way when the quorum was reached
    assert rounds.check(2, 0, [Range(3, 1)]) is False
    assert rounds.have(2, 0) == ALL
    rounds.apply(Range(0, 4))
    assert rounds.check(2, 0, [Range(3, 1)]) is False
    assert rounds.check(2, 1, ALL)


def test_a_quorum_that_too_few_are_left_for_waits_for_newcomers_who_take_part_at_once():
    rounds = Rounds(4, 3, quorum=2)
    rounds.push(0, 0, ALL)
    rounds.leave(1)
    rounds.leave(2)
    assert rounds.short == 1
    rounds.leave(0)
    assert rounds.short == 1

    rounds.enter(2)
    assert rounds.short == 0
    assert rounds.push(2, 0, ALL) == ALL
    assert rounds.contributors(Range(0, 4)) == [(Range(0, 4), (0, 2))]


def test_entering_a_taken_slot_and_leaving_a_free_one_are_refused():
    rounds = Rounds(4, 2, members=[0])
    with pytest.raises(LocalProtocolError, match="slot 0 is taken"):
        rounds.enter(0)
    with pytest.raises(LocalProtocolError, match="nobody is in slot 1"):
        rounds.leave(1)


def test_what_need_not_be_pushed_again_is_all_of_the_steps_before_and_what_came_of_this_one():
    rounds = Rounds(4, 2, step=3)
    rounds.push(0, 3, [Range(0, 1), Range(2, 2)])

    assert rounds.have(0, 3) == [Range(0, 1), Range(2, 2)]
    assert rounds.have(0, 2) == ALL
    with pytest.raises(RemoteProtocolError, match="step 4 has not begun, expected at most 3"):
        rounds.have(0, 4)


# -- no common step ------------------------------------------------------------------------------


def finish_step(rounds, slot):
    step = rounds.clock(slot)
    rounds.check(slot, step, ALL)
    for cells in rounds.push(slot, step, ALL):
        assert rounds.apply(slot, step, cells)


def test_nobody_gets_further_ahead_than_the_bound():
    rounds = StaleRounds(4, 2, 1)
    finish_step(rounds, 0)
    assert rounds.allows(1)
    finish_step(rounds, 0)
    assert not rounds.allows(2)
    with pytest.raises(RemoteProtocolError, match="slowest worker is at 0: more than 1 ahead"):
        rounds.check(0, 2, ALL)

    finish_step(rounds, 1)
    assert rounds.allows(2)
    assert rounds.versions.tolist() == [3, 3, 3, 3]


def test_without_a_bound_anybody_may_go_on():
    rounds = StaleRounds(4, 2, None)
    for _ in range(9):
        finish_step(rounds, 0)
    assert (rounds.allows(9), rounds.minimum) == (True, 0)


def test_who_leaves_frees_those_it_held_back_and_who_is_held_does_not():
    rounds = StaleRounds(4, 3, 0)
    finish_step(rounds, 0)
    rounds.hold(1)
    rounds.leave(2)
    assert (rounds.waiting, rounds.allows(1)) == ((1,), False)
    rounds.leave(1)
    assert (rounds.waiting, rounds.allows(1)) == ((), True)


def test_a_joiner_begins_at_the_minimum_but_repeats_no_step_of_its_slot():
    rounds = StaleRounds(4, 3, 2)
    for slot in (0, 0, 1):
        finish_step(rounds, slot)
    rounds.leave(2)
    assert rounds.enter(2) == 1

    rounds.leave(0)
    assert rounds.enter(0) == 2
    rounds.push(0, 2, [Range(0, 1)])
    rounds.leave(0)
    assert rounds.enter(0) == 3
    assert rounds.apply(0, 2, Range(0, 1)) is False  # what its predecessor pushed is applied still
    assert rounds.have(0, 3) == []
