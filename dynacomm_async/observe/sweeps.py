"""Which strategy is good enough where: pictures of a sweep over links, batches and workers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from dynacomm_async.errors import ConfigError
from dynacomm_async.observe.canvas import (
    Canvas,
    format_count,
    format_duration,
    format_rate,
    strategy_colours,
    text_colour,
)

__all__ = ["plot_sweep"]

Row = Mapping[str, Any]

_MOST_PANELS = 12
_PANELS_ABREAST = 2


@dataclass(frozen=True, slots=True)
class _Axis:
    """A setting that a sweep may vary.

    Attributes:
        name: for people.
        read: its value in a row.
        show: a value as text.
    """

    name: str
    read: Callable[[Row], Any]
    show: Callable[[Any], str]

    def values(self, rows: Sequence[Row]) -> list[Any]:
        """The different values, in the order in which they come."""
        return list(dict.fromkeys(self.read(row) for row in rows))


def _show_rates(rates: tuple[float | None, float | None]) -> str:
    """Three digits are enough to read, and a measured link is never quite the same both ways."""
    down, up = rates
    if down and up and abs(down - up) <= 0.02 * max(down, up):
        up = down
    texts = [format_rate(rate and float(f"{rate:.3g}")) for rate in (down, up)]
    return texts[0] if down == up else f"{texts[0]}\nup {texts[1]}"


_AXES = (
    _Axis("bandwidth", lambda row: (row["down_bytes_per_s"], row["up_bytes_per_s"]), _show_rates),
    _Axis("overhead of a message", lambda row: row["overhead_s"], format_duration),
    _Axis("latency", lambda row: row["latency_s"], format_duration),
    _Axis("batch", lambda row: row["batch"], format_count),
    _Axis("workers", lambda row: row["workers"], format_count),
)


def plot_sweep(rows: Sequence[Row], path: Path) -> None:
    """Draw which strategy is the choice where, and save the picture.

    Where one setting varies: each strategy's step relative to sequential's, and the choice at each
    point. Where two vary: a map of the choices; where more do, one map for each combination of the
    others.

    Args:
        rows: a full grid, as :func:`dynacomm_async.schedule.whatif.judge` describes one point,
            beside ``down_bytes_per_s``, ``up_bytes_per_s``, ``overhead_s``, ``latency_s``,
            ``batch`` and ``workers``.
        path: of the picture.

    Raises:
        ConfigError: no rows, too many combinations for one picture, matplotlib is missing, or a
            format that it does not know.
    """
    if not rows:
        raise ConfigError("there is nothing to draw, expected at least one row")
    varied = [axis for axis in _AXES if len(axis.values(rows)) > 1]
    if len(varied) < 2:
        _plot_curves(rows, varied[0] if varied else _AXES[0]).save(path)
    else:
        _plot_maps(rows, varied).save(path)


def _fixed(rows: Sequence[Row]) -> str:
    """What is the same in all rows."""
    return ", ".join(
        f"{axis.name} {axis.show(axis.read(rows[0]))}".replace("\n", ", ")
        for axis in _AXES
        if len(axis.values(rows)) == 1
    )


def _plot_curves(rows: Sequence[Row], axis: _Axis) -> Canvas:
    canvas = Canvas(8.2, 4.2, rows=2, sharex=True, height_ratios=(11, 1))
    (curves,), (strip,) = canvas.axes
    _draw_curves(curves, rows)
    _draw_strip(strip, rows)
    strip.set_xticks(range(len(rows)), [axis.show(axis.read(row)) for row in rows], fontsize=9)
    strip.set_xlabel(f"{axis.name}; in the strip: {_CHOICE}", fontsize=9)
    curves.set_title(_fixed(rows), fontsize=9, loc="left")
    return canvas


def _draw_curves(axes: Any, rows: Sequence[Row]) -> None:
    names = list(rows[0]["step_s"])
    colours = strategy_colours(names)
    for index, name in enumerate(names):
        # Strategies often coincide: those drawn first are wider and show on both sides.
        wider = len(names) - 1 - index
        axes.plot(
            [_relative(row["step_s"][name], row) for row in rows],
            color=colours[name],
            marker="os^vDPX*"[index % 8],
            linewidth=1.4 + 0.6 * wider,
            markersize=4 + 1.2 * wider,
            label=name,
        )
    bound = [_relative(row["lower_bound_s"], row) for row in rows]
    axes.plot(bound, color="black", linestyle=":", linewidth=1.3, label="lower bound")
    axes.set_ylabel("step time relative to sequential", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_strip(axes: Any, rows: Sequence[Row]) -> None:
    colours = strategy_colours(rows[0]["step_s"])
    for place, row in enumerate(rows):
        colour = colours[row["choice"]]
        axes.bar(place, 1, width=0.97, color=colour)
        axes.text(
            place,
            0.5,
            row["choice"],
            ha="center",
            va="center_baseline",
            fontsize=min(9, 60 / len(rows)),
            color=text_colour(colour),
        )
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


_CHOICE = "the simplest strategy within 1% of the fastest"


def _relative(step_s: float, row: Row) -> float:
    """Relative to the first strategy, which is the plainest; 1 where nothing takes time."""
    plainest_s = next(iter(row["step_s"].values()))
    return step_s / plainest_s if plainest_s else 1.0


def _plot_maps(rows: Sequence[Row], varied: Sequence[_Axis]) -> Canvas:
    across, up, *others = varied
    combinations = list(itertools.product(*(axis.values(rows) for axis in others)))
    if len(combinations) > _MOST_PANELS:
        raise ConfigError(
            f"a picture would need {len(combinations)} maps, expected at most {_MOST_PANELS}: "
            f"vary fewer settings"
        )
    abreast = min(_PANELS_ABREAST, len(combinations))
    high = ceil(len(combinations) / abreast)
    width = max(5.5, abreast * (1.3 + 0.92 * len(across.values(rows))))
    height = 1.3 + high * (0.8 + 0.5 * len(up.values(rows)))
    canvas = Canvas(width, height, high, abreast)
    panels = [axes for line in canvas.axes for axes in line]
    for axes, combination in zip(panels, combinations, strict=False):
        settings = list(zip(others, combination, strict=True))
        cells = [row for row in rows if all(axis.read(row) == value for axis, value in settings)]
        _draw_map(axes, cells, across, up)
        title = ", ".join(f"{axis.name} {axis.show(value)}" for axis, value in settings)
        axes.set_title(title, fontsize=9, loc="left")
    for axes in panels[len(combinations) :]:
        axes.set_visible(False)
    plainest = next(iter(rows[0]["step_s"]))
    canvas.figure.suptitle(
        f"{_CHOICE[0].upper()}{_CHOICE[1:]},\nand its step time against {plainest}'s",
        fontsize=11,
        x=0.01,
        ha="left",
    )
    canvas.figure.supxlabel(_fixed(rows), fontsize=8, color="#444444", x=0.01, ha="left")
    return canvas


def _draw_map(axes: Any, rows: Sequence[Row], across: _Axis, up: _Axis) -> None:
    columns, lines = across.values(rows), up.values(rows)
    colours = strategy_colours(rows[0]["step_s"])
    for row in rows:
        x, y = columns.index(across.read(row)), lines.index(up.read(row))
        colour = colours[row["choice"]]
        axes.bar(x, 0.98, bottom=y - 0.49, width=0.98, color=colour)
        change = _relative(row["step_s"][row["choice"]], row) - 1
        number = f"{change:+.0%}".replace("-", "\N{MINUS SIGN}") if round(change, 2) else "\u00b10%"
        axes.text(
            x,
            y,
            f"{row['choice']}\n{number}",
            ha="center",
            va="center",
            fontsize=8,
            color=text_colour(colour),
        )
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(-0.5, len(lines) - 0.5)
    axes.set_xticks(range(len(columns)), [across.show(value) for value in columns], fontsize=8)
    axes.set_yticks(range(len(lines)), [up.show(value) for value in lines], fontsize=8)
    axes.set_xlabel(across.name, fontsize=9)
    axes.set_ylabel(up.name, fontsize=9)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
