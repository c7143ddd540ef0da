"""``dynacomm compare``, ``profile`` and ``demo``: what they report, and that it fits together."""

from __future__ import annotations

import json
import re

import pytest

from dynacomm_async.cli.compare import Comparison, parse_strategies, print_comparison
from dynacomm_async.errors import ConfigError
from dynacomm_async.schedule import CROSSING, PLANNERS, Costs

KEYS = {"step_s", "predicted_s", "lower_bound_s", "hidden_fraction", "parameters_sha256", "loss"}
KEYS |= {"interval_s", "waits_s"}
LINK = ("--bandwidth", "200mbit", "--delay", "1ms", "--overhead", "0.2ms")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """(JSON output, cost table file) of one comparison."""
    import subprocess
    import sys

    costs = tmp_path_factory.mktemp("compared") / "costs.json"
    command = [sys.executable, "-m", "dynacomm_async.cli.main", "compare", *LINK]
    options = f"--data synthetic:128:32 --batch 8 --steps 14 --save-costs {costs} --json".split()
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    # Quiet where there is no terminal, but for a link that a busy machine makes too uneven.
    assert done.stderr == "" or "its costs are guesses" in done.stderr
    return json.loads(done.stdout), costs


def test_the_json_has_the_keys_of_the_contract(compared):
    found, _ = compared
    assert set(found) == {"strategies", "costs"}
    assert list(found["strategies"]) == list(PLANNERS)
    for entry in found["strategies"].values():
        assert set(entry) == KEYS
        assert re.fullmatch("[0-9a-f]{64}", entry["parameters_sha256"])
        assert len(entry["loss"]) == 14
        assert entry["step_s"] > 0
        assert entry["hidden_fraction"] <= 1
        low, high = entry["interval_s"]
        assert low <= entry["step_s"] <= high
        assert 0 <= min(entry["waits_s"]) < entry["predicted_s"]


def test_the_same_bound_holds_for_all_strategies_and_none_is_promised_less(compared):
    found, _ = compared
    entries = found["strategies"].values()
    assert len({entry["lower_bound_s"] for entry in entries}) == 1
    assert all(entry["lower_bound_s"] <= entry["predicted_s"] for entry in entries)
    promised = {name: entry["predicted_s"] for name, entry in found["strategies"].items()}
    with_barrier = [step_s for name, step_s in promised.items() if name not in CROSSING]
    assert promised["dynacomm"] == min(with_barrier)
    assert promised["joint"] <= promised["dynacomm"]


def test_the_saved_costs_are_those_of_the_report_and_can_be_read(compared):
    found, costs = compared
    saved = json.loads(costs.read_text())
    assert saved == found["costs"]
    table = Costs.from_json(saved)
    assert (table.workers, table.batch) == (2, 8)
    assert [layer.nbytes for layer in table.layers] == [624, 9664, 192480, 40656, 3400]


def test_plan_promises_from_the_saved_costs_what_compare_reported(call, compared):
    found, costs = compared
    for plan in call("plan", costs, "--json").json:
        entry = found["strategies"][plan["strategy"]]
        assert plan["step_s"] == entry["predicted_s"]
        assert plan["lower_bound_s"] == entry["lower_bound_s"]


@pytest.mark.parametrize(("factor", "guessed"), [(1.0, False), (2.0, False), (2.0, True)])
def test_steps_far_longer_than_predicted_are_told_of(compared, capsys, factor, guessed):
    found, _ = compared
    strategies = {
        name: {**entry, "step_s": factor * entry["predicted_s"]}
        for name, entry in found["strategies"].items()
    }
    print_comparison(Comparison(costs=found["costs"], strategies=strategies, guessed=guessed))
    told = "steps took 2.0 times as long as predicted" in capsys.readouterr().out
    assert told == (factor == 2.0 and not guessed)


def test_a_comparison_of_few_strategies_prints_a_table(run, quick):
    outcome = run(
        "compare", *quick, *LINK, "--steps", "10", "--workers", "1", "--strategies", "bucket,ibatch"
    )
    assert outcome.code == 0
    # Ten steps on a busy machine may be too uneven to measure the link, and then it says so.
    assert outcome.err == "" or "its costs are guesses" in outcome.err
    *names, last = [line.split()[0] for line in outcome.out.splitlines()]
    # Behind these it may say that the machine was busy.
    assert names[:7] == ["strategy", "-" * 8, "bucket", "ibatch", "x", "hidden:", "at"]
    assert last == "parameters:"
    assert "bit-identical under every strategy" in outcome.out


def test_a_link_too_fast_to_be_measured_is_compared_all_the_same(run, quick):
    outcome = run(
        "compare",
        *quick,
        *("--bandwidth", "unlimited", "--delay", "0ms", "--model", "mlp"),
        *("--steps", "10", "--strategies", "sequential,layerwise", "--json"),
    )
    assert outcome.code == 0, outcome.err
    assert set(outcome.json["strategies"]) == {"sequential", "layerwise"}
    assert outcome.err.splitlines() in ([], [outcome.err.strip()])


def test_one_shared_link_gives_the_same_bits_as_one_for_each(run, quick, compared):
    outcome = run(
        "compare", *quick, *LINK, "--shared", "--steps", "14", "--strategies", "bucket", "--json"
    )
    assert outcome.code == 0, outcome.err
    (entry,) = outcome.json["strategies"].values()
    assert entry["parameters_sha256"] == compared[0]["strategies"]["bucket"]["parameters_sha256"]


@pytest.mark.parametrize(
    ("text", "names"),
    [("all", list(PLANNERS)), ("bucket", ["bucket"]), ("ibatch, bucket", ["ibatch", "bucket"])],
)
def test_strategies_are_read_in_the_order_given(text, names):
    assert parse_strategies(text) == names


def test_strategies_given_twice_are_refused():
    with pytest.raises(ConfigError, match="once"):
        parse_strategies("bucket,bucket")


def test_profile_writes_a_table_that_plan_reads(run, call, quick, tmp_path):
    path = tmp_path / "costs.json"

    outcome = run("profile", *quick, *LINK, "-o", path, "--json")

    assert outcome.code == 0
    assert outcome.err == "" or "its costs are guesses" in outcome.err  # on a busy machine
    table = json.loads(path.read_text())
    assert outcome.json == table
    assert {"overhead_s", "layers"} <= set(table)
    for layer in table["layers"]:
        assert set(layer) == {"name", "nbytes", "pull_s", "forward_s", "backward_s", "push_s"}
    assert set(table["memory"]) == {"activation_bytes", "gradient_bytes", "workspace_bytes"}
    assert min(table["memory"].values()) > 0
    assert len(call("plan", path, "--json").json) == len(PLANNERS)


def test_demo_trains_compares_and_names_the_files_that_it_wrote(run, quick, user_model):
    fast = ("--bandwidth", "1gbit", "--delay", "0ms", "--overhead", "0ms")
    options = (*quick, *fast, "--model", "mine.nets:small", "--steps", "20", "--json")

    outcome = run("demo", *options, cwd=user_model)

    assert outcome.code == 0, outcome.err
    assert "Traceback" not in outcome.err
    found = outcome.json
    assert set(found) == {"test_accuracy", "strategies", "files"}
    assert 0 <= found["test_accuracy"] <= 1
    assert list(found["strategies"]) == list(PLANNERS)
    assert all(set(entry) == KEYS for entry in found["strategies"].values())
    written = {path.relative_to(user_model).as_posix() for path in user_model.rglob("*.*")}
    assert set(found["files"]) <= written


def test_demo_refuses_a_folder_that_cannot_be_made(call, quick, tmp_path):
    (tmp_path / "file").touch()
    outcome = call("demo", *quick, "--output", tmp_path / "file" / "results")
    assert outcome.code == 1
    assert "cannot make the folder" in outcome.complaint


def test_of_uneven_workers_the_slowest_sets_the_predicted_pace_and_the_others_wait(call, quick):
    link = ("--bandwidth=400mbit,20mbit", "--steps=14", "--workers=2")
    result = call("compare", *quick, "--model=mlp", *link, "--strategies=layerwise")
    found = re.search(r"waiting for worker 1 under layerwise: worker 0 [0-9.]+ m?s", result.out)
    assert found, result.out


def test_explain_tells_the_costs_once_and_the_story_of_each_strategy(run, quick):
    options = ("--steps", "14", "--strategies", "sequential,layerwise", "--explain")
    outcome = run("compare", *quick, *LINK, *options)
    assert outcome.code == 0, outcome.err
    table, costs, *stories = re.split(r"\n(?=[^\n]+\n=+\n)", outcome.out)
    assert table.startswith("strategy ")
    assert costs.count("Layer, in forward order") == 1
    assert len(stories) == 2
    for name, story in zip(("sequential", "layerwise"), stories, strict=True):
        assert story.startswith(f"Strategy {name}")
        assert f"Plan in use: {name}, " in story
        assert "Layer, in forward order" not in story
        for line in ("Measured step", "Predicted step", "Lower bound", "Hidden share"):
            assert line in story
    assert outcome.err == "" or "guesses" in outcome.err
