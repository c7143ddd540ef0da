from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from dynacomm_async.errors import PlanError
from dynacomm_async.schedule import (
    CROSSING,
    PLANNERS,
    Costs,
    LayerCosts,
    Plan,
    evaluate,
    lower_bound_ns,
    make_plan,
)

MakeCosts = Callable[..., Costs]
MakePlan = Callable[[int, int], Plan]


class Simulation:
    """A step as events on a heap: each event is a time and what then happens."""

    def __init__(self, plan: Plan, costs: Costs) -> None:
        self.costs = costs
        self.share = costs.workers if costs.shared_link else 1
        self.now = 0
        self.events: list[tuple[int, int, Callable[[], None]]] = []
        self.count = 0
        self.to_pull = list(plan.pull)
        self.to_push = list(plan.push)
        self.arrived: set[int] = set()
        self.graded: set[int] = set()
        self.next_forward = 0
        self.computing = False
        self.pushing = False
        self.forward_end = -1

    def run(self) -> tuple[int, int]:
        self.pull_next()
        while self.events:
            self.now, _, happen = heapq.heappop(self.events)
            happen()
        return self.forward_end, self.now

    def after(self, delay: int, happen: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + delay, self.count, happen))
        self.count += 1

    def pull_next(self) -> None:
        if not self.to_pull:
            return
        segment = self.to_pull.pop(0)
        delay = self.costs.overhead_down_ns * self.share
        for layer in range(segment.first, segment.last + 1):
            delay += self.costs.layers[layer].pull_ns * self.share

        def leave() -> None:
            self.after(self.costs.latency_down_ns, arrive)
            self.pull_next()

        def arrive() -> None:
            self.arrived.update(range(segment.first, segment.last + 1))
            self.forward()

        self.after(delay, leave)

    def forward(self) -> None:
        if self.computing or self.next_forward not in self.arrived:
            return

        def end() -> None:
            self.computing = False
            self.next_forward += 1
            if self.next_forward == len(self.costs.layers):
                self.forward_end = self.now
                self.backward(self.next_forward - 1)
            else:
                self.forward()

        self.computing = True
        self.after(self.costs.layers[self.next_forward].forward_ns, end)

    def backward(self, layer: int) -> None:
        def end() -> None:
            self.graded.add(layer)
            if layer:
                self.backward(layer - 1)
            self.push_next()

        self.after(self.costs.layers[layer].backward_ns, end)

    def push_next(self) -> None:
        if self.pushing or not self.to_push:
            return
        layers = range(self.to_push[0].first, self.to_push[0].last + 1)
        if not self.graded.issuperset(layers):
            return

        def leave() -> None:
            self.pushing = False
            if self.to_push:
                self.push_next()
            else:
                self.after(self.costs.latency_up_ns, lambda: self.after(server_ns, lambda: None))

        server_ns = self.costs.server_ns
        self.pushing = True
        self.to_push.pop(0)
        cost = self.costs.overhead_up_ns + sum(self.costs.layers[i].push_ns for i in layers)
        self.after(cost * self.share, leave)


@pytest.mark.parametrize("first_seed", range(0, 1000, 250))
def test_the_timeline_equals_an_event_simulation(
    first_seed: int, make_costs: MakeCosts, make_random_plan: MakePlan
) -> None:
    for seed in range(first_seed, first_seed + 250):
        costs = make_costs(
            seed,
            most_layers=12,
            latency_up_ns=seed % 3,
            latency_down_ns=seed % 5,
            server_ns=seed % 7,
            workers=1 + seed % 4,
            shared_link=seed % 2 == 0,
        )
        plan = make_random_plan(seed, len(costs.layers))
        timeline = evaluate(plan, costs)
        assert (timeline.forward_ns, timeline.step_ns) == Simulation(plan, costs).run(), seed
        assert timeline.backward_ns == timeline.step_ns - timeline.forward_ns


@pytest.mark.parametrize("seed", range(50))
def test_a_timeline_breaks_none_of_the_rules_of_a_step(
    seed: int, make_costs: MakeCosts, make_random_plan: MakePlan
) -> None:
    costs = make_costs(seed, latency_down_ns=3)
    plan = make_random_plan(seed, len(costs.layers))
    timeline = evaluate(plan, costs)
    n_layers = len(costs.layers)
    order = [(work.phase, work.layer) for work in timeline.computations]
    assert order == [
        *(("forward", layer) for layer in range(n_layers)),
        *(("backward", layer) for layer in reversed(range(n_layers))),
    ]
    pulls = [sent for sent in timeline.transfers if sent.direction == "pull"]
    pushes = [sent for sent in timeline.transfers if sent.direction == "push"]
    assert tuple(sent.segment for sent in pulls) == plan.pull
    assert tuple(sent.segment for sent in pushes) == plan.push
    assert pulls[0].start_ns == 0
    for events in (timeline.computations, pulls, pushes):
        for before, after in pairwise(events):
            assert before.end_ns <= after.start_ns
    forward, backward = timeline.computations[:n_layers], timeline.computations[n_layers:]
    for sent in pulls:
        assert forward[sent.segment.first].start_ns >= sent.end_ns + costs.latency_down_ns
    for sent in pushes:
        assert sent.start_ns >= backward[n_layers - 1 - sent.segment.first].end_ns


def test_a_sequential_step_hides_nothing_and_costs_everything() -> None:
    layers = tuple(LayerCosts(f"{index}", 1, 2, 3, 5, 7) for index in range(4))
    costs = Costs(layers, overhead_up_ns=11, overhead_down_ns=13)
    timeline = evaluate(make_plan("sequential", costs), costs)
    assert timeline.step_ns == 4 * (2 + 3 + 5 + 7) + 11 + 13
    assert timeline.compute_ns == 4 * (3 + 5)
    assert timeline.busy_ns == 4 * (2 + 7) + 11 + 13
    assert timeline.hidden_fraction == 0


def test_what_is_sent_while_computing_is_hidden() -> None:
    layers = (LayerCosts("a", 1, 10, 10, 10, 10), LayerCosts("b", 1, 10, 10, 10, 10))
    costs = Costs(layers, 0, 0)
    timeline = evaluate(make_plan("layerwise", costs), costs)
    assert (timeline.step_ns, timeline.busy_ns) == (60, 40)
    assert timeline.hidden_fraction == 0.5


def test_the_hidden_fraction_of_nothing_is_0() -> None:
    costs = Costs((LayerCosts("a", 1, 0, 5, 5, 0),), 0, 0)
    assert evaluate(make_plan("dynacomm", costs), costs).hidden_fraction == 0


def test_latency_delays_each_phase_once_and_the_server_the_step() -> None:
    near = Costs(tuple(LayerCosts(f"{i}", 1, 2, 3, 5, 7) for i in range(4)), 1, 1)
    far = replace(near, latency_up_ns=100, latency_down_ns=10, server_ns=1000)
    for strategy in set(PLANNERS) - CROSSING:
        plan = make_plan(strategy, near)
        before, after = evaluate(plan, near), evaluate(plan, far)
        assert after.forward_ns == before.forward_ns + 10
        assert after.step_ns == before.step_ns + 1110
        assert after.busy_ns == before.busy_ns


def test_a_plan_for_another_model_is_refused(make_costs: MakeCosts) -> None:
    costs = Costs((LayerCosts("a", 1, 0, 5, 5, 0),), 0, 0)
    with pytest.raises(PlanError, match="for 2 layers, expected 1"):
        evaluate(Plan.from_cuts("mine", 2, [], []), costs)


def make_symmetric(costs: Costs) -> Costs:
    """The same table with what goes up costing as much as what comes down."""
    layers = tuple(replace(layer, push_ns=layer.pull_ns) for layer in costs.layers)
    return replace(costs, layers=layers, overhead_up_ns=costs.overhead_down_ns)


def test_no_plan_is_below_the_bound(make_costs: MakeCosts, make_random_plan: MakePlan) -> None:
    for seed in range(1500):
        costs = make_costs(
            seed,
            latency_up_ns=seed % 3,
            latency_down_ns=seed % 5,
            server_ns=seed % 7,
            workers=1 + seed % 4,
            shared_link=seed % 3 == 0,
        )
        if seed % 2:
            costs = make_symmetric(costs)
        bound_ns = lower_bound_ns(costs).step_ns
        for plan in (make_plan("dynacomm", costs), make_random_plan(seed, len(costs.layers))):
            assert bound_ns <= evaluate(plan, costs).step_ns, seed


Unit = tuple[int, int, int]  # layer, time up, time down


def slice_layers(numbers: random.Random, costs: Costs) -> list[Unit]:
    units = []
    for index, layer in enumerate(costs.layers):
        n_slices = numbers.choice([1, 1, 2, 5])
        for part in range(n_slices):
            up_ns = layer.push_ns * (part + 1) // n_slices - layer.push_ns * part // n_slices
            down_ns = layer.pull_ns * (part + 1) // n_slices - layer.pull_ns * part // n_slices
            units.append((index, up_ns, down_ns))
    return units


def group_units(
    numbers: random.Random, units: list[Unit], workers: int, *, descending: bool
) -> list[tuple[int, list[int]]]:
    """Messages of one link: a worker and the units, somewhere between in order and shuffled."""
    messages = []
    disorder = numbers.choice([0, 0, 1, 3])
    for worker in range(workers):
        order = sorted(
            range(len(units)),
            key=lambda unit: unit + disorder * numbers.random(),
            reverse=descending,
        )
        most = numbers.randint(1, len(order))
        while order:
            size = numbers.randint(1, most)
            messages.append((numbers.random(), worker, order[:size]))
            order = order[size:]
    if workers > 1:
        messages.sort(key=lambda message: (message[0], message[1]))
    return [(worker, content) for _, worker, content in messages]


def run_without_barrier(numbers: random.Random, costs: Costs) -> int:
    """From the start of all workers' backward pass to the end of the last forward pass."""
    units = slice_layers(numbers, costs)
    workers = costs.link_share
    ready, now = {}, 0
    for index in reversed(range(len(costs.layers))):
        now += costs.layers[index].backward_ns
        ready[index] = now
    complete = dict.fromkeys(range(len(units)), 0)
    link = 0
    for _, content in group_units(numbers, units, workers, descending=True):
        link = max(link, *(ready[units[unit][0]] for unit in content))
        link += costs.overhead_up_ns + sum(units[unit][1] for unit in content)
        for unit in content:
            complete[unit] = max(complete[unit], link + costs.latency_up_ns + costs.server_ns)
    arrival = [[0] * len(costs.layers) for _ in range(workers)]
    link = 0
    for worker, content in group_units(numbers, units, workers, descending=False):
        link = max(link, *(complete[unit] for unit in content))
        link += costs.overhead_down_ns + sum(units[unit][2] for unit in content)
        for unit in content:
            arrival[worker][units[unit][0]] = link + costs.latency_down_ns
    ends = []
    for arrivals in arrival:
        end = now
        for layer, arrived in zip(costs.layers, arrivals, strict=True):
            end = max(end, arrived) + layer.forward_ns
        ends.append(end)
    return max(ends)


@pytest.mark.parametrize("first_seed", range(0, 900, 300))
def test_no_schedule_without_a_barrier_is_below_the_bound(
    first_seed: int, make_costs: MakeCosts
) -> None:
    for seed in range(first_seed, first_seed + 300):
        costs = make_costs(
            seed,
            most_layers=5,
            latency_up_ns=seed % 3,
            latency_down_ns=seed % 5,
            server_ns=seed % 7,
            workers=1 + seed % 3,
            shared_link=seed % 2 == 0,
        )
        if seed % 4 < 2:
            costs = make_symmetric(costs)
        numbers = random.Random(seed)
        bound_ns = lower_bound_ns(costs).step_ns
        assert all(run_without_barrier(numbers, costs) >= bound_ns for _ in range(30)), seed


def test_the_best_plan_with_a_barrier_is_at_most_twice_the_bound(make_costs: MakeCosts) -> None:
    for seed in range(500):
        costs = make_symmetric(make_costs(seed, most_layers=12))
        bound_ns = lower_bound_ns(costs).step_ns
        assert evaluate(make_plan("dynacomm", costs), costs).step_ns <= 2 * bound_ns + 1, seed


@pytest.mark.parametrize("overhead_ns", [0, 1, 7, 100, 10**6])
@pytest.mark.parametrize("transfer_ns", [0, 1, 99, 12_345])
def test_the_bound_of_one_layer_takes_the_best_number_of_slices(
    transfer_ns: int, overhead_ns: int
) -> None:
    costs = Costs((LayerCosts("a", 1, transfer_ns, 3, 5, transfer_ns),), overhead_ns, overhead_ns)
    turn_ns = transfer_ns + min(
        transfer_ns // s + (s + 1) * overhead_ns for s in range(1, transfer_ns + 2)
    )
    assert lower_bound_ns(costs) == (8 + max(turn_ns, transfer_ns + 2 * overhead_ns), "equal-rate")


def test_the_bound_names_its_proof(make_costs: MakeCosts) -> None:
    equal = Costs((LayerCosts("a", 1, 4, 3, 5, 4),), 2, 2)
    assert lower_bound_ns(equal).name == "equal-rate"
    assert lower_bound_ns(replace(equal, overhead_up_ns=3)).name == "any-rate"
    layers = (replace(equal.layers[0], push_ns=5),)
    assert lower_bound_ns(replace(equal, layers=layers)).name == "any-rate"
    assert lower_bound_ns(replace(equal, workers=2)).name == "equal-rate"
    assert lower_bound_ns(replace(equal, workers=2, shared_link=True)).name == "shared-link"


def test_the_bound_contains_each_latency_and_the_server_once() -> None:
    near = Costs((LayerCosts("a", 1, 4, 3, 5, 4), LayerCosts("b", 1, 4, 3, 5, 6)), 2, 2)
    far = replace(near, latency_up_ns=100, latency_down_ns=10, server_ns=1000)
    assert lower_bound_ns(far).step_ns == lower_bound_ns(near).step_ns + 1110
