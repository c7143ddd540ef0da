"""Train on several machines: the commands, and three machines imitated on this one.

What it shows
    One command on each machine is all. On the machine that keeps the parameters::

        dynacomm serve --workers 2 --listen 192.168.1.10:7070 --insecure

    and on each machine that computes::

        dynacomm work --server 192.168.1.10:7070

    Model, data set, batch and seed come from the server, so a worker needs nothing but its address
    (and the package; files of mnist or cifar10 are looked for on each machine: ``--data-dir``).
    There is no authentication: ``--insecure`` says that the network is trusted.

Run it::

    python demos/train_several_machines.py                        # imitate them, about 20 seconds
    python demos/train_several_machines.py --bandwidth 20mbit
    python demos/train_several_machines.py --print 192.168.1.10   # only print your commands

    As root on Linux the three machines are network namespaces with a switch between them, so the
    bytes go through the kernel's whole network stack, and ``tc`` limits each machine's rate.
    Elsewhere they are three processes that talk over the loopback address.

What to look for
    The commands as they are run, and in the end the test accuracy and the hash of the parameters.
    The hash is the same however the run was distributed (on like processors), since each step adds
    the workers' gradients in the order of their ranks, whoever was faster.

What it leaves out
    Machines that fail: for that see ``demos/chaos.py``. And unlike processors: NumPy's matrix
    products differ in the last bit between processor types, and so does the hash.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from dynacomm_async.link.units import parse_rate

NETWORK = "10.77.0"
"""The imitated machines are 10.77.0.1 (the server), 10.77.0.2 and so on; nobody else sees them."""

INSIDE = "DYNACOMM_DEMO_INSIDE"
TOOLS = ("ip", "mount", "setpriv", "unshare")


def serve_command(args: argparse.Namespace, host: str) -> list[str]:
    """Return what to type on the server's machine."""
    command = ["dynacomm", "serve", "--workers", str(args.workers), "--steps", str(args.steps)]
    command += ["--model", args.model, "--data", args.data, "--listen", f"{host}:{args.port}"]
    return command if host.startswith("127.") else [*command, "--insecure"]


def work_command(args: argparse.Namespace, host: str) -> list[str]:
    """Return what to type on a worker's machine."""
    return ["dynacomm", "work", "--server", f"{host}:{args.port}"]


def print_commands(args: argparse.Namespace) -> None:
    """Print what to type on real machines."""
    serve, work = serve_command(args, args.print), work_command(args, args.print)
    print(f"on {args.print}:\n  {shlex.join(serve)}")
    print(f"on each of {args.workers} others:\n  {shlex.join(work)}")


# -- machines imitated by namespaces -------------------------------------------------------------


def can_isolate() -> bool:
    """Return whether this process may make network namespaces of its own."""
    if os.name != "posix" or os.geteuid() != 0 or not all(map(shutil.which, TOOLS)):
        return False
    attempt = subprocess.run([*isolation(), "true"], capture_output=True, check=False)
    return attempt.returncode == 0


def isolation() -> list[str]:
    """Return what to put before a command so that nothing of what it makes outlives it.

    It becomes process 1 of its own world of processes, networks and mounts, and dies with this
    process. However it ends, ``kill -9`` included, the kernel ends what it started and forgets
    its networks: there is nothing to clean up.
    """
    world = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--net"]
    return ["setpriv", "--pdeathsig", "KILL", *world]


def rerun_isolated() -> int:
    """Run this very command in a world of its own; return its exit code."""
    command = [*isolation(), sys.executable, *sys.argv]
    process = subprocess.Popen(command, env={**os.environ, INSIDE: "1"})
    try:
        return process.wait()
    finally:
        process.kill()
        process.wait()


def build_network(
    n_machines: int,
    bandwidth: str | None,
    server_bandwidth: str | None = None,
    congestion: str | None = None,
) -> list[list[str]]:
    """Make machines on one switch; return for each what runs a command on it.

    The first is the server's, whose rate may differ from the others'; ``congestion`` names the
    congestion control of all, by default this machine's.
    """
    # Names of namespaces are files in /run/netns; the world outside is not to see them.
    configure("mount -t tmpfs none /run")
    configure("ip link add switch type bridge")
    configure("ip link set switch up")
    machines = []
    for number in range(1, n_machines + 1):
        name = f"machine{number}"
        configure(f"ip netns add {name}")
        configure(f"ip link add port{number} type veth peer name eth0 netns {name}")
        configure(f"ip link set port{number} master switch up")
        configure(f"ip -n {name} address add {NETWORK}.{number}/24 dev eth0")
        configure(f"ip -n {name} link set lo up")
        configure(f"ip -n {name} link set eth0 up")
        if congestion:
            control = f"net.ipv4.tcp_congestion_control={congestion}"
            configure(f"ip netns exec {name} sysctl -q -w {control}")
        rate = server_bandwidth if number == 1 and server_bandwidth else bandwidth
        if rate:
            limit = f"root tbf rate {rate} burst {burst_nbytes(rate)} latency 100ms"
            configure(f"tc qdisc add dev port{number} {limit}")  # to the machine
            configure(f"tc -n {name} qdisc add dev eth0 {limit}")  # from it
        machines.append(["ip", "netns", "exec", name])
    return machines


def burst_nbytes(bandwidth: str) -> int:
    """Return how much may pass at once: on a fast link what the kernel hands over in one piece.

    Less than 64 KiB would have it cut every piece into packets, which costs more than all the rest.
    """
    rate = parse_rate(bandwidth)
    assert rate is not None, "there is a limit"
    return max(128 * 1024, round(rate / 1000))


def configure(command: str) -> None:
    """Run a command that has to work.

    Raises:
        SystemExit: it did not; with what it said.
    """
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {command}: {done.stderr.strip()}")


# -- running them --------------------------------------------------------------------------------


@contextmanager
def running(machine: list[str], where: str, command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Run a dynacomm command on a machine; end it with the block."""
    print(f"{where}$ {shlex.join(command)}", flush=True)
    dynacomm = [sys.executable, "-m", "dynacomm_async.cli.main"]
    process = subprocess.Popen(
        [*machine, *dynacomm, *command[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def train(args: argparse.Namespace, machines: list[list[str]], hosts: list[str]) -> int:
    """Start the server on the first machine and a worker on each other; return an exit code."""
    with ExitStack() as stack:
        server_command = serve_command(args, hosts[0])
        processes = [stack.enter_context(running(machines[0], hosts[0], server_command))]
        for machine, host in zip(machines[1:], hosts[1:], strict=True):
            worker_command = work_command(args, hosts[0])
            processes.append(stack.enter_context(running(machine, host, worker_command)))
        failed = wait_for_all(processes)
        if failed is not None:
            words = failed.stderr.read().strip() if failed.stderr else ""
            print(words.splitlines()[-1] if words else "a process failed", file=sys.stderr)
            return 1
        assert processes[0].stdout is not None
        print(f"server: {processes[0].stdout.read().strip()}")
    return 0


def wait_for_all(processes: list[subprocess.Popen[str]]) -> subprocess.Popen[str] | None:
    """Wait until all have ended well, or one has not; return that one."""
    waiting = list(processes)
    while waiting:
        for process in list(waiting):
            if process.poll() is None:
                continue
            if process.returncode:
                return process
            waiting.remove(process)
        time.sleep(0.05)
    return None


def main() -> int:
    """Print commands, or imitate machines."""
    parser = argparse.ArgumentParser(
        description="Train on several machines, imitated on this one.",
        epilog="example: python demos/train_several_machines.py --bandwidth 20mbit --workers 3",
    )
    parser.add_argument(
        "--print", metavar="HOST", help="only print the commands for a server there"
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="(default: 2)")
    parser.add_argument("--steps", type=int, default=100, metavar="K", help="(default: 100)")
    parser.add_argument("--model", default="lenet", help="(default: lenet)")
    parser.add_argument("--data", default="digits", help="or synthetic (default: digits)")
    parser.add_argument(
        "--bandwidth",
        default="50mbit",
        metavar="RATE",
        help="of each machine, where namespaces and tc are there (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, default=7070, help="of the server (default: 7070)")
    parser.add_argument("--loopback", action="store_true", help="make no namespaces, even as root")
    args = parser.parse_args()
    if args.print:
        print_commands(args)
        return 0
    n_machines = args.workers + 1
    if INSIDE in os.environ:
        bandwidth = args.bandwidth if shutil.which("tc") else None
        machines = build_network(n_machines, bandwidth)
        hosts = [f"{NETWORK}.{number}" for number in range(1, n_machines + 1)]
        print(f"{n_machines} machines in network namespaces, {bandwidth or 'unlimited'} each")
        return train(args, machines, hosts)
    if not args.loopback and can_isolate():
        return rerun_isolated()
    print(f"{n_machines} processes on this machine (no root, no ip or --loopback: no namespaces)")
    return train(args, [[]] * n_machines, ["127.0.0.1"] * n_machines)


def stop(number: int, frame: object) -> None:
    """Leave as after Ctrl-C, through every ``finally``."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
