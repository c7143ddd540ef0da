"""The step machine: plain synchronous tests, no link and no clock."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings, strategies as st

from dynacomm_async.errors import LocalProtocolError, PlanError
from dynacomm_async.ranges import Range
from dynacomm_async.schedule import OrderedDispatcher
from dynacomm_async.worker.step import (
    Compute,
    LayerComputed,
    LinkFree,
    Phase,
    RangeArrived,
    Resumed,
    Send,
    StepMachine,
)

LAYERS = [Range(0, 2), Range(2, 1), Range(3, 3)]
LAYERWISE = [(cells,) for cells in reversed(LAYERS)]
FRONT = (Range(0, 3),)


def cells_of(ranges):
    return [cell for first, count in ranges for cell in range(first, first + count)]


def computes(instructions, phase):
    return [i.layer for i in instructions if isinstance(i, Compute) and i.phase is phase]


def pulled_machine(push=LAYERWISE, statistics=None):
    machine = StepMachine(LAYERS, OrderedDispatcher(push, n_cells=6), statistics)
    machine.handle(RangeArrived(Range(0, 6)))
    return machine


@settings(max_examples=200, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**9), cuts=st.sets(st.integers(1, 29)))
def test_whatever_the_order_of_arrival_layers_are_computed_in_order_once_they_are_whole(seed, cuts):
    numbers = random.Random(seed)
    edges = [0, *sorted(numbers.sample(range(1, 30), numbers.randint(0, 9))), 30]
    layers = [Range(a, b - a) for a, b in itertools.pairwise(edges)]
    bounds = [0, *sorted(cuts), 30]
    pieces = [Range(a, b - a) for a, b in itertools.pairwise(bounds)]
    numbers.shuffle(pieces)

    machine = StepMachine(layers, OrderedDispatcher([(Range(0, 30),)], n_cells=30))
    arrived, forward, backward = set(), [], []
    for piece in pieces:
        instructions = machine.handle(RangeArrived(piece))
        arrived |= set(range(piece.first, piece.first + piece.count))
        forward += computes(instructions, Phase.FORWARD)
        backward += computes(instructions, Phase.BACKWARD)
        whole = [set(range(first, first + count)) <= arrived for first, count in layers]
        n_granted = whole.index(False) if False in whole else len(layers)
        assert forward == list(range(n_granted))
        assert machine.pulled == (n_granted == len(layers))
        assert backward == (list(reversed(range(len(layers)))) if machine.pulled else [])


def test_statistics_behind_the_last_layer_change_nothing_of_what_the_layers_lack():
    machine = StepMachine(LAYERS, OrderedDispatcher(LAYERWISE, n_cells=6), Range(6, 2))
    assert machine.handle(RangeArrived(Range(6, 2))) == []
    assert not machine.pulled
    instructions = machine.handle(RangeArrived(Range(0, 8)))
    assert computes(instructions, Phase.FORWARD) == [0, 1, 2]
    assert machine.pulled


@settings(max_examples=200, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**9))
def test_whatever_the_order_of_gradients_and_link_events_messages_leave_whole_and_in_plan_order(
    seed,
):
    numbers = random.Random(seed)
    layers = [Range(index, 1) for index in range(8)]
    order = list(layers)
    numbers.shuffle(order)
    push = [tuple(sorted(order[i : i + 2])) for i in range(0, 8, 2)]
    machine = StepMachine(layers, OrderedDispatcher(push, n_cells=8))
    machine.handle(RangeArrived(Range(0, 8)))
    gradients = list(range(8))
    numbers.shuffle(gradients)
    sent, ready, busy = [], set(), False
    while gradients or busy:
        if busy and (not gradients or numbers.random() < 0.5):
            busy = False
            instructions = machine.handle(LinkFree())
        else:
            layer = gradients.pop()
            ready.add(layer)
            instructions = machine.handle(LayerComputed(layer))
        for send in instructions:
            assert isinstance(send, Send)
            assert not busy, "two messages at once"
            busy = True
            assert send.first == (not sent)
            sent.append(send.cells)
            assert all(first in ready for first, _ in send.cells)
        due = push[len(sent)] if len(sent) < len(push) else None
        if not busy and due is not None:
            assert not all(first in ready for first, _ in due), "a message waits for nothing"
    assert sent == push
    assert machine.pushed


def test_the_first_gradient_message_takes_the_statistics_along_and_no_other_does():
    machine = pulled_machine(statistics=Range(6, 2))

    assert machine.handle(LayerComputed(2)) == [Send((Range(3, 3), Range(6, 2)), True)]
    assert machine.handle(LayerComputed(1)) == []
    assert machine.handle(LinkFree()) == [Send((Range(2, 1),), False)]


def test_a_model_without_statistics_sends_none():
    machine = pulled_machine(statistics=Range(6, 0))

    assert machine.handle(LayerComputed(2)) == [Send((Range(3, 3),), True)]


def test_the_step_is_pushed_only_when_the_last_message_has_left():
    machine = pulled_machine(push=[(Range(0, 6),)])
    for layer in (2, 1, 0):
        assert not machine.pushed
        instructions = machine.handle(LayerComputed(layer))
    assert instructions == [Send((Range(0, 6),), True)]
    assert not machine.pushed
    assert machine.handle(LinkFree()) == []
    assert machine.pushed


def test_nothing_is_sent_before_the_whole_message_exists():
    machine = pulled_machine(push=[(Range(2, 4),), (Range(0, 2),)])

    assert machine.handle(LayerComputed(0)) == []
    assert machine.handle(LayerComputed(2)) == []
    assert machine.handle(LayerComputed(1)) == [Send((Range(2, 4),), True)]


@pytest.mark.parametrize("again", [Range(0, 6), Range(1, 1), Range(5, 1)])
def test_cells_that_arrive_twice_are_an_error(again):
    machine = pulled_machine()

    with pytest.raises(LocalProtocolError, match="have arrived twice"):
        machine.handle(RangeArrived(again))


def test_a_gradient_before_all_parameters_is_an_error_and_changes_nothing():
    machine = StepMachine(LAYERS, OrderedDispatcher(LAYERWISE, n_cells=6))
    machine.handle(RangeArrived(Range(0, 5)))
    with pytest.raises(LocalProtocolError, match="layer 2 is there before all parameters"):
        machine.handle(LayerComputed(2))

    machine.handle(RangeArrived(Range(5, 1)))
    assert machine.handle(LayerComputed(2)) == [Send((Range(3, 3),), True)]


def test_a_gradient_twice_is_an_error():
    machine = pulled_machine()
    machine.handle(LayerComputed(1))

    with pytest.raises(LocalProtocolError, match="gradient of layer 1 is there twice"):
        machine.handle(LayerComputed(1))


@pytest.mark.parametrize(
    "push",
    [
        [(Range(0, 4),), (Range(3, 3),)],
        [(Range(0, 7),)],
        [()],
        [(Range(0, 6), Range(0, 1))],
    ],
)
def test_gradient_messages_that_overlap_or_leave_the_model_are_refused(push):
    with pytest.raises(PlanError):
        StepMachine(LAYERS, OrderedDispatcher(push, n_cells=6))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**9))
def test_after_any_number_of_breaks_each_cell_has_arrived_just_once(seed):
    statistics = Range(6, 2)
    numbers = random.Random(seed)
    messages = numbers.choice([LAYERWISE, [(Range(0, 6),)], [(Range(3, 3),), FRONT]])
    machine, arrived, outbox = pulled_machine(messages, statistics), [], []
    gradients = list(reversed(range(3)))

    def take(instructions):
        outbox.extend(i for i in instructions if isinstance(i, Send))

    while gradients or outbox:
        what = numbers.choice(["gradient", "message", "break"])
        if what == "gradient" and gradients:
            take(machine.handle(LayerComputed(gradients.pop(0))))
        elif what == "message" and outbox:
            arrived += cells_of(outbox.pop(0).cells)
            take(machine.handle(LinkFree()))
        elif what == "break":
            if outbox and numbers.random() < 0.5:  # it had arrived, and nobody here knew
                arrived += cells_of(outbox[0].cells)
            outbox.clear()
            there = [Range(cell, 1) for cell in arrived]
            rest = statistics if statistics.first not in arrived else None
            skip = [cells for cells in there if cells.first < 6]
            uplink = OrderedDispatcher(messages, n_cells=6, skip=skip)
            take(machine.handle(Resumed(uplink, rest)))
    assert sorted(arrived) == list(range(8))
    assert machine.pushed
