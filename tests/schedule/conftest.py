"""Random cost tables, small enough for ties to be common."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from dynacomm_async.schedule import Costs, LayerCosts, Plan


@pytest.fixture
def make_costs() -> Callable[..., Costs]:
    def make(seed: int, most_layers: int = 8, **settings: object) -> Costs:
        numbers = random.Random(seed)
        n_layers = numbers.randint(1, most_layers)
        most = numbers.choice([1, 3, 20, 1000])

        def draw() -> int:
            return numbers.choice([0, numbers.randint(0, most), numbers.randint(0, most)])

        layers = tuple(
            LayerCosts(f"layer{index}", numbers.randint(1, 9), draw(), draw(), draw(), draw())
            for index in range(n_layers)
        )
        overheads = [0, 1, draw(), most * n_layers * 2]
        return Costs(
            layers,
            overhead_up_ns=numbers.choice(overheads),
            overhead_down_ns=numbers.choice(overheads),
            **settings,  # type: ignore[arg-type]
        )

    return make


@pytest.fixture
def make_random_plan() -> Callable[[int, int], Plan]:
    def make(seed: int, n_layers: int) -> Plan:
        numbers = random.Random(seed)

        def draw_cuts() -> list[int]:
            return [cut for cut in range(1, n_layers) if numbers.random() < 0.5]

        return Plan.from_cuts("random", n_layers, draw_cuts(), draw_cuts())

    return make
