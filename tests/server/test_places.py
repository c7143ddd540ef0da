"""Who gets a place back after the server's restart, and who comes too late."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from dynacomm_async.server.member import Refusal
from dynacomm_async.server.places import Places
from dynacomm_async.wire.messages import Membership


def connection(slot):
    return SimpleNamespace(slot=slot, sent=-1, channel=SimpleNamespace(peer="somewhere"))


def restarted(term):
    """Places of a second life, where rank 0 is kept as the checkpoint has it."""
    places = Places(2, term=1 << 20)
    places.hold(0, term)
    return places


def test_a_membership_that_is_younger_than_the_checkpoint_comes_back_to_its_place():
    places = restarted(term=3)
    assert places.come_back(Membership(0, 5, 1, 1), connection(0)).term == 5
    with pytest.raises(Refusal, match="has ended"):  # whom it had replaced
        places.come_back(Membership(0, 3, 7, 1), connection(0))


def test_who_comes_back_first_after_a_restart_has_the_place():
    places = restarted(term=3)
    assert places.come_back(Membership(0, 3, 1, 1), connection(0)).term == 3
    with pytest.raises(Refusal, match="has ended"):
        places.come_back(Membership(0, 5, 1, 1), connection(0))


@pytest.mark.parametrize("term", [2, (1 << 20) + 1])
def test_an_older_membership_and_one_that_nobody_gave_out_are_refused(term):
    with pytest.raises(Refusal, match="has ended"):
        restarted(term=3).come_back(Membership(0, term, 1, 1), connection(0))


def test_without_a_restart_no_other_membership_comes_back():
    places = Places(2)
    places.take(0, connection(0))
    places.take(0, connection(0))
    for term in (1, 3):
        with pytest.raises(Refusal, match="has ended"):
            places.come_back(Membership(0, term, 1, 1), connection(0))


async def test_members_from_before_a_restart_come_before_newcomers_for_a_while():
    loop = asyncio.get_running_loop()
    now = loop.time()
    places = Places(3, term=1 << 20)
    for slot in (0, 1):
        places.hold(slot, term=3 + slot).wait(100, lambda: None)
    lost = connection(2)
    places.take(2, lost)
    places.of(lost).wait(100, lambda: None)
    try:
        assert places.away == [0, 1, 2]
        assert places.vacant == [2]
        loop.time = lambda: now + 10.0
        assert places.vacant == [0, 1, 2]
        back = connection(1)
        places.come_back(Membership(1, 4, 1, 1), back).member = back
        assert places.vacant == [0, 2]
    finally:
        for slot in range(3):
            places.release(slot)
