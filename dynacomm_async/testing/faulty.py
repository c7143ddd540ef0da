"""A link on which things go wrong, for tests that block: a relay in a thread of its own."""

from __future__ import annotations

from typing import Any

from dynacomm_async.addresses import Address
from dynacomm_async.link import Counters, Link, LinkSettings, parse_fault
from dynacomm_async.testing.threaded import Threaded

__all__ = ["FaultyLink"]


class FaultyLink(Threaded[Link]):
    """A relay in front of a server, whose connections suffer what the test says.

    Example::

        with FaultyLink(server.address, "reset:up@bytes=9000,connection=0", delay_s=0.005) as link:
            train_against(link.address)
            assert link.fired == {"reset:up@bytes=9000,connection=0": 1}

    A fault that has never fired has tested nothing: check :attr:`fired`.

    Args:
        to: the server's address.
        faults: each as :func:`dynacomm_async.link.parse_fault` reads it.
        settings: what else :class:`dynacomm_async.link.LinkSettings` takes, such as rates. How
            well they are kept depends on the machine; exactness wants a process of its own
            (:class:`dynacomm_async.link.LinkProcess`).

    Raises:
        ConfigError: not a fault, or values that cannot be.
    """

    def __init__(self, to: tuple[str, int], *faults: str, **settings: Any) -> None:
        self._by_hand: dict[str, int] = {}
        described = LinkSettings(faults=tuple(map(parse_fault, faults)), **settings)
        super().__init__(lambda: Link(described, to))

    @property
    def address(self) -> Address:
        """Where workers connect to."""
        return self.inner.address

    @property
    def fired(self) -> dict[str, int]:
        """How often each fault happened, by its full text, once for each connection it struck."""
        return {**self.inner.faults, **self._by_hand}

    @property
    def counters(self) -> Counters:
        """Messages and bytes each way, live."""
        return self.inner.counters

    def fire(self, fault: str) -> int:
        """Have a fault without a trigger happen now; return to how many connections.

        Raises:
            ConfigError: not a fault, or one with a trigger.
        """
        parsed = parse_fault(fault, on_demand=True)
        struck = self.call(self.inner.fire, parsed)
        self._by_hand[str(parsed)] = self._by_hand.get(str(parsed), 0) + struck
        return struck
