"""Who may send what, when: one table for both ends of a connection.

Each end has a state that only its own messages move. A row of the table allows a message kind in
a state, names the states of the *other* end in which it may be sent, and the state that it leads
to. What is not in the table is illegal.
"""

from __future__ import annotations

from enum import Enum

from dynacomm_async.errors import LocalProtocolError, RemoteProtocolError
from dynacomm_async.wire.frame import MessageKind as Kind

__all__ = ["Role", "SessionStates", "State"]


class Role(Enum):
    """The two ends of a connection."""

    WORKER = "worker"
    SERVER = "server"

    __hash__ = object.__hash__  # members are unique; hashing their names costs a call each

    @property
    def other(self) -> Role:
        """The opposite end."""
        return Role.SERVER if self is Role.WORKER else Role.WORKER


class State(Enum):
    """How far one end has come, by the messages that it has sent."""

    NEW = "new"
    GREETED = "greeted"  # worker: hello sent; server: welcome sent
    MEMBER = "member"  # worker: join or resume sent; server: have, skip or first parameters sent
    ENDED = "ended"  # nothing may follow

    __hash__ = object.__hash__


_OTHER = {role: role.other for role in Role}

_ANY = frozenset(State)
_OPEN = frozenset({State.NEW, State.GREETED, State.MEMBER})
_GREETED = frozenset({State.GREETED, State.MEMBER})
_MEMBER = frozenset({State.MEMBER})

_Row = tuple[frozenset[State], State]
_TABLE: dict[tuple[Role, State, Kind], _Row] = {
    (Role.WORKER, State.NEW, Kind.HELLO): (_ANY, State.GREETED),
    (Role.WORKER, State.GREETED, Kind.HEARTBEAT): (_GREETED, State.GREETED),
    (Role.WORKER, State.GREETED, Kind.JOIN): (_GREETED, State.MEMBER),
    (Role.WORKER, State.GREETED, Kind.RESUME): (frozenset({State.GREETED}), State.MEMBER),
    (Role.WORKER, State.MEMBER, Kind.INITIAL): (frozenset({State.GREETED}), State.MEMBER),
    (Role.WORKER, State.MEMBER, Kind.HEARTBEAT): (_ANY, State.MEMBER),
    (Role.WORKER, State.MEMBER, Kind.GRADIENTS): (_MEMBER, State.MEMBER),
    (Role.WORKER, State.MEMBER, Kind.SUBSCRIBE): (_MEMBER, State.MEMBER),
    (Role.SERVER, State.NEW, Kind.WELCOME): (_GREETED, State.GREETED),
    (Role.SERVER, State.GREETED, Kind.HEARTBEAT): (_ANY, State.GREETED),
    (Role.SERVER, State.GREETED, Kind.HAVE): (_MEMBER, State.MEMBER),
    (Role.SERVER, State.GREETED, Kind.PARAMETERS): (_MEMBER, State.MEMBER),
    (Role.SERVER, State.GREETED, Kind.SKIP): (_MEMBER, State.MEMBER),
    (Role.SERVER, State.MEMBER, Kind.PARAMETERS): (_MEMBER, State.MEMBER),
    (Role.SERVER, State.MEMBER, Kind.SKIP): (_MEMBER, State.MEMBER),
    (Role.SERVER, State.MEMBER, Kind.HEARTBEAT): (_ANY, State.MEMBER),
    (Role.SERVER, State.MEMBER, Kind.END): (_ANY, State.ENDED),
}
for _role in Role:
    for _state in _OPEN:
        _TABLE[_role, _state, Kind.ERROR] = (_ANY, State.ENDED)
for _state in (State.GREETED, State.MEMBER):
    _TABLE[Role.WORKER, _state, Kind.LEAVE] = (_ANY, State.ENDED)


class SessionStates:
    """The states of both ends of one connection, kept by one of them.

    Args:
        role: which end keeps it.
    """

    def __init__(self, role: Role) -> None:
        self.role = role
        self._other = role.other
        self._states = {Role.WORKER: State.NEW, Role.SERVER: State.NEW}

    @property
    def ours(self) -> State:
        """How far this end has come."""
        return self._states[self.role]

    @property
    def theirs(self) -> State:
        """How far the other end has come."""
        return self._states[self.role.other]

    def send(self, kind: Kind) -> None:
        """Move on by a message that this end is about to send.

        Raises:
            LocalProtocolError: not now; nothing has changed.
        """
        state = self._next_state(self.role, kind)
        if state is None:
            raise LocalProtocolError(self._complaint(self.role, kind))
        self._states[self.role] = state

    def receive(self, kind: Kind) -> None:
        """Move on by a message from the other end.

        Raises:
            RemoteProtocolError: not now; nothing has changed.
        """
        state = self._next_state(self._other, kind)
        if state is None:
            raise RemoteProtocolError(self._complaint(self._other, kind))
        self._states[self._other] = state

    def check_receive(self, kind: Kind) -> None:
        """Make sure that the other end may send such a message now. Nothing changes.

        Raises:
            RemoteProtocolError: it may not.
        """
        if self._next_state(self._other, kind) is None:
            raise RemoteProtocolError(self._complaint(self._other, kind))

    def _next_state(self, sender: Role, kind: Kind) -> State | None:
        states = self._states
        row = _TABLE.get((sender, states[sender], kind))
        return None if row is None or states[_OTHER[sender]] not in row[0] else row[1]

    def _complaint(self, sender: Role, kind: Kind) -> str:
        return (
            f"a {sender.value} in state {self._states[sender].value!r} may not send "
            f"{kind.name} while the {sender.other.value} is {self._states[sender.other].value!r}"
        )
