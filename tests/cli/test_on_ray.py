"""``dynacomm launch --on ray``, on a real Ray cluster of several nodes on this machine."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys

import pytest

from dynacomm_async.cli.on_ray import ray_options, resources

RUN = ("--model", "mlp", "--data", "synthetic:128:32", "--batch", "8", "--workers", "2")
PLACED = re.compile(r"(server|worker actor \d) starts( anew)? on node (\w+) at \S+, process (\d+)")


@pytest.mark.parametrize(
    ("text", "amounts"),
    [("CPU=2", {"CPU": 2}), ("CPU=0.5,GPU=1,edge=3", {"CPU": 0.5, "GPU": 1, "edge": 3})],
)
def test_resources_are_amounts_by_name(text, amounts):
    assert resources(text) == amounts


@pytest.mark.parametrize("text", ["", "CPU", "=1", "CPU=-1", "CPU=x", "CPU=inf", "CPU=1,"])
def test_what_are_no_resources_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not NAME=AMOUNT"):
        resources(text)


def test_ray_knows_some_resources_by_names_of_its_own():
    options = ray_options({"GPU": 1.0, "edge": 2.0})
    assert options == {"num_cpus": 0.0, "num_gpus": 1.0, "resources": {"edge": 2.0}}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--on ray needs --checkpoint-dir DIR, a folder that all nodes share"),
        (["--listen", "127.0.0.1:0"], "--listen has no meaning with --on ray"),
        (["--server", "here:1"], "--server has no meaning with --on ray"),
        (["--trace", "t.json"], "--trace has no meaning with --on ray"),
    ],
)
def test_what_makes_no_sense_on_ray_is_said_in_one_line(options, words, call):
    outcome = call("launch", "--on", "ray", *options)
    assert outcome.code == 1
    assert words in outcome.complaint


def test_without_ray_it_says_what_to_install(run, tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError('not here')")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    outcome = run(
        *("launch", "--on", "ray", *RUN, "--checkpoint-dir", tmp_path),
        env={**os.environ, "PYTHONPATH": path},
    )
    assert outcome.code == 1
    assert '--on ray needs Ray: pip install "dynacomm_async[ray]"' in outcome.complaint


# -- on a cluster --------------------------------------------------------------------------------


class Launched:
    """A run on the cluster, seen through what it prints."""

    def __init__(self, program):
        self.program = program
        self.said: list[str] = []

    def wait_for(self, pattern: str) -> re.Match[str]:
        while True:
            line = self.program.read_error_line()
            assert line, "".join(self.said)
            self.said.append(line)
            if found := re.search(pattern, line):
                return found

    def finish(self):
        outcome = self.program.finish(200)
        self.said.append(outcome.err)
        assert outcome.code == 0, "".join(self.said)
        return outcome

    @property
    def placed(self) -> list[tuple[str, ...]]:
        return PLACED.findall("".join(self.said))


@pytest.fixture
def launch(ray_cluster, start, tmp_path):
    def launch_on_it(*options: object) -> Launched:
        address = ("--on", "ray", "--address", ray_cluster.address, "--insecure")
        return Launched(start("launch", *address, *RUN, "--checkpoint-dir", tmp_path, *options))

    return launch_on_it


@pytest.mark.peers
@pytest.mark.soak
@pytest.mark.timeout(300)
def test_ctrl_c_saves_the_run_and_resuming_ends_with_the_same_bits(launch, run):
    steps = ("--steps", "600", "--json")
    launched = launch(*steps)
    launched.wait_for(r"step \d+/600")
    launched.program.say(signal.SIGINT)
    stopped = launched.program.finish()
    assert stopped.code == 130
    (step,) = re.findall(r"stopped at step (\d+), from which", stopped.err)
    assert 0 < int(step) < 600

    resumed = launch(*steps, "--resume").finish().json
    undisturbed = run("train", *RUN, *steps).json
    assert resumed == undisturbed


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_workers_and_nodes_do_not_change_a_bit(ray_cluster, launch, run):
    steps = ("--steps", "600", "--json")
    launched = launch(*steps, "--checkpoint-every", "50")
    launched.wait_for(r"step \d+/600")
    first = {who: (node, int(pid)) for who, _, node, pid in launched.placed}
    assert set(first) == {"server", "worker actor 0", "worker actor 1"}

    os.kill(first["worker actor 1"][1], signal.SIGKILL)
    launched.wait_for("worker actor 1 starts anew")
    launched.wait_for(r"step \d+/600")
    (lost,) = [node for node in ray_cluster.worker_nodes if node.node_id[:8] == first["server"][0]]
    ray_cluster.remove_node(lost, allow_graceful=False)
    launched.wait_for("server starts anew")

    ended = launched.finish().json
    assert ended == run("train", *RUN, *steps).json
    assert {node for _, again, node, _ in launched.placed if again} != {first["server"][0]}
