"""Runs on a real Ray cluster of several nodes, whose driver is a program of its own."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dynacomm_async.optim import SGD
from dynacomm_async.server import parameters_sha256

DRIVER = Path(__file__).parent / "ray_driver.py"

# Ray starts a dozen processes; on a busy machine that takes its time.
pytestmark = [pytest.mark.peers, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def ended(ray_cluster, tmp_path_factory):
    """How each of the driver's runs has ended, by name."""
    folder = tmp_path_factory.mktemp("ray")
    command = [sys.executable, str(DRIVER), ray_cluster.address, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]  # Ray prints, too
    return {run["run"]: run for run in map(json.loads, lines)}


def replay(driver):
    """Train in one process, in plain NumPy."""
    parameters = driver["initial"]()
    states = (np.zeros_like(parameters),)
    for step in range(driver["STEPS"]):
        first, second = (driver["gradient"](parameters, slot, step) for slot in range(2))
        mean = (first + second) / np.float32(2)
        SGD(0.9).update(parameters, mean, states, step=step, rate=0.05, decay=0.0)
    return parameters


def test_a_step_that_a_lost_worker_has_left_half_done_is_computed_anew(ended):
    driver = runpy.run_path(str(DRIVER))
    run = ended["half-way"]

    assert run["sha256"] == parameters_sha256(replay(driver))
    assert f"the server goes back to step {driver['HALF_WAY']}" in run["news"]
    assert run["steps"] == list(range(driver["STEPS"]))
    assert sum(" starts anew on node " in line for line in run["news"]) == 1


def test_an_actor_that_dies_too_often_ends_the_run_in_one_line(ended):
    run = ended["too-often"]
    assert run["error"] == "ActorLost"
    assert "died, and Ray does not start it anew (restarts: 0): " in run["text"]
    assert len(run["text"].splitlines()) == 1


def test_what_a_worker_raises_is_raised_in_the_driver_with_its_traceback_behind_it(ended):
    run = ended["failing"]
    assert (run["error"], run["text"]) == ("ZeroDivisionError", "nothing to divide by")
    assert run["remote"]


def test_a_server_that_cannot_be_made_is_an_error_of_the_drivers(ended):
    run = ended["no-server"]
    assert (run["error"], run["text"]) == ("ConfigError", "no server like that")
