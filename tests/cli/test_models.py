"""``dynacomm models``."""

from __future__ import annotations

import pytest

from dynacomm_async.models import MODELS


def test_the_json_lists_every_model_with_the_keys_of_the_contract(call):
    outcome = call("models", "--json")

    assert (outcome.code, outcome.err) == (0, "")
    rows = outcome.json
    assert [row["name"] for row in rows] == list(MODELS)
    for row in rows:
        assert set(row) == {"name", "layers", "parameters", "forward_flops", "input_shape"}


def test_lenet_has_its_published_size(call):
    lenet = next(row for row in call("models", "--json").json if row["name"] == "lenet")
    # LeNet-5 with every map of conv1 feeding every map of conv2.
    assert (lenet["layers"], lenet["parameters"]) == (5, 61706)
    macs = 6 * 25 * 28 * 28 + 16 * 6 * 25 * 10 * 10 + 400 * 120 + 120 * 84 + 84 * 10
    assert lenet["forward_flops"] == 2 * macs


@pytest.mark.parametrize("name", MODELS)
def test_the_table_shows_every_model(call, name):
    outcome = call("models")
    assert any(line.split()[0] == name for line in outcome.out.splitlines())
