"""Helpers for tests and benchmarks, of this package and of code that builds on it.

- :class:`RunningServer`: a parameter server in a thread, for a training loop that blocks;
  :mod:`dynacomm_async.testing.fixtures` makes the pytest fixture ``start_server`` of it.
- :class:`FaultyLink`: a relay in front of a server, on which connections are reset, cut, stalled or
  sliced where a test says, and slow if it likes; the fixture ``start_link``.
- :func:`open_memory_pair`, :func:`open_tcp_pair`: both ends of a connection with handlers that
  record and check; :func:`memory_pair`: two channels for handlers of your own.
- :class:`FakeClockLoop`, :func:`pass_time`: an event loop whose clock a test moves.
- :func:`simulate`: the real step logic on a fake clock.
- Planners that are slow but plainly right, to judge the fast ones by.
"""

from __future__ import annotations

from dynacomm_async.testing.channels import (
    HANDSHAKE,
    ChannelPair,
    RecordingHandler,
    open_memory_pair,
    open_tcp_pair,
)
from dynacomm_async.testing.clock import FakeClockLoop, pass_time
from dynacomm_async.testing.faulty import FaultyLink
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
from dynacomm_async.transport import memory_pair

__all__ = [
    "HANDSHAKE",
    "ChannelPair",
    "FakeClockLoop",
    "FaultyLink",
    "PhaseOptimum",
    "RecordingHandler",
    "RunningServer",
    "forward_end_ns",
    "list_all_cuts",
    "list_all_orders",
    "memory_pair",
    "open_memory_pair",
    "open_tcp_pair",
    "pass_time",
    "push_end_ns",
    "search_crossing",
    "search_forward",
    "search_push",
    "simulate",
    "solve_forward_cubic",
    "solve_push_cubic",
    "solve_push_quadratic",
]
