from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from dynacomm_async.errors import ConfigError
from dynacomm_async.schedule import (
    CROSSING,
    PLANNERS,
    Costs,
    crosses,
    evaluate,
    find_planner,
    make_plan,
)

WITH_BARRIER = ["sequential", "layerwise", "ibatch", "bucket", "dynacomm"]


def test_the_strategies_stand_in_the_table_those_with_a_barrier_first() -> None:
    assert list(PLANNERS) == [*WITH_BARRIER, "priority", "joint"]
    assert set(PLANNERS) - set(WITH_BARRIER) == CROSSING


@pytest.mark.parametrize("strategy", PLANNERS)
def test_a_plan_bears_the_name_of_its_strategy(
    strategy: str, make_costs: Callable[..., Costs]
) -> None:
    assert make_plan(strategy, make_costs(1)).strategy == strategy


def test_no_strategy_with_a_barrier_is_faster_than_dynacomm(
    make_costs: Callable[..., Costs],
) -> None:
    for seed in range(400):
        costs = make_costs(seed, most_layers=12, workers=1 + seed % 3, shared_link=seed % 2 == 0)
        best = evaluate(make_plan("dynacomm", costs), costs)
        for strategy in WITH_BARRIER:
            other = evaluate(make_plan(strategy, costs), costs)
            assert best.forward_ns is not None
            assert best.backward_ns is not None
            assert other.forward_ns is not None
            assert other.backward_ns is not None
            assert best.forward_ns <= other.forward_ns, (seed, strategy)
            assert best.backward_ns <= other.backward_ns, (seed, strategy)


def test_an_unknown_strategy_is_refused_with_the_names_there_are(
    make_costs: Callable[..., Costs],
) -> None:
    with pytest.raises(ConfigError, match=r"'dynacom'.*sequential.*did you mean dynacomm\?"):
        make_plan("dynacom", make_costs(1))
    with pytest.raises(ConfigError, match=r"'xyz'.*sequential, layerwise.*joint$"):
        make_plan("xyz", make_costs(1))


@pytest.mark.parametrize(
    ("strategy", "nbytes"),
    [("priority", 4 * 2**20), ("priority:65536", 65536), ("priority:256k", 2**18)],
)
def test_the_size_of_prioritys_slices_is_part_of_its_name(
    strategy: str, nbytes: int, make_costs: Callable[..., Costs]
) -> None:
    plan = make_plan(strategy, make_costs(1))
    assert plan.push.cap_nbytes == nbytes  # type: ignore[union-attr]
    assert crosses(strategy)
    assert not crosses("dynacomm")


@pytest.mark.parametrize("strategy", ["priority:", "priority:0", "priority:1g", "joint:4k"])
def test_a_size_that_is_none_is_refused_with_examples(strategy: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(strategy))):
        find_planner(strategy)
