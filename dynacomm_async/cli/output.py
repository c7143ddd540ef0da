"""What commands print: progress for people at a terminal, events for a parent process, tables."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from dynacomm_async.errors import ConfigError
from dynacomm_async.schedule.account import StepAccount

__all__ = [
    "Progress",
    "check_writable",
    "decimal",
    "die_with_parent",
    "emit",
    "print_json",
    "say",
    "say_if_diverged",
    "seconds",
    "step_notes",
    "table",
    "telling",
    "to_json",
]


_SHOWN_EVERY_S, _LOGGED_EVERY_S = 0.1, 10.0
"""How often progress is shown at a terminal, and written to a log."""


def say(text: str) -> None:
    """Tell the person; standard output is kept for results."""
    Progress.wipe_shown()
    print(text, file=sys.stderr, flush=True)


def say_if_diverged(loss: float | None) -> None:
    """Tell the person why a loss is no number, where it is none."""
    if loss is not None and not math.isfinite(loss):
        say("training has diverged: the loss is not finite; try a lower --rate")


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return JSON that every reader takes: null for NaN and infinity, which JSON does not have."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def print_json(value: Any) -> None:
    """Print a result as one line of JSON; see :func:`to_json`."""
    sys.stdout.write(to_json(value) + "\n")  # at once: other threads may print, too
    sys.stdout.flush()


def emit(event: str, **fields: Any) -> None:
    """Tell the parent process: one line of JSON on standard output."""
    print_json({"event": event, **fields})


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def check_writable(path: Path) -> None:
    """Fail before the work is done, not after it.

    Raises:
        ConfigError: no file can be written there.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"cannot write {path}: the folder {folder} does not exist")
    if path.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"cannot write {path}: not a file that may be written")


def die_with_parent() -> None:
    """End this process when its standard input closes, as it does when the parent is gone."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


class _Telling(logging.Handler):
    """Tells the person what the library logs."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


@contextlib.contextmanager
def telling(logger_name: str) -> Iterator[None]:
    """Within this block, tell the person what a logger has to say, progress line or not."""
    logger, handler = logging.getLogger(logger_name), _Telling()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class Progress:
    """A line that is rewritten in place on a terminal; elsewhere a log, or silent.

    Time and images count from the first update on: whatever came before it was no training.

    Args:
        what: begins the line.
        total: how far it goes.
        log: where there is no terminal, write a line after every tenth of the way and whenever
            ten seconds have passed since the last.
    """

    _shown: ClassVar[Progress | None] = None

    def __init__(self, what: str, total: int, *, log: bool = False) -> None:
        self._what = what
        self._total = total
        self._live = sys.stderr.isatty()
        self._log = log
        self._logged_tenths = 0
        self._started: float | None = None
        self._updated = 0.0
        self._images = 0
        self._width = 0

    def update(
        self, done: int, *, loss: float | None = None, images: int = 0, notes: Sequence[str] = ()
    ) -> None:
        """Show how far it is; at most ten times a second.

        Args:
            done: steps.
            loss: of the newest one.
            images: that were used since the last update.
            notes: what else there is to say, at the end of the line.
        """
        now = time.monotonic()
        if self._started is None:
            self._started = now  # its own images were computed before
        else:
            self._images += images
        if not self._is_due(now, done):
            return
        self._updated = now
        parts = [f"{self._what} {done}/{self._total}"]
        if loss is not None:
            parts.append(f"loss {decimal(loss)}")
        if self._images:
            parts.append(f"{self._images / max(now - self._started, 1e-9):,.0f} images/s")
        if not self._live:
            say("  ".join([*parts, *notes]))
            return
        line = _fit([*parts, *notes], shutil.get_terminal_size().columns - 1)
        sys.stderr.write("\r" + line.ljust(self._width))
        sys.stderr.flush()
        self._width = len(line)
        Progress._shown = self

    def _is_due(self, now: float, done: int) -> bool:
        if self._live:
            return now - self._updated >= _SHOWN_EVERY_S or done >= self._total
        tenths = 10 * done // self._total
        due = self._log and (
            tenths > self._logged_tenths or now - (self._updated or now) >= _LOGGED_EVERY_S
        )
        self._updated = self._updated or now  # the first update starts the clock
        self._logged_tenths = tenths
        return due

    @classmethod
    def wipe_shown(cls) -> None:
        """Make room for a line of text, if a progress line is in its place."""
        if cls._shown is not None:
            cls._shown.close()

    def close(self) -> None:
        """End the line; the next update begins it anew."""
        if Progress._shown is self:
            Progress._shown = None
        if self._live and self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()
            self._width = 0


def _fit(parts: Sequence[str], width: int) -> str:
    """Join what fits on a line: one that wraps cannot be rewritten."""
    line = parts[0]
    for part in parts[1:]:
        if len(line) + 2 + len(part) > width:
            break
        line += f"  {part}"
    return line


def decimal(value: float | None) -> str:
    """Return a number with four decimals; a dash for one that is missing or not finite."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"


def seconds(value: float | None) -> str:
    """Return a duration with a unit that suits it."""
    if value is None:
        return "-"
    return f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.3f} s"


def step_notes(step_s: float | None, account: StepAccount | None = None) -> list[str]:
    """Return what a line of progress says of a step's time.

    Args:
        step_s: its duration; None while there is none.
        account: where that went, at a worker that knows.
    """
    notes = [] if step_s is None else [f"step {seconds(step_s)}"]
    if account is not None and account.hidden_fraction is not None:
        notes.append(f"hidden {max(0, round(100 * account.hidden_fraction))}%")
        if account.certificate is not None and account.certificate >= 1:
            # Below 1 the costs that it rests on were not those of the step.
            notes.append(f"{account.certificate:.2f} x bound")
    return notes


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned columns; the first is left-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "  ".join([first, *rest])

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])
