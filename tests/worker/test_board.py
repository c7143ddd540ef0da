"""What the loop tells the computing thread, which reads without a lock."""

from __future__ import annotations

import pytest

from dynacomm_async.errors import ChannelBroken
from dynacomm_async.split import Split
from dynacomm_async.worker.board import Board, Course
from dynacomm_async.worker.step import Compute, Phase


def test_whoever_sees_that_a_grant_is_gone_sees_that_training_has_stepped_back():
    seen = []

    class Watched(Board):
        """Looks, as another thread may, whenever something of the board changes."""

        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name in ("course", "_granted") and "opened" in self.__dict__:
                granted = self.is_granted(Phase.BACKWARD, 0, 4)
                seen.append((granted, self.course.life))

    board = Watched(1, 4)
    board.grant([Compute(Phase.BACKWARD, 0)], 4)
    board.step_back(2)
    assert (True, 1) in seen
    assert (False, 0) not in seen


def test_the_first_step_is_settled_once_and_another_one_is_a_step_back():
    board = Board(2, None)
    assert board.course == Course(0, None)
    board.settle(7)
    assert board.course == Course(0, 7)
    board.settle(7)
    assert board.course == Course(0, 7)
    board.settle(9)
    assert board.course == Course(1, 9)
    board.step_back(None)
    assert board.course == Course(2, None)
    board.settle(3)
    assert board.course == Course(2, 3)


@pytest.mark.parametrize(
    "happens",
    [
        lambda board: board.settle(0),
        lambda board: board.open(0),
        lambda board: board.step_back(0),
        lambda board: board.end(None),
        lambda board: board.end(ChannelBroken("gone")),
    ],
)
def test_whoever_waits_for_a_condition_is_called_once_when_it_holds_or_all_is_over(happens):
    board, calls = Board(1, None), []
    board.when_true(lambda: False, lambda: calls.append("never"))
    board.when_true(lambda: board.course.first is not None, lambda: calls.append("settled"))
    board.when_true(lambda: board.opened >= 0, lambda: calls.append("opened"))
    assert calls == []
    happens(board)
    before = list(calls)
    if board.is_over:
        assert sorted(calls) == ["never", "opened", "settled"]
    else:
        assert before in (["settled"], ["opened"])
    board.open(1)
    board.settle(0)
    assert len(calls) == len(set(calls)), "nobody is called twice"
    board.when_true(lambda: True, lambda: calls.append("at once"))
    assert calls[-1] == "at once"


def test_the_split_of_a_step_is_the_last_that_begins_before_it():
    board = Board(1)
    assert board.split_of(5) is None
    splits = [Split(100, members, step) for step, members in ((0, (0, 1)), (4, (0,)), (6, (0, 2)))]
    board.divide(splits[0])
    board.open(4, splits[1])
    board.open(5)
    board.open(6, splits[2])
    assert [board.split_of(step) for step in (3, 4, 5, 6, 9)] == [
        splits[0], splits[1], splits[1], splits[2], splits[2],
    ]  # fmt: skip
    board.divide(None)
    assert board.split_of(9) is None
