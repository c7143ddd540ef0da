"""A state machine drives rounds and roster beside a model that is nothing but sets.

The model is the specification: it says again after every event, from scratch, who takes part and
which cells are complete. Workers join, crash in the middle of a message, are replaced, come back
under an old term, push things twice, and overtake each other. What was applied is a history of
(step, cell, slots), judged at the end by a replay in NumPy from the pushes that were accepted.

``DYNACOMM_SEED`` repeats a run; its seed is printed.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, seed, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dynacomm_async.errors import LocalProtocolError, RemoteProtocolError
from dynacomm_async.ranges import Range
from dynacomm_async.server.clocks import StaleRounds
from dynacomm_async.server.member import Refusal
from dynacomm_async.server.places import Places
from dynacomm_async.server.rounds import Rounds
from dynacomm_async.wire.messages import Membership

N_CELLS = 5
RATE = np.float32(0.1)


def gradient(slot, term, step):
    """What the member of a term computes for all cells, one float each; terms differ on purpose."""
    return np.random.default_rng([slot, term, step]).standard_normal(N_CELLS).astype(np.float32)


def cells_of(ranges):
    return [cell for first, count in ranges for cell in range(first, first + count)]


def as_ranges(cells):
    return [Range(cell, 1) for cell in sorted(cells)]


@dataclass(frozen=True)
class Seat:
    """One membership over one connection, and its stand-in for a member."""

    slot: int
    term: int
    connection: int = 0

    @property
    def channel(self):
        return SimpleNamespace(peer="by hand")


class Roster:
    """A server's places, with seats for members."""

    def __init__(self, n_slots):
        self._places = Places(n_slots)

    def join(self, slot):
        seat = Seat(slot, self._places.term + 1)
        assert self._places.take(slot, seat).term == seat.term
        return seat

    def reconnect(self, seat):
        claimed = Membership(seat.slot, seat.term, seat.connection, 0)
        place = self._places.come_back(claimed, seat)
        if place is None:
            raise Refusal("term-outdated", f"nobody is in slot {seat.slot}")
        place.member = seat
        return seat

    def has(self, seat):
        return self._places.of(seat) is not None

    def leave(self, seat):
        if self.has(seat):
            self._places.release(seat.slot)


@dataclass
class Message:
    """One push under way."""

    seat: object
    step: int
    ranges: list
    counts: bool


@dataclass
class Model:
    """Synchronous training by its definition."""

    n_slots: int
    barrier: bool
    quorum: int | None
    step: int = 0
    present: set = field(default_factory=set)
    held: set = field(default_factory=set)
    owing: set = field(default_factory=set)  # who belongs to the step and has not left it
    pushed: dict = field(default_factory=dict)  # slot -> cells, of this step
    whole: list = field(default_factory=list)
    complete: set = field(default_factory=set)
    upcoming: set | None = None
    skipped: dict = field(default_factory=dict)
    refused: set = field(default_factory=set)
    applied: set = field(default_factory=set)

    def __post_init__(self):
        self.present = set(range(self.n_slots))
        self.begin()

    def begin(self):
        told = (self.upcoming or set()) & self.present
        self.owing = set(told or self.present)
        if self.quorum is not None:
            self.owing = set(self.present)
        self.pushed = {slot: set() for slot in range(self.n_slots)}
        self.whole, self.complete, self.applied, self.upcoming = [], set(), set(), None
        self.refused = set()

    def now_complete(self):
        everything = set(range(N_CELLS))
        if not any(self.pushed.values()) and not self.refused:
            return set()
        if self.quorum is not None:
            return everything if len(self.whole) >= self.needed() else set()
        done = {c for c in everything if all(c in self.pushed[slot] for slot in self.owing)}
        return done if not self.barrier or done == everything else set()

    def needed(self):
        """The quorum; where refusals have made it impossible, whoever is left."""
        possible = len(self.owing | set(self.whole))
        return max(min(self.quorum, possible), self.quorum - len(self.refused))

    def newly_complete(self):
        new = self.now_complete() - self.complete
        self.complete |= new
        if new and self.upcoming is None:
            self.upcoming = set(self.present)
            if self.quorum is not None:
                for slot in set(range(self.n_slots)) - set(self.whole):
                    self.skipped[slot] = self.step
        return new

    def contributors(self, cell):
        if self.quorum is not None:
            return tuple(sorted(self.whole[: self.quorum]))
        return tuple(slot for slot in range(self.n_slots) if cell in self.pushed[slot])

    def works(self, slot):
        """Whether a member in the slot is to push in this step."""
        return slot in self.owing and slot not in self.held

    def comes_too_late(self, slot):
        owes = slot in self.held & self.owing and len(self.pushed[slot]) < N_CELLS
        return owes and bool(self.complete)

    def enter(self, slot):
        everything = len(self.pushed[slot]) == N_CELLS
        if slot in self.held:
            self.held.remove(slot)
            if slot in self.owing and everything:
                self.owing.remove(slot)
            elif slot in self.owing:
                self.pushed[slot] = set()
            return
        self.present.add(slot)
        if self.quorum is not None:
            if not self.complete and not everything and slot not in self.refused:
                self.owing.add(slot)
                self.pushed[slot] = set()
        elif not self.complete and not self.owing and not any(self.pushed.values()):
            self.begin()

    def hold(self, slot):
        if slot in self.owing or slot in (self.upcoming or ()):
            self.held.add(slot)
        else:
            self.present.remove(slot)

    def leave(self, slot):
        self.present.discard(slot)
        self.held.discard(slot)
        was_in = slot in self.owing
        self.owing.discard(slot)
        nothing = not self.refused and not any(self.pushed.values())
        if was_in and self.quorum is None and not self.owing and nothing:
            self.begin()
        return self.newly_complete()

    def refuse(self, slot):
        self.skipped[slot] = self.step
        if slot in self.owing:
            self.owing.remove(slot)
            self.refused.add(slot)
            self.pushed[slot] = set()
        return self.newly_complete()

    def push(self, slot, step, cells):
        if step <= self.skipped.get(slot, -1):
            return set()
        self.pushed[slot] |= set(cells)
        if len(self.pushed[slot]) == N_CELLS:
            self.whole.append(slot)
        return self.newly_complete()

    def apply(self, cells):
        assert cells <= self.complete - self.applied
        self.applied |= cells
        if len(self.applied) == N_CELLS:
            self.step += 1
            self.begin()
            return True
        return False


class Synchronous(RuleBasedStateMachine):
    """Rounds and their model, with the arithmetic of a server around them."""

    mode = "shrink"

    @initialize(n_slots=st.integers(1, 4), data=st.data())
    def start(self, n_slots, data):
        mode = self.mode
        quorum = data.draw(st.integers(1, n_slots)) if mode == "quorum" else None
        self.rounds = Rounds(N_CELLS, n_slots, barrier=mode == "wait", quorum=quorum)
        self.model = Model(n_slots, mode == "wait", quorum)
        self.roster = Roster(n_slots)
        self.seats = {slot: self.roster.join(slot) for slot in range(n_slots)}
        self.former = []
        self.contributions = np.zeros((n_slots, N_CELLS), np.float32)
        self.arena = np.zeros(N_CELLS, np.float32)
        self.boundary = self.arena.copy()  # what it was when the step began
        self.under_way = {}  # slot -> message whose payload is arriving
        self.queue = []  # complete cells that have not been applied
        self.accepted = []  # (seat, step, cell) of pushes that arrived whole and counted
        self.history = []  # (step, cell, slots) in the order in which they were applied

    def slot_of(self, data, slots):
        return data.draw(st.sampled_from(sorted(slots)), label="slot")

    def take(self, complete, expected):
        assert sorted(cells_of(complete)) == sorted(expected)
        self.queue += complete

    # -- members --

    @precondition(lambda self: self.rounds.waiting or len(self.seats) < self.model.n_slots)
    @rule(data=st.data())
    def join(self, data):
        slot = self.slot_of(data, set(range(self.model.n_slots)) - set(self.seats))
        if self.model.comes_too_late(slot):
            assert not self.rounds.replaceable
            with pytest.raises(LocalProtocolError, match="too late to replace"):
                self.rounds.enter(slot)
            return
        seat = self.roster.join(slot)
        assert seat.term > max((old.term for old in self.former), default=0)
        self.seats[slot] = seat
        self.rounds.enter(slot)
        self.model.enter(slot)

    @precondition(lambda self: self.seats)
    @rule(data=st.data())
    def crash(self, data):
        slot = self.slot_of(data, self.seats)
        seat = self.seats.pop(slot)
        if slot in self.under_way:  # half of its last message arrived: it has scribbled
            message = self.under_way.pop(slot)
            if message.counts:
                self.contributions[slot, cells_of(message.ranges)[::2]] = np.nan
        self.roster.leave(seat)
        self.former.append(seat)
        if self.mode != "quorum" and data.draw(st.booleans(), label="waits"):
            self.rounds.hold(slot)
            self.model.hold(slot)
        else:
            self.take(self.rounds.leave(slot), self.model.leave(slot))

    @precondition(lambda self: self.seats and len(self.under_way) < len(self.seats))
    @rule(data=st.data())
    def crash_in_the_middle_and_be_replaced(self, data):
        if self.may_push():
            slot = self.slot_of(data, self.may_push())
            left = set(range(N_CELLS)) - self.model.pushed[slot]
            self.start_message(slot, set(sorted(left)[: 1 + len(left) // 2]))
            self.deliver(slot)
        self.crash(data)
        self.join(data)

    @precondition(lambda self: self.model.held)
    @rule(data=st.data())
    def give_up_waiting(self, data):
        slot = self.slot_of(data, self.model.held)
        self.take(self.rounds.leave(slot), self.model.leave(slot))

    @precondition(lambda self: self.seats)
    @rule(data=st.data())
    def reconnect(self, data):
        slot = self.slot_of(data, self.seats)
        old, seat = self.seats[slot], self.seats[slot]
        self.under_way.pop(slot, None)  # a message that was cut off has not been sent
        seat = self.roster.reconnect(replace(seat, connection=seat.connection + 1))
        self.seats[slot] = seat
        assert not self.roster.has(old)
        with pytest.raises(Refusal, match="comes too late"):
            self.roster.reconnect(old)
        self.roster.leave(old)
        assert self.roster.has(seat)
        if self.model.works(slot) and self.model.step > self.model.skipped.get(slot, -1):
            have = self.rounds.have(slot, self.model.step)
            assert set(cells_of(have)) == self.model.pushed[slot]
            for cells in have:
                with pytest.raises(RemoteProtocolError, match="were pushed before"):
                    self.rounds.check(slot, self.model.step, [cells])

    @precondition(lambda self: self.former)
    @rule(data=st.data())
    def former_member_returns(self, data):
        seat = data.draw(st.sampled_from(self.former))
        assert not self.roster.has(seat)
        with pytest.raises(Refusal, match=r"has ended|nobody is in"):
            self.roster.reconnect(replace(seat, connection=seat.connection + 1))

    # -- pushes --

    @precondition(lambda self: self.may_push())
    @rule(data=st.data())
    def begin_push(self, data):
        slot = self.slot_of(data, self.may_push())
        left = sorted(set(range(N_CELLS)) - self.model.pushed[slot])
        some = st.sets(st.sampled_from(left), min_size=1)
        self.start_message(slot, data.draw(some, label="cells"))

    def start_message(self, slot, cells):
        seat, step = self.seats[slot], self.model.step
        assert self.roster.has(seat)
        ranges = as_ranges(cells)
        counts = self.rounds.check(slot, step, ranges)
        assert counts == (step > self.model.skipped.get(slot, -1))
        self.under_way[slot] = Message(seat, step, ranges, counts)

    def may_push(self):
        """Who has cells to push. Late ones of a quorum push on until they hear that they skip."""
        free = [slot for slot in sorted(self.seats) if slot not in self.under_way]
        return [s for s in free if self.model.works(s) and len(self.model.pushed[s]) < N_CELLS]

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def end_push(self, data):
        self.deliver(self.slot_of(data, self.under_way))

    def deliver(self, slot):
        message = self.under_way.pop(slot)
        cells = cells_of(message.ranges)
        if message.counts:  # one that a quorum overtook may still be arriving, and is dropped
            values = gradient(slot, message.seat.term, message.step)
            self.contributions[slot, cells] = values[cells]
        counted = message.step > self.model.skipped.get(slot, -1)
        complete = self.rounds.push(slot, message.step, message.ranges)
        self.take(complete, self.model.push(slot, message.step, cells))
        if counted:
            self.accepted += [(message.seat, message.step, cell) for cell in cells]

    @precondition(lambda self: self.may_push() or self.under_way)
    @rule(data=st.data())
    def contribute(self, data):
        """Somebody pushes all that it owes, in one message more."""
        slot = self.slot_of(data, {*self.may_push(), *self.under_way})
        if slot in self.under_way:
            self.deliver(slot)
        if slot in self.may_push():
            self.start_message(slot, set(range(N_CELLS)) - self.model.pushed[slot])
            self.deliver(slot)

    @precondition(lambda self: self.may_push() or self.queue)
    @rule()
    def all_go_on(self):
        """The step comes to its end, unless somebody is waited for."""
        for slot in sorted(self.under_way):
            self.deliver(slot)
        for slot in self.may_push():
            if slot in self.may_push():  # a quorum may have been reached
                self.start_message(slot, set(range(N_CELLS)) - self.model.pushed[slot])
                self.deliver(slot)
        while self.queue:
            self.apply_one(0)

    @rule(data=st.data(), offset=st.sampled_from([-2, -1, 1, 2]))
    def push_for_another_step(self, data, offset):
        slot = data.draw(st.integers(0, self.model.n_slots - 1))
        step = self.model.step + offset
        if step <= self.model.skipped.get(slot, -1):
            assert self.rounds.check(slot, step, [Range(0, 1)]) is False
            assert self.rounds.push(slot, step, [Range(0, 1)]) == []
        else:
            with pytest.raises(RemoteProtocolError, match=f"step {step}, expected step"):
                self.rounds.check(slot, step, [Range(0, 1)])

    @rule(data=st.data())
    def push_of_one_who_takes_no_part(self, data):
        slot = data.draw(st.integers(0, self.model.n_slots - 1))
        if not self.model.works(slot) and self.model.step > self.model.skipped.get(slot, -1):
            with pytest.raises(RemoteProtocolError, match="takes no part"):
                self.rounds.check(slot, self.model.step, [Range(0, 1)])

    @precondition(lambda self: self.may_push())
    @rule(data=st.data(), undo=st.booleans())
    def refuse(self, data, undo):
        """Poison in somebody's gradients; with ``undo`` the step is applied anew without them."""
        slot = self.slot_of(data, self.may_push())
        step, before = self.rounds.step, self.model.applied
        if undo and before:
            kept = [entry for entry in self.history if entry[0] != step]
            self.history = kept
            self.arena[:] = self.boundary
            self.rounds.undo()
            self.model.applied = set()
            self.queue += as_ranges(before)
        self.take(self.rounds.refuse(slot), self.model.refuse(slot))
        for former in [seat for seat, of, _ in self.accepted if of == step and seat.slot == slot]:
            used = {
                (cell, slot) for of, cell, slots in self.history if of == step and slot in slots
            }
            self.accepted = [
                (seat, of, cell)
                for seat, of, cell in self.accepted
                if (seat, of) != (former, step) or (cell, slot) in used
            ]

    # -- the server applies --

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def apply(self, data):
        self.apply_one(data.draw(st.integers(0, len(self.queue) - 1)))

    def apply_one(self, index):
        cells = self.queue.pop(index)
        step = self.rounds.step
        for part, slots in self.rounds.contributors(cells):
            for cell in cells_of([part]):
                assert slots == self.model.contributors(cell)
                self.history.append((step, cell, slots))
            start, stop = part.first, part.first + part.count
            if slots:
                joined = self.contributions[slots[0], start:stop].copy()
                for slot in slots[1:]:
                    joined += self.contributions[slot, start:stop]
                self.arena[start:stop] -= RATE * (joined / np.float32(len(slots)))
        ended = self.rounds.apply(cells)
        if ended:
            self.boundary = self.arena.copy()
        assert ended == self.model.apply(set(cells_of([cells])))
        assert self.rounds.step == step + ended
        assert not ended or not self.queue

    # -- what always holds --

    @invariant()
    def rounds_agree_with_the_model(self):
        if not hasattr(self, "rounds"):
            return
        rounds, model = self.rounds, self.model
        assert rounds.step == model.step
        assert (rounds.upcoming is None) == (model.upcoming is None)
        assert set(rounds.upcoming or ()) == (model.upcoming or set())
        waits = {s for s in model.held & model.owing if len(model.pushed[s]) < N_CELLS}
        assert set(rounds.waiting) == waits
        for slot in range(model.n_slots):
            inside = slot in model.present and slot not in model.held
            assert rounds.takes_part(slot, model.step) == (inside and slot in model.owing)
            next_too = inside and slot in (model.upcoming or ())
            assert rounds.takes_part(slot, model.step + 1) == next_too
            assert rounds.skips(slot) == model.skipped.get(slot, -1)
        idle = not model.complete and not model.owing and not any(model.pushed.values())
        missing = model.quorum and model.needed() - len(model.owing | set(model.whole))
        assert rounds.short == (max(0, missing) if model.quorum else idle)

    @invariant()
    def somebody_can_always_go_on(self):
        if hasattr(self, "rounds") and not self.queue and not self.under_way:
            goes_on = self.may_push() or self.rounds.waiting or self.rounds.short
            assert goes_on, "nothing is due, and nobody is waited for"

    def teardown(self):
        if hasattr(self, "rounds"):
            judge(self.arena, self.history, self.accepted)


def judge(arena, history, accepted):
    """Replay what was applied from what was accepted, and look for anything twice."""
    terms = {}
    for seat, step, cell in accepted:
        terms[seat.slot, step, cell] = seat.term  # of two members, the one who computed it anew
    replayed, versions, used = np.zeros_like(arena), [0] * N_CELLS, set()
    for step, cell, slots in history:
        assert versions[cell] == step
        versions[cell] += 1
        total = None
        for slot in slots:
            key = (slot, step, cell)
            assert key not in used
            used.add(key)
            term = terms[key]
            assert {terms[slot, step, c] for c in range(N_CELLS) if (slot, step, c) in used} == {
                term
            }
            value = gradient(slot, term, step)[cell]
            total = value if total is None else total + value
        if total is not None:
            replayed[cell] -= RATE * (total / np.float32(len(slots)))
    assert arena.tobytes() == replayed.tobytes()


class Waiting(Synchronous):
    """Behind a barrier, with a slot kept for the replacement of who is lost."""

    mode = "wait"


class Quorum(Synchronous):
    """The first whole contributions count."""

    mode = "quorum"


class Stale(RuleBasedStateMachine):
    """Contributions applied as they arrive: clocks, the bound, joiners at the minimum."""

    @initialize(n_slots=st.integers(1, 4), bound=st.sampled_from([None, 0, 1, 2]))
    def start(self, n_slots, bound):
        self.bound = bound
        self.rounds = StaleRounds(N_CELLS, n_slots, bound)
        self.roster = Roster(n_slots)
        self.seats = {slot: self.roster.join(slot) for slot in range(n_slots)}
        self.n_slots = n_slots
        self.held = set()
        self.former = []
        self.skipped = {}
        self.clocks = dict.fromkeys(range(n_slots), 0)
        self.floor = 0
        self.pushed = {slot: set() for slot in range(n_slots)}
        self.done = {slot: set() for slot in range(n_slots)}  # of those, the applied ones
        self.queue = []  # (seat, step, cells), applied in this order
        self.arena = np.zeros(N_CELLS, np.float32)
        self.history = []

    def slot_of(self, data, slots):
        return data.draw(st.sampled_from(sorted(slots)), label="slot")

    def find_floor(self):
        alive = [self.clocks[slot] for slot in (*self.seats, *self.held)]
        self.floor = max(self.floor, min(alive, default=self.floor))

    def allowed(self, slot):
        return self.bound is None or self.clocks[slot] - self.floor <= self.bound

    @precondition(lambda self: len(self.seats) < self.n_slots)
    @rule(data=st.data())
    def join(self, data):
        slot = self.slot_of(data, set(range(self.n_slots)) - set(self.seats))
        expected = max(self.floor, self.clocks[slot] + bool(self.pushed[slot]))
        self.seats[slot] = self.roster.join(slot)
        self.held.discard(slot)
        assert self.rounds.enter(slot) == expected
        self.clocks[slot] = expected
        self.pushed[slot], self.done[slot] = set(), set()
        self.find_floor()

    @precondition(lambda self: self.seats)
    @rule(data=st.data(), waits=st.booleans())
    def crash(self, data, waits):
        slot = self.slot_of(data, self.seats)
        seat = self.seats.pop(slot)
        self.roster.leave(seat)
        self.former.append(seat)
        if waits:
            self.rounds.hold(slot)
            self.held.add(slot)
        else:
            self.rounds.leave(slot)
            self.find_floor()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_up_waiting(self, data):
        slot = self.slot_of(data, self.held)
        self.held.remove(slot)
        self.rounds.leave(slot)
        self.find_floor()

    @precondition(lambda self: self.may_push())
    @rule(data=st.data())
    def push(self, data):
        slot = self.slot_of(data, self.may_push())
        left = sorted(set(range(N_CELLS)) - self.pushed[slot])
        some = st.sets(st.sampled_from(left), min_size=1)
        cells = data.draw(st.one_of(some, st.just(set(left))), label="cells")
        self.push_cells(slot, cells)

    @precondition(lambda self: self.may_push() or self.queue)
    @rule(data=st.data())
    def finish_a_step(self, data):
        if self.may_push():
            slot = self.slot_of(data, self.may_push())
            self.push_cells(slot, set(range(N_CELLS)) - self.pushed[slot])
        while self.queue:
            self.apply()

    def push_cells(self, slot, cells):
        seat, step, ranges = self.seats[slot], self.clocks[slot], as_ranges(cells)
        assert self.roster.has(seat)
        self.rounds.check(slot, step, ranges)
        assert self.bound is None or step - self.floor <= self.bound
        assert self.rounds.push(slot, step, ranges) == ranges
        self.pushed[slot] |= cells
        self.queue.append((seat, step, ranges))
        with pytest.raises(RemoteProtocolError, match="were pushed before"):
            self.rounds.check(slot, step, ranges)
        assert set(cells_of(self.rounds.have(slot, step))) == self.pushed[slot]

    @precondition(lambda self: self.may_push())
    @rule(data=st.data())
    def refuse(self, data):
        """Poison in what somebody pushes: its step is over for it, and late parts are dropped."""
        slot = self.slot_of(data, self.may_push())
        step = self.clocks[slot]
        self.rounds.refuse(slot)
        self.skipped[slot] = step
        self.clocks[slot] += 1
        self.pushed[slot], self.done[slot] = set(), set()
        self.find_floor()
        assert self.rounds.skips(slot) == step
        assert self.rounds.check(slot, step, [Range(0, 1)]) is False
        assert self.rounds.push(slot, step, [Range(0, 1)]) == []

    @rule()
    def the_server_is_restarted(self):
        """It knows what a checkpoint holds; what had only arrived is to be pushed again."""
        old = self.rounds
        members = {*self.seats, *self.held}
        fresh = StaleRounds(N_CELLS, self.n_slots, self.bound, step=self.floor, members=members)
        applied = {slot: old.applied(slot) for slot in range(self.n_slots)}
        fresh.restore(old.versions, old.clocks, applied)
        for slot in self.held:
            fresh.hold(slot)
        self.rounds = fresh
        self.queue.clear()
        self.pushed = {slot: set(done) for slot, done in self.done.items()}
        self.skipped.clear()

    def may_push(self):
        return [
            slot for slot in self.seats if self.allowed(slot) and len(self.pushed[slot]) < N_CELLS
        ]

    @rule(data=st.data(), offset=st.sampled_from([-1, 0, 1]))
    def push_what_cannot_be(self, data, offset):
        slot = data.draw(st.integers(0, self.n_slots - 1))
        step = max(0, self.clocks[slot] + offset)
        if slot in self.seats and step == self.clocks[slot] and self.allowed(slot):
            return
        if slot in self.seats and step <= self.skipped.get(slot, -1):
            assert self.rounds.check(slot, step, [Range(0, 1)]) is False
            return
        with pytest.raises(RemoteProtocolError):
            self.rounds.check(slot, step, [Range(0, 1)])

    @precondition(lambda self: self.former)
    @rule(data=st.data())
    def former_member_returns(self, data):
        seat = data.draw(st.sampled_from(self.former))
        assert not self.roster.has(seat)

    @precondition(lambda self: self.queue)
    @rule()
    def apply_next(self):
        self.apply()

    def apply(self):
        seat, step, ranges = self.queue.pop(0)
        for cells in ranges:
            before = self.rounds.versions.copy()
            for cell in cells_of([cells]):
                self.arena[cell] -= RATE * gradient(seat.slot, seat.term, step)[cell]
                self.history.append((seat.slot, seat.term, step, cell))
            moved = self.rounds.apply(seat.slot, step, cells)
            assert (self.rounds.versions >= before).all()
            if step == self.clocks[seat.slot]:
                self.done[seat.slot] |= set(cells_of([cells]))
            expected = len(self.done[seat.slot]) == N_CELLS
            assert moved == expected
            if expected:
                self.clocks[seat.slot] += 1
                self.pushed[seat.slot], self.done[seat.slot] = set(), set()
                self.find_floor()

    @invariant()
    def clocks_and_bound_agree(self):
        if not hasattr(self, "rounds"):
            return
        assert [self.rounds.clock(slot) for slot in range(self.n_slots)] == [
            self.clocks[slot] for slot in range(self.n_slots)
        ]
        assert self.rounds.minimum == self.floor
        lowest = {slot for slot in self.held if self.clocks[slot] == self.floor}
        assert set(self.rounds.waiting) == lowest
        for step in range(self.floor, self.floor + 5):
            expected = self.bound is None or step - self.floor <= self.bound
            assert self.rounds.allows(step) == expected

    @invariant()
    def nobody_pushes_beyond_the_bound(self):
        for slot in self.seats if hasattr(self, "rounds") else ():
            if not self.allowed(slot):
                with pytest.raises(RemoteProtocolError, match=f"more than {self.bound} ahead"):
                    self.rounds.check(slot, self.clocks[slot], [Range(0, 1)])

    @invariant()
    def somebody_can_always_go_on(self):
        if hasattr(self, "rounds") and not self.queue and self.seats:
            assert self.may_push() or self.held or not self.seats

    def teardown(self):
        if not hasattr(self, "rounds"):
            return
        keys = [(slot, step, cell) for slot, _, step, cell in self.history]
        assert len(keys) == len(set(keys))
        terms = {}
        for slot, term, step, _ in self.history:
            assert terms.setdefault((slot, step), term) == term
        counts = np.bincount([cell for *_, cell in self.history], minlength=N_CELLS)
        assert counts.tolist() == self.rounds.versions.tolist()
        replayed = np.zeros_like(self.arena)
        for slot, term, step, cell in self.history:
            replayed[cell] -= RATE * gradient(slot, term, step)[cell]
        assert self.arena.tobytes() == replayed.tobytes()


MACHINES = [Synchronous, Waiting, Quorum, Stale]


@pytest.mark.parametrize("machine", MACHINES, ids=[machine.__name__ for machine in MACHINES])
def test_no_event_makes_rounds_and_their_model_differ(machine):
    number = int(os.environ.get("DYNACOMM_SEED") or secrets.randbits(32))
    examples = int(os.environ.get("DYNACOMM_EXAMPLES") or 40)
    print(f"DYNACOMM_SEED={number}, {examples} runs of at most 60 events")
    run_state_machine_as_test(
        seed(number)(machine),
        settings=settings(
            max_examples=examples,
            stateful_step_count=60,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
