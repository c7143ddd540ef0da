"""``dynacomm serve`` on a disk that is full: it says so, trains on, and loses nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from dynacomm_async.server import Checkpoints

STEPS = 40


@pytest.fixture(scope="module")
def undisturbed():
    """The hash that the same run ends with where nothing is saved."""
    options = f"--data synthetic:128:32 --batch 8 --steps {STEPS} --workers 1 --json".split()
    command = [sys.executable, "-m", "dynacomm_async.cli.main", "train", *options]
    return json.loads(subprocess.check_output(command))["parameters_sha256"]


@pytest.fixture
def serve_on_small_disk(start, quick, small_disk):
    """A server, with a worker, whose disk has room for two checkpoints."""
    place, mount = small_disk
    saving = ("--checkpoint-dir", place / "saved", "--checkpoint-every", 2)
    lengths = ("--steps", STEPS, "--workers", 1)
    server = start("serve", *quick, *lengths, *saving, "--listen", "127.0.0.1:0", "--json")
    address = re.search(r"listening on (\S+),", server.read_error_line())[1]
    worker = start("work", "--server", address)
    return server, worker, mount, place / "saved"


def read_until(program, text):
    """The lines on standard error up to the first one with that text."""
    lines = [program.read_error_line()]
    while text not in lines[-1]:
        assert lines[-1], lines
        lines.append(program.read_error_line())
    return lines


def test_a_disk_with_room_again_is_used_again(serve_on_small_disk, undisturbed):
    server, worker, mount, directory = serve_on_small_disk
    alarm = read_until(server, "failure 2 in a row")[-1]
    assert re.search(r"step \d+ was not saved .*saved/.*: No space left on device", alarm)
    assert mount("remount", "size=8m").returncode == 0
    read_until(server, "was saved: the disk works again after")
    outcome = server.finish()
    assert (outcome.code, worker.finish().code) == (0, 0), outcome.err
    assert outcome.json["parameters_sha256"] == undisturbed
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.load().step == STEPS


def test_a_disk_that_stays_full_costs_the_last_checkpoint_but_not_the_result(
    serve_on_small_disk, undisturbed
):
    server, worker, _, directory = serve_on_small_disk
    outcome = server.finish()
    assert (outcome.code, worker.finish().code) == (1, 0)
    assert outcome.json["parameters_sha256"] == undisturbed
    *alarms, last = outcome.err.splitlines()
    assert last.startswith("dynacomm serve: error: the last checkpoint was not saved: cannot ")
    assert sum("was not saved (failure" in line for line in alarms) >= 2
    assert "Traceback" not in outcome.err
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.load().step == checkpoints.list()[-1].step < STEPS
