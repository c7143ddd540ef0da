from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from dynacomm_async.errors import PlanError
from dynacomm_async.schedule import Plan, Policy, PolicyPlan, Segment, cut_segments, read_plan


def test_a_plan_covers_all_layers_in_both_directions() -> None:
    plan = Plan.from_cuts("mine", 5, [2], [1, 4])
    assert plan.pull == (Segment(0, 1), Segment(2, 4))
    assert plan.push == (Segment(4, 4), Segment(1, 3), Segment(0, 0))
    assert list(plan.push[1].layers) == [1, 2, 3]


def test_a_plan_is_saved_in_the_order_sent() -> None:
    plan = Plan.from_cuts("mine", 3, [1], [2])
    assert plan.to_json() == {
        "strategy": "mine",
        "pull": [[0, 0], [1, 2]],
        "push": [[2, 2], [0, 1]],
    }


@pytest.mark.parametrize("seed", range(20))
def test_a_saved_plan_is_read_back(seed: int, make_random_plan: Callable[[int, int], Plan]) -> None:
    plan = make_random_plan(seed, 1 + seed)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_keys_without_a_meaning_are_ignored() -> None:
    plan = Plan.from_cuts("mine", 3, [1], [2])
    assert Plan.from_json({**plan.to_json(), "step_s": 0.5}) == plan


@pytest.mark.parametrize(
    ("first", "last"), [(1, 0), (-1, 0), (0, 1.0), (True, 1), (None, 0)], ids=str
)
def test_a_segment_that_cannot_be_is_not_made(first: Any, last: Any) -> None:
    with pytest.raises(PlanError, match="expected"):
        Segment(first, last)


A, B, AB = Segment(0, 0), Segment(1, 1), Segment(0, 1)


@pytest.mark.parametrize(
    ("n_layers", "pull", "push"),
    [
        (0, (), ()),
        (2, (), (AB,)),
        (2, (AB,), ()),
        (2, (A,), (AB,)),
        (2, (B, A), (AB,)),
        (2, (AB,), (A, B)),
        (2, (AB,), (B,)),
        (2, (AB, B), (AB,)),
        (2, (AB,), (B, AB)),
        (2, (B,), (AB,)),
        (1, (AB,), (A,)),
    ],
)
def test_a_plan_that_leaves_out_repeats_or_misorders_layers_is_not_made(
    n_layers: int, pull: tuple[Segment, ...], push: tuple[Segment, ...]
) -> None:
    with pytest.raises(PlanError, match="expected"):
        Plan("mine", n_layers, pull, push)


def test_a_plan_has_a_strategy() -> None:
    with pytest.raises(PlanError, match="strategy"):
        Plan("", 1, (A,), (A,))


@pytest.mark.parametrize("cuts", [[0], [3], [2, 1], [1, 1], [-1]], ids=str)
def test_cuts_ascend_inside_the_model(cuts: list[int]) -> None:
    with pytest.raises(PlanError, match="expected ascending cuts"):
        cut_segments(3, cuts)


@pytest.mark.parametrize(
    "mapping",
    [
        None,
        [],
        {},
        {"strategy": "a", "pull": [[0, 0]]},
        {"strategy": 1, "pull": [[0, 0]], "push": [[0, 0]]},
        {"strategy": "a", "pull": [], "push": [[0, 0]]},
        {"strategy": "a", "pull": [0], "push": [[0, 0]]},
        {"strategy": "a", "pull": [[0]], "push": [[0, 0]]},
        {"strategy": "a", "pull": [[0, "1"]], "push": [[0, 0]]},
        {"strategy": "a", "pull": [[0, 1]], "push": [[0, 0]]},
    ],
    ids=str,
)
def test_a_bad_saved_plan_is_refused(mapping: object) -> None:
    with pytest.raises(PlanError, match="expected"):
        Plan.from_json(mapping)


def test_without_a_barrier_segments_may_leave_in_any_order() -> None:
    plan = Plan("mine", 2, (B, A), (A, B), barrier=False)
    assert plan.to_json()["barrier"] is False
    assert read_plan(json.loads(json.dumps(plan.to_json()))) == plan
    with pytest.raises(PlanError, match="pull: a segment begins at layer 1, expected layer 0"):
        Plan("mine", 2, (B, A), (B, A))
    with pytest.raises(PlanError, match="expected layer 1"):
        Plan("mine", 2, (A, A), (A, B), barrier=False)
    with pytest.raises(PlanError, match="the segments cover 1 layers, expected 2"):
        Plan("mine", 2, (B, A), (A,), barrier=False)
    with pytest.raises(PlanError, match="barrier is 0, expected True or False"):
        Plan("mine", 2, (A, B), (B, A), barrier=0)  # type: ignore[arg-type]


def test_policies_are_saved_and_read_back() -> None:
    plan = PolicyPlan("mine", 3, pull=Policy(None, 5), push=Policy(7, 0, True, True, True))
    assert plan.to_json() == {
        "strategy": "mine",
        "layers": 3,
        "pull": {
            "cap_nbytes": None,
            "threshold_nbytes": 5,
            "whole_layers": False,
            "one_layer": False,
            "rear_first": False,
        },
        "push": {
            "cap_nbytes": 7,
            "threshold_nbytes": 0,
            "whole_layers": True,
            "one_layer": True,
            "rear_first": True,
        },
    }
    assert read_plan(json.loads(json.dumps(plan.to_json()))) == plan
    assert PolicyPlan.from_json({**plan.to_json(), "step_s": 1}) == plan


@pytest.mark.parametrize(
    "change",
    [
        *({"strategy": None}, {"strategy": ""}, {"layers": 0}, {"layers": "3"}, {"layers": None}),
        *({"pull": None}, {"push": []}, {"push": {}}, {"push": {"cap_nbytes": 3}}),
        {
            "pull": {
                "cap_nbytes": 0,
                "threshold_nbytes": 0,
                "whole_layers": False,
                "one_layer": False,
                "rear_first": False,
            }
        },
        {"pull": asdict(Policy(rear_first=True))},
    ],
    ids=str,
)
def test_policies_that_cannot_be_read_are_refused(change: dict[str, Any]) -> None:
    table = PolicyPlan("mine", 3, Policy(), Policy()).to_json()
    with pytest.raises(PlanError, match="expected"):
        PolicyPlan.from_json({**table, **change})
    with pytest.raises(PlanError, match="expected an object"):
        PolicyPlan.from_json([change])
