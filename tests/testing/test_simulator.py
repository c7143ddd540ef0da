"""The step logic on a fake clock must take exactly what the cost model says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from dynacomm_async.errors import PlanError
from dynacomm_async.schedule import (
    CROSSING,
    PLANNERS,
    Costs,
    LayerCosts,
    Plan,
    Policy,
    PolicyPlan,
    evaluate,
)
from dynacomm_async.testing import simulate

# Few values, so that ties are common, and some that are large.
TIMES_NS = st.one_of(st.integers(0, 3), st.integers(0, 50), st.integers(0, 10**12))


SOME_NS = TIMES_NS.map(lambda value: value + 1)  # never nothing


@st.composite
def tables(draw, backward=TIMES_NS, overhead=TIMES_NS):
    n_layers = draw(st.integers(1, 12))
    parts = (TIMES_NS, TIMES_NS, backward, TIMES_NS)
    layers = tuple(
        LayerCosts(f"layer{index}", draw(st.integers(1, 80_000)), *draw(st.tuples(*parts)))
        for index in range(n_layers)
    )
    return Costs(
        layers,
        overhead_up_ns=draw(overhead),
        overhead_down_ns=draw(overhead),
        latency_up_ns=draw(TIMES_NS),
        latency_down_ns=draw(TIMES_NS),
        server_ns=draw(TIMES_NS),
        workers=draw(st.integers(1, 4)),
        shared_link=draw(st.booleans()),
    )


@st.composite
def cuts(draw, n_layers):
    return [cut for cut in range(1, n_layers) if draw(st.booleans())]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data(), costs=tables())
def test_a_random_plan_takes_what_the_timeline_says_to_the_nanosecond(data, costs):
    n_layers = len(costs.layers)
    plan = Plan.from_cuts("random", n_layers, data.draw(cuts(n_layers)), data.draw(cuts(n_layers)))

    assert simulate(plan, costs) == evaluate(plan, costs).step_ns


@settings(max_examples=150, deadline=None, derandomize=True)
@given(costs=tables())
def test_every_strategys_plan_takes_what_the_timeline_says_to_the_nanosecond(costs):
    for name, planner in PLANNERS.items():
        if name not in CROSSING:
            plan = planner(costs)
            assert simulate(plan, costs) == evaluate(plan, costs).step_ns, name


policies = st.builds(
    Policy,
    cap_nbytes=st.one_of(st.none(), st.integers(1, 200_000)),
    threshold_nbytes=st.one_of(st.just(0), st.integers(0, 200_000)),
    whole_layers=st.booleans(),
    one_layer=st.booleans(),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(costs=tables(SOME_NS, SOME_NS), pull=policies, push=policies)
def test_policies_take_what_the_timeline_says_to_the_nanosecond(costs, pull, push):
    plan = PolicyPlan("random", len(costs.layers), pull, push)

    assert simulate(plan, costs) == evaluate(plan, costs).step_ns


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), costs=tables(SOME_NS, SOME_NS))
def test_early_pulls_take_what_the_timeline_says_to_the_nanosecond(data, costs):
    n_layers = len(costs.layers)
    whole = Plan.from_cuts("random", n_layers, data.draw(cuts(n_layers)), data.draw(cuts(n_layers)))
    pull = tuple(data.draw(st.permutations(whole.pull)))
    plan = Plan("random", n_layers, pull, whole.push, barrier=False)

    assert simulate(plan, costs) == evaluate(plan, costs).step_ns


@settings(max_examples=50, deadline=None, derandomize=True)
@given(costs=tables(SOME_NS, SOME_NS))
def test_plans_across_the_boundary_take_what_the_timeline_says_to_the_nanosecond(costs):
    for name in CROSSING:
        plan = PLANNERS[name](costs)
        assert simulate(plan, costs) == evaluate(plan, costs).step_ns, name


def test_a_step_by_hand():
    costs = Costs(
        (LayerCosts("a", 1, 10, 5, 7, 20), LayerCosts("b", 1, 30, 6, 8, 40)),
        overhead_up_ns=2,
        overhead_down_ns=3,
        latency_up_ns=100,
        latency_down_ns=200,
        server_ns=1000,
    )
    # b arrives at 13 + 33 + 200 and is forward at 252; its backward ends at 260, its push at 302;
    # a's gradient is there at 267 and leaves until 324.
    plan = Plan.from_cuts("by hand", 2, [1], [1])
    assert simulate(plan, costs) == 324 + 100 + 1000


def test_a_plan_for_another_model_is_refused():
    costs = Costs((LayerCosts("a", 1, 1, 1, 1, 1),), overhead_up_ns=0, overhead_down_ns=0)

    with pytest.raises(PlanError, match="for 2 layers, expected 1"):
        simulate(Plan.from_cuts("too long", 2, [], []), costs)


def test_one_medium_for_both_directions_is_refused_where_they_would_meet():
    costs = Costs((LayerCosts("a", 1, 1, 1, 1, 1),), 0, 0, half_duplex=True)
    plan = Plan.from_cuts("whole", 1, [], [])

    assert simulate(plan, costs) == evaluate(plan, costs).step_ns
    with pytest.raises(PlanError, match="half-duplex"):
        simulate(replace(plan, barrier=False), costs)
