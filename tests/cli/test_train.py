"""``dynacomm train``: a server and workers on this machine."""

from __future__ import annotations

import numpy as np
import pytest

KEYS = {"steps", "parameters_sha256", "loss", "test_accuracy"}


def test_the_json_has_the_keys_of_serve_and_nothing_else_is_said(run, quick):
    outcome = run("train", *quick, "--steps", "10", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert set(outcome.json) == KEYS
    assert outcome.json["steps"] == 10


def test_a_model_of_ones_own_is_found_from_the_current_folder(run, quick, user_model):
    outcome = run(
        "train", *quick, "--model", "mine.nets:small", "--steps", "10", "--json", cwd=user_model
    )
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.json["loss"] < 2.5


def test_epochs_are_passes_over_the_data(run, quick):
    # 128 images, 2 workers with 8 each: 8 steps are an epoch.
    outcome = run("train", *quick, "--model", "mlp", "--epochs", "2", "--json")
    assert outcome.json["steps"] == 16


def test_layers_are_saved_by_name(run, quick, tmp_path):
    path = tmp_path / "model.npz"
    outcome = run("train", *quick, "--model", "mlp", "--steps", "3", "--save", path)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("3 steps, loss ")
    with np.load(path) as layers:
        assert sum(layers[name].size for name in ("fc1", "fc2", "fc3")) == 109386
        assert set(layers.files) == {"fc1", "fc2", "fc3", "statistics", "model.name"}


def test_seed_and_augmentation_decide_the_result_and_nothing_else(start, quick):
    options = ("train", *quick, "--model", "mlp", "--steps", "4", "--json", "--seed", "1")
    changes = (
        (),
        ("--strategy", "bucket", "--delay", "1ms"),
        ("--seed", "2"),
        ("--augment=shift:1",),
    )
    programs = [start(*options, *change) for change in changes]
    first, again, *others = (program.finish().json for program in programs)
    assert first == again
    hashes = {result["parameters_sha256"] for result in (first, *others)}
    assert len(hashes) == 3


def test_threads_in_workers_give_the_same_bits_under_every_strategy(start):
    options = ("train", "--model", "vgg_small", "--data", "synthetic:64:8", "--batch", "8")
    options = (*options, "--steps", "2", "--json")
    changes = (("--threads", "2"), ("--threads", "2", "--strategy", "bucket"), ())
    programs = [start(*options, *change) for change in changes]
    first, again, alone = (program.finish().json for program in programs)
    assert first == again
    # Sums of shards are rounded differently: so it is known that there were some.
    assert alone["parameters_sha256"] != first["parameters_sha256"]
    assert alone["loss"] == pytest.approx(first["loss"], rel=1e-3)


def test_a_worker_that_fails_is_quoted_and_ends_the_run(run, quick, user_model):
    # The network is made in the parent, in the server and in both workers; only these fail.
    (user_model / "picky.py").write_text(
        "import sys\n"
        "from mine.nets import small\n"
        "\n"
        "def net(input_shape=(6, 6, 1), classes=10):\n"
        "    if 'work' in sys.argv:\n"
        "        raise RuntimeError('not on this machine')\n"
        "    return small(input_shape, classes)\n"
    )
    outcome = run("train", *quick, "--model", "picky:net", cwd=user_model)
    assert outcome.code == 1
    assert "worker" in outcome.complaint
    assert "not on this machine" in outcome.complaint


@pytest.mark.parametrize("name", ["train", "compare"])
def test_training_that_diverges_ends_with_one_line_that_says_so(run, quick, name):
    lengths = ("--model", "mlp", "--steps", "10", "--rate", "1e30")
    options = ("--strategies", "bucket") if name == "compare" else ()
    outcome = run(name, *quick, *lengths, *options, "--json")
    assert outcome.code == 1
    assert outcome.out == ""
    *told, last = outcome.err.splitlines()
    assert "training has diverged: " in last
    assert last.endswith("try a lower --rate")
    assert any("gradients of step 1 hold values that are not finite" in line for line in told)
    assert not [line for line in told if "Warning" in line or "Traceback" in line]


def test_explain_tells_the_first_worker_whole_and_the_others_in_brief(run, quick):
    outcome = run("train", *quick, "--model", "mlp", "--steps", "12", "--explain")
    assert outcome.code == 0, outcome.err
    result, first, second = outcome.out.split("\nWorker ")
    assert result.startswith("12 steps, loss ")
    assert first.startswith("0 of 2: where the time of a step goes")
    assert second.startswith("1 of 2: where the time of a step goes")
    for text in (first, second):
        assert "down (parameters)" in text
        assert "Plan in use: " in text
        assert "Measured step" in text
        assert "waiting for other workers" in text
    assert "Layer, in forward order" in first
    assert "Layer, in forward order" not in second


def test_explanations_do_not_mix_with_json(run, quick):
    outcome = run("train", *quick, "--model", "mlp", "--steps", "8", "--json", "--explain")
    assert outcome.code == 0, outcome.err
    assert set(outcome.json) == KEYS
    assert outcome.err.count("where the time of a step goes") == 2


def test_without_a_terminal_progress_is_a_log(run, quick):
    outcome = run("train", *quick, "--model", "mlp", "--steps", "20")
    lines = [line for line in outcome.err.splitlines() if line.startswith("training: step ")]
    assert [line.split()[2] for line in lines] == [f"{done}/20" for done in range(2, 21, 2)]
