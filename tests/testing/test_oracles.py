from __future__ import annotations

import random

import pytest

from dynacomm_async.schedule import Costs, LayerCosts, evaluate, lower_bound_ns, make_plan
from dynacomm_async.testing import (
    forward_end_ns,
    list_all_cuts,
    list_all_orders,
    push_end_ns,
    search_crossing,
    search_forward,
    search_push,
    solve_forward_cubic,
    solve_push_cubic,
    solve_push_quadratic,
)


def test_a_known_phase_takes_the_time_worked_out_by_hand() -> None:
    # Pull 2+3 | 4 with overhead 1: arrivals at 6 and 11; computing 5+6 from 6, 7 from 17.
    assert forward_end_ns([5, 6, 7], [2, 3, 4], 1, [2]) == 24
    # Gradients at 7 and 18; push 4 from 7 to 12, 2+3 from 18 to 24.
    assert push_end_ns([5, 6, 7], [2, 3, 4], 1, [2]) == 24


@pytest.mark.parametrize("n_layers", [1, 2, 5])
def test_all_cuts_are_listed_once(n_layers: int) -> None:
    cuts = list(list_all_cuts(n_layers))
    assert len(cuts) == len(set(cuts)) == 2 ** (n_layers - 1)


@pytest.mark.parametrize("seed", range(200))
def test_the_dynamic_programmes_equal_exhaustive_search(seed: int) -> None:
    numbers = random.Random(seed)
    n_layers, most = numbers.randint(1, 7), numbers.choice([1, 9, 999])
    compute = [numbers.randint(0, most) for _ in range(n_layers)]
    transfer = [numbers.randint(0, most) for _ in range(n_layers)]
    overhead_ns = numbers.choice([0, 1, numbers.randint(0, most)])
    phase = (compute, transfer, overhead_ns)
    forward, push = search_forward(*phase), search_push(*phase)
    assert solve_forward_cubic(*phase) == forward
    assert solve_push_cubic(*phase) == push
    assert solve_push_quadratic(*phase) == push.end_ns == forward.end_ns


@pytest.mark.parametrize(("n_items", "n_orders"), [(0, 1), (1, 1), (2, 3), (3, 13), (4, 75)])
def test_all_orders_of_messages_are_listed_once(n_items: int, n_orders: int) -> None:
    orders = list(list_all_orders(range(n_items)))
    assert len(orders) == n_orders
    distinct = {tuple(tuple(sorted(message)) for message in order) for order in orders}
    assert len(distinct) == n_orders
    for order in orders:
        assert sorted(item for message in order for item in message) == list(range(n_items))


def test_a_step_without_a_barrier_takes_the_time_worked_out_by_hand() -> None:
    # b is there at 0, up at 11, down at 22; a is there at 20, up at 31, down at 42; then 2 + 3.
    layers = (LayerCosts("a", 1, 10, 2, 20, 10), LayerCosts("b", 1, 10, 3, 0, 10))
    assert search_crossing(Costs(layers, 1, 1)) == 47
    # In halves, 5 each: a is up at 26 and 32, down at 32 and 38.
    assert search_crossing(Costs(layers, 1, 1), n_slices=2) == 43
    # Everything on the link twice: b is up at 22, a at 44 and down at 66; latencies come once.
    far = Costs(layers, 1, 1, 100, 1000, 10_000, workers=2, shared_link=True)
    assert search_crossing(far) == 66 + 11_100 + 5


@pytest.mark.parametrize("n_slices", [1, 2, 4])
def test_no_order_of_slices_is_below_the_bound(n_slices: int) -> None:
    for seed in range(40):
        numbers = random.Random(seed)
        most = numbers.choice([2, 20, 500])

        def draw(name: str, most: int = most, numbers: random.Random = numbers) -> LayerCosts:
            pull_ns, push_ns = (4 * numbers.randint(0, most) for _ in range(2))
            if numbers.random() < 0.7:
                push_ns = pull_ns
            computing_ns = numbers.randint(0, 4 * most), numbers.randint(0, 4 * most)
            return LayerCosts(name, 16, pull_ns, *computing_ns, push_ns)

        layers = tuple(draw(f"{index}") for index in range(4 // n_slices))
        overhead_ns = numbers.choice([0, 1, most, 4 * most])
        costs = Costs(
            layers,
            overhead_ns,
            overhead_ns if seed % 3 else numbers.randint(0, most),
            latency_up_ns=seed % 5,
            latency_down_ns=seed % 7,
            server_ns=seed % 4,
        )
        bound_ns = lower_bound_ns(costs).step_ns
        assert bound_ns <= search_crossing(costs, n_slices), seed
        assert bound_ns <= evaluate(make_plan("joint", costs), costs).step_ns, seed
