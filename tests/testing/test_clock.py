"""An event loop whose clock stands still until a test moves it."""

from __future__ import annotations

import asyncio

import pytest

from dynacomm_async.testing import FakeClockLoop, pass_time


@pytest.fixture
def loop_factory():
    return FakeClockLoop


async def test_timers_are_due_in_order_and_time_is_what_has_passed(loop_factory):
    loop, due = asyncio.get_running_loop(), []
    for at_s in (15, 5, 10, 25):
        loop.call_later(at_s, due.append, at_s)
    await pass_time(20, tick_s=0.5)

    assert due == [5, 10, 15]
    assert loop.time() == 20


async def test_who_sleeps_is_woken_when_time_has_passed_and_not_before(loop_factory):
    sleeper = asyncio.create_task(asyncio.sleep(10))
    await pass_time(9.9)
    assert not sleeper.done()
    await pass_time(0.2)
    assert sleeper.done()


async def test_a_limit_of_time_is_over_by_the_fake_clock(loop_factory):
    async def limited():
        async with asyncio.timeout(5):
            await asyncio.Event().wait()

    waiting = asyncio.create_task(limited())
    await pass_time(5.1)
    with pytest.raises(TimeoutError):
        await waiting


async def test_on_another_loop_time_cannot_be_moved():
    with pytest.raises(AssertionError, match="time passes by itself"):
        await asyncio.create_task(_on_a_stock_loop())


async def _on_a_stock_loop():
    def pass_some():
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            runner.run(pass_time(1))

    await asyncio.to_thread(pass_some)
