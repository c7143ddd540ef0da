"""Who holds which slot: memberships, told from one another so that a former one is refused.

Pure: no sockets, no clock. A *term* numbers the memberships of a run and grows with each. Within a
term each reconnect raises the *connection*. Both only fence: what training counts is keyed (slot,
step, cell), see :mod:`dynacomm_async.server.rounds`.
"""

from __future__ import annotations

from typing import NamedTuple

from dynacomm_async.errors import RemoteProtocolError

__all__ = ["Roster", "Seat"]


class Seat(NamedTuple):
    """One membership as it stands.

    Attributes:
        slot: its rank.
        term: its number in the run, from 1.
        connection: how often it has reconnected.
    """

    slot: int
    term: int
    connection: int = 0


class Roster:
    """The memberships of a run.

    Args:
        n_slots: ranks.
        term: the highest term given so far, of a run that goes on after a restart.

    Attributes:
        term: the highest term given.
    """

    def __init__(self, n_slots: int, term: int = 0) -> None:
        self.term = term
        self._seats: list[Seat | None] = [None] * n_slots

    @property
    def free(self) -> tuple[int, ...]:
        """Slots that nobody holds, ascending."""
        return tuple(slot for slot, seat in enumerate(self._seats) if seat is None)

    def join(self, slot: int) -> Seat:
        """Give a slot to a newcomer under a new term, whoever may have held it before."""
        self.term += 1
        seat = Seat(slot, self.term)
        self._seats[slot] = seat
        return seat

    def reconnect(self, claimed: Seat) -> Seat:
        """Let a member come back on a connection with a higher number.

        Raises:
            RemoteProtocolError: its slot has passed on, or a later connection is there already.
        """
        held = self._find(claimed)
        if claimed.connection <= held.connection:
            raise RemoteProtocolError(
                f"{_name(claimed)} comes late: expected a connection above {held.connection}"
            )
        self._seats[claimed.slot] = claimed
        return claimed

    def check(self, claimed: Seat) -> None:
        """Make sure that a message comes from the latest connection of the present member.

        Raises:
            RemoteProtocolError: it comes from a former membership or connection.
        """
        held = self._find(claimed)
        if held != claimed:
            raise RemoteProtocolError(f"{_name(claimed)} is over: {_name(held)} has taken over")

    def leave(self, seat: Seat) -> bool:
        """Free the slot; return False where another membership or connection has it by now."""
        if self._seats[seat.slot] != seat:
            return False
        self._seats[seat.slot] = None
        return True

    def _find(self, claimed: Seat) -> Seat:
        held = self._seats[claimed.slot] if 0 <= claimed.slot < len(self._seats) else None
        if held is None or held.term != claimed.term:
            now = "nobody" if held is None else f"term {held.term}"
            raise RemoteProtocolError(
                f"{_name(claimed)} has ended: the slot is held by {now}; join as a newcomer"
            )
        return held


def _name(seat: Seat) -> str:
    return f"term {seat.term} of slot {seat.slot}, connection {seat.connection},"
