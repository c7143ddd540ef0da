"""Rounds, against a model that is nothing but sets."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings, strategies as st

from dynacomm_async.errors import RemoteProtocolError
from dynacomm_async.ranges import Range
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
