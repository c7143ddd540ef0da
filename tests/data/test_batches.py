"""Batches: who sees which images when."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from dynacomm_async.data import Batches
from dynacomm_async.errors import ConfigError


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 300),
    workers=st.integers(1, 5),
    batch=st.integers(1, 12),
    seed=st.integers(0, 2**70),
    epoch=st.integers(0, 3),
)
def test_within_an_epoch_no_image_is_seen_twice_and_less_than_one_step_is_left_out(
    size, workers, batch, seed, epoch
):
    if size < workers * batch:
        return
    batches = Batches(size, workers=workers, batch=batch, seed=seed)
    first = epoch * batches.steps_per_epoch
    seen = np.concatenate(
        [
            batches.indices(slot, step)
            for step in range(first, first + batches.steps_per_epoch)
            for slot in range(workers)
        ]
    )
    assert len(set(seen.tolist())) == len(seen)
    assert set(seen.tolist()) <= set(range(size))
    assert size - len(seen) < workers * batch


def test_workers_together_see_the_batch_of_one_process_that_takes_it_all():
    many = Batches(100, workers=3, batch=5, seed=7)
    one = Batches(100, workers=1, batch=15, seed=7)
    for step in range(20):
        together = np.concatenate([many.indices(slot, step) for slot in range(3)])
        np.testing.assert_array_equal(together, one.indices(0, step))


def test_an_epochs_order_is_the_order_of_its_raw_random_bits():
    batches = Batches(50, workers=1, batch=50, seed=3)
    for epoch in (0, 4):
        generator = np.random.PCG64(np.random.SeedSequence([3, epoch]))
        keys = [int(generator.random_raw()) for _ in range(50)]
        expected = sorted(range(50), key=keys.__getitem__)
        assert batches.indices(0, epoch).tolist() == expected


def test_the_order_of_calls_does_not_matter():
    batches = Batches(40, workers=2, batch=3, seed=1)
    calls = [(slot, step) for step in range(20) for slot in range(2)]
    forward = {call: batches.indices(*call).tolist() for call in calls}
    shuffled = [calls[i] for i in np.random.default_rng(0).permutation(len(calls))]
    fresh = Batches(40, workers=2, batch=3, seed=1)
    assert {call: fresh.indices(*call).tolist() for call in shuffled} == forward


def test_epochs_and_seeds_shuffle_differently():
    batches = Batches(64, workers=1, batch=64, seed=1)
    other = Batches(64, workers=1, batch=64, seed=2)
    orders = [batches.indices(0, 0), batches.indices(0, 1), other.indices(0, 0)]
    assert len({order.tobytes() for order in orders}) == 3


def test_indices_are_int64_and_cannot_be_written():
    indices = Batches(10, workers=1, batch=4, seed=0).indices(0, 0)
    assert (indices.dtype, indices.shape, indices.flags.writeable) == (np.int64, (4,), False)


@pytest.mark.parametrize(
    ("size", "workers", "batch", "seed", "message"),
    [
        (9, 2, 5, 0, "9 images are too few for one step of 2 workers with a batch of 5"),
        (9, 0, 5, 0, "workers is 0"),
        (9, 1, 0, 0, "batch is 0"),
        (9, 1, 1, -1, "seed is -1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(size, workers, batch, seed, message):
    with pytest.raises(ConfigError, match=message):
        Batches(size, workers=workers, batch=batch, seed=seed)


@pytest.mark.parametrize(("slot", "step"), [(-1, 0), (2, 0), (0, -1)])
def test_a_slot_or_step_that_is_not_there_is_refused(slot, step):
    with pytest.raises(ConfigError, match=r"(slot|step) is -?\d, expected"):
        Batches(20, workers=2, batch=5, seed=0).indices(slot, step)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), blocks=st.integers(4, 40), rest=st.integers(0, 2), seed=st.integers(0, 9))
def test_whoever_comes_and_goes_nothing_is_seen_twice_in_an_epoch_and_little_is_left_out(
    data, blocks, rest, seed
):
    size = 3 * blocks + rest
    batches = Batches(size, workers=4, batch=3, seed=seed)
    split, seen = batches.split, {}
    for step in range(data.draw(st.integers(1, 50))):
        if data.draw(st.integers(0, 3)) == 0:
            split = split.anew(step, data.draw(st.sets(st.integers(0, 3), min_size=1)))
        dealt = [batches.indices(slot, step, split) for slot in split.members]
        epoch, _ = split.locate(step)
        seen.setdefault(epoch, []).extend(np.concatenate(dealt).tolist())
    assert sorted(seen) == list(range(len(seen)))
    for epoch, images in seen.items():
        assert len(images) == len(set(images))
        if epoch + 1 in seen:
            assert size - len(images) < 3 * 4 + rest


def test_a_split_in_force_is_all_it_takes_to_deal_a_step_again():
    batches = Batches(60, workers=3, batch=4, seed=2)
    split = batches.split.anew(2, [0, 2]).anew(5, [0, 1, 2])
    late = Batches(60, workers=3, batch=4, seed=2)
    for step in (9, 5, 7, 5):
        for slot in range(3):
            expected = batches.indices(slot, step, split)
            assert late.indices(slot, step, split).tolist() == expected.tolist()
    with pytest.raises(ConfigError, match="step is 4, expected at least 5"):
        late.indices(0, 4, split)
