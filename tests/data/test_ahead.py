"""Batches made a step ahead, in a thread of their own."""

from __future__ import annotations

import threading

import pytest

from dynacomm_async.data import Ahead

PATIENCE_S = 10


class Maker:
    """Makes batches, notes which, and can be held up before any of them."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.began = {step: threading.Event() for step in range(10)}
        self.may_go = {step: threading.Event() for step in range(10)}
        for event in self.may_go.values():
            event.set()

    def __call__(self, step: int) -> tuple[int, int]:
        self.began[step].set()
        assert self.may_go[step].wait(PATIENCE_S)
        self.made.append(step)
        return step, threading.get_ident()


def test_every_batch_is_the_one_of_its_step_and_made_once_in_another_thread():
    make = Maker()
    with Ahead(make, 4) as ahead:
        came = [ahead.take(step) for step in range(4)]
    assert [step for step, _ in came] == make.made == [0, 1, 2, 3]
    assert {ident for _, ident in came}.isdisjoint({threading.get_ident()})


def test_the_next_batch_is_made_while_the_caller_has_this_one():
    make = Maker()
    with Ahead(make, 4) as ahead:
        ahead.take(0)
        assert make.began[1].wait(PATIENCE_S)  # nobody has asked for it yet
        assert not make.began[2].is_set()


def test_the_first_batch_is_begun_when_it_is_expected():
    make = Maker()
    with Ahead(make, 4) as ahead:
        make.may_go[2].clear()
        ahead.expect(2)  # returns while the batch is not there
        assert make.began[2].wait(PATIENCE_S)
        make.may_go[2].set()
        assert ahead.take(2)[0] == 2
        ahead.take(3)
    assert make.made == [2, 3]


def test_after_a_step_back_the_batch_that_was_ready_is_made_again_in_its_turn():
    make = Maker()
    with Ahead(make, 4) as ahead:
        came = [ahead.take(step)[0] for step in (0, 1, 2, 1, 2, 3)]
    assert came == [0, 1, 2, 1, 2, 3]
    assert make.made == [0, 1, 2, 3, 1, 2, 3]


def test_nothing_is_made_behind_the_last_step():
    make = Maker()
    with Ahead(make, 2) as ahead:
        ahead.take(0)
        ahead.take(1)
        ahead.expect(2)
    assert make.made == [0, 1]


def test_what_making_raises_reaches_whoever_takes_that_batch_and_the_others_are_sound():
    def make(step):
        if step == 1:
            raise OSError("the disk is gone")
        return step

    with Ahead(make, 4) as ahead:
        assert ahead.take(0) == 0
        with pytest.raises(OSError, match="the disk is gone"):
            ahead.take(1)
        assert ahead.take(2) == 2


def test_its_thread_ends_with_the_block_whatever_it_is_left_by():
    def leave():
        with Ahead(Maker(), 4) as ahead:
            ahead.take(0)
            raise KeyError

    before = set(threading.enumerate())
    with pytest.raises(KeyError):
        leave()
    assert set(threading.enumerate()) <= before
