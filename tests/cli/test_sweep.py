"""``dynacomm sweep``: other links, batches and workers, and what is said of wrong options."""

from __future__ import annotations

import json

import pytest

from dynacomm_async.schedule import CROSSING, PLANNERS

# By hand: 1000 bytes and 4000 bytes at 1000 bytes/s down and 500 bytes/s up.
TABLE = {
    "overhead_up_s": 0.25,
    "overhead_s": 0.5,
    "latency_up_s": 0.125,
    "latency_down_s": 0.125,
    "batch": 4,
    "workers": 2,
    "layers": [
        {"name": "a", "nbytes": 1000, "pull_s": 1, "forward_s": 2, "backward_s": 2, "push_s": 2},
        {"name": "b", "nbytes": 4000, "pull_s": 4, "forward_s": 1, "backward_s": 3, "push_s": 8},
    ],
}
KEYS = {
    *("down_bytes_per_s", "up_bytes_per_s", "overhead_s", "latency_s", "batch", "workers", "link"),
    *("step_s", "best", "choice", "lower_bound_s"),
}


@pytest.fixture
def costs(tmp_path):
    """Write a cost table, changed; returns the file's name."""

    def write(**changes):
        path = tmp_path / "costs.json"
        path.write_text(json.dumps({**TABLE, **changes}))
        return path

    return write


def sequential_s(row, costs=TABLE):
    """A step without any overlap, from the row's own settings, by hand."""
    compute = sum(layer["forward_s"] + layer["backward_s"] for layer in costs["layers"])
    share = row["workers"] if row["link"] == "shared" else 1
    nbytes = sum(layer["nbytes"] for layer in costs["layers"])
    transfer = nbytes / row["down_bytes_per_s"] + nbytes / row["up_bytes_per_s"]
    return (
        compute * row["batch"] / 4
        + share * (transfer + 2 * row["overhead_s"])
        + 2 * (row["latency_s"])
    )


def test_the_json_has_its_keys_and_every_strategy_in_every_row(call, costs):
    outcome = call("sweep", costs(), "--json")

    assert (outcome.code, outcome.err) == (0, "")
    assert len(outcome.json) == 7
    for row in outcome.json:
        assert set(row) == KEYS
        assert list(row["step_s"]) == list(PLANNERS)
        plainer = [row["step_s"][name] for name in PLANNERS if name not in CROSSING]
        assert min(plainer) == row["step_s"]["dynacomm"] >= row["step_s"]["joint"]
        assert row["lower_bound_s"] <= min(row["step_s"].values())
        assert row["choice"] in row["step_s"]
        assert min(row["step_s"].values()) == row["step_s"][row["best"][0]]


def test_without_a_bandwidth_both_directions_are_made_slower_and_faster_alike(call, costs):
    rows = call("sweep", costs(), "--json").json
    assert [row["down_bytes_per_s"] for row in rows] == [125, 250, 500, 1000, 2000, 4000, 8000]
    assert all(row["up_bytes_per_s"] == row["down_bytes_per_s"] / 2 for row in rows)


def test_every_combination_is_judged_by_its_own_settings(call, costs):
    options = ["--bandwidth", "8kbit,16kbit", "--overhead", "0,250ms", "--latency", "0s,1s"]
    options += ["--batch", "4,8,12", "--workers", "1,3", "--shared", "--json"]
    rows = call("sweep", costs(), *options).json

    assert len(rows) == 2 * 2 * 2 * 3 * 2
    names = ["down_bytes_per_s", "overhead_s", "latency_s", "batch", "workers"]
    settings = {tuple(row[name] for name in names) for row in rows}
    assert len(settings) == len(rows)
    for row in rows:
        assert row["link"] == "shared"
        assert row["step_s"]["sequential"] == pytest.approx(sequential_s(row), abs=1e-8)


def test_the_plans_own_setting_gives_the_steps_that_plan_gives(call, costs):
    path = costs()
    plans = {plan["strategy"]: plan for plan in call("plan", path, "--json").json}
    same = next(
        row for row in call("sweep", path, "--json").json if row["down_bytes_per_s"] == 1000
    )
    assert same["step_s"] == {name: plan["step_s"] for name, plan in plans.items()}
    assert same["lower_bound_s"] == plans["dynacomm"]["lower_bound_s"]


def test_values_that_are_named_twice_are_tried_once(call, costs):
    rows = call("sweep", costs(), "--bandwidth", "8kbit,8000bit", "--json").json
    assert len(rows) == 1


def test_the_table_names_varied_settings_in_columns_and_others_once(call, costs):
    outcome = call("sweep", costs(), "--batch", "4,8", "--bandwidth", "8kbit")
    lines = outcome.out.splitlines()
    assert lines[0].split()[:2] == ["batch", "sequential"]
    assert len(lines) == 2 + 2 + 2
    assert "bandwidth 8kbit" in lines[-2]
    assert "simplest strategy" in lines[-1]


def test_a_table_without_transfer_can_be_swept_too(call, costs):
    layers = [{**layer, "pull_s": 0, "push_s": 0} for layer in TABLE["layers"]]
    (row,) = call("sweep", costs(layers=layers), "--json").json
    assert row["down_bytes_per_s"] is None
    assert call("sweep", costs(layers=layers)).code == 0


def test_workers_on_links_of_their_own_are_pointed_out(call, costs):
    assert "--shared" in call("sweep", costs(), "--workers", "1,2").err
    assert call("sweep", costs(), "--workers", "1,2", "--shared").err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bandwidth", "fast"], "--bandwidth: 'fast' is not a rate"),
        (["--bandwidth", "8kbit,"], "--bandwidth: '' is not a rate"),
        (["--bandwidth", "unlimited"], "--bandwidth: a sweep needs rates"),
        (["--overhead", "5"], "--overhead: '5' is not a duration"),
        (["--latency", "-1ms"], "--latency: '-1ms' is not a duration"),
        (["--batch", "0"], "--batch: '0' is not a whole number"),
        (["--batch", "2.5"], "--batch: '2.5' is not a whole number"),
        (["--workers", "many"], "--workers: 'many' is not a whole number"),
        (["--batch", ",".join(map(str, range(1, 2000)))], "combinations are too many"),
        (["--plot", "no/such/folder.png"], "cannot write no/such/folder.png"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(call, costs, options, message):
    name, *value = options
    outcome = call("sweep", costs(), f"{name}={value[0]}", "--json")
    assert outcome.code == 1
    assert message in outcome.complaint


def test_a_batch_cannot_be_changed_where_none_is_known(call, costs):
    path = costs(batch=None)
    table = json.loads(path.read_text())
    del table["batch"]
    path.write_text(json.dumps(table))
    outcome = call("sweep", path, "--batch", "8")
    assert outcome.code == 1
    assert "has no batch" in outcome.complaint


def test_a_wrong_table_is_named(call, tmp_path):
    assert "none.json" in call("sweep", tmp_path / "none.json").complaint


def test_a_picture_is_drawn_beside_the_output(call, costs, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    picture = tmp_path / "sweep.png"
    outcome = call("sweep", costs(), "--overhead", "0,1s", "--plot", picture, "--json")
    assert outcome.code == 0
    assert len(outcome.json) == 14
    assert str(picture) in outcome.err
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_too_many_maps_is_refused_before_anything_is_printed(call, costs, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    options = ["--overhead", "0,1s", "--latency", "0,1s,2s", "--batch", "1,2,3,4,5"]
    outcome = call("sweep", costs(), *options, "--plot", tmp_path / "sweep.png")
    assert "15 maps" in outcome.complaint
    assert not (tmp_path / "sweep.png").exists()
