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

_LANES = {"pull": ("pull",), "compute": ("forward", "backward"), "push": ("push",)}
"""From top to bottom, and what is in each."""

_SHADES = {
    "pull": ("#0072B2", "#7FB8DA"),
    "forward": ("#009E73", "#7FCEB9"),
    "backward": ("#D55E00", "#EEB07F"),
    "push": ("#8F4A78", "#CC9DBE"),
}
"""Neighbours of one kind get its two shades in turns."""

_MEANINGS = {
    "pull": "pull parameters",
    "forward": "compute forward",
    "backward": "compute backward",
    "push": "push gradients",
}
_WAITING = "#DDDDDD"
_WAITING_MEANS = "processor waits"
_REST, _REST_EDGE = "#F4F0E4", "#B8AE90"
_REST_MEANS = "latency, server, other workers"
_BEGIN = {
    True: "milliseconds since the step's first pull began",
    False: "milliseconds since the first pull began, or without a barrier the backward pass",
}
_WIDTH = 9.0
_LANE_HEIGHT = 0.185
_BAR = 0.86
_GAP = 0.45
"""Between the lanes of the predicted and of the measured step, in lanes."""

_CHARACTERS = 130
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

    @property
    def rows(self) -> dict[str, Timeline]:
        """The timelines by what they are, from top to bottom."""
        rows = {"predicted": self.predicted}
        return rows if self.measured is None else {**rows, "measured": self.measured}


@dataclass(frozen=True, slots=True)
class _Bar:
    """Something that keeps a lane busy; ``label`` names the layers."""

    start_ns: int
    end_ns: int
    label: str


def plot_timelines(
    entries: Sequence[TimelineEntry], path: Path, *, title: str | None = None
) -> None:
    """Draw one step for each entry on one common time axis, and save the picture.

    Three lanes each: pull, compute, push. Neighbouring segments or layers have different shades;
    wide bars carry the numbers of their layers. Grey in the compute lane: the processor waits.
    Behind all of it lies what ends the step: latency, the server's update, other workers.

    Args:
        title: of the whole picture, such as the model and the link.

    Raises:
        ConfigError: no entries, matplotlib is missing, or a format that it does not know.
    """
    if not entries:
        raise ConfigError("there are no timelines to draw, expected at least one")
    lanes = [_n_lanes(entry) for entry in entries]
    canvas = Canvas(
        _WIDTH,
        1.05 + (0.25 if title else 0) + sum(0.34 + _LANE_HEIGHT * n for n in lanes),
        rows=len(entries),
        sharex=True,
        height_ratios=lanes,
    )
    longest_ns = max(step.step_ns for entry in entries for step in entry.rows.values()) or 1
    for entry, (axes,) in zip(entries, canvas.axes, strict=True):
        _draw_entry(axes, entry, longest_ns)
    last = canvas.axes[-1][0]
    last.tick_params(axis="x", bottom=True, labelbottom=True)
    last.set_xlabel(
        _BEGIN[all(entry.predicted.forward_ns is not None for entry in entries)]
        + "; numbers in bars: layers, from 0",
        fontsize=9,
    )
    _add_legend(canvas)
    if title:
        canvas.figure.suptitle(title, fontsize=10.5, x=0.012, ha="left")
    canvas.save(path)


def _n_lanes(entry: TimelineEntry) -> float:
    return len(_LANES) * len(entry.rows) + _GAP * (len(entry.rows) - 1)


def _add_legend(canvas: Canvas) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=_SHADES[kind][0], label=text) for kind, text in _MEANINGS.items()]
    patches.insert(3, Patch(color=_WAITING, label=_WAITING_MEANS))
    patches.append(Patch(label=_REST_MEANS, facecolor=_REST, edgecolor=_REST_EDGE, hatch="////"))
    canvas.figure.legend(
        handles=patches,
        loc="outside lower left",
        ncols=3,
        fontsize=8.5,
        frameon=False,
        handlelength=1.4,
        columnspacing=1.6,
    )


def _draw_entry(axes: Any, entry: TimelineEntry, longest_ns: int) -> None:
    axes.set_title(_headline(entry), loc="left", fontsize=9.5, fontweight="bold", pad=3)
    ticks: list[float] = []
    top = 0.0
    for name, timeline in entry.rows.items():
        _draw_step(axes, top, timeline, longest_ns)
        ticks += [top + lane for lane in range(len(_LANES))]
        if entry.measured is not None:
            axes.text(
                -0.075,
                top + 1,
                name,
                transform=axes.get_yaxis_transform(),
                rotation=90,
                ha="center",
                va="center",
                fontsize=7.5,
            )
        top += len(_LANES) + _GAP
    axes.set_xlim(0, 1.09 * longest_ns / 1e6)
    axes.set_ylim(top - _GAP - 0.5, -0.5)
    axes.set_yticks(ticks, list(_LANES) * len(entry.rows), fontsize=7.5)
    axes.tick_params(axis="y", length=0, pad=2)
    axes.tick_params(axis="x", labelsize=9, bottom=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#BBBBBB")


def _headline(entry: TimelineEntry) -> str:
    predicted, measured = entry.predicted, entry.measured
    if measured is None:
        return f"{entry.name}: {_ms(predicted)} ms a step, {_hidden(predicted)}"
    apart = measured.step_ns / predicted.step_ns - 1 if predicted.step_ns else 0.0
    sign = "\N{PLUS-MINUS SIGN}"
    if round(apart, 3):
        sign = "+" if apart > 0 else "\N{MINUS SIGN}"
    return (
        f"{entry.name}: predicted {_ms(predicted)} ms, measured {_ms(measured)} ms "
        f"({sign}{abs(apart):.1%}), {_hidden(measured)}"
    )


def _draw_step(axes: Any, top: float, timeline: Timeline, longest_ns: int) -> None:
    for lane, kinds in enumerate(_LANES.values()):
        for kind in kinds:
            _draw_bars(axes, top + lane, _bars(timeline, kind), _SHADES[kind], longest_ns)
    lanes = list(_LANES)
    pauses = [(start / 1e6, (end - start) / 1e6) for start, end in _pauses(timeline)]
    axes.broken_barh(
        pauses, (top + lanes.index("compute") - _BAR / 2, _BAR), facecolors=_WAITING, linewidth=0
    )
    ends_ns = [transfer.end_ns for transfer in timeline.transfers]
    last_ns = max([*ends_ns, *(work.end_ns for work in timeline.computations)], default=0)
    if timeline.step_ns > last_ns:
        axes.broken_barh(
            [(last_ns / 1e6, (timeline.step_ns - last_ns) / 1e6)],
            (top + lanes.index("push") - _BAR / 2, _BAR),
            facecolors=_REST,
            edgecolors=_REST_EDGE,
            hatch="////",
            linewidth=0.5,
        )
    step_ms = timeline.step_ns / 1e6
    axes.vlines(step_ms, top - 0.5, top + len(_LANES) - 0.5, color="black", linewidth=1.3)
    axes.text(
        step_ms + 0.006 * longest_ns / 1e6,
        top + 1,
        f"{_ms(timeline)} ms",
        ha="left",
        va="center_baseline",
        fontsize=8,
    )


def _draw_bars(
    axes: Any, lane: float, bars: Sequence[_Bar], shades: tuple[str, str], longest_ns: int
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


def _bars(timeline: Timeline, kind: str) -> list[_Bar]:
    """What of a kind keeps its lane busy, in order, without what takes no time."""
    bars = [
        _Bar(transfer.start_ns, transfer.end_ns, _name_layers(transfer.segment.layers))
        for transfer in timeline.transfers
        if transfer.direction == kind
    ] + [
        _Bar(work.start_ns, work.end_ns, str(work.layer))
        for work in timeline.computations
        if work.phase == kind
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


def _ms(timeline: Timeline) -> str:
    step_ms = timeline.step_ns / 1e6
    return f"{step_ms:,.1f}" if step_ms >= 10 else f"{step_ms:.3g}"


def _hidden(timeline: Timeline) -> str:
    return f"{max(timeline.hidden_fraction, 0):.0%} of the transfer hidden"
