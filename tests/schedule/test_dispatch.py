from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from dynacomm_async.errors import PlanError
from dynacomm_async.ranges import Range
from dynacomm_async.schedule import Layout, OrderedDispatcher, Policy, PriorityDispatcher

FIRST = (Range(4, 2),)
SECOND = (Range(0, 1), Range(2, 2))
LAST = (Range(1, 1),)


def test_messages_leave_in_order_each_when_its_cells_are_ready() -> None:
    dispatcher = OrderedDispatcher([FIRST, SECOND, LAST], n_cells=6)
    assert dispatcher.next() is None
    dispatcher.ready(0, 4)
    assert dispatcher.next() is None
    dispatcher.ready(4, 1)
    assert dispatcher.next() is None
    dispatcher.ready(5, 1)
    assert [dispatcher.next() for _ in range(2)] == [FIRST, SECOND]
    assert not dispatcher.done
    assert dispatcher.next() == LAST
    assert dispatcher.done
    assert dispatcher.next() is None


def test_a_barrier_waits_for_all_cells_of_all_messages() -> None:
    dispatcher = OrderedDispatcher([FIRST, SECOND, LAST], n_cells=7, barrier=True)
    dispatcher.ready(2, 4)
    dispatcher.ready(0, 1)
    assert dispatcher.next() is None
    dispatcher.ready(1, 1)
    assert [dispatcher.next() for _ in range(3)] == [FIRST, SECOND, LAST]
    assert dispatcher.done


def test_marking_twice_changes_nothing() -> None:
    dispatcher = OrderedDispatcher([SECOND], n_cells=6)
    for _ in range(3):
        dispatcher.ready(0, 3)
    assert dispatcher.next() is None
    dispatcher.ready(3, 1)
    assert dispatcher.next() == SECOND


def test_cells_in_no_message_are_never_sent() -> None:
    dispatcher = OrderedDispatcher([LAST], n_cells=6)
    dispatcher.ready(0, 6)
    assert dispatcher.next() == LAST
    assert dispatcher.done


def test_without_messages_all_is_done() -> None:
    dispatcher = OrderedDispatcher([], n_cells=6, barrier=True)
    assert dispatcher.done
    assert dispatcher.next() is None


@pytest.mark.parametrize(
    "messages",
    [
        [()],
        [(Range(0, 0),)],
        [(Range(2, -1),)],
        [(Range(-1, 2),)],
        [(Range(5, 2),)],
        [(Range(0, 2),), (Range(1, 1),)],
        [(Range(0, 2), Range(1, 2))],
        [(Range(3, 1),), (Range(0, 6),)],
    ],
    ids=str,
)
def test_messages_that_overlap_are_empty_or_leave_the_model_are_refused(
    messages: list[tuple[Range, ...]],
) -> None:
    with pytest.raises(PlanError, match="expected"):
        OrderedDispatcher(messages, n_cells=6)


@pytest.mark.parametrize(("first", "count"), [(0, 0), (-1, 2), (5, 2), (6, 1), (0, -1)])
def test_cells_outside_the_model_are_not_marked(first: int, count: int) -> None:
    dispatcher = OrderedDispatcher([LAST], n_cells=6)
    with pytest.raises(PlanError, match="expected"):
        dispatcher.ready(first, count)
    assert dispatcher.next() is None


def make_messages(numbers: random.Random, n_cells: int) -> list[tuple[Range, ...]]:
    cuts = sorted(numbers.sample(range(1, n_cells), numbers.randint(0, min(30, n_cells - 1))))
    ranges = [Range(a, b - a) for a, b in zip([0, *cuts], [*cuts, n_cells], strict=True)]
    numbers.shuffle(ranges)
    messages = []
    while ranges:
        size = numbers.randint(1, 3)
        messages.append(tuple(ranges[:size]))
        ranges = ranges[size:]
    return messages[: numbers.randint(1, len(messages))]


@pytest.mark.parametrize("barrier", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_the_dispatcher_equals_one_that_looks_at_every_cell(seed: int, barrier: bool) -> None:
    numbers = random.Random(seed)
    n_cells = numbers.randint(1, 80)
    messages = make_messages(numbers, n_cells)
    cells = [{c for first, n in message for c in range(first, first + n)} for message in messages]
    dispatcher = OrderedDispatcher(messages, n_cells=n_cells, barrier=barrier)
    marked: set[int] = set()
    sent = 0
    for _ in range(300):
        first = numbers.randrange(n_cells)
        count = min(numbers.choice([1, 1, 5, n_cells]), n_cells - first)
        dispatcher.ready(first, count)
        marked.update(range(first, first + count))
        while sent < len(messages) and (
            set().union(*cells) <= marked if barrier else cells[sent] <= marked
        ):
            assert dispatcher.next() == messages[sent]
            sent += 1
        assert dispatcher.next() is None
        assert dispatcher.done == (sent == len(messages))


def test_a_large_model_may_become_ready_at_once_or_cell_by_cell() -> None:
    n_cells = 35_000
    messages = [(Range(first, 100),) for first in range(0, n_cells, 100)]
    at_once = OrderedDispatcher(messages, n_cells=n_cells)
    at_once.ready(0, n_cells)
    singly = OrderedDispatcher(messages, n_cells=n_cells)
    order = list(range(n_cells))
    random.Random(0).shuffle(order)
    for cell in order:
        singly.ready(cell, 1)
    for message in messages:
        assert at_once.next() == singly.next() == message


SMALL = Layout([10, 25, 3, 40], cell_nbytes=10)  # cells 0; 1 2 3; 4; 5 6 7 8


def test_what_is_ready_leaves_from_the_front_cut_to_size() -> None:
    dispatcher = PriorityDispatcher(Policy(cap_nbytes=30), SMALL)
    assert dispatcher.next() is None
    dispatcher.ready(5, 4)
    assert dispatcher.next() == (Range(5, 3),)
    dispatcher.ready(4, 1)
    dispatcher.ready(1, 3)
    assert dispatcher.next() == (Range(1, 4),)  # 28 bytes: two of its cells are short
    dispatcher.ready(0, 1)
    assert dispatcher.next() == (Range(0, 1), Range(8, 1))
    assert dispatcher.done
    assert dispatcher.next() is None


def test_a_message_holds_at_least_one_cell() -> None:
    dispatcher = PriorityDispatcher(Policy(cap_nbytes=1), SMALL)
    dispatcher.ready(0, 9)
    assert [dispatcher.next() for _ in range(9)] == [(Range(cell, 1),) for cell in range(9)]
    assert dispatcher.done


def test_layers_that_stay_whole_wait_for_their_last_cell_and_may_exceed_the_cap() -> None:
    dispatcher = PriorityDispatcher(Policy(cap_nbytes=20, whole_layers=True), SMALL)
    dispatcher.ready(2, 5)
    assert dispatcher.next() == (Range(4, 1),)
    assert dispatcher.next() is None
    dispatcher.ready(1, 1)
    assert dispatcher.next() == (Range(1, 3),)
    dispatcher.ready(7, 2)
    dispatcher.ready(0, 1)
    assert [dispatcher.next(), dispatcher.next()] == [(Range(0, 1),), (Range(5, 4),)]
    assert dispatcher.done


def test_a_message_may_be_kept_to_one_layer() -> None:
    dispatcher = PriorityDispatcher(Policy(cap_nbytes=20, one_layer=True), SMALL)
    dispatcher.ready(0, 9)
    found = [dispatcher.next() for _ in range(6)]
    assert found == [
        *((Range(0, 1),), (Range(1, 2),), (Range(3, 1),), (Range(4, 1),)),
        *((Range(5, 2),), (Range(7, 2),)),
    ]


def test_rear_layers_may_leave_first_until_all_are_ready() -> None:
    dispatcher = PriorityDispatcher(Policy(cap_nbytes=20, rear_first=True), SMALL)
    dispatcher.ready(5, 4)
    assert dispatcher.next() == (Range(5, 2),)
    dispatcher.ready(1, 4)
    assert dispatcher.next() == (Range(7, 2),)  # what comes later does not overtake it
    assert dispatcher.next() == (Range(1, 1), Range(4, 1))
    dispatcher.ready(0, 1)
    assert [dispatcher.next() for _ in range(2)] == [(Range(0, 1), Range(2, 1)), (Range(3, 1),)]
    assert dispatcher.done


def test_less_than_the_threshold_waits_until_nothing_more_can_come() -> None:
    dispatcher = PriorityDispatcher(Policy(threshold_nbytes=50), SMALL)
    dispatcher.ready(5, 4)
    assert dispatcher.next() is None
    dispatcher.ready(1, 3)
    assert dispatcher.next() == (Range(1, 3), Range(5, 4))
    dispatcher.ready(4, 1)
    assert dispatcher.next() is None
    dispatcher.ready(0, 1)
    assert dispatcher.next() == (Range(0, 1), Range(4, 1))
    assert dispatcher.done


@pytest.mark.parametrize(("first", "count"), [(0, 0), (-1, 2), (8, 2), (9, 1)])
def test_cells_outside_the_model_are_refused_by_a_policy_too(first: int, count: int) -> None:
    dispatcher = PriorityDispatcher(Policy(), SMALL)
    with pytest.raises(PlanError, match="expected"):
        dispatcher.ready(first, count)
    assert dispatcher.next() is None


@pytest.mark.parametrize(
    "fields",
    [
        *({"cap_nbytes": 0}, {"cap_nbytes": 1.5}, {"cap_nbytes": True}, {"cap_nbytes": "1"}),
        *({"threshold_nbytes": -1}, {"threshold_nbytes": None}),
        *({"whole_layers": 1}, {"one_layer": None}, {"rear_first": 0}),
    ],
    ids=str,
)
def test_a_policy_that_cannot_be_is_not_made(fields: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="expected"):
        Policy(**fields)


class NaivePriority:
    """The same rule, looking at every cell every time."""

    def __init__(self, policy: Policy, sizes: list[int], cell_nbytes: int) -> None:
        self.policy = policy
        self.cells = [
            (layer, min(cell_nbytes, size - place))
            for layer, size in enumerate(sizes)
            for place in range(0, size, cell_nbytes)
        ]
        self.marked: set[int] = set()
        self.sent: set[int] = set()

    def next(self) -> list[int] | None:
        policy, cells = self.policy, self.cells
        of_layer = [[c for c, (own, _) in enumerate(cells) if own == layer] for layer, _ in cells]
        waiting = [
            cell
            for cell in sorted(self.marked - self.sent)
            if not policy.whole_layers or self.marked.issuperset(of_layer[cell])
        ]
        if not waiting:
            return None
        more = len(self.marked) < len(cells)
        if more and sum(cells[cell][1] for cell in waiting) < policy.threshold_nbytes:
            return None
        message: list[int] = []
        room = sum(size for _, size in cells) if policy.cap_nbytes is None else policy.cap_nbytes
        if policy.rear_first and more:
            waiting.sort(key=lambda cell: (-cells[cell][0], cell))
        units = [[cell] for cell in waiting]
        if policy.whole_layers:
            units = [of_layer[cell] for cell in waiting if cell == of_layer[cell][0]]
        for unit in units:
            if policy.one_layer and message and cells[unit[0]][0] != cells[message[0]][0]:
                break
            nbytes = sum(cells[cell][1] for cell in unit)
            if message and nbytes > room:
                break
            message += unit
            room -= nbytes
            if room < 0:
                break
        self.sent.update(message)
        return sorted(message)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_policys_dispatcher_equals_one_that_looks_at_every_cell(data: st.DataObject) -> None:
    cell_nbytes = data.draw(st.integers(1, 8))
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=7))
    policy = Policy(
        data.draw(st.none() | st.integers(1, 60)),
        data.draw(st.just(0) | st.integers(0, 80)),
        whole_layers=data.draw(st.booleans()),
        one_layer=data.draw(st.booleans()),
        rear_first=data.draw(st.booleans()),
    )
    layout = Layout(sizes, cell_nbytes)
    dispatcher, naive = (
        PriorityDispatcher(policy, layout),
        NaivePriority(policy, sizes, cell_nbytes),
    )
    while not dispatcher.done:
        missing = sorted(set(range(layout.n_cells)) - naive.marked)
        if missing and data.draw(st.booleans()):
            first = data.draw(st.sampled_from(missing))
            count = data.draw(st.integers(1, layout.n_cells - first))
            dispatcher.ready(first, count)
            naive.marked.update(range(first, first + count))
        elif missing:
            dispatcher.ready(missing[-1], 1)
            naive.marked.add(missing[-1])
        found = dispatcher.next()
        expected = naive.next()
        if found is None:
            assert expected is None
            continue
        assert [cell for first, n in found for cell in range(first, first + n)] == expected
        ends = [first + n for first, n in found]
        assert all(end < part.first for end, part in zip(ends, found[1:], strict=False))
    assert len(naive.sent) == layout.n_cells
    assert naive.next() is None


def test_a_layer_of_many_cells_costs_a_policy_nothing() -> None:
    layout = Layout([25_000 * 10], cell_nbytes=10)
    dispatcher = PriorityDispatcher(Policy(cap_nbytes=100), layout)
    dispatcher.ready(0, 25_000)
    n_messages = 0
    while not dispatcher.done:
        assert dispatcher.next() == (Range(10 * n_messages, 10),)
        n_messages += 1
    assert n_messages == 2500


# -- what the other end has already ----------------------------------------------------------------


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_cells_that_are_skipped_are_never_sent_and_all_others_are_once(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    layout = Layout(sizes, cell_nbytes=2)
    cells = list(range(layout.n_cells))
    whole = data.draw(st.booleans())
    if whole:
        layers = data.draw(st.sets(st.integers(0, layout.n_layers - 1)))
        skipped = {cell for cell in cells if layout.layer_of(cell) in layers}
    else:
        skipped = data.draw(st.sets(st.sampled_from(cells)))
    skip = [Range(cell, 1) for cell in skipped]
    kind = data.draw(st.sampled_from(["policy", "ordered", "barrier"]))
    dispatcher: OrderedDispatcher | PriorityDispatcher
    if kind == "policy":
        cap = data.draw(st.none() | st.integers(1, 12))
        policy = Policy(cap, data.draw(st.integers(0, 12)), whole)
        dispatcher = PriorityDispatcher(policy, layout, skip)
    else:
        cut = data.draw(st.integers(1, layout.n_cells))
        messages = [(Range(0, cut),), (Range(cut, layout.n_cells - cut),)]
        messages = [message for message in messages if message[0].count]
        dispatcher = OrderedDispatcher(
            messages, n_cells=layout.n_cells, barrier=kind == "barrier", skip=skip
        )
    sent: list[int] = []
    for cell in data.draw(st.permutations(cells)):
        assert dispatcher.done == (len(sent) == len(cells) - len(skipped))
        dispatcher.ready(cell, 1)
        while (message := dispatcher.next()) is not None:
            sent += [one for first, count in message for one in range(first, first + count)]
    assert sorted(sent) == [cell for cell in cells if cell not in skipped]
    assert dispatcher.done
