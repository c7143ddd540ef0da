"""Modes of training: what goes together, and which strategies hold in which."""

from __future__ import annotations

import math

import pytest

from dynacomm_async.errors import ConfigError
from dynacomm_async.schedule.planners.table import PLANNERS
from dynacomm_async.server.modes import Mode, check_mode

EVERY = set(PLANNERS)
WITH_A_BARRIER = EVERY - {"joint", "priority"}


@pytest.mark.parametrize(
    ("mode", "holds", "barrier"),
    [
        (Mode(), EVERY, False),
        (Mode(on_leave="shrink"), EVERY, False),
        (Mode(on_leave="wait"), WITH_A_BARRIER, True),
        (Mode(quorum=2), WITH_A_BARRIER, True),
        (Mode(quorum=3, on_leave="shrink"), WITH_A_BARRIER, True),
        (Mode(staleness=0), WITH_A_BARRIER, False),
        (Mode(staleness=1), EVERY, False),
        (Mode(staleness=4, on_leave="wait"), EVERY, False),
        (Mode(staleness=math.inf, on_leave="shrink"), EVERY, False),
    ],
    ids=str,
)
def test_the_strategies_that_hold_in_a_mode_are_those_of_the_table(mode, holds, barrier):
    for strategy in EVERY & holds:
        check_mode(mode, strategy, workers=3)
    assert mode.may_cross == (holds == EVERY)
    for strategy in EVERY - holds:
        words = f"^{strategy} sends .* one of sequential, layerwise, ibatch, bucket, dynacomm$"
        with pytest.raises(ConfigError, match=words):
            check_mode(mode, strategy, workers=3)
    assert mode.barrier == barrier


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_leave": "stop"}, "on_leave is 'stop', expected end, shrink, wait"),
        ({"quorum": 0}, "a quorum of 0"),
        ({"staleness": -1}, "staleness is -1"),
        ({"staleness": 1.5}, "staleness is 1.5"),
        ({"staleness": math.nan}, "staleness is nan"),
        ({"quorum": 2, "staleness": 1}, "choose one of them"),
        ({"quorum": 2, "on_leave": "wait"}, "a quorum goes on without"),
    ],
)
def test_modes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Mode(**options)


def test_a_quorum_above_the_number_of_workers_is_refused():
    check_mode(Mode(quorum=3), "dynacomm", workers=3)
    with pytest.raises(ConfigError, match="a quorum of 4 among 3 workers"):
        check_mode(Mode(quorum=4), "dynacomm", workers=3)


def test_a_strategy_that_is_not_there_is_refused_by_name():
    with pytest.raises(ConfigError, match="did you mean joint"):
        check_mode(Mode(), "joined", workers=1)
