from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from dynacomm_async.schedule import (
    Costs,
    Crossing,
    LayerCosts,
    Plan,
    Policy,
    PolicyPlan,
    Segment,
    evaluate,
    lower_bound_ns,
)

MakeCosts = Callable[..., Costs]
MakePlan = Callable[[int, int], Plan]


def make_far(make_costs: MakeCosts, seed: int, most_layers: int = 8) -> Costs:
    """A random table with layers of several cells, latencies, and maybe a shared link."""
    costs = make_costs(
        seed,
        most_layers=most_layers,
        latency_up_ns=seed % 3,
        latency_down_ns=seed % 5,
        server_ns=seed % 7,
        workers=1 + seed % 3,
        shared_link=seed % 2 == 0,
    )
    numbers = random.Random(seed)
    layers = tuple(replace(layer, nbytes=numbers.randint(1, 80_000)) for layer in costs.layers)
    return replace(costs, layers=layers)


def make_policy(numbers: random.Random) -> Policy:
    return Policy(
        numbers.choice([None, numbers.randint(1, 200_000)]),
        numbers.choice([0, numbers.randint(0, 200_000)]),
        whole_layers=numbers.random() < 0.5,
        one_layer=numbers.random() < 0.2,
    )


def test_a_step_by_hand() -> None:
    costs = Costs(
        (LayerCosts("a", 4, 10, 5, 7, 20), LayerCosts("b", 4, 30, 6, 8, 40)),
        overhead_up_ns=2,
        overhead_down_ns=3,
        latency_up_ns=100,
        latency_down_ns=200,
        server_ns=1000,
    )
    plan = PolicyPlan("mine", 2, pull=Policy(4), push=Policy(4))
    timeline = evaluate(plan, costs)
    # b's gradient is there at 8 and leaves until 50, a's at 15 and leaves until 72; new parameters
    # of b exist at 1150 and leave until 1183, those of a at 1172, until 1196, there at 1396.
    assert [(t.direction, t.segment, t.start_ns, t.end_ns) for t in timeline.transfers] == [
        ("push", Segment(1, 1), 8, 50),
        ("push", Segment(0, 0), 50, 72),
        ("pull", Segment(1, 1), 1150, 1183),
        ("pull", Segment(0, 0), 1183, 1196),
    ]
    assert [t.ranges for t in timeline.transfers] == [((4, 4),), ((0, 4),)] * 2
    assert [(c.phase, c.layer, c.start_ns, c.end_ns) for c in timeline.computations] == [
        ("backward", 1, 0, 8),
        ("backward", 0, 8, 15),
        ("forward", 0, 1396, 1401),
        ("forward", 1, 1401, 1407),
    ]
    assert timeline.step_ns == Crossing(costs).step_ns(plan) == 1407
    assert timeline.forward_ns is timeline.backward_ns is None


def test_parts_of_a_layer_take_their_share_of_its_time_and_add_up() -> None:
    costs = Costs((LayerCosts("a", 40_000, 0, 0, 0, 1000),), 0, 0)
    sent = Crossing(costs).push(PolicyPlan("mine", 1, Policy(), Policy(16_384)))
    assert [message.end_ns for message in sent] == [409, 819, 1000]


def test_at_a_barrier_a_step_takes_as_long_wherever_one_begins_to_count(
    make_costs: MakeCosts, make_random_plan: MakePlan
) -> None:
    for seed in range(300):
        costs = make_far(make_costs, seed)
        plan = make_random_plan(seed, len(costs.layers))
        assert Crossing(costs).step_ns(plan) == evaluate(plan, costs).step_ns, seed


def test_on_a_half_duplex_link_directions_take_turns_by_hand() -> None:
    costs = Costs(
        (LayerCosts("a", 4, 30, 5, 50, 20), LayerCosts("b", 4, 30, 6, 8, 40)),
        overhead_up_ns=2,
        overhead_down_ns=3,
        half_duplex=True,
    )
    timeline = evaluate(PolicyPlan("mine", 2, pull=Policy(4), push=Policy(4)), costs)
    # a's gradient is there at 58, while b's new parameters come down, and has to wait until 83.
    assert [(t.direction, t.segment.first, t.start_ns, t.end_ns) for t in timeline.transfers] == [
        ("push", 1, 8, 50),
        ("push", 0, 83, 105),
        ("pull", 1, 50, 83),
        ("pull", 0, 105, 138),
    ]
    assert timeline.step_ns == 138 + 5 + 6


def test_on_a_half_duplex_link_no_two_messages_are_sent_at_once(
    make_costs: MakeCosts, make_random_plan: MakePlan
) -> None:
    for seed in range(200):
        full = make_far(make_costs, seed)
        half = replace(full, half_duplex=True)
        numbers = random.Random(seed)
        policies = make_policy(numbers), make_policy(numbers)
        timeline = evaluate(PolicyPlan("random", len(full.layers), *policies), half)
        spans = sorted((sent.start_ns, sent.end_ns) for sent in timeline.transfers)
        assert all(before[1] <= after[0] for before, after in pairwise(spans)), seed
        for direction in ("push", "pull"):
            carried = [r for t in timeline.transfers if t.direction == direction for r in t.ranges]
            assert sum(n for _, n in carried) == sum(layer.nbytes for layer in full.layers)
            assert len({offset for offset, _ in carried}) == len(carried), seed
        assert timeline.step_ns >= timeline.busy_ns + full.layers[-1].backward_ns
        barrier = make_random_plan(seed, len(full.layers))
        assert Crossing(half).step_ns(barrier) == evaluate(barrier, full).step_ns, seed


def test_no_policies_make_a_step_shorter_than_the_bound(make_costs: MakeCosts) -> None:
    for seed in range(400):
        costs = make_far(make_costs, seed)
        if seed % 4 < 2:
            layers = tuple(replace(layer, push_ns=layer.pull_ns) for layer in costs.layers)
            costs = replace(costs, layers=layers, overhead_up_ns=costs.overhead_down_ns)
        numbers = random.Random(seed)
        bound_ns = lower_bound_ns(costs).step_ns
        for _ in range(3):
            policies = make_policy(numbers), make_policy(numbers)
            plan = PolicyPlan("random", len(costs.layers), *policies)
            timeline = evaluate(plan, costs)
            assert bound_ns <= timeline.step_ns == Crossing(costs).step_ns(plan), seed


def test_trying_below_a_limit_gives_the_step_or_nothing(make_costs: MakeCosts) -> None:
    for seed in range(200):
        costs = make_far(make_costs, seed)
        numbers = random.Random(seed)
        crossing = Crossing(costs)
        plan = PolicyPlan("x", len(costs.layers), make_policy(numbers), make_policy(numbers))
        step_ns = crossing.step_ns(plan)
        pushed = crossing.try_push(plan.push, step_ns + 1)
        assert pushed == crossing.push(plan)
        assert crossing.try_pull(plan.pull, pushed, step_ns + 1) == step_ns
        assert crossing.try_pull(plan.pull, pushed, step_ns) is None


def test_workers_on_links_of_their_own_are_one_worker(make_costs: MakeCosts) -> None:
    costs = make_costs(5, workers=7)
    plan = PolicyPlan("mine", len(costs.layers), Policy(4), Policy(4))
    assert evaluate(plan, costs) == evaluate(plan, replace(costs, workers=1))


@pytest.mark.parametrize("seed", range(20))
def test_messages_become_segments_that_carry_every_layer_once(
    seed: int, make_costs: MakeCosts
) -> None:
    costs = make_far(make_costs, seed)
    crossing = Crossing(costs)
    numbers = random.Random(seed)
    plan = PolicyPlan("x", len(costs.layers), make_policy(numbers), make_policy(numbers))
    pushed = crossing.push(plan)
    segments = crossing.whole_layers(pushed)
    layers = [layer for segment in segments for layer in segment.layers]
    assert sorted(layers) == list(range(len(costs.layers)))
    first_sent = {}
    for index, message in enumerate(pushed):
        for first, count in message.cells:
            for cell in range(first, first + count):
                first_sent.setdefault(crossing.layout.layer_of(cell), index)
    places = [first_sent[layer] for layer in layers]
    assert places == sorted(places)
