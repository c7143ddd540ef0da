"""Tiles hold what they should, and transformed products are convolutions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from dynacomm_async.nn.kernels import (
    PLACES,
    REACH,
    TILE,
    Transforms,
    block_tiles,
    plan_tiles,
    suits_winograd,
    tiles_in,
    winograd,
)

shapes = st.tuples(st.integers(1, 5), st.integers(1, 13), st.integers(1, 13), st.integers(1, 3))


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape)


def tile_of(array, size, number, tiles):
    """The tile of that number, cut out of the array with zeros behind its edges."""
    down, across = tiles
    image, line, place = number // (down * across), number // across % down, number % across
    step = min(size, TILE)
    behind = np.pad(array[image], ((0, size), (0, size), (0, 0)))
    return behind[step * line :, step * place :][:size, :size]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(shape=shapes, size=st.sampled_from([2, 4, 6]), most=st.sampled_from([1, 3, 8, 1000]))
def test_blocks_gather_every_tile_once_and_scatter_it_back(shape, size, most):
    array = normal(*shape)
    inside = [max(1, extent - 2) if size == REACH else extent for extent in shape[1:3]]
    tiles = tuple(-(-extent // min(size, TILE)) for extent in inside)
    back = np.zeros_like(array)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "MOST_TILES", most)
        scratch = np.full(size * size * block_tiles(shape[0], tiles) * shape[3], np.nan)
        blocks = plan_tiles(array, size, tiles, scratch)
        writing = plan_tiles(back, size, tiles, scratch)
        adding = plan_tiles(back, size, tiles, scratch, accumulate=True)
    number = 0
    for block in blocks:
        block.gather()
        for index in range(block.scratch.shape[1]):
            own = block.scratch[:, index].reshape(size, size, -1)
            np.testing.assert_array_equal(own, tile_of(array, size, number, tiles))
            number += 1
    assert number == shape[0] * tiles[0] * tiles[1]
    if size == REACH:  # such tiles overlap and are only read
        return
    for targets, times in ((writing, 1), (adding, 2)):
        for block, target in zip(blocks, targets, strict=True):
            block.gather()
            target.scatter()
        np.testing.assert_array_equal(back, times * array)


def direct(x, weights):
    """The convolution of (6, 6, C) with (3, 3, C, O), by its definition."""
    return np.array(
        [
            [np.einsum("ijc,ijco->o", x[h : h + 3, w : w + 3], weights) for w in range(4)]
            for h in range(4)
        ]
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-13), (np.float32, 1e-5)])
def test_products_of_transformed_tiles_are_convolutions(dtype, tolerance):
    x, weights = normal(REACH, REACH, 40).astype(dtype), normal(3, 3, 40, 7).astype(dtype)
    transforms = Transforms(np.dtype(dtype))
    inputs = transforms.inputs @ x.reshape(PLACES, -1)
    for matrix, turned in [
        (transforms.weights, weights),
        (transforms.turned, weights[::-1, ::-1]),
    ]:
        moved = (matrix @ weights.reshape(9, -1)).reshape(PLACES, 40, 7)
        products = np.einsum("pc,pco->po", inputs, moved)
        outputs = (transforms.outputs @ products).reshape(TILE, TILE, 7)
        expected = direct(x.astype(np.float64), turned.astype(np.float64))
        assert np.abs(outputs - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.parametrize(
    ("kernel", "stride", "channels", "output", "expected"),
    [
        ((3, 3), (1, 1), (64, 64), (32, 32), True),
        ((3, 3), (1, 1), (256, 256), (7, 7), True),
        ((3, 3), (1, 1), (32, 32), (16, 16), True),
        ((3, 3), (1, 1), (16, 16), (32, 32), False),  # transforms cost more than they save
        ((3, 3), (1, 1), (3, 64), (224, 224), False),
        ((3, 3), (1, 1), (64, 64), (5, 5), False),  # most of the second tiles lies outside
        ((3, 3), (1, 1), (512, 512), (3, 3), False),
        ((3, 3), (2, 2), (64, 64), (32, 32), False),
        ((5, 5), (1, 1), (64, 64), (32, 32), False),
        ((1, 3), (1, 1), (64, 64), (32, 32), False),
    ],
)
def test_which_convolutions_go_by_tiles(kernel, stride, channels, output, expected):
    assert suits_winograd(kernel, stride, channels, output) is expected


def test_tiles_that_reach_over_the_edge_count():
    assert tiles_in((7, 8)) == (2, 2)
    assert tiles_in((9, 1)) == (3, 1)
