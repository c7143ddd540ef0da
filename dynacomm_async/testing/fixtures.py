"""Pytest fixtures that start parameter servers and faulty links; needs pytest.

In the ``conftest.py`` of your tests::

    pytest_plugins = ["dynacomm_async.testing.fixtures"]

and in a test::

    def test_my_loop_survives_a_reset(start_server, start_link):
        server = start_server({"w": 10}, workers=1, steps=3, initial=np.zeros(10, np.float32))
        link = start_link(server.address, "reset:up@bytes=100,connection=0")
        my_loop(link.address)
        assert server.result().steps == 3
        assert link.fired == {"reset:up@bytes=100,connection=0": 1}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from dynacomm_async.testing.faulty import FaultyLink
from dynacomm_async.testing.serving import RunningServer

__all__ = ["start_link", "start_server"]


@pytest.fixture
def start_server() -> Iterator[Callable[..., RunningServer]]:
    """Start servers that stop with the test; call it as :class:`RunningServer` is made."""
    with ExitStack() as stack:

        def start(*args: Any, **options: Any) -> RunningServer:
            return stack.enter_context(RunningServer(*args, **options))

        yield start


@pytest.fixture
def start_link() -> Iterator[Callable[..., FaultyLink]]:
    """Start links that stop with the test; call it as :class:`FaultyLink` is made."""
    with ExitStack() as stack:

        def start(*args: Any, **settings: Any) -> FaultyLink:
            return stack.enter_context(FaultyLink(*args, **settings))

        yield start
