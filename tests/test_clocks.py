"""No timeout hangs on a clock that people set: the package reads monotonic clocks only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import dynacomm_async

ROOT = Path(dynacomm_async.__file__).parent
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
STAMPS = {"observe"}
"""Pieces that may say when something was written."""

WALL_CLOCKS = {
    "time": {
        *("time", "time_ns", "ctime", "localtime", "gmtime", "asctime", "strftime"),
        *("clock_gettime", "clock_gettime_ns", "CLOCK_REALTIME"),
    },
    "datetime": {"now", "utcnow", "today", "fromtimestamp"},
    "date": {"today", "fromtimestamp"},
}


def wall_clocks(source: str) -> Iterator[tuple[int, str]]:
    """Every use of a clock that can jump, as (line, name)."""
    modules: dict[str, str] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.name in WALL_CLOCKS.get(node.module or "", ()):
                    yield node.lineno, f"{node.module}.{alias.name}"
                modules[alias.asname or alias.name] = alias.name
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value).rpartition(".")[2]
            if node.attr in WALL_CLOCKS.get(modules.get(owner, owner), ()):
                yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_piece_that_decides_anything_reads_a_clock_that_can_jump(path: Path) -> None:
    if path.parts[0] not in STAMPS:
        assert list(wall_clocks((ROOT / path).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import time\ntime.time()",
        "import time as t\nf = t.time_ns",
        "from time import time",
        "from time import monotonic, localtime as l",
        "import time\ntime.clock_gettime(0)",
        "import datetime\ndatetime.datetime.now()",
        "from datetime import datetime\ndatetime.utcnow()",
        "from datetime import date as d\nd.today()",
    ],
)
def test_a_clock_that_can_jump_is_found_however_it_is_read(source: str) -> None:
    assert len(list(wall_clocks(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import time\ntime.monotonic_ns() + time.perf_counter() + time.thread_time_ns()",
        "from time import monotonic, sleep",
        "import asyncio\nasyncio.get_running_loop().time()",
        "def f(step):\n    return step.time",
    ],
)
def test_a_clock_that_only_goes_on_is_not_taken_for_one(source: str) -> None:
    assert list(wall_clocks(source)) == []
