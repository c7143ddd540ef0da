"""Which process of a job this is: what launchers leave in the environment."""

from __future__ import annotations

import pytest

from dynacomm_async.addresses import Address
from dynacomm_async.cluster import Place, find_place, first_host
from dynacomm_async.errors import ConfigError

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
BY_HAND = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "::1", "MASTER_PORT": "1234"}
SLURM = {
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "5",
    "SLURM_JOB_NODELIST": "gpu[010-012,20],login1",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9",
}
KUBERNETES = {"JOB_COMPLETION_INDEX": "2", "WORLD_SIZE": "3", "HOSTNAME": "train-it-2"}
POD = "train-it-2.workers.default.svc.cluster.local"


def test_without_a_launcher_there_is_no_place():
    assert find_place({"HOME": "/root", "RANK": "1", "MASTER_PORT": "x"}) is None


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        (TORCHRUN, Place("torchrun", 3, 4, Address("node1", 29501))),  # it has 29500 itself
        (BY_HAND, Place("RANK and WORLD_SIZE", 0, 2, Address("::1", 1234))),
        ({"RANK": "0", "WORLD_SIZE": "2"}, Place("RANK and WORLD_SIZE", 0, 2, None)),
        (SLURM, Place("Slurm", 0, 5, Address("gpu010", 7070))),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu012"}, Place("Slurm", 0, 5, Address("gpu012", 7070))),
        (
            SLURM | {"SLURM_JOB_NODELIST": ""},
            Place("Slurm", 0, 5, Address("10.0.0.9", 7070)),
        ),
        (
            SLURM | {"MASTER_ADDR": "ib-gpu010", "MASTER_PORT": "5000"},
            Place("Slurm", 0, 5, Address("ib-gpu010", 5000)),
        ),
        (
            KUBERNETES,
            Place("Kubernetes", 2, 3, Address(POD.replace("it-2", "it-0"), 7070)),
        ),
        (
            {"JOB_COMPLETION_INDEX": "0", "MASTER_ADDR": "train-0.workers"},
            Place("Kubernetes", 0, None, Address("train-0.workers", 7070)),
        ),
    ],
    ids=lambda value: value.launcher if isinstance(value, Place) else "",
)
def test_a_launchers_variables_say_rank_size_and_server(environ, place):
    assert find_place(environ, hostname=POD) == place


def test_a_pod_with_another_name_does_not_guess_that_of_rank_0():
    place = find_place(KUBERNETES, hostname="some-pod-7.cluster.local")
    assert place is not None
    assert place.server is None


def test_torchrun_within_slurm_counts_rather_than_slurm():
    place = find_place(SLURM | TORCHRUN)
    assert place is not None
    assert (place.launcher, place.rank) == ("torchrun", 3)


@pytest.mark.parametrize(("size", "workers"), [(None, None), (1, None), (2, 1), (5, 4)])
def test_all_ranks_but_the_servers_are_workers(size, workers):
    assert Place("x", 0, size, None).workers == workers


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x' in the environment, expected a whole"),
        ({"RANK": "0", "WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2' in the environment"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "this is rank 2 of 2, expected"),
        (BY_HAND | {"MASTER_PORT": "70000"}, "MASTER_PORT leads to port 70000"),
        (SLURM | {"SLURM_JOB_NODELIST": "[1-2"}, "is no list of Slurm nodes"),
    ],
)
def test_variables_that_cannot_be_are_named(environ, words):
    with pytest.raises(ConfigError, match=words):
        find_place(environ)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[1-3]", "node1"),
        ("node[007,9-12],other", "node007"),
        ("rack[2-3]-ib,x", "rack2-ib"),
        ("a.b-c_d", "a.b-c_d"),
    ],
)
def test_the_first_of_slurms_nodes_keeps_its_zeros(nodelist, host):
    assert first_host(nodelist) == host


@pytest.mark.parametrize("nodelist", ["", ",", "node[a-b]", "node["])
def test_what_is_no_list_of_nodes_is_refused(nodelist):
    with pytest.raises(ConfigError, match="no list of Slurm nodes"):
        first_host(nodelist)
