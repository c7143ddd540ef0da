"""What a schedule does, for people: the story of a worker's steps as text, pictures (timelines of a
step, and which strategy suits which setting), and traces of a whole run.

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
from dynacomm_async.observe.joining import Crossing, Joined, Party, join_recordings
from dynacomm_async.observe.measured import measured_steps, median_step
from dynacomm_async.observe.sweeps import plot_sweep
from dynacomm_async.observe.timelines import TimelineEntry, plot_timelines
from dynacomm_async.observe.trace import trace_of

__all__ = [
    "Canvas",
    "Crossing",
    "Joined",
    "Party",
    "TimelineEntry",
    "check_plotting",
    "describe_plan",
    "explain_layers",
    "explain_link",
    "explain_plan",
    "explain_steps",
    "explain_worker",
    "join_recordings",
    "measured_steps",
    "median_step",
    "plot_sweep",
    "plot_timelines",
    "strategy_colours",
    "trace_of",
]
