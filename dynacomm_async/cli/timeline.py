"""A step's timeline, drawn with characters: one lane for each thing that can be busy."""

from __future__ import annotations

import shutil
from collections.abc import Iterable

from dynacomm_async.cli.output import seconds
from dynacomm_async.schedule import Timeline

__all__ = ["draw_timeline"]

_SHADES = "█▒"
"""Neighbours get different shades, so that one can tell segments and layers apart."""


def draw_timeline(timeline: Timeline, *, width: int | None = None) -> str:
    """Return four lanes (pull, forward, backward, push) over a scale in time.

    Args:
        width: characters in a line; None: as wide as the terminal, at most 100.
    """
    columns = width or min(100, shutil.get_terminal_size().columns)
    n = max(columns - 10, 20)
    transfers, computations = timeline.transfers, timeline.computations
    lanes = {
        "pull": [(t.start_ns, t.end_ns) for t in transfers if t.direction == "pull"],
        "forward": [(c.start_ns, c.end_ns) for c in computations if c.phase == "forward"],
        "backward": [(c.start_ns, c.end_ns) for c in computations if c.phase == "backward"],
        "push": [(t.start_ns, t.end_ns) for t in transfers if t.direction == "push"],
    }
    lines = [f"{name:<9} {_lane(spans, timeline.step_ns, n)}" for name, spans in lanes.items()]
    end = seconds(timeline.step_ns / 1e9)
    lines.append(f"{'':<9} 0{end:>{n - 1}}")
    return "\n".join(line.rstrip() for line in lines)


def _lane(spans: Iterable[tuple[int, int]], step_ns: int, n: int) -> str:
    """Each character shows what its middle falls on."""
    cells = [" "] * n
    for index, (start_ns, end_ns) in enumerate(spans):
        first = -(-(2 * start_ns * n - step_ns) // (2 * step_ns))
        last = -(-(2 * end_ns * n - step_ns) // (2 * step_ns))
        for cell in range(max(first, 0), min(last, n)):
            cells[cell] = _SHADES[index % 2]
    return "".join(cells)
