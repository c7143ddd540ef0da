"""Addresses as people write them, and which of them stay on this machine."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

from dynacomm_async.errors import ConfigError

__all__ = ["Address", "check_listen", "is_loopback", "parse_address"]


class Address(NamedTuple):
    """A host name or IP address, and a TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str, *, port: int | None = None) -> Address:
    """Return the address in ``host:port``, ``[::1]:port`` or, with a default ``port``, ``host``.

    Raises:
        ConfigError: it is neither.
    """
    host, separator, digits = text.rpartition(":")
    if text.isdigit():  # a port alone: not a host of that name
        separator = ":"
    if (text.startswith("[") and text.endswith("]")) or not separator:
        host, digits = text, "" if port is None else str(port)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""  # an IPv6 address without brackets: where would the port begin?
    if not host or not _is_port(digits):
        raise ConfigError(
            f"{text!r} is not an address: expected HOST:PORT with a port from 0 to 65535, "
            "such as 127.0.0.1:7070 or [::1]:7070"
        )
    return Address(host, int(digits))


def _is_port(digits: str) -> bool:
    return digits.isascii() and digits.isdigit() and len(digits) <= 5 and int(digits) <= 65535


def is_loopback(host: str) -> bool:
    """Return whether an IP address (or the name ``localhost``) stays on this machine."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def check_listen(address: Address, *, insecure: bool) -> None:
    """Refuse to listen where other machines can reach it, unless ``insecure`` allows that.

    Raises:
        ConfigError: the address is not a loopback one, and ``insecure`` is false.
    """
    if not insecure and not is_loopback(address.host):
        raise ConfigError(
            f"listening on {address} lets other machines in without authentication; "
            "pass --insecure (insecure=True) if the network is trusted, or listen on 127.0.0.1"
        )
