"""A run's step: who sets the pace, and how long the others wait."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from dynacomm_async.errors import PlanError
from dynacomm_async.schedule import (
    CROSSING,
    PLANNERS,
    Costs,
    LayerCosts,
    Policy,
    PolicyPlan,
    bound_of_all_ns,
    evaluate,
    forecast,
    lower_bound_ns,
)
from dynacomm_async.schedule.whatif import judge, with_batch, with_speed, with_workers

MS = 10**6


def table(speed: float = 1.0, compute: float = 1.0) -> Costs:
    rows = [(400_000, 3, 5), (100_000, 6, 9), (900_000, 2, 4)]
    layers = tuple(
        LayerCosts(
            f"layer{index}",
            nbytes,
            round(nbytes * 80 / speed),
            round(forward * MS * compute),
            round(backward * MS * compute),
            round(nbytes * 80 / speed),
        )
        for index, (nbytes, forward, backward) in enumerate(rows)
    )
    return Costs(layers, 2 * MS, 2 * MS, workers=2, batch=8)


FAST, SLOW_LINK, SLOW_DEVICE = table(), table(speed=0.25), table(compute=2)


BARRIER = [name for name in PLANNERS if name not in CROSSING]


@pytest.mark.parametrize("name", BARRIER)
def test_the_slowest_worker_sets_the_pace_and_the_others_wait_for_it(name: str) -> None:
    planner = PLANNERS[name]
    own = [evaluate(planner(each), each).step_ns for each in (FAST, SLOW_LINK, SLOW_DEVICE)]
    found = forecast(planner, replace(FAST, others=(SLOW_LINK, SLOW_DEVICE)))
    assert found.step_ns == own[1] > max(own[0], own[2])
    assert found.slowest == 1
    assert found.waits_ns == (own[1] - own[0], 0, own[1] - own[2])


@pytest.mark.parametrize("name", PLANNERS)
def test_workers_that_are_alike_do_not_wait(name: str) -> None:
    assert forecast(PLANNERS[name], FAST).waits_ns == (0,)
    assert forecast(PLANNERS[name], replace(FAST, others=(FAST,))).waits_ns == (0, 0)


def test_the_bound_on_a_run_is_that_of_its_slowest_worker() -> None:
    assert bound_of_all_ns(replace(FAST, others=(SLOW_LINK,))) == lower_bound_ns(SLOW_LINK)
    assert bound_of_all_ns(replace(SLOW_LINK, others=(FAST,))) == lower_bound_ns(SLOW_LINK)


def test_a_table_with_others_survives_the_way_through_a_file() -> None:
    costs = replace(FAST, others=(SLOW_LINK, SLOW_DEVICE))
    assert Costs.from_json(costs.to_json()) == costs


def test_what_cannot_be_another_workers_table_is_refused() -> None:
    nested = replace(FAST, others=(SLOW_LINK,))
    with pytest.raises(PlanError, match="has others itself"):
        replace(FAST, others=(nested,))
    with pytest.raises(PlanError, match="other layers"):
        replace(FAST, others=(replace(FAST, layers=FAST.layers[:2]),))
    good = FAST.to_json()
    with pytest.raises(PlanError, match="others is 7, expected a list"):
        Costs.from_json({**good, "others": 7})
    with pytest.raises(PlanError, match="has others itself"):
        Costs.from_json({**good, "others": [nested.to_json()]})
    with pytest.raises(PlanError, match="the cost table"):
        Costs.from_json({**good, "others": [7]})


def test_a_what_if_changes_every_worker() -> None:
    both = replace(FAST, others=(SLOW_LINK,))
    faster = with_speed(both, 2)
    assert faster.others == (with_speed(SLOW_LINK, 2),)
    assert (
        judge(faster).steps_ns["sequential"]
        == judge(with_speed(SLOW_LINK, 2)).steps_ns["sequential"]
    )
    assert with_batch(both, 16).others == (with_batch(SLOW_LINK, 16),)
    assert with_workers(both, 4) == replace(FAST, workers=4)


FRONT_FIRST = Policy(cap_nbytes=1, whole_layers=True)
"""Every layer is a message of its own; of those that are ready the front one leaves first."""


def follow(tables: list[Costs], n_steps: int = 40) -> int:
    """Several workers under FRONT_FIRST, message by message, in plain lists: the last step."""
    n_layers = len(tables[0].layers)
    layers = range(n_layers)
    starts = [0] * len(tables)
    for _ in range(n_steps):
        ready = [0] * n_layers  # at the server, from all workers
        for costs, start in zip(tables, starts, strict=True):
            done, at = {}, start
            for layer in reversed(layers):
                at += costs.layers[layer].backward_ns
                done[layer] = at
            times = [costs.layers[layer].push_ns + costs.overhead_up_ns for layer in layers]
            for layer, end in send(done, times, start).items():
                ready[layer] = max(ready[layer], end + costs.latency_up_ns + costs.server_ns)
        ends = []
        for costs, start in zip(tables, starts, strict=True):
            times = [costs.layers[layer].pull_ns + costs.overhead_down_ns for layer in layers]
            arrived = send(dict(enumerate(ready)), times, start)
            at = start + sum(layer.backward_ns for layer in costs.layers)
            for layer in layers:
                at = max(at, arrived[layer] + costs.latency_down_ns)
                at += costs.layers[layer].forward_ns
            ends.append(at)
        step, starts = max(ends) - max(starts), ends
    return step


def send(ready: dict[int, int], times: list[int], now: int) -> dict[int, int]:
    """Send one layer after the other, of those that are ready the lowest; return when each ends."""
    ends, left = {}, set(ready)
    while left:
        now = max(now, min(ready[layer] for layer in left))
        layer = min(layer for layer in left if ready[layer] <= now)
        now += times[layer]
        ends[layer] = now
        left.remove(layer)
    return ends


def draw_tables(seed: int) -> list[Costs]:
    numbers = random.Random(seed)
    sizes = [numbers.randint(1, 300_000) for _ in range(numbers.randint(1, 9))]

    def draw_table() -> Costs:
        up, down = numbers.randint(10, 200), numbers.randint(10, 200)
        compute = numbers.randint(1, 20)
        layers = tuple(
            LayerCosts(
                str(index),
                nbytes,
                nbytes * down,
                numbers.randint(0, compute * MS),
                numbers.randint(0, 2 * compute * MS),
                nbytes * up,
            )
            for index, nbytes in enumerate(sizes)
        )
        overheads = numbers.randint(0, 5 * MS), numbers.randint(0, 5 * MS)
        latencies = numbers.randint(0, 9 * MS), numbers.randint(0, 9 * MS)
        return Costs(layers, *overheads, *latencies, server_ns=numbers.randint(0, MS), workers=3)

    return [draw_table() for _ in range(numbers.randint(2, 3))]


@pytest.mark.parametrize("seed", range(60))
def test_without_a_barrier_workers_wait_for_each_other_cell_by_cell(seed: int) -> None:
    first, *others = tables = draw_tables(seed)

    def plan(costs: Costs) -> PolicyPlan:
        return PolicyPlan("front", len(costs.layers), FRONT_FIRST, FRONT_FIRST)

    found = forecast(plan, replace(first, others=tuple(others)))
    assert found.own_ns == tuple(evaluate(plan(own), own).step_ns for own in tables)
    assert found.step_ns >= max(found.own_ns)
    assert found.step_ns == pytest.approx(max(follow(tables), max(found.own_ns)), rel=1e-3)


def test_one_workers_late_gradients_and_anothers_slow_parameters_add_up() -> None:
    longer = 0
    for seed in range(60):
        first, *others = draw_tables(seed)
        found = forecast(PLANNERS["priority"], replace(first, others=tuple(others)))
        longer += found.step_ns > 1.01 * max(found.own_ns)
    assert longer > 0
