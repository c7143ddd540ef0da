"""The pulse of a connection: idle ends are heard, silent ones noticed, slow ones left alone."""

from __future__ import annotations

import asyncio

import pytest

from dynacomm_async.errors import ChannelBroken, DynaCommError
from dynacomm_async.testing import FakeClockLoop, pass_time
from dynacomm_async.transport.pulse import Pulse


class Line:
    """A channel as far as a pulse sees it."""

    peer = "the other end"

    def __init__(self) -> None:
        self.received_nbytes = 0
        self.error: DynaCommError | None = None
        self.limit_s = 0.0

    def limit_silence(self, limit_s: float) -> None:
        self.limit_s = limit_s

    def abort(self, error: DynaCommError | None = None) -> None:
        self.error = error


@pytest.fixture
def loop_factory():
    return FakeClockLoop


async def test_an_idle_end_is_heard_three_times_within_the_limit(loop_factory):
    line, beats = Line(), []
    pulse = Pulse(line, 6.0, lambda: beats.append(1))
    pulse.heard()
    await pass_time(24, pulse.heard)
    pulse.stop()
    assert line.limit_s == 6.0
    assert 11 <= len(beats) <= 12
    assert line.error is None


async def test_who_sends_anyway_adds_no_heartbeats(loop_factory):
    line, beats = Line(), []
    pulse = Pulse(line, 6.0, lambda: beats.append(1))
    pulse.heard()
    await pass_time(24, lambda: (pulse.heard(), pulse.sent()))
    pulse.stop()
    assert beats == []


async def test_silence_is_noticed_after_the_limit_and_before_one_and_a_half_of_it(loop_factory):
    line = Line()
    pulse = Pulse(line, 6.0, lambda: None)
    await pass_time(5.9)
    assert line.error is None
    await pass_time(3.1)
    assert isinstance(line.error, ChannelBroken)
    assert "nothing has come over it for 6 s" in str(line.error)
    pulse.stop()


@pytest.mark.parametrize(("nbytes", "alive"), [(400, True), (50, False)])
async def test_one_cell_for_each_limit_is_life_and_a_trickle_is_not(loop_factory, nbytes, alive):
    line = Line()
    pulse = Pulse(line, 6.0, lambda: None)

    def crawl():
        line.received_nbytes += nbytes  # each twentieth of a second; 6 s need 137 for a cell

    await pass_time(24, crawl)
    pulse.stop()
    assert (line.error is None) == alive


async def test_the_time_in_which_this_process_stood_still_is_not_the_others_silence(loop_factory):
    loop, line = asyncio.get_running_loop(), Line()
    pulse = Pulse(line, 6.0, lambda: None)
    await pass_time(1)
    loop.now_s += 15
    await pass_time(1)
    assert line.error is None
    await pass_time(6)
    assert line.error is not None
    pulse.stop()
