"""The table of who may send what when, tried out in full."""

from __future__ import annotations

from itertools import product

import pytest

from dynacomm_async.errors import LocalProtocolError, RemoteProtocolError
from dynacomm_async.wire import MessageKind, Role, SessionStates, State
from dynacomm_async.wire.states import _TABLE

# How an end with nothing in its way reaches each state.
PATHS = {
    (Role.WORKER, State.NEW): [],
    (Role.WORKER, State.GREETED): [MessageKind.HELLO],
    (Role.WORKER, State.MEMBER): [MessageKind.HELLO, MessageKind.JOIN],
    (Role.WORKER, State.ENDED): [MessageKind.HELLO, MessageKind.LEAVE],
    (Role.SERVER, State.NEW): [],
    (Role.SERVER, State.GREETED): [MessageKind.WELCOME],
    (Role.SERVER, State.MEMBER): [MessageKind.WELCOME, MessageKind.PARAMETERS],
    (Role.SERVER, State.ENDED): [MessageKind.ERROR],
}
EVERYTHING = list(product(Role, State, State, MessageKind))


def reach(keeper: Role, worker: State, server: State) -> SessionStates:
    """States kept by ``keeper``, with both ends as far as asked."""
    states = SessionStates(keeper)
    states._states = {Role.WORKER: worker, Role.SERVER: server}
    return states


def allowed(sender: Role, ours: State, theirs: State, kind: MessageKind) -> State | None:
    row = _TABLE.get((sender, ours, kind))
    return row[1] if row is not None and theirs in row[0] else None


@pytest.mark.parametrize(("role", "state"), list(PATHS))
def test_every_state_is_reached_by_messages_alone(role: Role, state: State) -> None:
    states = SessionStates(role)
    other = {Role.WORKER: MessageKind.WELCOME, Role.SERVER: MessageKind.HELLO}[role]
    if role is Role.SERVER:
        states.receive(other)
    for kind in PATHS[role, state]:
        if kind is MessageKind.JOIN:
            states.receive(other)
        if kind is MessageKind.PARAMETERS:
            states.receive(MessageKind.JOIN)
        states.send(kind)
    assert states.ours is state


def test_each_message_is_taken_just_where_the_table_has_it() -> None:
    for role, ours, theirs, kind in EVERYTHING:
        sender = {role: ours, role.other: theirs}
        worker, server = sender[Role.WORKER], sender[Role.SERVER]
        at_sender, at_receiver = (reach(keeper, worker, server) for keeper in (role, role.other))
        following = allowed(role, ours, theirs, kind)
        if following is None:
            with pytest.raises(LocalProtocolError, match=f"{role.value} in state .*{kind.name}"):
                at_sender.send(kind)
            with pytest.raises(RemoteProtocolError, match=f"{role.value} in state .*{kind.name}"):
                at_receiver.check_receive(kind)
            with pytest.raises(RemoteProtocolError, match=f"{role.value} in state .*{kind.name}"):
                at_receiver.receive(kind)
            following = ours
        else:
            at_sender.send(kind)
            at_receiver.check_receive(kind)
            assert at_receiver.theirs is ours, "a check moves nothing"
            at_receiver.receive(kind)
        assert (at_sender.ours, at_sender.theirs) == (following, theirs)
        assert (at_receiver.theirs, at_receiver.ours) == (following, theirs)


def test_nothing_may_follow_the_end() -> None:
    assert not [key for key in _TABLE if key[1] is State.ENDED]


def test_an_error_may_be_said_in_every_state_but_the_last() -> None:
    for role, ours, theirs in product(Role, State, State):
        expected = None if ours is State.ENDED else State.ENDED
        assert allowed(role, ours, theirs, MessageKind.ERROR) is expected


def test_no_message_kind_belongs_to_nobody() -> None:
    assert {kind for _, _, kind in _TABLE} == set(MessageKind)


def test_coming_back_is_legal_and_needs_no_join() -> None:
    kind = MessageKind
    said = [
        (Role.WORKER, kind.HELLO),
        (Role.SERVER, kind.WELCOME),
        (Role.WORKER, kind.RESUME),
        (Role.SERVER, kind.HAVE),
        (Role.WORKER, kind.GRADIENTS),
        (Role.SERVER, kind.END),
        (Role.WORKER, kind.LEAVE),
    ]
    take_part(said)


def take_part(said: list[tuple[Role, MessageKind]]) -> None:
    ends = [SessionStates(role) for role in Role]
    for sender, kind_said in said:
        for end in ends:
            (end.send if end.role is sender else end.receive)(kind_said)
    assert {end.ours for end in ends} == {State.ENDED}


def test_a_run_from_hello_to_end_is_legal() -> None:
    kind = MessageKind
    said = [
        (Role.WORKER, kind.HELLO),
        (Role.SERVER, kind.WELCOME),
        (Role.WORKER, kind.HEARTBEAT),
        (Role.SERVER, kind.HEARTBEAT),
        (Role.WORKER, kind.JOIN),
        (Role.WORKER, kind.INITIAL),
        (Role.SERVER, kind.PARAMETERS),
        (Role.WORKER, kind.GRADIENTS),
        (Role.SERVER, kind.PARAMETERS),
        (Role.WORKER, kind.GRADIENTS),
        (Role.SERVER, kind.PARAMETERS),
        (Role.SERVER, kind.END),
        (Role.WORKER, kind.LEAVE),
    ]
    take_part(said)
