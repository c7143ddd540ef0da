"""The command line as a person meets it: called in this process, or as a program of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dynacomm_async.cli.main import main

PROGRAM = [sys.executable, "-m", "dynacomm_async.cli.main"]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def complaint(self) -> str:
        """The one line on standard error of a command that refused."""
        lines = self.err.splitlines()
        assert self.code != 0, f"expected a refusal, got {self.out!r}"
        assert len(lines) == 1, self.err
        assert self.out == ""
        assert "Traceback" not in self.err
        return lines[0]


class Program:
    """A command as a process, which is killed at the end of the test if it still runs.

    Attributes:
        popen: the process, in a session and process group of its own.
    """

    def __init__(self, *arguments: str, **options: Any) -> None:
        self.popen = subprocess.Popen(
            [*PROGRAM, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )

    @property
    def pid(self) -> int:
        return self.popen.pid

    def say(self, number: signal.Signals) -> None:
        """Send a signal to the process group, as a terminal does."""
        os.killpg(self.pid, number)

    def read_error_line(self) -> str:
        """The next line on standard error; blocks."""
        assert self.popen.stderr is not None
        return self.popen.stderr.readline()

    def finish(self, timeout_s: float = 60) -> Outcome:
        out, err = self.popen.communicate(timeout=timeout_s)
        return Outcome(self.popen.returncode, out, err)


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Call a command in this process."""

    def call_main(*arguments: str) -> Outcome:
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return call_main


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    """Start a command as a process of its own."""
    programs: list[Program] = []

    def start_program(*arguments: str, **options: Any) -> Program:
        programs.append(Program(*map(str, arguments), **options))
        return programs[-1]

    # A process that is started to ignore Ctrl-C keeps ignoring it, as do those that it starts.
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield start_program
    signal.signal(signal.SIGINT, before)
    for program in programs:
        if program.popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                program.say(signal.SIGKILL)
        program.popen.communicate()


@pytest.fixture
def run(start: Callable[..., Program]) -> Callable[..., Outcome]:
    """Run a command as a process of its own, to its end."""
    return lambda *arguments, **options: start(*arguments, **options).finish()


QUICK: Sequence[str] = ("--data", "synthetic:128:32", "--batch", "8")


@pytest.fixture
def quick() -> Sequence[str]:
    """Options that make any training short."""
    return QUICK


@pytest.fixture
def user_model(tmp_path: Path) -> Path:
    """A folder with a user's own network, ``mine.nets:small``."""
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nets.py").write_text(
        "from dynacomm_async.nn import Dense, Flatten, Network, ReLU\n"
        "\n"
        "def small(input_shape=(6, 6, 1), classes=10):\n"
        "    parts = [Flatten(), Dense(16), ReLU(), Dense(classes)]\n"
        "    return Network('small', parts, input_shape, classes)\n"
        "\n"
        "def number(input_shape=(6, 6, 1), classes=10):\n"
        "    return 7\n"
        "\n"
        "def broken(input_shape=(6, 6, 1), classes=10):\n"
        "    raise RuntimeError('out of ideas')\n"
    )
    return tmp_path
