"""Event loops, and one in a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
import threading
from collections.abc import Callable

import pytest

from dynacomm_async.transport import LoopThread, new_event_loop, run

LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def test_the_default_loop_is_uvloop_where_there_is_one() -> None:
    uvloop = pytest.importorskip("uvloop")
    loop = new_event_loop()
    assert isinstance(loop, uvloop.Loop)
    loop.close()


def test_without_uvloop_plain_asyncio_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    loop = new_event_loop()
    assert type(loop).__module__.startswith("asyncio")
    loop.close()


def test_a_program_gets_its_result_or_its_exception() -> None:
    async def double(value: int) -> int:
        if value < 0:
            raise ValueError("negative")
        await asyncio.sleep(0)
        return 2 * value

    assert run(double(4)) == 8
    with pytest.raises(ValueError, match="negative"):
        run(double(-1))


def test_a_loop_in_a_thread_computes_while_its_caller_blocks(loop_factory: LoopFactory) -> None:
    async def thread_name() -> str:
        await asyncio.sleep(0)
        return threading.current_thread().name

    with LoopThread(loop_factory) as thread:
        assert thread.submit(thread_name()).result(10) == "dynacomm-io"
        assert [thread.submit(asyncio.sleep(0, i)).result(10) for i in range(5)] == list(range(5))
    assert thread.loop.is_closed()


def test_an_exception_travels_to_whoever_submitted(loop_factory: LoopFactory) -> None:
    async def fail() -> None:
        raise LookupError("not here")

    with LoopThread(loop_factory) as thread:
        with pytest.raises(LookupError, match="not here"):
            thread.submit(fail()).result(10)
        assert thread.submit(asyncio.sleep(0, "alive")).result(10) == "alive"


def test_leaving_cancels_what_runs_and_waits_for_it(loop_factory: LoopFactory) -> None:
    started, tidied = threading.Event(), threading.Event()

    async def wait_for_ever() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            tidied.set()

    with LoopThread(loop_factory) as thread:
        future = thread.submit(wait_for_ever())
        assert started.wait(10)
    assert tidied.is_set()
    with pytest.raises(concurrent.futures.CancelledError):
        future.result(0)


def test_an_exception_of_the_caller_ends_the_thread_too(loop_factory: LoopFactory) -> None:
    threads = []

    def compute() -> None:
        with LoopThread(loop_factory) as thread:
            threads.append(thread)
            thread.submit(asyncio.Event().wait())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute()
    assert threads[0].loop.is_closed()


def test_leaving_finishes_asynchronous_generators(loop_factory: LoopFactory) -> None:
    finished = threading.Event()

    async def count() -> object:
        try:
            for i in range(10):
                yield i
        finally:
            finished.set()

    generators = []

    async def begin() -> int:
        generators.append(count())
        return await anext(generators[0])

    with LoopThread(loop_factory) as thread:
        assert thread.submit(begin()).result(10) == 0
        assert not finished.is_set()
    assert finished.is_set()
