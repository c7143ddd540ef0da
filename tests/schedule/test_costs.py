from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from dynacomm_async.errors import PlanError
from dynacomm_async.schedule import Costs, LayerCosts


def make_table(**changes: Any) -> dict[str, Any]:
    layer = {
        "name": "conv1",
        "nbytes": 100,
        "pull_s": 0.5,
        "forward_s": 1,
        "backward_s": 2.0,
        "push_s": 0.25,
    }
    return {"overhead_s": 0.001, "layers": [layer, layer | {"name": "fc"}], **changes}


def change_layer(**changes: Any) -> dict[str, Any]:
    table = make_table()
    table["layers"][1] = table["layers"][1] | changes
    return table


def drop(table: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name != key}


def drop_in_layer(key: str) -> dict[str, Any]:
    table = make_table()
    table["layers"][1] = drop(table["layers"][1], key)
    return table


def test_a_minimal_file_is_read_in_nanoseconds() -> None:
    costs = Costs.from_json(make_table())
    assert costs == Costs(
        (
            LayerCosts("conv1", 100, 500_000_000, 10**9, 2 * 10**9, 250_000_000),
            LayerCosts("fc", 100, 500_000_000, 10**9, 2 * 10**9, 250_000_000),
        ),
        overhead_up_ns=1_000_000,
        overhead_down_ns=1_000_000,
    )


def test_optional_keys_override_the_defaults() -> None:
    costs = Costs.from_json(
        make_table(
            overhead_down_s=0.002,
            latency_up_s=0.003,
            latency_down_s=0.004,
            server_s=0.005,
            workers=3,
            batch=32,
            link="shared",
        )
    )
    assert (costs.overhead_up_ns, costs.overhead_down_ns) == (1_000_000, 2_000_000)
    assert (costs.latency_up_ns, costs.latency_down_ns) == (3_000_000, 4_000_000)
    assert (costs.server_ns, costs.workers, costs.batch) == (5_000_000, 3, 32)
    assert costs.shared_link
    assert costs.link_share == 3


def test_keys_without_a_meaning_are_ignored() -> None:
    assert Costs.from_json(make_table(note="measured at night")) == Costs.from_json(make_table())


BAD_TABLES = {
    "not-an-object": ([], ["cost table", "[]", "object"]),
    "null": (None, ["cost table", "None", "object"]),
    "no-overhead": (drop(make_table(), "overhead_s"), ["overhead_s", "missing"]),
    "no-layers-key": (drop(make_table(), "layers"), ["layers", "missing"]),
    "no-layers": (make_table(layers=[]), ["layers", "[]", "at least one"]),
    "layers-object": (make_table(layers={"a": 1}), ["layers", "list"]),
    "layers-null": (make_table(layers=None), ["layers", "None"]),
    "layer-not-an-object": (make_table(layers=[7]), ["layer 0", "7", "object"]),
    "negative-overhead": (make_table(overhead_s=-1e-9), ["overhead_s", "-1e-09"]),
    "nan-overhead": (make_table(overhead_s=math.nan), ["overhead_s", "nan"]),
    "text-overhead": (make_table(overhead_s="1ms"), ["overhead_s", "'1ms'", "number"]),
    "null-latency": (make_table(latency_up_s=None), ["latency_up_s", "None"]),
    "true-latency": (make_table(latency_down_s=True), ["latency_down_s", "True"]),
    "infinite-server": (make_table(server_s=math.inf), ["server_s", "inf"]),
    "huge-integer": (make_table(server_s=10**400), ["server_s"]),
    "no-workers": (make_table(workers=0), ["workers", "0", "at least 1"]),
    "half-a-worker": (make_table(workers=1.5), ["workers", "1.5", "whole"]),
    "null-workers": (make_table(workers=None), ["workers", "None"]),
    "batch-text": (make_table(batch="32"), ["batch", "'32'"]),
    "link-unknown": (make_table(link="wifi"), ["link", "'wifi'", "own", "shared"]),
    "duplex-unknown": (make_table(duplex="both"), ["duplex", "'both'", "full", "half"]),
    "link-list": (make_table(link=[]), ["link", "[]"]),
    "layer-no-name": (drop_in_layer("name"), ["layer 1", "name", "missing"]),
    "layer-empty-name": (change_layer(name=""), ["layer 1", "name", "''"]),
    "layer-name-number": (change_layer(name=3), ["layer 1", "name", "3"]),
    "layer-twice": (change_layer(name="conv1"), ["0", "1", "'conv1'", "once"]),
    "layer-no-nbytes": (drop_in_layer("nbytes"), ["layer 1 ('fc')", "nbytes", "missing"]),
    "layer-zero-nbytes": (change_layer(nbytes=0), ["layer 1 ('fc')", "nbytes", "0"]),
    "layer-float-nbytes": (change_layer(nbytes=1.5), ["layer 1 ('fc')", "nbytes", "1.5"]),
    "layer-true-nbytes": (change_layer(nbytes=True), ["layer 1 ('fc')", "nbytes", "True"]),
    "layer-no-pull": (drop_in_layer("pull_s"), ["layer 1 ('fc')", "pull_s", "missing"]),
    "layer-no-forward": (drop_in_layer("forward_s"), ["layer 1 ('fc')", "forward_s"]),
    "layer-negative": (change_layer(backward_s=-2), ["layer 1 ('fc')", "backward_s", "-2"]),
    "layer-nan": (change_layer(push_s=math.nan), ["layer 1 ('fc')", "push_s", "nan"]),
    "layer-minus-infinite": (change_layer(push_s=-math.inf), ["layer 1 ('fc')", "push_s"]),
    "layer-null": (change_layer(pull_s=None), ["layer 1 ('fc')", "pull_s", "None"]),
}


@pytest.mark.parametrize(("table", "words"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_bad_file_is_refused_in_one_sentence_that_says_what_is_wrong(
    table: object, words: list[str]
) -> None:
    with pytest.raises(PlanError) as caught:
        Costs.from_json(table)
    message = str(caught.value)
    assert "expected" in message
    assert "\n" not in message
    assert len(message) < 200
    for word in words:
        assert word in message


times = st.integers(0, 2**51)


@st.composite
def tables(draw: st.DrawFn) -> Costs:
    n_layers = draw(st.integers(1, 4))
    layers = tuple(
        LayerCosts(f"layer{index}", draw(st.integers(1, 2**40)), *(draw(times) for _ in range(4)))
        for index in range(n_layers)
    )
    return Costs(
        layers,
        *(draw(times) for _ in range(5)),
        workers=draw(st.integers(1, 64)),
        batch=draw(st.none() | st.integers(1, 512)),
        shared_link=draw(st.booleans()),
        half_duplex=draw(st.booleans()),
    )


@settings(max_examples=300, derandomize=True, deadline=None)
@given(tables())
def test_a_saved_table_is_read_back_exactly(costs: Costs) -> None:
    assert Costs.from_json(json.loads(json.dumps(costs.to_json()))) == costs


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": ()},
        {"layers": []},
        {"layers": (1,)},
        {"layers": (LayerCosts("a", 1, 0, 0, 0, 0),) * 2},
        {"overhead_up_ns": -1},
        {"overhead_down_ns": 0.5},
        {"latency_up_ns": True},
        {"latency_down_ns": None},
        {"server_ns": -1},
        {"workers": 0},
        {"batch": 0},
        {"shared_link": 1},
        {"half_duplex": 1},
    ],
    ids=str,
)
def test_a_table_that_cannot_be_is_not_made(changes: dict[str, Any]) -> None:
    good = {"layers": (LayerCosts("a", 1, 0, 0, 0, 0),), "overhead_up_ns": 0, "overhead_down_ns": 0}
    with pytest.raises(PlanError, match="expected"):
        Costs(**(good | changes))


@pytest.mark.parametrize(
    "fields",
    [
        ("", 1, 0, 0, 0, 0),
        (5, 1, 0, 0, 0, 0),
        ("a", 0, 0, 0, 0, 0),
        ("a", 1.0, 0, 0, 0, 0),
        ("a", 1, -1, 0, 0, 0),
        ("a", 1, 0, 0.1, 0, 0),
        ("a", 1, 0, 0, False, 0),
        ("a", 1, 0, 0, 0, None),
    ],
    ids=str,
)
def test_a_layer_that_cannot_be_is_not_made(fields: tuple[Any, ...]) -> None:
    with pytest.raises(PlanError, match="expected"):
        LayerCosts(*fields)


def test_an_own_link_is_not_divided_among_workers() -> None:
    assert Costs((LayerCosts("a", 1, 0, 0, 0, 0),), 0, 0, workers=4).link_share == 1
