"""``dynacomm launch``, and what a launcher's environment fills in for serve and work."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dynacomm_async.addresses import Address
from dynacomm_async.cli.launch import worker_options
from dynacomm_async.cli.place import fill_serve, fill_work
from dynacomm_async.cluster import Place
from dynacomm_async.errors import ConfigError

FAR, NEAR = Address("node1", 5000), Address("127.0.0.1", 5000)
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PREFIXES = ("SLURM_", "JOB_COMPLETION", "TORCHELASTIC_")


@pytest.mark.parametrize(
    ("place", "workers", "listen"),
    [
        (None, 2, "127.0.0.1:7070"),
        (Place("x", 0, 5, FAR), 4, "0.0.0.0:5000"),
        (Place("x", 0, 3, NEAR), 2, "127.0.0.1:5000"),
        (Place("x", 0, None, None), 2, "127.0.0.1:7070"),
    ],
)
def test_serve_takes_what_was_not_given_from_the_launcher(place, workers, listen):
    args = argparse.Namespace(workers=None, listen=None)
    fill_serve(args, place)
    assert (args.workers, args.listen) == (workers, listen)


def test_what_was_given_counts():
    args = argparse.Namespace(workers=7, listen="127.0.0.1:0", server="here:1")
    fill_serve(args, Place("x", 0, 5, FAR))
    fill_work(args, Place("x", 0, 5, FAR))
    assert vars(args) == {"workers": 7, "listen": "127.0.0.1:0", "server": "here:1"}


def test_work_takes_the_server_from_the_launcher_or_says_what_is_missing():
    args = argparse.Namespace(server=None)
    fill_work(args, Place("x", 1, 5, FAR))
    assert args.server == "node1:5000"
    for place in (None, Place("x", 1, 5, None)):
        with pytest.raises(ConfigError, match="give --server HOST:PORT, or say it in the env"):
            fill_work(argparse.Namespace(server=None), place)


def test_a_launched_worker_has_the_servers_port_and_a_trace_of_its_own():
    args = argparse.Namespace(
        server=None,
        listen="0.0.0.0:9",
        trace=Path("a/b.json"),
        run=None,
        data_dir=None,
        retry=1.0,
        congestion="reno",
    )
    options = worker_options(args, Place("x", 2, 3, FAR))
    assert (options.server, options.trace) == ("node1:9", Path("a/b-2.json"))
    assert options.congestion == "reno"


def environment(**variables):
    rest = {
        name: value
        for name, value in os.environ.items()
        if name not in VARIABLES and not name.startswith(PREFIXES)
    }
    return rest | variables


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("launcher", "rank", "common"),
    [
        ("RANK and WORLD_SIZE", "RANK", {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}),
        ("Slurm", "SLURM_PROCID", {"SLURM_NTASKS": "3", "SLURM_JOB_NODELIST": "127.0.0.1,node2"}),
        (
            "Kubernetes",
            "JOB_COMPLETION_INDEX",
            {"WORLD_SIZE": "3", "MASTER_ADDR": "localhost"},
        ),
    ],
    ids=["by hand", "Slurm", "Kubernetes"],
)
def test_the_same_command_for_every_rank_trains(launcher, rank, common, start, quick):
    common = common | {"MASTER_PORT": free_port()}
    command = ("launch", *quick, "--model", "mlp", "--steps", 5, "--json")
    ranks = [start(*command, env=environment(**common, **{rank: number})) for number in "210"]

    outcomes = [program.finish() for program in ranks]
    assert [outcome.code for outcome in outcomes] == [0, 0, 0], outcomes
    assert outcomes[2].json["steps"] == 5
    assert f"{launcher}, rank 0 of 3: --workers 2 --listen 127.0.0.1:" in (
        outcomes[2].err.replace("localhost", "127.0.0.1")
    )
    assert {outcome.out for outcome in outcomes[:2]} == {""}


@pytest.mark.peers
@pytest.mark.slow
def test_torchrun_starts_a_server_and_workers(quick):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    launch = ["-m", "dynacomm_async.cli.main", "launch", *quick, "--model=mlp", "--steps=5"]
    done = subprocess.run(
        [*torchrun, *launch, "--json"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 5
    assert "torchrun, rank 0 of 3: --workers 2 --listen " in done.stderr


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "no launcher has started this process: expected RANK and WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "this job has one process, which serves"),
        ({"JOB_COMPLETION_INDEX": "0"}, "Kubernetes does not say how many processes"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "where is the server? give --server"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one'"),
    ],
)
def test_what_is_missing_is_said_in_one_line(variables, words, run):
    outcome = run("launch", env=environment(**variables))
    assert outcome.code == 1
    assert words in outcome.complaint
