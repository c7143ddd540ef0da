"""Poisoned contributions: NaN, infinite and huge values are seen, and nothing else is."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dynacomm_async.errors import ConfigError
from dynacomm_async.optim import SGD, Constant
from dynacomm_async.ranges import Range
from dynacomm_async.server.store import Store, Training, is_sound
from dynacomm_async.wire.grid import Grid, LayerSpec

PIECE = 1 << 18
SEED = 17


def gradients(n, scale=1e-2):
    return (np.random.default_rng(SEED).standard_normal(n) * scale).astype(np.float32)


def oracle(values, limit):
    """The definition, in Python's own numbers."""
    return all(math.isfinite(value) and abs(value) <= limit for value in values.tolist())


BAD = {
    "nan": np.float32(np.nan),
    "negative nan": np.array([0xFFC00000], np.uint32).view(np.float32)[0],
    "signalling nan": np.array([0x7F800001], np.uint32).view(np.float32)[0],
    "inf": np.float32(np.inf),
    "-inf": np.float32(-np.inf),
    "1e38": np.float32(1e38),
    "-1e38": np.float32(-1e38),
    "3.4e38": np.finfo(np.float32).max,
    "1e19, whose square is still finite": np.float32(1e19),
    "-1e10": np.float32(-1e10),
    "just above": np.nextafter(np.float32(1e9), np.float32(2e9)),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_one_bad_value_is_seen_at_any_place(bad):
    values = gradients(131)
    assert is_sound(values, 1e9)
    for place in range(len(values)):
        spoilt = values.copy()
        spoilt[place] = bad
        assert not is_sound(spoilt, 1e9), place
        for start in range(0, place, 13):  # unaligned to any vector register, too
            assert not is_sound(spoilt[start:], 1e9), (start, place)


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_one_bad_value_is_seen_in_any_piece_of_a_large_vector(bad):
    values = gradients(2 * PIECE + 77)
    for place in (0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE - 1, 2 * PIECE, len(values) - 1):
        kept, values[place] = values[place], bad
        assert not is_sound(values, 1e9), place
        values[place] = kept
    assert is_sound(values, 1e9)


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1e-45, -1e-40, 1.1754942e-38, 1.1754944e-38, 1e9, -1e9, 65536.0]
)
@pytest.mark.parametrize("n", [0, 1, 4096, PIECE + 5])
def test_sound_values_pass_even_if_there_are_many_of_them(value, n):
    # Many values at the limit: their squares add up to far more than the limit's.
    assert is_sound(np.full(n, value, np.float32), 1e9)


@pytest.mark.parametrize("limit", [1e-40, 1e-30, 0.5, 1.0, 3e4, 1e9, 1e19, 3e38, 1e300, math.inf])
def test_it_agrees_with_the_definition_for_every_limit(limit):
    rng = np.random.default_rng(SEED)
    seen = set()
    for _ in range(300):
        values = rng.integers(0, 2**32, rng.integers(1, 9), dtype=np.uint32).view(np.float32)
        if rng.random() < 0.7:
            values = np.nan_to_num(values, nan=1.0, posinf=2.0, neginf=-2.0)
        if rng.random() < 0.5:
            most = np.float32(min(limit, 3.4e38))
            values = np.clip(values, -most, most)
        seen.add(oracle(values, limit))
        assert is_sound(values, limit) == oracle(values, limit), (SEED, values)
    assert seen == {True, False}


def test_the_limit_itself_is_the_border():
    above = np.nextafter(np.float32(1), np.float32(2))
    for sign in (1, -1):
        assert is_sound(np.array([sign], np.float32), 1.0)
        assert not is_sound(np.array([sign * above], np.float32), 1.0)


def test_values_are_only_read():
    values = gradients(100)
    values.flags.writeable = False
    assert is_sound(values, 1e9)


def test_a_store_tells_which_cells_of_which_contribution_are_poisoned():
    grid = Grid([LayerSpec("a", 9000), LayerSpec("b", 5000, 0, 10)])
    store = Store(grid, 2, Training(SGD(), Constant(0.1), max_gradient=100.0))
    for contribution in store.contributions:
        contribution[:] = gradients(grid.n_floats)
    everything = [Range(0, grid.n_cells)]
    for cell in range(grid.n_cells):
        start, stop = grid.floats(cell, 1)
        for place in (start, stop - 1):
            store.contributions[1][place] = 101
            poisoned = [not store.is_sound(1, [Range(c, 1)]) for c in range(grid.n_cells)]
            assert poisoned == [c == cell for c in range(grid.n_cells)]
            assert not store.is_sound(1, everything)
            assert store.is_sound(0, everything)
            store.contributions[1][place] = 1
    assert store.is_sound(1, [])


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
def test_a_limit_that_refuses_everything_is_refused(limit):
    with pytest.raises(ConfigError, match="largest gradient"):
        Training(SGD(), Constant(0.1), max_gradient=limit)
