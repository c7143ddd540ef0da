"""Which process of a job this is, from what the launchers of jobs leave in the environment.

Each launcher starts the same command many times and tells the processes apart by variables:

=============================================  ==================  ==================  ============
launcher                                       rank                how many            rank 0's host
=============================================  ==================  ==================  ============
torchrun, Kubeflow's PyTorchJob, or by hand    RANK                WORLD_SIZE          MASTER_ADDR
Slurm (srun)                                   SLURM_PROCID        SLURM_NTASKS        first node
Kubernetes (Job with completionMode: Indexed)  JOB_COMPLETION_INDEX  WORLD_SIZE        own name
=============================================  ==================  ==================  ============

MASTER_ADDR and MASTER_PORT count with every launcher. torchrun listens on MASTER_PORT itself; the
port after it is taken then. Slurm's first node is that of SLURM_STEP_NODELIST, SLURM_JOB_NODELIST
or, without either, SLURM_LAUNCH_NODE_IPADDR: where ``srun`` was typed may be a login node. An
indexed Kubernetes job names its pods ``JOB-INDEX``; with a headless service as ``subdomain`` they
find each other by name (https://kubernetes.io/docs/tasks/job/job-with-pod-to-pod-communication/).
How many there are it does not say: put WORLD_SIZE into the manifest.

Pure: the environment is an argument.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dynacomm_async.addresses import Address
from dynacomm_async.errors import ConfigError

__all__ = ["Place", "find_place", "first_host"]


@dataclass(frozen=True, slots=True)
class Place:
    """One process among those of a job.

    Attributes:
        launcher: what started it, for people.
        rank: from 0.
        size: how many processes there are; None where the launcher does not say.
        server: where rank 0 can listen and be reached; None where the launcher does not say.
    """

    launcher: str
    rank: int
    size: int | None
    server: Address | None

    @property
    def workers(self) -> int | None:
        """How many workers there are if rank 0 is the server; None where that is not known."""
        return None if self.size is None or self.size < 2 else self.size - 1


def find_place(environ: Mapping[str, str], *, hostname: str = "", port: int = 7070) -> Place | None:
    """Return this process's place in a job, or None if no launcher has left one.

    Args:
        environ: the environment.
        hostname: this machine's name, with its domain; only Kubernetes needs it.
        port: the server's where MASTER_PORT is not set.

    Raises:
        ConfigError: a variable does not hold what it should.
    """
    for find in (_by_rank, _by_slurm, _by_kubernetes):
        found = find(environ, hostname)
        if found is not None:
            launcher, rank, size, host = found
            if size is not None and not 0 <= rank < size:
                raise ConfigError(
                    f"{launcher} says that this is rank {rank} of {size}, "
                    "expected a rank from 0 and less than their number"
                )
            host = environ.get("MASTER_ADDR") or host
            port = _port(environ, port)
            return Place(launcher, rank, size, Address(host, port) if host else None)
    return None


_Found = tuple[str, int, int | None, str]


def _by_rank(environ: Mapping[str, str], hostname: str) -> _Found | None:
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return None
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "RANK and WORLD_SIZE"
    return launcher, _whole(environ, "RANK"), _whole(environ, "WORLD_SIZE"), ""


def _by_slurm(environ: Mapping[str, str], hostname: str) -> _Found | None:
    if "SLURM_PROCID" not in environ or "SLURM_NTASKS" not in environ:
        return None
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    host = first_host(nodes) if nodes else environ.get("SLURM_LAUNCH_NODE_IPADDR", "")
    return "Slurm", _whole(environ, "SLURM_PROCID"), _whole(environ, "SLURM_NTASKS"), host


def _by_kubernetes(environ: Mapping[str, str], hostname: str) -> _Found | None:
    if "JOB_COMPLETION_INDEX" not in environ:
        return None
    index = _whole(environ, "JOB_COMPLETION_INDEX")
    size = _whole(environ, "WORLD_SIZE") if "WORLD_SIZE" in environ else None
    pod, dot, domain = hostname.partition(".")
    job, _, own = pod.rpartition("-")
    host = f"{job}-0{dot}{domain}" if job and own == str(index) else ""
    return "Kubernetes", index, size, host


def _port(environ: Mapping[str, str], port: int) -> int:
    if not environ.get("MASTER_PORT"):
        return port
    taken = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    chosen = _whole(environ, "MASTER_PORT") + taken
    if chosen > 65535:
        raise ConfigError(f"MASTER_PORT leads to port {chosen}, expected at most 65535")
    return chosen


def _whole(environ: Mapping[str, str], name: str) -> int:
    text = environ[name]
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"{name} is {text!r} in the environment, expected a whole number from 0")
    return int(text)


def first_host(nodelist: str) -> str:
    """Return the first host of a list in Slurm's notation, such as ``node[07-09,12],gpu1``.

    Raises:
        ConfigError: it is none.
    """
    found = re.match(r"([^\[\],\s]*)(?:\[(\d+)[^\]]*\]([^\[\],\s]*))?(?:,|$)", nodelist)
    host = "".join(part or "" for part in found.groups()) if found else ""
    if not host:
        raise ConfigError(f"{nodelist!r} is no list of Slurm nodes, expected such as node[07-09]")
    return host
