"""Traces of a command: what its processes record, joined in one file."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from dynacomm_async.cli.output import check_writable
from dynacomm_async.observe import Joined, join_recordings, trace_of
from dynacomm_async.recording import Recorder, read_recordings, write_recordings

__all__ = [
    "Parts",
    "add_own_trace_argument",
    "add_trace_argument",
    "label_recorders",
    "recorded",
    "write_trace",
]


def add_trace_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--trace`` of a command that starts all processes itself."""
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE.json",
        help="record every message, layer, wait and plan of all processes on one clock; open the "
        "file in https://ui.perfetto.dev or chrome://tracing",
    )


def add_own_trace_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--trace`` of a command that is one process of a run."""
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE.json",
        help="record what this process does, for https://ui.perfetto.dev or chrome://tracing; "
        "`dynacomm trace` joins such files of a run",
    )


class Parts:
    """A temporary folder in which each process of a command leaves its recordings."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dynacomm-trace-")
        self._paths: list[Path] = []

    def __enter__(self) -> Parts:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._folder.cleanup()

    def add(self) -> Path:
        """Return a path for another process to write to."""
        self._paths.append(Path(self._folder.name) / f"{len(self._paths)}.json")
        return self._paths[-1]

    def join(self) -> Joined:
        """Return everything on one clock, once all processes have ended.

        Raises:
            ConfigError: a process has left nothing.
        """
        return join_recordings(row for path in self._paths for row in read_recordings(path))


def write_trace(path: Path, joined: Joined) -> None:
    """Write a trace for viewers.

    Raises:
        OSError: the file cannot be written.
    """
    path.write_text(json.dumps(trace_of(joined), separators=(",", ":")) + "\n")


@contextlib.contextmanager
def label_recorders(specification: Mapping[str, Any]) -> Iterator[Mapping[str, Recorder]]:
    """Give a recorder for each strategy of a comparison; none unless its ``trace`` says where to.

    What was recorded is written there at the end of the block.
    """
    if specification.get("trace") is None:
        yield {}
        return
    recorders = {name: Recorder(label=name) for name in specification["strategies"]}
    yield recorders
    write_recordings(
        Path(specification["trace"]), [recorder.recording() for recorder in recorders.values()]
    )


@contextlib.contextmanager
def recorded(path: Path | None) -> Iterator[Recorder | None]:
    """Give a recorder for what one process does in the block, None where ``path`` is None.

    What was recorded is written at the end of the block, however it ends: a trace for viewers
    that holds the recording too, so that it can be joined with others.

    Raises:
        ConfigError: (on entering) no file can be written there.
    """
    if path is None:
        yield None
        return
    check_writable(path)
    recorder = Recorder()
    try:
        yield recorder
    finally:
        if recorder.role is not None:
            rows = [recorder.recording()]
            write_recordings(path, rows, **trace_of(join_recordings(rows)))
