from __future__ import annotations

import pytest

from dynacomm_async.schedule import Costs, LayerCosts, Plan
from dynacomm_async.schedule.replan import Replan, describe_change, describe_estimate

NBYTES = 1_000_000


def costs(
    *,
    down_mbit: float = 100,
    up_mbit: float = 100,
    overhead_down_ms: float = 2,
    overhead_up_ms: float = 2,
    forward_ms: float = 10,
) -> Costs:
    """One layer of a megabyte on a link given in the units that reasons are told in."""
    layer = LayerCosts(
        "layer",
        NBYTES,
        pull_ns=round(8e3 * NBYTES / down_mbit),
        forward_ns=round(forward_ms * 1e6),
        backward_ns=10_000_000,
        push_ns=round(8e3 * NBYTES / up_mbit),
    )
    return Costs((layer,), round(overhead_up_ms * 1e6), round(overhead_down_ms * 1e6))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"down_mbit": 21}, "downlink rate 100 -> 21 Mbit/s"),
        ({"up_mbit": 250.4}, "uplink rate 100 -> 250 Mbit/s"),
        ({"overhead_down_ms": 5}, "downlink overhead 2.00 -> 5.00 ms"),
        ({"overhead_up_ms": 0.5}, "uplink overhead 2.00 -> 0.50 ms"),
        ({"forward_ms": 40}, "computing 20.00 -> 50.00 ms"),
        ({"up_mbit": 50, "down_mbit": 20}, "downlink rate 100 -> 20 Mbit/s, "
                                           "uplink rate 100 -> 50 Mbit/s"),
        ({"up_mbit": 97}, "uplink rate 100 -> 97 Mbit/s"),
    ],
)  # fmt: skip
def test_the_reason_names_what_has_moved_most_with_units(change, words):
    assert describe_change(costs(), costs(**change)) == words


def test_a_link_that_costs_nothing_can_be_described():
    free = Costs((LayerCosts("layer", 1, 0, 0, 0, 0),), 0, 0)
    assert describe_change(free, free) == "downlink rate 0 -> 0 Mbit/s"
    assert "down 0 Mbit/s" in describe_estimate(free)
    assert describe_change(costs(), free).startswith("downlink rate 100 -> 0 Mbit/s")


def test_an_overhead_that_moved_by_less_than_a_tenth_of_a_millisecond_is_no_reason():
    before, after = costs(overhead_up_ms=0.01), costs(overhead_up_ms=0.1, down_mbit=94)
    assert describe_change(before, after) == "downlink rate 100 -> 94 Mbit/s"


def test_an_estimate_is_told_in_one_line():
    assert describe_estimate(costs(up_mbit=20.04)) == (
        "down 100 Mbit/s and 2.00 ms a message, up 20 Mbit/s and 2.00 ms a message, "
        "computing 20.0 ms"
    )


def test_a_replan_reads_as_a_sentence():
    plan = Plan.from_cuts("dynacomm", 1, [], [])
    entry = Replan(7, "downlink rate 100 -> 21 Mbit/s", plan, plan, 120_000_000, 95_500_000)
    assert str(entry) == ("step 7: downlink rate 100 -> 21 Mbit/s; predicted step 120.0 -> 95.5 ms")
