"""A server in a thread of its own, and the fixture that starts it."""

from __future__ import annotations

import numpy as np
import pytest

from dynacomm_async.errors import ConfigError, PeerError
from dynacomm_async.testing import RunningServer
from dynacomm_async.worker import Session


def work(session):
    for step in session.steps():
        step.wait("w")
        session.gradients[:] = 1
        step.gradient_ready("w")


def test_a_loop_that_blocks_trains_against_it(start_server):
    server = start_server({"w": 10}, workers=1, steps=3, initial=np.zeros(10, np.float32))
    with Session(server.address) as session:
        work(session)

    assert server.result().steps == 3
    assert np.allclose(server.result().parameters, -0.03)


def test_several_servers_run_at_once(start_server):
    first, second = (start_server({"w": 1}, workers=1, steps=1) for _ in range(2))
    assert first.address != second.address


def test_a_run_that_does_not_end_is_not_waited_for_for_ever(start_server):
    server = start_server({"w": 1}, workers=1, steps=1)
    with pytest.raises(TimeoutError):
        server.result(timeout_s=0.01)


def test_a_run_that_fails_says_why(start_server):
    server = start_server({"w": 1}, workers=1, steps=1, initial=np.zeros(1, np.float32))
    with Session(server.address) as session:
        next(session.steps()).wait("w")
    with pytest.raises(PeerError, match="left in step 0"):
        server.result()


def test_a_server_that_cannot_start_leaves_nothing_behind():
    with pytest.raises(ConfigError, match="0 workers"), RunningServer({"w": 1}, workers=0, steps=1):
        pass
