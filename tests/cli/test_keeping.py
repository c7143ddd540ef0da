"""``serve`` that is stopped by a signal and goes on: checkpoints on the command line."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time

import pytest

LENGTHS = ("--steps", "300", "--workers", "2")


@pytest.fixture
def serve(start, quick, tmp_path):
    def start_server(*options, listen="127.0.0.1:0"):
        places = ("--checkpoint-dir", tmp_path / "kept", "--checkpoint-every", "50")
        program = start(
            "serve", *quick, *LENGTHS, *places, "--json", "--run=kept", "--listen", listen, *options
        )
        found = None
        while found is None:
            line = program.read_error_line()
            assert line, "the server has ended"
            found = re.match(r"run (\S+): listening on (\S+), ", line)
        program.address = found[2]
        return program

    return start_server


def sha_of_undisturbed(*options):
    command = [sys.executable, "-m", "dynacomm_async.cli.main", "train", *options, "--json"]
    return json.loads(subprocess.check_output(command))["parameters_sha256"]


@pytest.fixture(scope="module")
def undisturbed():
    return sha_of_undisturbed("--data", "synthetic:128:32", "--batch", "8", *LENGTHS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_the_first_signal_drains_and_the_run_goes_on_bit_for_bit(serve, start, undisturbed, number):
    server = serve()
    workers = [start("work", "--server", server.address) for _ in range(2)]
    for worker in workers:
        worker.read_error_line()  # joined
    began = time.monotonic()
    server.say(number)
    outcome = server.finish()
    assert outcome.code == 0, outcome.err
    assert time.monotonic() - began < 10
    stopped = json.loads(outcome.out)
    assert stopped["drained"] is True
    assert 0 <= stopped["steps"] < 300
    again = serve("--resume", listen=server.address)
    for worker in workers:
        outcome = worker.finish()
        assert outcome.code == 0
        assert re.search(r"rank \d: .*; trying to return\n(.*\n)*rank \d: back at ", outcome.err)
    outcome = again.finish()
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["parameters_sha256"] == undisturbed


def test_a_run_that_ended_in_the_middle_of_an_epoch_goes_on_with_new_workers_bit_for_bit(
    start, quick, tmp_path
):
    """Nothing but the directory is left of the first 12 steps; an epoch has 16."""

    def run_to(steps):
        where = ("--checkpoint-dir", tmp_path / "new", "--resume", "--listen", "127.0.0.1:0")
        server = start("serve", *quick, "--workers", 1, "--steps", steps, *where, "--json")
        lines = iter(server.read_error_line, "")
        heard = next(line for line in lines if "listening on" in line)
        address = re.search(r"listening on (\S+),", heard)[1]
        assert start("work", "--server", address).finish().code == 0
        outcome = server.finish()
        assert outcome.code == 0, outcome.err
        return heard, outcome.json

    heard, begun = run_to(12)
    assert begun["steps"] == 12, "the directory was empty: a fresh start"
    assert "going on" not in heard
    heard, gone_on = run_to(20)
    assert "going on from step 12 of 20; waiting for" in heard
    assert gone_on["steps"] == 20
    undisturbed = sha_of_undisturbed(*quick, "--workers", "1", "--steps", "20")
    assert gone_on["parameters_sha256"] == undisturbed


def test_a_local_run_says_where_it_goes_on(run, quick, tmp_path):
    options = ("train", *quick, "--checkpoint-dir", tmp_path / "local", "--resume")
    assert "going on" not in run(*options, "--steps", 8).err
    begun = run(*options, "--steps", 12, "--json")
    assert begun.err == "going on from step 8 of 12\n"
    # Once more: there is nothing left to do but to give the result again.
    again = run(*options, "--steps", 12, "--json", "--save", tmp_path / "model.npz")
    assert again.code == 0, again.err
    assert again.json["parameters_sha256"] == begun.json["parameters_sha256"]
    assert (tmp_path / "model.npz").exists()
    outcome = run(*options, "--steps", 10)
    assert outcome.code == 1
    assert "the checkpoint is of step 12, behind the 10 steps" in outcome.complaint
    told = run(*options, "--steps", 14, "--rate", "0.001")
    assert told.code == 0
    assert "from step 12 on the learning rate is Constant(" in told.err


def test_a_local_run_that_is_interrupted_says_where_it_can_go_on(start, quick, tmp_path):
    options = ("--checkpoint-dir", tmp_path / "local", "--checkpoint-every", "2")
    program = start("train", *quick, "--steps", "100000", *options)
    while len(list(tmp_path.glob("local/*-step-*"))) < 2:  # which ones depends on the disk
        time.sleep(0.05)
    program.say(signal.SIGINT)
    outcome = program.finish()
    assert outcome.code == 130
    step = re.fullmatch(r"stopped; the same command with --resume .* step (\d+)\n", outcome.err)
    assert step, outcome.err


@pytest.mark.parametrize("command", ["serve", "train"])
@pytest.mark.parametrize("option", [("--resume",), ("--checkpoint-every", "5")])
def test_an_option_of_checkpoints_needs_to_know_where_they_are(call, quick, command, option):
    outcome = call(command, *quick, *LENGTHS, *option)
    assert outcome.code == 1
    words = f"dynacomm {command}: error: {option[0]} without --checkpoint-dir"
    assert outcome.complaint.startswith(words)
