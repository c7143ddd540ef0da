from __future__ import annotations

import random

import pytest

from dynacomm_async.testing import (
    forward_end_ns,
    list_all_cuts,
    push_end_ns,
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
