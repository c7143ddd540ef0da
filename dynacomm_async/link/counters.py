"""How many messages and bytes have been on the link, by direction, kind and step."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Final

from dynacomm_async.wire.frame import PREFIX_NBYTES, MessageKind, Prefix

__all__ = ["Counters", "KindTally", "Tally"]


KEPT_STEPS: Final = 10_000
"""Steps of a kind that are counted apart; a link may run for months."""


@dataclass(slots=True)
class KindTally:
    """Whole messages of one kind.

    Attributes:
        messages: how many.
        nbytes: their bytes.
        steps: how many of them by the prefix's step, for the 10,000 steps that appeared last.
    """

    messages: int = 0
    nbytes: int = 0
    # Ordered: a plain dict forgets its oldest entry in time that grows with its size.
    steps: OrderedDict[int, int] = field(default_factory=OrderedDict)

    def add(self, step: int, nbytes: int) -> None:
        """Count one whole message."""
        self.messages += 1
        self.nbytes += nbytes
        self.steps[step] = self.steps.get(step, 0) + 1
        if len(self.steps) > KEPT_STEPS:
            self.steps.popitem(last=False)

    def to_json(self) -> dict[str, Any]:
        """Return ``{"messages":, "bytes":, "steps": {"0": messages, ...}}``."""
        steps = {str(step): self.steps[step] for step in sorted(self.steps)}
        return {"messages": self.messages, "bytes": self.nbytes, "steps": steps}


@dataclass(slots=True)
class Tally:
    """Whole messages of one direction. Bytes include prefix and header."""

    messages: int = 0
    nbytes: int = 0
    kinds: dict[MessageKind, KindTally] = field(default_factory=dict)

    def add(self, message: Prefix) -> None:
        """Count one whole message."""
        nbytes = PREFIX_NBYTES + message.header_nbytes + message.payload_nbytes
        self.messages += 1
        self.nbytes += nbytes
        kind = self.kinds.get(message.kind)
        if kind is None:
            kind = self.kinds[message.kind] = KindTally()
        kind.add(message.step, nbytes)

    def to_json(self) -> dict[str, Any]:
        """Return ``{"messages":, "bytes":, "kinds": {"GRADIENTS": {...}, ...}}``."""
        kinds = {kind.name: self.kinds[kind].to_json() for kind in sorted(self.kinds)}
        return {"messages": self.messages, "bytes": self.nbytes, "kinds": kinds}


@dataclass(slots=True)
class Counters:
    """Both directions of one connection, or of all connections together.

    A message counts once its last byte has got its time on the medium. Bytes that are not
    dynacomm messages are not counted.
    """

    up: Tally = field(default_factory=Tally)
    down: Tally = field(default_factory=Tally)

    def to_json(self) -> dict[str, Any]:
        """Return ``{"up": {...}, "down": {...}}``; see :meth:`Tally.to_json`."""
        return {"up": self.up.to_json(), "down": self.down.to_json()}
