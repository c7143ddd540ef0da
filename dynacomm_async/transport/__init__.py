"""Channels that carry messages: TCP, and in memory. They know no layers and no plans."""

from dynacomm_async.addresses import Address, is_loopback, parse_address
from dynacomm_async.transport.channel import Channel, Handler
from dynacomm_async.transport.loop import LoopThread, new_event_loop, run
from dynacomm_async.transport.memory import MemoryChannel, memory_pair
from dynacomm_async.transport.tcp import (
    TcpChannel,
    TcpListener,
    allowed_congestion,
    check_congestion,
    connect,
    describe_failure,
    listen,
)

__all__ = [
    "Address",
    "Channel",
    "Handler",
    "LoopThread",
    "MemoryChannel",
    "TcpChannel",
    "TcpListener",
    "allowed_congestion",
    "check_congestion",
    "connect",
    "describe_failure",
    "is_loopback",
    "listen",
    "memory_pair",
    "new_event_loop",
    "parse_address",
    "run",
]
