"""``dynacomm plan``: plans from a cost table, and what is said of a table that cannot be."""

from __future__ import annotations

import copy
import json

import pytest

from dynacomm_async.schedule import CROSSING, PLANNERS, read_plan

TABLE = {
    "overhead_s": 0.001,
    "layers": [
        {"name": "a", "nbytes": 1000, "pull_s": 1, "forward_s": 2, "backward_s": 2, "push_s": 1},
        {"name": "b", "nbytes": 4000, "pull_s": 4, "forward_s": 1, "backward_s": 3, "push_s": 4},
    ],
}
KEYS = {"strategy", "forward_s", "backward_s", "step_s", "lower_bound_s"}
MORE_KEYS = {"wait_s", "lower_bound"}


@pytest.fixture
def costs(tmp_path):
    """Write a cost table; returns the file's name."""

    def write(table):
        path = tmp_path / "costs.json"
        path.write_text(table if isinstance(table, str) else json.dumps(table))
        return path

    return write


def changed(**changes):
    return {**TABLE, **changes}


def with_layer(**changes):
    table = copy.deepcopy(TABLE)
    table["layers"][1].update(changes)
    return table


def without_layer_key(key):
    table = copy.deepcopy(TABLE)
    del table["layers"][1][key]
    return table


def test_the_json_has_the_keys_of_the_contract_for_every_strategy(call, costs):
    plans = call("plan", costs(TABLE), "--json").json

    assert [plan["strategy"] for plan in plans] == list(PLANNERS)
    for plan in plans:
        assert plan["lower_bound_s"] <= plan["step_s"]
        assert plan["lower_bound"] == "equal-rate"
        if plan["strategy"] in CROSSING:
            assert set(plan) == KEYS | MORE_KEYS | {"messages", "plan"}
            continue
        assert set(plan) == KEYS | MORE_KEYS | {"pull", "push"}
        assert sorted(i for a, b in plan["pull"] for i in range(a, b + 1)) == [0, 1]
        assert sorted(i for a, b in plan["push"] for i in range(a, b + 1)) == [0, 1]


@pytest.mark.parametrize("strategy", sorted(CROSSING))
def test_without_a_barrier_the_messages_are_listed_and_carry_everything_once(call, costs, strategy):
    table = changed(layers=[{**layer, "nbytes": 10**8} for layer in TABLE["layers"]])
    (plan,) = call("plan", costs(table), "--strategy", strategy, "--json").json

    assert plan["forward_s"] is plan["backward_s"] is None
    assert read_plan(plan["plan"]).strategy == strategy
    for direction in ("push", "pull"):
        sent = [m["ranges"] for m in plan["messages"] if m["direction"] == direction]
        assert len(sent) > 1
        due = 0
        for offset, nbytes in sorted(part for ranges in sent for part in ranges):
            assert offset == due
            due += nbytes
        assert due == 2 * 10**8
    assert plan["messages"][0]["direction"] == "push"


def test_one_strategy_can_be_asked_for(call, costs):
    (plan,) = call("plan", costs(TABLE), "--strategy", "sequential", "--json").json

    assert (plan["pull"], plan["push"]) == ([[0, 1]], [[0, 1]])
    # By hand: overhead, both pulls, both forwards; both backwards, overhead, both pushes.
    assert plan["forward_s"] == pytest.approx(0.001 + 5 + 3)
    assert plan["backward_s"] == pytest.approx(5 + 0.001 + 5)
    assert plan["step_s"] == pytest.approx(18.002)


def test_pushes_come_in_the_order_sent(call, costs):
    (plan,) = call("plan", costs(TABLE), "--strategy", "layerwise", "--json").json
    assert (plan["pull"], plan["push"]) == ([[0, 0], [1, 1]], [[1, 1], [0, 0]])


def test_the_table_for_people_has_a_row_for_every_strategy(call, costs):
    outcome = call("plan", costs(TABLE))
    assert outcome.code == 0
    for name in PLANNERS:
        assert any(line.startswith(name) for line in outcome.out.splitlines())
    assert "lower bound" in outcome.out


def test_the_timelines_can_be_drawn(call, costs, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    picture = tmp_path / "steps.png"
    outcome = call("plan", costs(TABLE), "--plot", picture, "--json")
    assert outcome.code == 0
    assert len(outcome.json) == len(PLANNERS)
    assert str(picture) in outcome.err
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["no/such/folder.png", "steps.doc"])
def test_a_picture_that_cannot_be_written_is_refused(call, costs, tmp_path, name):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    outcome = call("plan", costs(TABLE), "--plot", tmp_path / name)
    assert outcome.code == 1
    assert name in outcome.complaint


WRONG_TABLES = {
    "not JSON": ("{", "is not JSON"),
    "not an object": ("[]", "expected an object"),
    "a number": ("3", "expected an object"),
    "empty": ("", "is not JSON"),
    "no overhead": ({"layers": TABLE["layers"]}, "overhead_s"),
    "no layers key": ({"overhead_s": 0.001}, "layers is missing"),
    "no layers": (changed(layers=[]), "at least one layer"),
    "layers an object": (changed(layers={"a": 1}), "expected a list"),
    "a layer that is a number": (changed(layers=[1]), "layer 0"),
    "a layer twice": (changed(layers=[TABLE["layers"][0]] * 2), "expected every name once"),
    "negative overhead": (changed(overhead_s=-0.1), "overhead_s"),
    "overhead NaN": (changed(overhead_s=float("nan")), "overhead_s"),
    "overhead infinite": (changed(overhead_s=float("inf")), "overhead_s"),
    "overhead a string": (changed(overhead_s="1ms"), "overhead_s"),
    "overhead null": (changed(overhead_s=None), "overhead_s"),
    "overhead true": (changed(overhead_s=True), "overhead_s"),
    "workers zero": (changed(workers=0), "workers"),
    "workers a fraction": (changed(workers=1.5), "workers"),
    "batch negative": (changed(batch=-1), "batch"),
    "link unknown": (changed(link="wet string"), "link"),
    "latency negative": (changed(latency_up_s=-1), "latency_up_s"),
    "server time a list": (changed(server_s=[1]), "server_s"),
    "a layer without name": (without_layer_key("name"), "name"),
    "a layer with an empty name": (with_layer(name=""), "name"),
    "nbytes zero": (with_layer(nbytes=0), "nbytes"),
    "nbytes a fraction": (with_layer(nbytes=0.5), "nbytes"),
    "a time that is too long": (with_layer(pull_s=1e30), "pull_s"),
    **{
        f"no {key}": (without_layer_key(key), key)
        for key in ("nbytes", "pull_s", "forward_s", "backward_s", "push_s")
    },
    **{
        f"{key} {value!r}": (with_layer(**{key: value}), key)
        for key in ("pull_s", "forward_s", "backward_s", "push_s")
        for value in (-0.5, float("nan"), "fast", None, False)
    },
}


@pytest.mark.parametrize("name", WRONG_TABLES)
def test_a_table_that_cannot_be_is_refused_in_one_line_that_says_what_is_wrong(call, costs, name):
    table, word = WRONG_TABLES[name]
    path = costs(table)

    outcome = call("plan", path, "--json")

    assert outcome.code == 1
    assert str(path) in outcome.complaint
    assert word in outcome.complaint
    assert outcome.complaint.startswith("dynacomm plan: error: ")


def test_a_missing_file_is_named(call, tmp_path):
    outcome = call("plan", tmp_path / "none.json")
    assert outcome.code == 1
    assert "none.json" in outcome.complaint
    assert "No such file" in outcome.complaint


def test_a_folder_is_no_table(call, tmp_path):
    outcome = call("plan", tmp_path)
    assert outcome.code == 1
    assert "directory" in outcome.complaint


def test_bytes_that_are_no_text_are_no_table(call, tmp_path):
    path = tmp_path / "costs.json"
    path.write_bytes(b"\xff\xfe\x00")
    outcome = call("plan", path)
    assert outcome.code == 1
    assert "is not JSON" in outcome.complaint


@pytest.mark.parametrize(
    "table", ['{"overhead_s": ' + "9" * 5000 + "}", "[" * 100_000], ids=["digits", "nesting"]
)
def test_numbers_and_nesting_beyond_reason_are_refused_like_other_mistakes(call, costs, table):
    outcome = call("plan", costs(table))
    assert outcome.code == 1
    assert "is not JSON" in outcome.complaint


def test_an_unknown_strategy_is_refused_with_the_known_ones(call, costs):
    outcome = call("plan", costs(TABLE), "--strategy", "dynacom")
    assert outcome.code == 1
    assert "dynacomm" in outcome.complaint
