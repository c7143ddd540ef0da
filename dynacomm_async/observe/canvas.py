"""A figure of a given size, and what all pictures have in common: colours, units, saving."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dynacomm_async.errors import ConfigError
from dynacomm_async.schedule import PLANNERS

__all__ = [
    "Canvas",
    "check_plotting",
    "format_count",
    "format_duration",
    "format_rate",
    "strategy_colours",
    "text_colour",
]

_DPI = 150
_PALETTE = (
    *("#9A9A9A", "#E69F00", "#56B4E9", "#CC79A7", "#0072B2"),
    *("#009E73", "#D55E00", "#F0E442", "#332288", "#882255"),
)
"""Told apart with every common kind of colour vision; the first eight after Okabe and Ito, "Color
Universal Design" (2008), with grey in place of black."""


class Canvas:
    """A figure with axes in a grid, drawn without a window.

    Args:
        width, height: in inches.
        rows, columns: of the grid.
        settings: more for matplotlib's ``Figure.subplots``.

    Attributes:
        figure: matplotlib's.
        axes: rows of matplotlib's axes.

    Raises:
        ConfigError: matplotlib is not installed.
    """

    def __init__(
        self, width: float, height: float, rows: int = 1, columns: int = 1, **settings: Any
    ) -> None:
        check_plotting()
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        FigureCanvasAgg(self.figure)
        self.axes: Sequence[Sequence[Any]] = self.figure.subplots(
            rows, columns, squeeze=False, **settings
        )

    def save(self, path: Path) -> None:
        """Write the picture; the format follows from the file's name, such as ``.png``.

        Raises:
            ConfigError: no such format.
            OSError: the file cannot be written.
        """
        try:
            self.figure.savefig(path, dpi=_DPI)
        except ValueError as error:  # matplotlib names the formats that it knows
            raise ConfigError(f"cannot draw {path}: {error}") from error


def check_plotting() -> None:
    """Do nothing where pictures can be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError("pictures need matplotlib: pip install 'dynacomm_async[plot]'") from error


def strategy_colours(names: Iterable[str]) -> dict[str, str]:
    """Return a colour for each strategy: the same in every picture for those of the library."""
    known = list(PLANNERS)
    order = known + [name for name in names if name not in known]
    return {name: _PALETTE[index % len(_PALETTE)] for index, name in enumerate(order)}


def text_colour(background: str) -> str:
    """Return black or white, whichever reads better on a ``"#RRGGBB"`` background."""
    red, green, blue = (int(background[place : place + 2], 16) for place in (1, 3, 5))
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 110 else "white"


def format_rate(bytes_per_s: float | None) -> str:
    """Return a rate in bits with a unit that suits it, None as unlimited."""
    if bytes_per_s is None:
        return "unlimited"
    bits = 8 * bytes_per_s
    unit, scale = next(
        (pair for pair in (("Gbit/s", 1e9), ("Mbit/s", 1e6)) if bits >= 0.9995 * pair[1]),
        ("kbit/s", 1e3),
    )
    return f"{bits / scale:.3g} {unit}"


def format_duration(value_s: float) -> str:
    """Return a duration with a unit that suits it."""
    return f"{value_s * 1e3:.4g} ms" if value_s < 1 else f"{value_s:.4g} s"


def format_count(value: int | None) -> str:
    """Return a number that may be unknown."""
    return "unknown" if value is None else str(value)
