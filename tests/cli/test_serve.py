"""``dynacomm serve`` and ``dynacomm work``: a run of separate processes, and whom it refuses."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket

import numpy as np
import pytest

from dynacomm_async.errors import PeerError
from dynacomm_async.nn import KERNELS
from dynacomm_async.worker import Session

STEPS = 100
KEYS = {"steps", "parameters_sha256", "loss", "test_accuracy"}


class Serving:
    """A server process and where it listens."""

    def __init__(self, program):
        self.program = program
        line = program.read_error_line()
        found = re.match(r"run (\S+): listening on (\S+), ", line)
        assert found, line + program.popen.stderr.read()
        self.run, self.address = found.groups()
        self.port = int(self.address.rpartition(":")[2])


@pytest.fixture
def serve(start, quick):
    def start_server(*options, steps=STEPS, workers=2):
        lengths = ("--steps", steps, "--workers", workers)
        options = ("--listen", "127.0.0.1:0", *options)  # the last of an option counts
        return Serving(start("serve", *quick, *lengths, "--json", *options))

    return start_server


@pytest.fixture
def work(start):
    return lambda server, *options: start("work", "--server", server.address, *options)


def sha_of(server, workers):
    for worker in workers:
        outcome = worker.finish()
        assert (outcome.code, outcome.out) == (0, ""), outcome.err
    outcome = server.program.finish()
    assert outcome.code == 0, outcome.err
    assert set(outcome.json) == KEYS
    return outcome.json["parameters_sha256"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The hash that an undisturbed run of two workers ends with."""
    import json
    import subprocess
    import sys

    options = f"--data synthetic:128:32 --batch 8 --steps {STEPS} --workers 2 --json".split()
    command = [sys.executable, "-m", "dynacomm_async.cli.main", "train", *options]
    return json.loads(subprocess.check_output(command))["parameters_sha256"]


def test_a_run_of_separate_processes_ends_in_order(serve, work, undisturbed):
    server = serve()
    assert sha_of(server, [work(server), work(server)]) == undisturbed


def test_a_port_in_use_is_refused(run, quick):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        outcome = run("serve", *quick, "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert outcome.code == 1
    assert "cannot listen on" in outcome.complaint
    assert "choose another --listen" in outcome.complaint


def test_a_server_that_is_not_there_is_looked_for_and_then_reported(run):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        outcome = run("work", "--server", f"127.0.0.1:{port}", "--retry", "0.5")
    assert outcome.code == 1
    told, complaint = outcome.err.splitlines()
    why = os.strerror(errno.ECONNREFUSED)
    assert told == f"cannot join at 127.0.0.1:{port} yet ({why}); trying for 0.5 s"
    assert f"no server at 127.0.0.1:{port} (tried for 0.5 s: {why}); start it" in complaint


@pytest.mark.parametrize("address", ["nowhere", ":", "host:port", "127.0.0.1:99999"])
def test_what_is_no_address_is_refused(run, address):
    outcome = run("work", "--server", address, "--retry", "0")
    assert outcome.code == 1
    assert "HOST:PORT" in outcome.complaint


@pytest.mark.skipif(not hasattr(socket, "TCP_CONGESTION"), reason="no choice on this system")
def test_a_congestion_control_that_is_none_is_refused_before_anything_begins(run, quick):
    for command in (("serve", *quick, "--listen", "127.0.0.1:0"), ("work", "--server", "nobody:1")):
        outcome = run(*command, "--congestion", "cubik")
        assert outcome.code == 1
        assert "congestion control 'cubik'" in outcome.complaint
        assert "choose one of" in outcome.complaint


@pytest.mark.parametrize("seconds", ["soon", "-1", "nan", "inf"])
def test_a_time_to_look_for_the_server_must_be_a_number(call, seconds):
    outcome = call("work", "--server", "127.0.0.1:1", f"--retry={seconds}")
    assert outcome.code == 2
    assert f"{seconds!r} is not a number from 0" in outcome.complaint


def test_a_worker_too_many_is_refused_while_the_run_goes_on(serve, work, undisturbed):
    server = serve()
    first = work(server)
    assert "joined as rank 0 (of 2)" in first.read_error_line()
    # Both places are taken by now, but the run cannot end before the second worker is there.
    with Session(server.address, run=server.run, kernels=KERNELS) as held:
        assert held.welcome.slot == 1
        refused = work(server).finish()
        assert refused.code == 1
        assert "all 2 workers of this run have joined" in refused.complaint
    first.finish()
    assert server.program.finish().code == 1  # the place that was held was left in training

    server = serve()
    workers = [work(server), work(server)]
    assert sha_of(server, workers) == undisturbed


def test_a_third_worker_does_not_disturb_the_run(serve, work, undisturbed):
    server = serve()
    workers = [work(server) for _ in range(2)]
    for worker in workers:
        worker.read_error_line()
    third = work(server, "--retry", "0.5").finish()
    assert third.code == 1
    assert "Traceback" not in third.err
    assert sha_of(server, workers) == undisturbed


def test_a_worker_of_another_run_is_refused_while_the_run_goes_on(serve, work, undisturbed):
    server = serve("--run", "mine")
    refused = work(server, "--run", "other").finish()
    assert refused.code == 1
    assert "'mine'" in refused.complaint
    assert "'other'" in refused.complaint
    assert sha_of(server, [work(server, "--run", "mine"), work(server)]) == undisturbed


def test_a_worker_with_another_model_is_refused_while_the_run_goes_on(serve, work, undisturbed):
    server = serve()
    first = work(server)
    first.read_error_line()
    with (
        pytest.raises(PeerError, match="model is not the server's") as caught,
        Session(server.address, {"conv1": 150, "other": 7}),
    ):
        pass
    assert caught.value.code == "model-mismatch"
    assert sha_of(server, [first, work(server)]) == undisturbed


def test_garbage_does_not_disturb_the_training(serve, work, undisturbed):
    server = serve()
    rng = np.random.default_rng(5)
    workers = [work(server), work(server)]
    workers[0].read_error_line()
    sent = 0
    while workers[0].popen.poll() is None:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", server.port), timeout=1) as stranger,
        ):
            kind = sent % 4
            if kind == 0:
                stranger.sendall(rng.bytes(int(rng.integers(1, 100_000))))
            elif kind == 1:
                stranger.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            elif kind == 2:
                stranger.sendall(b"\xff" * 64)
            stranger.settimeout(0.05)
            stranger.recv(1000)
        sent += 1
    assert sent >= 3
    assert sha_of(server, workers) == undisturbed


def test_the_server_tells_who_joins_and_who_goes_again_before_training_begins(serve, work):
    server = serve(workers=2)
    first = work(server)
    joined = server.program.read_error_line()
    first.popen.kill()
    gone = server.program.read_error_line()

    found = re.fullmatch(r"worker 0 has joined from (127\.0\.0\.1:\d+)\n", joined)
    assert found, joined
    assert re.fullmatch(
        rf"worker 0 \({found[1]}\) was lost in step 0: .*, before training began: "
        r"its place is free\n",
        gone,
    ), gone

    assert sha_of(server, [work(server), work(server)])


def test_listening_where_others_can_reach_it_needs_to_be_allowed(run, quick):
    outcome = run("serve", *quick, "--listen", "0.0.0.0:0")
    assert outcome.code == 1
    assert "--insecure" in outcome.complaint


def test_listening_everywhere_works_once_it_is_allowed(serve, start, undisturbed):
    server = serve("--insecure", "--listen", "0.0.0.0:0")
    workers = [start("work", "--server", f"127.0.0.1:{server.port}") for _ in range(2)]
    assert sha_of(server, workers) == undisturbed


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_a_run_over_ipv6_ends_with_the_same_bits(serve, work, undisturbed):
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 loopback")
    server = serve("--listen", "[::1]:0")
    assert sha_of(server, [work(server), work(server)]) == undisturbed


def test_a_lost_worker_ends_the_run_in_one_line_everywhere(serve, work):
    server = serve("--absence=0", steps=100_000)
    workers = [work(server), work(server)]
    for worker in workers:
        worker.read_error_line()
        server.program.read_error_line()  # who has joined
    workers[0].popen.kill()
    workers[0].finish()
    for program in (server.program, workers[1]):
        outcome = program.finish()
        assert outcome.code == 1
        assert "worker" in outcome.complaint
        assert re.search("was lost|left", outcome.complaint)


def test_an_embedded_server_has_no_settings_for_the_command(run, toy):
    import asyncio
    import threading

    from dynacomm_async import ParameterServer

    ready, done = threading.Event(), threading.Event()
    addresses = []

    async def embed():
        async with ParameterServer(toy.layers, workers=1, steps=1, initial=toy.initial) as server:
            addresses.append(server.address)
            ready.set()
            await asyncio.to_thread(done.wait)

    thread = threading.Thread(target=lambda: asyncio.run(embed()))
    thread.start()
    try:
        ready.wait()
        outcome = run("work", "--server", str(addresses[0]))
    finally:
        done.set()
        thread.join()
    assert outcome.code == 1
    assert "not started by `dynacomm serve`" in outcome.complaint


def test_both_ends_log_how_far_they_are_where_there_is_no_terminal(serve, work):
    server = serve(workers=1)
    worker = work(server, "--explain")
    told = worker.finish()
    log = server.program.finish().err

    assert told.code == 0, told.err
    steps = [line for line in log.splitlines() if line.startswith("step ")]
    assert steps[-1].startswith(f"step {STEPS}/{STEPS}  loss ")
    assert " ms" in steps[-1].split("  step ")[1]
    assert f"step {STEPS}/{STEPS}  loss " in told.err
    assert told.out.startswith("Worker 0 of 1: where the time of a step goes\n")
    assert "Layer, in forward order" in told.out
