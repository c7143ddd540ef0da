"""What commands print: progress for people at a terminal, events for a parent process, tables."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from dynacomm_async.errors import ConfigError

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
    "table",
    "to_json",
]


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


class Progress:
    """A line that is rewritten in place on a terminal; silent elsewhere.

    Time and images count from the first update on: whatever came before it was no training.
    """

    _shown: ClassVar[Progress | None] = None

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = total
        self._live = sys.stderr.isatty()
        self._started: float | None = None
        self._updated = 0.0
        self._images = 0
        self._width = 0

    def update(self, done: int, *, loss: float | None = None, images: int = 0) -> None:
        """Show how far it is; at most ten times a second."""
        now = time.monotonic()
        if self._started is None:
            self._started = now  # its own images were computed before
        else:
            self._images += images
        if not self._live or (now - self._updated < 0.1 and done < self._total):
            return
        self._updated = now
        parts = [f"{self._what} {done}/{self._total}"]
        if loss is not None:
            parts.append(f"loss {decimal(loss)}")
        if self._images:
            parts.append(f"{self._images / max(now - self._started, 1e-9):,.0f} images/s")
        line = "  ".join(parts)
        sys.stderr.write("\r" + line.ljust(self._width))
        sys.stderr.flush()
        self._width = len(line)
        Progress._shown = self

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


def decimal(value: float | None) -> str:
    """Return a number with four decimals; a dash for one that is missing or not finite."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"


def seconds(value: float | None) -> str:
    """Return a duration with a unit that suits it."""
    if value is None:
        return "-"
    return f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.3f} s"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned columns; the first is left-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "  ".join([first, *rest])

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])
