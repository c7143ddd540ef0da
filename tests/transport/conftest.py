"""Pairs of channels of every kind, with handlers that record what they are told."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial

import pytest

from dynacomm_async.testing import (
    HANDSHAKE,
    ChannelPair,
    RecordingHandler,
    open_memory_pair,
    open_tcp_pair as open_tcp,
)
from dynacomm_async.wire import Message

OpenPair = Callable[..., AbstractAsyncContextManager[ChannelPair]]


@pytest.fixture
def open_pair(kind: str) -> OpenPair:
    """``async with open_pair() as pair``: ended, and each end's one loss checked, at the exit."""
    if kind.startswith("tcp"):
        return open_tcp
    if kind == "memory":
        return open_memory_pair
    return partial(open_memory_pair, 1, 30_011, 2, 7, 65_536)


@pytest.fixture
def open_tcp_pair() -> OpenPair:
    return open_tcp


@pytest.fixture
def new_recorder() -> type[RecordingHandler]:
    return RecordingHandler


@pytest.fixture
def handshake() -> tuple[Message, ...]:
    """Hello, welcome, join, first parameters, as sent in turn by worker and server."""
    return HANDSHAKE
