"""An event loop whose clock a test moves: limits of seconds pass in no time, and none by chance."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["FakeClockLoop", "pass_time"]

_TURNS = 3
"""Turns of the loop after each bit of time, for what a timer starts to get done."""


class FakeClockLoop(asyncio.SelectorEventLoop):
    """A loop whose time stands still until it is moved; timers that are due run in order.

    Example::

        async def main():
            timer = asyncio.get_running_loop().call_later(60, limit_is_over)
            await pass_time(61)

        with asyncio.Runner(loop_factory=FakeClockLoop) as runner:
            runner.run(main())

    Whoever sleeps on it sleeps until somebody calls :func:`pass_time`; sockets and threads keep
    their own pace.

    Attributes:
        now_s: what :meth:`time` returns.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def time(self) -> float:
        """Return the fake time in seconds."""
        return self.now_s


async def pass_time(
    seconds: float, each: Callable[[], object] | None = None, *, tick_s: float = 0.05
) -> None:
    """Let time pass on the running :class:`FakeClockLoop`, tick by tick.

    Args:
        seconds: how much; a whole number of ticks.
        each: called in each tick, before what is due.
        tick_s: the bits in which it passes.
    """
    loop = asyncio.get_running_loop()
    assert isinstance(loop, FakeClockLoop), "time passes by itself on any other loop"
    for _ in range(round(seconds / tick_s)):
        loop.now_s += tick_s
        if each is not None:
            each()
        for _ in range(_TURNS):
            await asyncio.sleep(0)
