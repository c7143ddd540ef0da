"""A pytest fixture that starts parameter servers; needs pytest.

In a ``conftest.py``::

    from dynacomm_async.testing.fixtures import start_server

and in a test::

    def test_my_loop_trains(start_server):
        server = start_server({"w": 10}, workers=1, steps=3, initial=np.zeros(10, np.float32))
        my_loop(server.address)
        assert server.result().steps == 3
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from dynacomm_async.testing.serving import RunningServer

__all__ = ["start_server"]


@pytest.fixture
def start_server() -> Iterator[Callable[..., RunningServer]]:
    """Start servers that stop with the test; call it as :class:`RunningServer` is made."""
    with ExitStack() as stack:
        yield lambda *args, **options: _start(stack, *args, **options)


def _start(stack: ExitStack, *args: Any, **options: Any) -> RunningServer:
    return stack.enter_context(RunningServer(*args, **options))
