from __future__ import annotations

from collections.abc import Callable

import pytest

from dynacomm_async.schedule import Costs, LayerCosts, Segment, evaluate, make_plan
from dynacomm_async.testing import forward_end_ns


def reconstruct_forward_ns(costs: Costs) -> int:
    """The definition, word by word: batches are lists, sums are taken anew."""
    compute = [layer.forward_ns for layer in costs.layers]
    transfer = [layer.pull_ns for layer in costs.layers]
    n_layers = len(compute)
    ends = []
    for first in range(1, n_layers + 1):
        batches = [list(range(first))]
        while batches[-1][-1] < n_layers - 1:
            hidden = sum(compute[layer] for layer in batches[-1])
            batch = [batches[-1][-1] + 1]
            while batch[-1] < n_layers - 1 and (
                costs.overhead_down_ns + sum(transfer[layer] for layer in [*batch, batch[-1] + 1])
                <= hidden
            ):
                batch.append(batch[-1] + 1)
            batches.append(batch)
        cuts = [batch[0] for batch in batches[1:]]
        ends.append(forward_end_ns(compute, transfer, costs.overhead_down_ns, cuts))
    return min(ends)


@pytest.mark.parametrize("seed", range(100))
def test_the_forward_phase_is_the_best_greedy_one(
    seed: int, make_costs: Callable[..., Costs]
) -> None:
    costs = make_costs(seed, most_layers=10)
    assert evaluate(make_plan("ibatch", costs), costs).forward_ns == reconstruct_forward_ns(costs)


@pytest.mark.parametrize("seed", range(50))
def test_the_backward_phase_mirrors_the_forward_one(
    seed: int, make_costs: Callable[..., Costs]
) -> None:
    costs = make_costs(seed, most_layers=10)
    layers = tuple(
        LayerCosts(
            layer.name,
            layer.nbytes,
            pull_ns=layer.push_ns,
            forward_ns=layer.backward_ns,
            backward_ns=layer.forward_ns,
            push_ns=layer.pull_ns,
        )
        for layer in costs.layers
    )
    mirrored = Costs(layers, costs.overhead_down_ns, costs.overhead_up_ns)
    plan, other = make_plan("ibatch", costs), make_plan("ibatch", mirrored)
    assert plan.push[::-1] == other.pull
    assert evaluate(plan, costs).backward_ns == evaluate(other, mirrored).forward_ns


def test_each_batch_fits_under_the_computation_of_the_one_before() -> None:
    layers = tuple(LayerCosts(f"{index}", 1, 2, 5, 5, 2) for index in range(7))
    plan = make_plan("ibatch", Costs(layers, 1, 1))
    assert plan.pull == (Segment(0, 0), Segment(1, 2), Segment(3, 6))
    assert plan.push == plan.pull[::-1]
