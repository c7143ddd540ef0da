"""Crews run shards side by side, add up in order, and end together."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from dynacomm_async.nn.crew import Crew

COUNTS = [1, 2, 3, 5]


@pytest.mark.parametrize("count", COUNTS)
def test_shards_cover_the_batch_as_evenly_as_can_be(count):
    members = Crew(17, count).members
    assert [n for m in members for n in range(17)[m.images]] == list(range(17))
    assert max(m.batch for m in members) - min(m.batch for m in members) <= 1
    assert all(m.whole_batch == 17 for m in members)


@pytest.mark.parametrize("count", COUNTS)
def test_the_first_acts_alone_when_all_have_come_and_before_any_goes_on(count):
    crew, notes = Crew(count, count), []

    def work(member):
        for turn in range(50):
            notes.append((turn, "comes"))
            member.meet(lambda turn=turn: notes.append((turn, "alone")))
            notes.append((turn, "goes"))

    crew.run(work)
    for turn in range(50):
        own = [what for when, what in notes if when == turn]
        assert own[:count] == ["comes"] * count
        assert own[count] == "alone"
        assert own[count + 1 :] == ["goes"] * count


@pytest.mark.parametrize("count", COUNTS)
def test_sums_are_taken_in_the_order_of_the_shards(count):
    crew = Crew(count, count)
    tables = [crew.members[0].table(use, 3, np.float32) for use in ("even", "odd")]
    parts = np.random.default_rng(0).standard_normal((count, 20, 3)).astype(np.float32)
    found = np.zeros((count, 20, 3), np.float32)

    def work(member):
        for turn in range(20):
            own = parts[member.index, turn].copy()
            member.add_up(own, tables[turn % 2])
            found[member.index, turn] = own

    crew.run(work)
    expected = np.zeros((20, 3), np.float32)
    for part in parts:
        expected += part
    for member in range(count):
        assert found[member].tobytes() == expected.tobytes()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("place", [0, 1, -1])
@pytest.mark.parametrize("when", ["between", "at once", "alone"])
def test_what_one_raises_reaches_the_caller_and_all_threads_end(count, place, when):
    crew, before = Crew(count, count), threading.active_count()
    failing = range(count)[min(place, count - 1)]

    def fail():
        raise ZeroDivisionError

    def work(member):
        fails = member.index == failing
        if fails and when == "at once":
            fail()
        member.meet()
        if fails and when == "between":
            fail()
        member.meet(fail if when == "alone" else None)
        member.meet()

    for _ in range(20):
        with pytest.raises(ZeroDivisionError):
            crew.run(work)
        assert threading.active_count() == before
    seen = []
    crew.run(lambda member: (member.meet(), seen.append(member.index)))
    assert sorted(seen) == list(range(count))
