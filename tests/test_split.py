"""Splits: among whom an epoch's blocks are divided."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from dynacomm_async.errors import ConfigError
from dynacomm_async.split import Split


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    blocks=st.integers(4, 30),
    changes=st.dictionaries(st.integers(1, 60), st.sets(st.integers(0, 3), min_size=1)),
)
def test_blocks_are_dealt_one_after_the_other_and_an_epoch_ends_where_a_step_does_not_fit(
    blocks, changes
):
    split = Split(blocks, (0, 1, 2, 3))
    epoch, position = 0, 0
    for step in range(60):
        if step in changes:
            split = split.anew(step, changes[step])
        if position + len(split.members) > blocks:
            epoch, position = epoch + 1, 0
        for slot in split.members:
            assert split.block(slot, step) == (epoch, position)
            position += 1


def test_dividing_anew_among_the_same_members_changes_nothing():
    split = Split(10, (0, 1, 2))
    again = split.anew(4, [2, 0, 1])

    for step in range(4, 30):
        assert again.locate(step) == split.locate(step)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, ()), "expected ascending slots"),
        ((3, (1, 0)), "expected ascending slots"),
        ((3, (1, 1)), "expected ascending slots"),
        ((1, (0, 1)), "an epoch of 1 batches is too short for a step of 2 workers"),
        ((3, (-1, 1)), "negative"),
        ((3, (0,), -1), "negative"),
    ],
)
def test_splits_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Split(*arguments)


def test_steps_before_a_split_and_slots_outside_it_are_refused():
    split = Split(9, (0, 2), step=5)
    with pytest.raises(ConfigError, match="step is 4, expected at least 5"):
        split.locate(4)
    with pytest.raises(ConfigError, match="step is 4, expected at least 5"):
        split.anew(4, [0])
    with pytest.raises(ConfigError, match="slot is 1, expected one of 0, 2"):
        split.block(1, 5)
