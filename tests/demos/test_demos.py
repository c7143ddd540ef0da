import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

DEMOS = Path(__file__).parents[2] / "demos"
EVERY = sorted([*DEMOS.glob("[!_]*.py"), *DEMOS.glob("benchmarks/[!_]*.py")])


def run_demo(name: str, *options: str, timeout_s: float = 100) -> str:
    """Run a demo to its end as a user would, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(DEMOS / name), *options],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def hashes(text: str) -> list[str]:
    return re.findall(r"sha256 ([0-9a-f]{16})", text)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.name)
def test_a_demo_says_what_it_is_and_how_to_run_it(path):
    text = path.read_text()
    where = path.relative_to(DEMOS.parent).as_posix()

    assert f"python {where}" in text.partition('"""\n\n')[0]
    assert where.removeprefix("demos/") in (DEMOS / "README.md").read_text()


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.name)
def test_a_demo_needs_no_private_name(path):
    imports = re.findall(
        r"^(?:from|import) (dynacomm_async\S*)(?: import \(?([^)]*))?", path.read_text(), re.M
    )

    for module, names in imports:
        assert not re.search(r"(^|\.)_", module), module
        assert not re.search(r"(^|[\s,])_", names or ""), names


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--blocking"]], ids=["awaiting", "blocking"])
def test_plain_numpy_code_trains_and_all_hold_the_same_parameters(options):
    pytest.importorskip("sklearn")
    out = run_demo("embed_numpy.py", "--steps=150", *options)

    assert "all hold the same parameters" in out
    assert len(hashes(out)) == 3
    assert len(set(hashes(out))) == 1
    accuracies = [float(word) for word in re.findall(r"accuracy ([0-9.]+)", out)]
    assert len(accuracies) == 2
    assert min(accuracies) >= 0.9


@pytest.mark.slow
@pytest.mark.peers
def test_the_engine_benchmark_measures_both_sides():
    pytest.importorskip("torch", reason="PyTorch is not installed")
    options = ("--quick", "--threads=1", "--core=Haswell", "--only=layers", "--json")
    (setting,) = json.loads(run_demo("benchmarks/engine.py", *options))

    assert (setting["threads"], setting["core_type"]) == (1, "Haswell")
    assert setting["machine"]["openblas_coretype"] == "Haswell"
    assert {row["what"].partition(",")[0] for row in setting["rows"]} == {
        "pool forward",
        "batch norm forward",
        "dense",
        "blocked convolution",
        "Winograd convolution",
    }
    assert all(min(row["ours_s"], row["torch_s"], row["target"]) > 0 for row in setting["rows"])


@pytest.mark.slow
@pytest.mark.peers
def test_the_adapter_benchmark_measures_both_sides():
    pytest.importorskip("torch", reason="PyTorch is not installed")
    found = json.loads(run_demo("benchmarks/adapter.py", "--quick", "--json"))

    assert found["steps"] == 12
    assert 0 < found["plain_without_optimizer_s"] <= found["plain_thread_s"]
    assert min(found["thread_s"], found["io_s"], found["server_s"], found["clock_s"]) > 0
    assert min(found["hooks_s"], found["copying_s"]) > 0


def test_a_pytorch_module_trains_by_at_most_five_added_lines():
    """What is left without them is an ordinary loop, but for its optimizer."""
    text = (DEMOS / "embed_pytorch.py").read_text()
    work = re.search(r"^def work.*?(?=^# --)", text, re.M | re.S)[0]
    added = [line for line in work.splitlines() if "# new" in line]
    rest = [line for line in work.splitlines() if line not in added]

    assert 0 < len(added) <= 5
    assert (
        len([line for line in rest if re.search(r"\b(session|step|Torch)", line)]) <= 1
    )  # its rank, to print
    assert any("loss.backward()" in line for line in rest)


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.parametrize(
    ("name", "module"), [("embed_pytorch.py", "torch"), ("embed_jax.py", "jax")]
)
def test_another_framework_trains_and_all_hold_the_same_parameters(name, module):
    pytest.importorskip(module, reason=f"{module} is not installed")
    out = run_demo(name, "--steps=40")

    assert "all hold the same parameters" in out
    assert len(hashes(out)) == 3
    assert len(set(hashes(out))) == 1


@pytest.mark.parametrize(
    ("name", "module"),
    [("embed_pytorch.py", "torch"), ("embed_jax.py", "jax"), ("ray_cluster.py", "ray")],
)
def test_without_its_framework_a_demo_says_so_and_ends_well(name, module, tmp_path):
    (tmp_path / f"{module}.py").write_text("raise ImportError('not here')")
    done = subprocess.run(
        [sys.executable, str(DEMOS / name)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "is not installed: pip install" in done.stdout


@pytest.mark.slow
def test_one_machine_trains_the_same_under_two_strategies():
    options = ["--model=mlp", "--data=synthetic", "--steps=8", "--delay=0ms"]
    found = [
        hashes(run_demo("train_one_machine.py", *options, f"--strategy={strategy}"))
        for strategy in ("sequential", "dynacomm")
    ]

    assert len(found[0]) == 1
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_worker_that_cannot_start_ends_the_demo_instead_of_hanging_it():
    done = subprocess.run(
        [sys.executable, str(DEMOS / "train_one_machine.py"), "--batch=100000"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("error: a worker ended with exit code 1")


@pytest.mark.slow
def test_several_machines_train_over_loopback():
    options = ["--model=mlp", "--data=synthetic", "--steps=5", f"--port={free_port()}"]
    out = run_demo("train_several_machines.py", "--loopback", *options)

    assert out.count("$ dynacomm work") == 2
    assert "server: 5 steps" in out


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
def test_several_machines_train_in_namespaces_of_which_nothing_stays():
    def namespaces() -> str:
        return subprocess.run(
            ["ip", "netns", "list"], capture_output=True, text=True, check=False
        ).stdout

    before = namespaces()
    out = run_demo("train_several_machines.py", "--model=mlp", "--data=synthetic", "--steps=5")
    if "network namespaces" not in out:
        pytest.skip("this system makes no namespaces, root or not")

    assert "10.77.0.3$ dynacomm work --server 10.77.0.1:7070" in out
    assert "server: 5 steps" in out
    assert namespaces() == before


def test_the_commands_for_real_machines_are_printed():
    out = run_demo("train_several_machines.py", "--print=192.0.2.1", "--workers=3")

    assert "--listen 192.0.2.1:7070 --insecure" in out
    assert "on each of 3 others:\n  dynacomm work --server 192.0.2.1:7070\n" in out


@pytest.mark.peers
@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_ray_cluster_loses_a_worker_and_a_node_and_no_bit():
    pytest.importorskip("ray", reason="Ray is not installed")
    out = run_demo("ray_cluster.py", "--steps=120", timeout_s=280)

    assert " kill -9 of process " in out
    assert " is lost, with server" in out
    assert out.count(" starts anew on node ") >= 2
    assert len(hashes(out)) == 2
    assert len(set(hashes(out))) == 1


@pytest.mark.slow
def test_strategies_are_compared_on_two_links():
    options = ["--model=mlp", "--data=synthetic", "--steps=10", "--workers=1", "--delay=0ms"]
    out = run_demo("compare_strategies.py", *options, "--strategies=sequential,layerwise")

    assert out.count("parameters: bit-identical") == 2
    assert out.count("sequential: 1 messages down, 1 up") == 2
    assert out.count("fastest: ") == 2


@pytest.mark.timing
@pytest.mark.slow
def test_the_overlap_benchmark_reports_what_its_model_says_beside_what_it_measures():
    out = run_demo("benchmarks/overlap.py", "--quick", "--rounds=1", "--rates=1gbit", "--json")
    (row,) = json.loads(out)["rows"]

    assert row["rate"] == "1gbit"
    assert row["communication_theory_s"] == pytest.approx(0.2, rel=1e-3)
    assert row["communication_s"] > 0.99 * row["communication_theory_s"]
    longer_s = max(row["communication_s"], row["computation_s"])
    assert longer_s <= row["predicted_s"] < row["communication_s"] + row["computation_s"]
    assert row["ratio"] > 0.9  # above 1 but for noise; how much above is for idle machines


def test_over_all_settings_of_a_network_no_strategy_is_behind_what_it_contains():
    found = json.loads(run_demo("benchmarks/strategies.py", "--networks=vgg19", "--json"))

    assert len(found["settings"]) == 3 * 3 * 4 * 2
    assert found["behind"]["joint"] == {"dynacomm": 0}
    assert set(found["behind"]["dynacomm"].values()) == {0}
    assert found["strategies"]["joint"]["mean"] <= 1.015
    assert 1 <= found["strategies"]["joint"]["worst"] <= 1.19
    for row in found["settings"]:
        assert row["lower_bound_s"] <= min(row["step_s"].values())


def test_the_strategies_benchmark_names_what_it_does_not_know():
    done = subprocess.run(
        [sys.executable, str(DEMOS / "benchmarks/strategies.py"), "--networks=vgg99"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "there is no 'vgg99', expected some of vgg19,googlenet" in done.stderr


@pytest.mark.slow
def test_a_changing_link_changes_plans_and_no_loss():
    out = run_demo("adapt.py", "--model=mlp", "--data=synthetic", "--batch=32", "--phase=3")

    assert "first estimate: down" in out
    assert "losses of the first" in out
    assert "NOT identical" not in out


@pytest.mark.slow
def test_chaos_changes_no_bit():
    options = ["--model=mlp", "--data=synthetic", "--batch=8", "--every=0.2", "--blows=6"]
    found = json.loads(run_demo("chaos.py", *options, "--steps=90", "--seed=191", "--json"))

    assert found["identical"] is True
    assert found["disturbed"] == found["undisturbed"]
    assert found["disturbed"]["steps"] == 90
    assert set(found["blows"]) == {"server", "worker", "reset", "cut", "stall", "down"}


def test_the_replanning_benchmark_measures_every_table():
    tables = json.loads(run_demo("benchmarks/replanning.py", "--tables", "--json"))["tables"]

    assert {table["layers"] for table in tables} == {5, 20, 156}
    assert all(0 < table["median_s"] <= table["longest_s"] for table in tables)


def test_plans_for_several_rates_lose_less_where_the_rate_is_wrong():
    rows = json.loads(run_demo("benchmarks/robustness.py", "--json"))["rows"]
    worst = {row["plan"]: row["errors"][-1]["worst_loss"] for row in rows}

    assert worst["best of 5, 30 %"] < 0.05 < worst["the estimate's"]


@pytest.mark.slow
def test_the_checkpoints_benchmark_saves_a_model_with_its_momentum():
    found = json.loads(run_demo("benchmarks/checkpoints.py", "--quick", "--json"))

    assert found["saving"]["nbytes"] > 2 * 10 * 2**20


def test_the_poison_benchmark_measures_every_rule_and_number_of_workers():
    rows = json.loads(run_demo("benchmarks/poison.py", "--quick", "--json"))["rows"]

    assert [row["rule"] for row in rows] == ["sgd", "momentum", "adam"] * 4
    assert [row["workers"] for row in rows[::3]] == [1, 2, 4, 8]
    assert all(ratio > 0 for row in rows for ratio in row["ratios"].values())


@pytest.mark.slow
def test_the_input_benchmark_reports_each_kind_of_input():
    out = run_demo("benchmarks/input.py", "--batch=4", "--steps=5", "--json")
    rows = json.loads(out)["rows"]

    assert set(rows) == {"one batch", "in line", "a step ahead"}
    assert all(0 < row["input_s"] < row["step_s"] for row in rows.values())


LARGE = r"""{model}, batch 2, 1gbit
(?:  step \d: loss \d+\.\d+
){{9}}  \d+ layers, {megabytes} MB of parameters; \d+\.\d\d s each way on the link
  plan: joint, .*
  9 steps done, (\d+\.\d\d) s each, of which (\d+\.\d\d) s computing
  memory at its peak: server (\d+\.\d\d) GiB, worker (\d+\.\d\d) GiB
"""


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("model", "megabytes"),
    [("vgg19", 575), ("googlenet", 28), ("inception_v4", 171), ("resnet152", 241)],
)
def test_a_large_network_trains_at_its_real_size_under_the_joint_plan(model, megabytes):
    out = run_demo("large_networks.py", model, timeout_s=600)

    found = re.fullmatch(LARGE.format(model=model, megabytes=megabytes), out)
    assert found, out
    step_s, compute_s, *gib = map(float, found.groups())
    assert compute_s <= step_s
    # Each end holds all parameters at least twice, and twelve are plenty for a batch of two.
    assert all(2 * megabytes < 1074 * each < 12 * megabytes + 3000 for each in gib)
