"""A run's step: who sets the pace, and how long the others wait."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dynacomm_async.errors import PlanError
from dynacomm_async.schedule import (
    PLANNERS,
    Costs,
    LayerCosts,
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


@pytest.mark.parametrize("name", PLANNERS)
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
