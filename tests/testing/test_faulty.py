"""A link on which things go wrong, in a thread of its own, and the fixture that starts it."""

from __future__ import annotations

import time

import pytest

from dynacomm_async.errors import ConfigError
from dynacomm_async.optim import SGD, Constant
from dynacomm_async.server import Training
from dynacomm_async.testing import FaultyLink

RESET = "reset:up@bytes=30000,connection=0"


def train(toy, server, address, at_step=None):
    replica = toy.work(address, at_step)
    return replica.parameters.tobytes(), server.result().parameters.tobytes()


def start(toy, start_server, steps=4):
    training = Training(SGD(0.9), Constant(0.05))
    initial = {"initial": toy.initial, "initial_statistics": toy.initial_statistics}
    server = start_server(toy.layers, workers=1, steps=steps, training=training, **initial)
    return server, toy.replay(1, steps, training)[0].tobytes()


def test_training_goes_on_across_a_fault_that_has_happened(toy, start_server, start_link):
    server, expected = start(toy, start_server)
    link = start_link(server.address, RESET)

    assert link.fired == {RESET: 0}
    assert train(toy, server, link.address) == (expected, expected)
    assert link.fired == {RESET: 1}
    assert link.counters.up.messages > 4


def test_a_fault_may_be_fired_by_hand(toy, start_server, start_link):
    server, expected = start(toy, start_server)
    link = start_link(server.address)

    def at_step(session, index):
        if index == 2:
            assert link.fire("cut") == 1

    assert train(toy, server, link.address, at_step) == (expected, expected)
    assert link.fired == {"cut:both": 1}


def test_it_counts_what_it_carries_at_the_rate_it_is_given(toy, start_server, start_link):
    server, _ = start(toy, start_server, steps=1)
    link = start_link(server.address, rate_up_bytes_per_s=400_000)
    began_s = time.monotonic()
    toy.work(link.address)

    assert link.counters.up.nbytes >= 4 * toy.grid.n_floats
    took_s = time.monotonic() - began_s
    assert took_s >= 0.9 * 4 * toy.grid.n_floats / 400_000  # arithmetic: busy machines take longer


def test_what_is_not_a_fault_or_not_running_is_refused(start_link):
    with pytest.raises(ConfigError, match="'earthquake' is not a fault"):
        start_link(("127.0.0.1", 1), "earthquake")
    with pytest.raises(ConfigError, match="'earthquake' is not a fault"):
        start_link(("127.0.0.1", 1)).fire("earthquake")
    with pytest.raises(RuntimeError, match="the FaultyLink is not running: use it inside `with`"):
        FaultyLink(("127.0.0.1", 1)).fire("cut")
