"""Normalising, resizing and converting pixels: against plain loops."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from dynacomm_async.data.pixels import Normalisation, PreparedImages, prepare, resize
from dynacomm_async.errors import ConfigError


def resize_in_loops(images, height, width):
    """Bilinear, half-pixel centres, border repeated: one output value at a time, in float64."""
    n, old_height, old_width, channels = images.shape
    out = np.empty((n, height, width, channels))

    def locate(i, new, old):
        centre = min(max((i + 0.5) * old / new - 0.5, 0.0), old - 1.0)
        low = math.floor(centre)
        return low, min(low + 1, old - 1), centre - low

    for y in range(height):
        y0, y1, fy = locate(y, height, old_height)
        for x in range(width):
            x0, x1, fx = locate(x, width, old_width)
            top = (1 - fx) * images[:, y0, x0] + fx * images[:, y0, x1]
            bottom = (1 - fx) * images[:, y1, x0] + fx * images[:, y1, x1]
            out[:, y, x] = (1 - fy) * top + fy * bottom
    return out


@pytest.mark.parametrize(
    ("old", "new"),
    [((8, 8), (28, 28)), ((8, 8), (5, 3)), ((7, 5), (7, 9)), ((1, 1), (4, 4)), ((6, 4), (1, 1))],
)
def test_resizing_equals_a_plain_double_loop(old, new):
    images = np.random.default_rng(0).standard_normal((3, *old, 2)).astype(np.float32)
    resized = resize(images, *new)
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, resize_in_loops(images, *new), atol=2e-6)


@pytest.mark.peers
@pytest.mark.parametrize("new", [(28, 28), (3, 5)])
def test_resizing_agrees_with_pytorch(new):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    images = np.random.default_rng(1).standard_normal((2, 8, 9, 3)).astype(np.float32)
    peer = torch.nn.functional.interpolate(
        torch.from_numpy(images).permute(0, 3, 1, 2), size=new, mode="bilinear"
    )
    np.testing.assert_allclose(
        resize(images, *new), peer.permute(0, 2, 3, 1).numpy(), rtol=1e-5, atol=1e-5
    )


def test_an_unchanged_size_leaves_every_bit():
    images = np.random.default_rng(2).standard_normal((2, 5, 6, 1)).astype(np.float32)
    assert resize(images, 5, 6).tobytes() == images.tobytes()


def test_each_channel_is_normalised_by_its_own_constants():
    pixels = np.random.default_rng(3).integers(0, 256, (4, 2, 2, 3), np.uint8)
    images = prepare(pixels, Normalisation((1, 2, 3), (4, 5, 6)), (2, 2, 3), "toy")
    for channel in range(3):
        expected = (pixels[..., channel].astype(float) - (channel + 1)) / (channel + 4)
        np.testing.assert_allclose(images[..., channel], expected, rtol=1e-6)
    assert images.flags.c_contiguous


def test_grey_becomes_colour_by_repetition():
    pixels = np.random.default_rng(4).integers(0, 256, (2, 3, 3, 1), np.uint8)
    images = prepare(pixels, Normalisation((0,), (1,)), (3, 3, 3), "toy")
    np.testing.assert_array_equal(images, np.repeat(pixels, 3, axis=3))


def test_colour_becomes_grey_as_the_mean():
    pixels = np.random.default_rng(5).integers(0, 256, (2, 3, 3, 3), np.uint8)
    images = prepare(pixels, Normalisation((0, 0, 0), (1, 1, 1)), (3, 3, 1), "toy")
    np.testing.assert_allclose(images, pixels.mean(axis=3, keepdims=True), rtol=1e-6)


def test_converting_in_blocks_gives_the_bits_of_converting_one_by_one(monkeypatch):
    pixels = np.random.default_rng(6).integers(0, 256, (10, 5, 5, 3), np.uint8)
    scale = Normalisation((1.5, 2.5, 3.5), (2, 3, 4))
    whole = prepare(pixels, scale, (7, 7, 1), "toy")
    monkeypatch.setattr("dynacomm_async.data.pixels._BLOCK_FLOATS", 200)
    assert prepare(pixels, scale, (7, 7, 1), "toy").tobytes() == whole.tobytes()


def test_channels_that_cannot_be_converted_are_refused():
    pixels = np.zeros((1, 2, 2, 3), np.uint8)
    with pytest.raises(ConfigError, match="toy images have 3 channels and the model takes 4"):
        prepare(pixels, Normalisation((0, 0, 0), (1, 1, 1)), (2, 2, 4), "toy")
    with pytest.raises(ConfigError, match="toy images have 3 channels and the model takes 4"):
        PreparedImages(pixels, Normalisation((0, 0, 0), (1, 1, 1)), (2, 2, 4), "toy")


@pytest.mark.parametrize(
    "chosen", [np.array([3, 0, 3, 9]), slice(2, 7), slice(9, 40), np.array([], np.int64)]
)
@pytest.mark.parametrize("shape", [(5, 4, 3), (9, 9, 1)])
def test_images_that_are_prepared_when_taken_have_the_bits_of_preparing_all(chosen, shape):
    planes = np.random.default_rng(7).integers(0, 256, (10, 3, 5, 4), np.uint8)
    pixels = planes.transpose(0, 2, 3, 1)  # as CIFAR's files have them
    scale = Normalisation((1.5, 2.5, 3.5), (2, 3, 4))
    whole = prepare(pixels, scale, shape, "toy")
    images = PreparedImages(pixels, scale, shape, "toy")
    assert (images.shape, images.dtype, images.ndim) == (whole.shape, whole.dtype, whole.ndim)
    assert len(images) == 10
    assert images[chosen].flags.c_contiguous
    assert np.array_equal(images[chosen], whole[chosen])
    assert np.array_equal(np.asarray(images), whole)


def test_images_that_are_prepared_when_taken_hold_nothing_but_the_stored_pixels():
    pixels = np.zeros((100, 8, 8, 1), np.uint8)
    tracemalloc.start()
    try:
        images = PreparedImages(pixels, Normalisation((0,), (1,)), (64, 64, 3), "toy")
        images[np.arange(4)]
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held < 20_000
