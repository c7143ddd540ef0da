"""Cost tables by arithmetic."""

from __future__ import annotations

import pytest

from dynacomm_async.errors import PlanError
from dynacomm_async.models import build, costs_of
from dynacomm_async.schedule import Costs

LINK = {"flops_per_s": 1e9, "down_bytes_per_s": 1e6, "overhead_ns": 2_000_000}


@pytest.fixture
def lenet():
    return build("lenet")


def test_every_layer_costs_its_bytes_on_the_link_and_its_operations_on_the_machine(lenet):
    costs = costs_of(lenet, batch=8, **LINK)

    assert [layer.name for layer in costs.layers] == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    first, second = costs.layers[:2]
    # 6 maps of 5 x 5 weights and a bias; 28 x 28 pixels, 2 operations each, 8 images.
    assert (first.nbytes, first.pull_ns, first.push_ns) == (624, 624_000, 624_000)
    assert first.forward_ns == 8 * 2 * 6 * 25 * 28 * 28
    assert second.forward_ns == 8 * 2 * 16 * 150 * 10 * 10


def test_backward_is_twice_the_work_and_once_for_the_first_layer(lenet):
    first, *others = costs_of(lenet, batch=8, **LINK).layers
    assert first.backward_ns == first.forward_ns
    assert all(layer.backward_ns == 2 * layer.forward_ns for layer in others)


def test_the_settings_of_link_and_workers_are_kept(lenet):
    costs = costs_of(
        lenet, batch=8, up_bytes_per_s=5e5, latency_ns=7, workers=3, shared_link=True, **LINK
    )
    assert all(layer.push_ns == 2 * layer.pull_ns for layer in costs.layers)
    assert (costs.overhead_up_ns, costs.overhead_down_ns) == (2_000_000, 2_000_000)
    assert (costs.latency_up_ns, costs.latency_down_ns) == (7, 7)
    assert (costs.batch, costs.workers, costs.shared_link) == (8, 3, True)
    assert Costs.from_json(costs.to_json()) == costs


@pytest.mark.parametrize("name", ["vgg19", "googlenet", "inception_v4", "resnet152"])
def test_totals_are_those_of_the_network(name):
    network = build(name)
    costs = costs_of(network, batch=16, **{**LINK, "flops_per_s": 1e12})
    assert sum(layer.nbytes for layer in costs.layers) == 4 * network.parameters
    total_s = sum(layer.forward_ns for layer in costs.layers) / 1e9
    assert total_s == pytest.approx(16 * network.forward_flops / 1e12, rel=1e-6)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("flops_per_s", 0),
        ("flops_per_s", float("inf")),
        ("down_bytes_per_s", -1),
        ("up_bytes_per_s", float("nan")),
        ("batch", 0),
        ("workers", 0),
        ("overhead_ns", -1),
    ],
)
def test_numbers_that_cannot_be_are_refused_by_name(lenet, setting, value):
    with pytest.raises(PlanError, match=setting.removesuffix("_ns")):
        costs_of(lenet, **{"batch": 8, **LINK, setting: value})
