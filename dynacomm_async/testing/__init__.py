"""Helpers for tests and benchmarks, of this package and of code that builds on it: planners that
are slow but plainly right, to judge the fast ones by, the step logic on a fake clock, and a server
in a thread of its own (:mod:`dynacomm_async.testing.fixtures` makes a pytest fixture of it)."""

from __future__ import annotations

from dynacomm_async.testing.oracles import (
    PhaseOptimum,
    forward_end_ns,
    list_all_cuts,
    list_all_orders,
    push_end_ns,
    search_crossing,
    search_forward,
    search_push,
    solve_forward_cubic,
    solve_push_cubic,
    solve_push_quadratic,
)
from dynacomm_async.testing.serving import RunningServer
from dynacomm_async.testing.simulator import simulate

__all__ = [
    "PhaseOptimum",
    "RunningServer",
    "forward_end_ns",
    "list_all_cuts",
    "list_all_orders",
    "push_end_ns",
    "search_crossing",
    "search_forward",
    "search_push",
    "simulate",
    "solve_forward_cubic",
    "solve_push_cubic",
    "solve_push_quadratic",
]
