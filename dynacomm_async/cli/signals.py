"""Ctrl-C and SIGTERM: end soon, without a traceback, with nothing left running.

While a command is prepared (imports, data) it owns nothing that needs an orderly end, so it ends
at once. An exception would not do: raised in the callback of a weak reference, of which imports
have many, it is printed and lost. While a command runs, both signals raise KeyboardInterrupt.
Where it runs on an event loop, each signal cancels the main task instead, the second like the
first: raised in whatever the loop is at, an exception would end some other task.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

__all__ = ["INTERRUPTED", "end_at_once", "exit_code", "interruptible", "run"]

INTERRUPTED = 128 + signal.SIGINT
"""The exit code after Ctrl-C."""

T = TypeVar("T")

_received: list[int] = []


def end_at_once() -> None:
    """From now on both signals end the process, unless it was started to ignore Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(number, _end)


def exit_code() -> int:
    """Return the exit code that the signal which ended the command asks for."""
    return 128 + (_received[0] if _received else signal.SIGINT)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within this block, both signals raise KeyboardInterrupt in the main thread."""
    if signal.getsignal(signal.SIGINT) is not _end:
        yield  # not the program's own signals: called as a function, or told to ignore Ctrl-C
        return
    signal.signal(signal.SIGTERM, _as_interrupt)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        end_at_once()


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine on the library's event loop, to be cancelled by each signal.

    Raises:
        KeyboardInterrupt: a signal has ended it.
    """
    from asyncio import CancelledError

    from dynacomm_async.transport import run as run_on_loop

    if signal.getsignal(signal.SIGINT) is not _end:
        return run_on_loop(main)  # called as a function, or told to ignore Ctrl-C
    try:
        return run_on_loop(_cancelled_by_signals(main))
    except CancelledError:
        if not _received:
            raise
        raise KeyboardInterrupt from None


async def _cancelled_by_signals(main: Coroutine[Any, Any, T]) -> T:
    import asyncio

    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def cancel(number: int) -> None:
        _received.append(number)
        task.cancel()

    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, cancel, number)
    try:
        return await main
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
        end_at_once()


def _end(number: int, frame: object) -> None:
    os._exit(128 + number)


def _as_interrupt(number: int, frame: object) -> None:
    _received.append(number)
    signal.raise_signal(signal.SIGINT)
