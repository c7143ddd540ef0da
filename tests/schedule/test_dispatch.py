from __future__ import annotations

import random

import pytest

from dynacomm_async.errors import PlanError
from dynacomm_async.ranges import Range
from dynacomm_async.schedule import OrderedDispatcher

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
