"""The side-by-side benchmark runs, refuses what it cannot do, and leaves nothing behind."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "demos/benchmarks/end_to_end.py"

TINY = (
    "--quick",
    "--models=resnet18",
    "--workers=2",
    "--rates=1gbit",
    "--servers=fast",
    "--steps=2",
    "--blocks=1",
    "--batch=2",
)


def run(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        env={**os.environ, **environment},
    )


def can_isolate() -> bool:
    tools = ("ip", "mount", "setpriv", "tc", "unshare")
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or not all(map(shutil.which, tools)):
        return False
    attempt = subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], check=False)
    return attempt.returncode == 0


needs_networks = [
    pytest.mark.netns,
    pytest.mark.peers,
    pytest.mark.skipif(not can_isolate(), reason="needs root, ip, tc, unshare and setpriv"),
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch"),
]


def test_its_help_has_an_example():
    done = run("--help")

    assert done.returncode == 0
    assert "example: python demos/benchmarks/end_to_end.py" in done.stdout


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--systems=joint,ddpp", "no 'ddpp'; there are "),
        ("--systems=ddp:0", "no 'ddp:0'; there are "),
        ("--models=resnet19", "no 'resnet19'; there are resnet18, vgg11, transformer"),
        ("--rates=fast", "'fast' is not a rate"),
        ("--rates=unlimited", "without a limit there is nothing to compare"),
        ("--workers=0", "'0' is not a whole number from 1"),
    ],
)
def test_what_it_does_not_know_is_refused_in_a_line(option, words):
    done = run(option)

    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]


def test_where_it_cannot_make_networks_it_says_so_in_a_line():
    done = run(PATH="")

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "it needs Linux, root, and the commands ip, tc" in done.stderr


@pytest.mark.slow
class TestOnNetworks:
    pytestmark = needs_networks

    @pytest.mark.timeout(300)
    @pytest.mark.parametrize(
        "peers", [["ddp:default"], pytest.param(["ddp:4", "flower"], marks=pytest.mark.soak)]
    )
    def test_all_train_the_same_over_links_that_carry_what_they_say(self, peers):
        if "flower" in peers:
            pytest.importorskip("flwr")
        systems = ["joint", *peers]
        done = run(*TINY, "--imitate", "--json", f"--systems={','.join(systems)}")
        assert done.returncode == 0, done.stderr
        (cell,) = json.loads(done.stdout)["cells"]
        found = cell["systems"]

        assert list(found) == systems
        for row in found.values():
            assert len(row["step_s"]) == 2
            assert row["median_s"] > 0.9 * cell["lower_bound_s"]
            assert row["cpu_worker_s"] > 0
            # An all-reduce between two moves as much as a server does: the model, each way.
            assert cell["nbytes"] < row["up_nbytes"] < 1.5 * cell["nbytes"]
            assert cell["nbytes"] < row["down_nbytes"] < 1.5 * cell["nbytes"]
            assert row["loss"] == pytest.approx(found["joint"]["loss"], rel=1e-6)
            # The gradients of ranks 0 and 1 are 1 and 1.5 times the values.
            shrunk = (1 - 0.01 * 1.25) ** (2 * row["loss_step"])
            assert row["loss"] == pytest.approx(row["losses"][0] * shrunk, rel=1e-5)
        assert found["joint"]["server_up_nbytes"] > 2 * cell["nbytes"]
        assert found[peers[0]]["server_up_nbytes"] < 0.1 * cell["nbytes"]
        assert cell["joint_over_ddp"] == pytest.approx(
            found["joint"]["median_s"] / found[peers[0]]["median_s"]
        )

    def test_ctrl_c_ends_all_of_it(self):
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *TINY, "--steps=100000", "--systems=joint"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        with process:
            assert process.stdout is not None
            while not process.stdout.readline().startswith("batch 2"):
                assert process.poll() is None
            os.killpg(process.pid, signal.SIGINT)
            process.communicate(timeout=20)
            assert process.returncode == 130
            with pytest.raises(ProcessLookupError):
                os.killpg(process.pid, 0)
