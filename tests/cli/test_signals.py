"""Ctrl-C, SIGTERM and kill -9 at any moment: soon over, no traceback, no process left.

Children run in sessions of their own, so the processes of a command are found by their parents,
from /proc, and told apart from later ones of the same id by their start times.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.timing,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc"),
]

PATIENCE_S = 30.0
LIMIT_S = 2.0
LONG = ("--data", "synthetic:128:32", "--batch", "8", "--steps", "100000", "--delay", "1ms")
COMMANDS = {
    "demo": ("demo", *LONG, "--output", "results"),
    "compare": ("compare", *LONG),
    "train": ("train", *LONG),
    "serve": ("serve", *LONG[:-2], "--listen", "127.0.0.1:0"),
}
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


def stat(pid):
    """(parent, start time) of a process that runs; None of one that does not, or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else (int(fields[1]), int(fields[19]))


def descendants(pid):
    """(pid, start time) of every process below ``pid``."""
    parents = {
        int(entry.name): found
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and (found := stat(entry.name)) is not None
    }
    below, grown = {pid}, True
    while grown:
        new = {child for child, (parent, _) in parents.items() if parent in below} - below
        below |= new
        grown = bool(new)
    return {(child, parents[child][1]) for child in below - {pid} if child in parents}


def alive(processes):
    return {(pid, start) for pid, start in processes if (stat(pid) or (0, -1))[1] == start}


def processor_ticks(pid):
    """Processor time that a process has used, in 1/100 s."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0  # it has ended
    return int(fields[11]) + int(fields[12])


def count_busy(pid):
    """How many processes below ``pid`` have used about twice the time that starting takes."""
    return sum(processor_ticks(child) > 60 for child, _ in descendants(pid))


def catches_signals(pid):
    """Whether the program has begun to see to SIGTERM itself; before that, it is Python's start."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) & 1 << (signal.SIGTERM - 1))
    return False


def wait_until(condition, what):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for: {what}"
        time.sleep(0.005)


def reach(program, moment):
    """Wait for a moment in a command's life."""
    pid = program.pid
    if moment == "at once":
        wait_until(lambda: catches_signals(pid), moment)
    elif moment == "first child":
        wait_until(lambda: descendants(pid), moment)
    elif moment == "children starting":
        wait_until(lambda: len(descendants(pid)) >= 3, moment)
    elif moment == "listening":
        assert "listening on" in program.read_error_line()
    else:
        wait_until(lambda: len(descendants(pid)) >= 3, moment)
        wait_until(lambda: count_busy(pid) >= 3, moment)


MOMENTS = [
    *(
        (name, moment)
        for name in ("demo", "compare", "train")
        for moment in ("at once", "training")
    ),
    *((name, "first child") for name in ("demo", "compare", "train")),
    *((name, "children starting") for name in ("compare", "train")),
    ("serve", "at once"),
    ("serve", "listening"),
]


def check_end(program, number, limit_s=LIMIT_S):
    """Send the signal, then hold the end to what is promised."""
    children = descendants(program.pid)
    started = time.monotonic()
    program.say(number)
    # One that was being born when they were counted would be a child of the dying program.
    children |= descendants(program.pid)
    outcome = program.finish(PATIENCE_S)
    elapsed_s = time.monotonic() - started

    assert outcome.code == CODES[number], outcome.err
    assert "Traceback" not in outcome.err
    assert "Error" not in outcome.err
    assert elapsed_s < limit_s
    wait_until(lambda: not alive(children), "the end of all processes")
    assert time.monotonic() - started < limit_s


@pytest.mark.parametrize(("name", "moment"), MOMENTS)
def test_ctrl_c_ends_everything_in_order_within_two_seconds(start, tmp_path, name, moment):
    program = start(*COMMANDS[name], cwd=tmp_path)
    reach(program, moment)
    check_end(program, signal.SIGINT)


@pytest.mark.parametrize(
    ("name", "moment"), [("train", "training"), ("compare", "first child"), ("serve", "listening")]
)
def test_sigterm_ends_everything_in_order_within_two_seconds(start, tmp_path, name, moment):
    program = start(*COMMANDS[name], cwd=tmp_path)
    reach(program, moment)
    check_end(program, signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_that_looks_for_its_server_ends_at_once(start, number):
    program = start("work", "--server", "127.0.0.1:1")
    wait_until(lambda: catches_signals(program.pid), "the start")
    time.sleep(0.5)
    check_end(program, number)


def test_a_worker_in_training_leaves_and_the_server_says_so_and_ends(start):
    server = start(*COMMANDS["serve"], "--workers", "1")
    address = server.read_error_line().rpartition("--server ")[2].strip("`\n")
    worker = start("work", "--server", address)
    assert "joined as rank 0 (of 1)" in worker.read_error_line()
    check_end(worker, signal.SIGINT)

    outcome = server.finish()
    assert outcome.code == 1
    assert "left" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("name", "moment"),
    [("compare", "children starting"), ("train", "training")],
)
def test_no_child_outlives_a_killed_parent_by_two_seconds(start, tmp_path, name, moment):
    program = start(*COMMANDS[name], cwd=tmp_path)
    reach(program, moment)
    children = descendants(program.pid)
    program.popen.kill()
    killed = time.monotonic()
    wait_until(lambda: not alive(children), "the end of all children")
    assert time.monotonic() - killed < LIMIT_S


def test_called_as_a_function_the_program_leaves_signal_handlers_alone(call):
    before = [signal.getsignal(number) for number in CODES]
    assert call("models").code == 0
    assert [signal.getsignal(number) for number in CODES] == before


def test_starting_up_imports_little_before_signals_are_seen_to():
    code = "import sys, json, dynacomm_async.cli.main; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.check_output([sys.executable, "-c", code]))
    assert not {"numpy", "argparse", "asyncio"} & set(loaded)
