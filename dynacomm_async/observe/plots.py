"""The pictures that can be drawn, by name."""

from __future__ import annotations

from dynacomm_async.observe.sweeps import plot_sweep
from dynacomm_async.observe.timelines import TimelineEntry, plot_timelines

__all__ = ["TimelineEntry", "plot_sweep", "plot_timelines"]
