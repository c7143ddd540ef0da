"""Who has which rank, who is away for a while, and who has come too late.

A *term* numbers the memberships of a run and grows with each. Within a term each reconnect raises
the number of the *connection*. Both only fence: what training counts is keyed (slot, step, cell),
see :mod:`dynacomm_async.server.rounds`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from dynacomm_async.server.member import Member, Refusal
from dynacomm_async.wire.messages import Membership

__all__ = ["Place", "Places"]

_RETURN_S = 3.0
"""How long after a server's restart its members' places are kept from newcomers: a worker looks
for its server every 2 s at least."""


@dataclass(slots=True, eq=False)
class Place:
    """One rank that is taken.

    Attributes:
        slot: the rank.
        term: number of the membership that has it.
        connection: number of the membership's latest connection; -1 before its first one here.
        member: that connection, or None while the member is away.
        peer: where it is, for people.
        counted: whether training counts on the rank, be it for whoever had it before.
        entered: whether training knows of this membership.
        begun: whether its first parameters may go out to it, or did.
        refusals: how many of its contributions were refused.
        refused_at: the step of the last one; -2: there was none.
        has_left: whether its member has said that it goes.
    """

    slot: int
    term: int
    connection: int = 0
    member: Member | None = None
    peer: str = "not seen since the server's restart"
    counted: bool = False
    entered: bool = False
    begun: bool = False
    refusals: int = 0
    refused_at: int = -2
    has_left: bool = False
    _sent: int = -1
    _away: asyncio.TimerHandle | None = field(default=None, repr=False)
    _away_since: float = field(default=0.0, repr=False)

    @property
    def seen(self) -> bool:
        """Whether its member has been here since the server began."""
        return self.connection >= 0

    @property
    def has_been_sent(self) -> int:
        """The highest version of which anything was sent to the membership; -1: nothing was."""
        return self._sent if self.member is None else max(self._sent, self.member.sent)

    def connect(self, member: Member | None) -> None:
        """The membership has another connection; None: it has none."""
        self._sent = self.has_been_sent
        self.member = member

    def wait(self, limit_s: float, give_up: Callable[[], None]) -> None:
        """The member is away: call ``give_up`` unless it is back within the limit."""
        loop = asyncio.get_running_loop()
        self.connect(None)
        self.stop_waiting()
        self._away = loop.call_later(limit_s, give_up)
        self._away_since = loop.time()

    @property
    def away_s(self) -> float:
        """For how long its member has been away."""
        return asyncio.get_running_loop().time() - self._away_since

    def stop_waiting(self) -> None:
        """Nobody is waited for any more. Idempotent."""
        if self._away is not None:
            self._away.cancel()
            self._away = None


class Places:
    """The ranks of a run.

    Args:
        n_slots: how many there are.
        term: the highest term that was given out before.
    """

    def __init__(self, n_slots: int, term: int = 0) -> None:
        self.term = term
        self.n_slots = n_slots
        self._taken: dict[int, Place] = {}
        self._expelled: dict[int, int] = {}  # by slot: the last term that was
        self._heirs: dict[int, tuple[int, Member]] = {}  # by slot: a term, and who is to have it
        self._disinherited: dict[int, int] = {}  # by slot: the last term that nobody came to have

    def __iter__(self) -> Iterator[Place]:
        return iter([self._taken[slot] for slot in sorted(self._taken)])

    def __len__(self) -> int:
        return len(self._taken)

    @property
    def members(self) -> list[Member]:
        """Those who are there, in rank order."""
        return [place.member for place in self if place.member is not None]

    @property
    def free(self) -> list[int]:
        """Ranks that nobody has, ascending."""
        return [slot for slot in range(self.n_slots) if slot not in self._taken]

    def at(self, slot: int) -> Place | None:
        """Return the place of a rank, or None while nobody has it."""
        return self._taken.get(slot)

    @property
    def away(self) -> list[int]:
        """Ranks whose members are away, those first that have been for longest."""
        places = [place for place in self if place.member is None]
        return [place.slot for place in sorted(places, key=lambda place: -place.away_s)]

    @property
    def vacant(self) -> list[int]:
        """Those of them that a newcomer may have: after a server's restart its members come first,
        which have never really been away."""
        return [
            slot
            for slot in self.away
            if slot not in self._heirs
            and (self._taken[slot].seen or self._taken[slot].away_s >= _RETURN_S)
        ]

    def of(self, member: Member) -> Place | None:
        """Return the place that this connection holds now."""
        place = None if member.slot is None else self._taken.get(member.slot)
        return place if place is not None and place.member is member else None

    def take(self, slot: int, member: Member) -> Place:
        """Give a rank to a newcomer, under a new term, whoever may have had it before."""
        former = self._taken.get(slot)
        self.release(slot)
        self.term += 1
        place = Place(slot, self.term, 0, member, member.channel.peer)
        place.counted = former is not None and former.counted
        self._taken[slot] = place
        return place

    def promise(self, slot: int, member: Member) -> int:
        """Let a stranger have the rank of one who is away, once it joins; return its term.

        Until then the one who is away may come back.
        """
        self.term += 1
        self._heirs[slot] = (self.term, member)
        return self.term

    def inherit(self, member: Member) -> Place | None:
        """Give a stranger what it was promised; None where the other one has come back since, or
        nothing was promised.
        """
        for slot, (term, heir) in list(self._heirs.items()):
            former = self._taken.get(slot)
            if heir is member and (former is None or former.member is None):
                del self._heirs[slot]  # the term is a membership's from now on
                place = self.take(slot, member)
                place.term = term
                return place
        self.disinherit(member)
        return None

    def disinherit(self, member: Member) -> None:
        """The stranger has gone; what it was promised is as it was before."""
        for slot, (term, heir) in list(self._heirs.items()):
            if heir is member:
                del self._heirs[slot]
                self._disinherited[slot] = term

    def hold(self, slot: int, term: int) -> Place:
        """Keep a rank for a member of an earlier life of the server."""
        self.term = max(self.term, term)
        place = Place(slot, term, connection=-1, counted=True, entered=True, begun=True)
        self._taken[slot] = place
        return place

    def release(self, slot: int) -> None:
        """Nobody has the rank any more."""
        place = self._taken.pop(slot, None)
        if place is not None:
            place.stop_waiting()

    def expel(self, place: Place) -> None:
        """Nobody has the rank any more, and whoever had it is refused when it comes back."""
        self._expelled[place.slot] = place.term
        self.release(place.slot)

    def come_back(self, claimed: Membership, member: Member) -> Place | None:
        """Give a member its place back; None where nobody has it, and never had in this run.

        Where a checkpoint is older than the membership, the server that gave it out has died since:
        the place is that of the first who comes back to it, and whom it replaced is too late.

        Returns:
            the place; ``member`` of it is still the former connection, if there is one.

        Raises:
            Refusal: it was expelled, another membership has the place by now, or a later
                connection was here already.
        """
        if self._expelled.get(claimed.slot) == claimed.term:
            raise Refusal(
                "quarantined",
                f"the gradients of rank {claimed.slot} (term {claimed.term}) were refused too "
                "often; look at its data and its processor before it is started anew",
            )
        place = self._taken.get(claimed.slot)
        if place is None and 0 <= claimed.slot < self.n_slots:
            return None
        if self._disinherited.get(claimed.slot) == claimed.term:
            return None  # it has never had the place
        if place is not None and not place.seen and place.term < claimed.term <= self.term:
            place.term = claimed.term
        if place is None or place.term != claimed.term:
            raise Refusal(
                "term-outdated",
                f"the membership of rank {claimed.slot} that this worker comes back to (term "
                f"{claimed.term}) has ended, and another has its place; start the worker anew",
            )
        if claimed.connection <= place.connection:
            raise Refusal(
                "connection-outdated",
                f"rank {claimed.slot} was here with connection {place.connection} already; "
                f"connection {claimed.connection} comes too late",
            )
        place.connection = claimed.connection
        place.peer = member.channel.peer
        place.stop_waiting()
        return place
