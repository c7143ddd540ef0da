"""What a schedule does, for people: the story of a worker's steps as text, and pictures: timelines
of a step, and which strategy suits which setting.

Pictures need matplotlib (``pip install 'dynacomm_async[plot]'``), which is loaded when the first
one is drawn. Nothing here touches its global state: no window, no current figure, no changed
defaults.
"""

from __future__ import annotations

from dynacomm_async.observe.canvas import Canvas, check_plotting, strategy_colours
from dynacomm_async.observe.explain import (
    describe_plan,
    explain_layers,
    explain_link,
    explain_plan,
    explain_steps,
    explain_worker,
)
from dynacomm_async.observe.sweeps import plot_sweep
from dynacomm_async.observe.timelines import TimelineEntry, plot_timelines

__all__ = [
    "Canvas",
    "TimelineEntry",
    "check_plotting",
    "describe_plan",
    "explain_layers",
    "explain_link",
    "explain_plan",
    "explain_steps",
    "explain_worker",
    "plot_sweep",
    "plot_timelines",
    "strategy_colours",
]
