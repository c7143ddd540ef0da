"""Timelines of a step: what each link and the processor do when."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynacomm_async.errors import ConfigError
from dynacomm_async.observe.canvas import Canvas, text_colour
from dynacomm_async.schedule import Timeline

__all__ = ["TimelineEntry", "plot_timelines"]

_LANES = {
    "pull": ("#0072B2", "#7FB8DA"),
    "forward": ("#009E73", "#7FCEB9"),
    "backward": ("#D55E00", "#EEB07F"),
    "push": ("#8F4A78", "#CC9DBE"),
}
"""From top to bottom; neighbours in a lane get its two shades in turns."""

_WAITING = "#E4E4E4"
_WIDTH = 8.2
_BAR = 0.84
_CHARACTERS = 125
"""How many characters of the labels in the bars fit side by side."""


@dataclass(frozen=True, slots=True)
class TimelineEntry:
    """One strategy's step.

    Attributes:
        name: of the strategy, or any other title.
        predicted: what the cost model says.
        measured: what happened, in the same terms; drawn below.
    """

    name: str
    predicted: Timeline
    measured: Timeline | None = None


@dataclass(frozen=True, slots=True)
class _Bar:
    """Something that keeps a lane busy; ``label`` names the layers."""

    start_ns: int
    end_ns: int
    label: str


def plot_timelines(entries: Sequence[TimelineEntry], path: Path) -> None:
    """Draw one step for each entry on one common time axis, and save the picture.

    Four lanes each: pull, forward, backward, push. In a lane neighbouring segments or layers have
    different shades; wide bars carry the numbers of their layers. Where the processor waits the
    background is grey.

    Raises:
        ConfigError: no entries, matplotlib is missing, or a format that it does not know.
    """
    if not entries:
        raise ConfigError("there are no timelines to draw, expected at least one")
    panels: list[tuple[str, Timeline]] = []
    for entry in entries:
        both = entry.measured is not None
        panels.append((f"{entry.name}, predicted" if both else entry.name, entry.predicted))
        if entry.measured is not None:
            panels.append((f"{entry.name}, measured", entry.measured))
    canvas = Canvas(_WIDTH, 0.75 + 1.22 * len(panels), rows=len(panels), sharex=True)
    longest_ns = max(timeline.step_ns for _, timeline in panels) or 1
    for (title, timeline), (axes,) in zip(panels, canvas.axes, strict=True):
        _draw_panel(axes, title, timeline, longest_ns)
    last = canvas.axes[-1][0]
    last.tick_params(axis="x", bottom=True, labelbottom=True)
    last.set_xlabel(
        "ms since the first pull began; numbers: layers, from 0; grey: the processor waits",
        fontsize=9,
    )
    canvas.save(path)


def _draw_panel(axes: Any, title: str, timeline: Timeline, longest_ns: int) -> None:
    step_ms = timeline.step_ns / 1e6
    axes.set_title(
        f"{title}: {step_ms:,.4g} ms a step, {_hidden(timeline)}",
        loc="left",
        fontsize=10,
        fontweight="bold",
        pad=3,
    )
    for start_ns, end_ns in _pauses(timeline):
        axes.axvspan(start_ns / 1e6, end_ns / 1e6, color=_WAITING, linewidth=0, zorder=0)
    for lane, (name, shades) in enumerate(_LANES.items()):
        _draw_lane(axes, lane, _bars(timeline, name), shades, longest_ns)
    axes.axvline(step_ms, color="black", linewidth=1.2)
    axes.set_xlim(0, 1.01 * longest_ns / 1e6)
    axes.set_ylim(len(_LANES) - 0.5, -0.5)
    axes.set_yticks(range(len(_LANES)), list(_LANES), fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=9, bottom=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _draw_lane(
    axes: Any, lane: int, bars: Sequence[_Bar], shades: tuple[str, str], longest_ns: int
) -> None:
    axes.broken_barh(
        [(bar.start_ns / 1e6, (bar.end_ns - bar.start_ns) / 1e6) for bar in bars],
        (lane - _BAR / 2, _BAR),
        facecolors=[shades[index % 2] for index in range(len(bars))],
        linewidth=0,
    )
    for index, bar in enumerate(bars):
        room = _CHARACTERS * (bar.end_ns - bar.start_ns) / longest_ns
        if bar.label and len(bar.label) + 1 < room:
            axes.text(
                (bar.start_ns + bar.end_ns) / 2e6,
                lane,
                bar.label,
                ha="center",
                va="center_baseline",
                fontsize=7,
                color=text_colour(shades[index % 2]),
            )


def _bars(timeline: Timeline, lane: str) -> list[_Bar]:
    """What keeps a lane busy, in order, without what takes no time."""
    bars = [
        _Bar(transfer.start_ns, transfer.end_ns, _name_layers(transfer.segment.layers))
        for transfer in timeline.transfers
        if transfer.direction == lane
    ] + [
        _Bar(work.start_ns, work.end_ns, str(work.layer))
        for work in timeline.computations
        if work.phase == lane
    ]
    return [bar for bar in bars if bar.end_ns > bar.start_ns]


def _name_layers(layers: range) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}\N{EN DASH}{layers[-1]}"


def _pauses(timeline: Timeline) -> Iterable[tuple[int, int]]:
    """When the processor waits for a link, until the end of the step."""
    done_ns = 0
    for work in sorted(timeline.computations, key=lambda work: work.start_ns):
        if work.start_ns > done_ns:
            yield done_ns, work.start_ns
        done_ns = max(done_ns, work.end_ns)
    if timeline.step_ns > done_ns:
        yield done_ns, timeline.step_ns


def _hidden(timeline: Timeline) -> str:
    return f"{max(timeline.hidden_fraction, 0):.0%} of the transfer hidden"
