"""Convolutions of 3 x 3 with fewer multiplications: Winograd's F(4 x 4, 3 x 3).

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308). A tile of
4 x 4 outputs depends on 6 x 6 inputs. With the constant matrices B (6, 6), G (6, 3) and A (6, 4)

    output = A^T [ (G weights G^T) * (B^T input B) ] A        (* is elementwise)

so that a tile costs 36 products for each pair of channels instead of 144. Over all tiles and
channels the elementwise product is 36 matrix products, (tiles, C) by (C, O), one for each place in
the transformed tile. A transform of both directions at once is one product with a Kronecker square,
B (x) B and so on, of (36, 36), (36, 9) and (36, 16): tiles lie with their places as first axis,
(36, tiles, C), so the transforms need no strided access, and BLAS does them at full speed.

The gradient of the input is the same convolution of the output's gradient, with turned weights.
The gradient of the weights is the transposed algorithm:

    gradient = G^T [ sum over tiles of (B^T input B) * (A output gradient A^T) ] G

In float32 results are off by about 1e-6 of the largest, some times as much as direct products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

__all__ = [
    "PLACES",
    "REACH",
    "TILE",
    "TileBlock",
    "Transforms",
    "block_tiles",
    "plan_tiles",
    "suits_winograd",
    "tiles_in",
]

Array = NDArray[Any]

TILE = 4
"""Outputs of a tile in each direction."""

REACH = 6
"""Inputs of a tile in each direction."""

PLACES = REACH * REACH
"""Places in a transformed tile."""

MOST_TILES = 128
"""Tiles of a block: enough for products at BLAS's full speed, few enough to stay in cache."""

_B = (
    (4, 0, 0, 0, 0, 0),
    (0, -4, 4, -2, 2, 4),
    (-5, -4, -4, -1, -1, 0),
    (0, 1, -1, 2, -2, -5),
    (1, 1, 1, 1, 1, 0),
    (0, 0, 0, 0, 0, 1),
)
_G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_A = ((1, 0, 0, 0), (1, 1, 1, 1), (1, -1, 1, -1), (1, 2, 4, 8), (1, -2, 4, -8), (0, 0, 0, 1))


class Transforms:
    """The constant matrices in one dtype; places of tiles and taps count line by line.

    Attributes:
        inputs: (36, 36), of tiles of the input.
        weights: (36, 9).
        turned: (36, 9), of the weights turned by 180 degrees.
        outputs: (16, 36), of what the products give.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        b, g, a = (np.array(matrix, np.float64) for matrix in (_B, _G, _A))
        self.inputs = np.kron(b.T, b.T).astype(dtype)
        self.weights = np.kron(g, g).astype(dtype)
        self.turned = np.ascontiguousarray(self.weights[:, ::-1])
        self.outputs = np.kron(a.T, a.T).astype(dtype)


_LEAST_CHANNELS = 32
_MARGIN = 1.5
"""What an operation of Winograd's costs beside one of a direct convolution, copies included.

Measured at 16 to 512 channels and 3 to 56 pixels: where the rule says tiles, they took 0.46 to 0.91
of the time on AVX2. In batches of fewer than about ten tiles transforming the weights costs more
than all of them save; the rule does not look at the batch, which may be cut into shards.
"""


def suits_winograd(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    channels: tuple[int, int],
    output: tuple[int, int],
) -> bool:
    """Whether tiles are the faster way: a fixed rule, since the result's bits depend on it.

    Operations are counted. The transforms weigh more the fewer channels share them, and what tiles
    that reach over the edge compute there is lost.

    Args:
        channels: of the input and of the output.
        output: height and width.
    """
    before, after = channels
    if kernel != (3, 3) or stride != (1, 1):
        return False
    if min(channels) < _LEAST_CHANNELS or min(output) < TILE:
        return False
    down, across = tiles_in(output)
    transforms = PLACES * (PLACES * before + TILE * TILE * after)
    tiled = down * across * (PLACES * before * after + transforms)
    direct = 9 * before * after * output[0] * output[1]
    return tiled * _MARGIN < direct


def tiles_in(output: tuple[int, int]) -> tuple[int, int]:
    """Lines of tiles, and tiles in a line, that cover an output of that height and width."""
    return -(-output[0] // TILE), -(-output[1] // TILE)


class _Part(NamedTuple):
    """Neighbouring tiles, in one direction, of which equally much lies inside the array."""

    tiles: slice
    inside: int


def _parts(tiles: slice, size: int, step: int, extent: int) -> list[_Part]:
    """Whole tiles among ``tiles``, then the last one if it reaches over the edge."""
    whole = min(tiles.stop, max(tiles.start, (extent - size) // step + 1))
    parts = [_Part(slice(tiles.start, whole), size)] if whole > tiles.start else []
    if whole < tiles.stop:
        parts.append(_Part(slice(whole, tiles.stop), extent - step * whole))
    return parts


@dataclass(frozen=True, slots=True)
class TileBlock:
    """Some tiles of an array: of whole images, or some lines of tiles of one image.

    Attributes:
        scratch: (places, tiles, C), the workspace they are copied into or out of.
        copies: views (i, j, n, down, across, C) of the scratch and of the array that belong
            together.
        empty: views of the scratch that lie outside the array.
        accumulate: another has written the array already: :meth:`scatter` adds.
    """

    scratch: Array
    copies: tuple[tuple[Array, Array], ...]
    empty: tuple[Array, ...]
    accumulate: bool = False

    def gather(self) -> None:
        """Copy the array's tiles into the scratch, zeros where they reach over the edge."""
        for target in self.empty:
            target[...] = 0
        for target, source in self.copies:
            np.copyto(target, source)

    def scatter(self) -> None:
        """Copy the scratch into the array, or add it; what reaches over the edge is left out."""
        for source, target in self.copies:
            if self.accumulate:
                np.add(target, source, out=target)
            else:
                np.copyto(target, source)


def plan_tiles(
    array: Array,
    size: int,
    tiles: tuple[int, int],
    scratch: Array,
    *,
    accumulate: bool = False,
) -> list[TileBlock]:
    """Cut ``array`` into blocks of tiles, the same for every array of equally many tiles.

    Args:
        array: (N, H, W, C), channels contiguous; blocks keep views of it.
        size: height and width of a tile. Those of an input's tiles lie :data:`TILE` apart and
            overlap, all others lie side by side.
        tiles: lines of tiles, and tiles in a line.
        scratch: 1-D, at least size * size * :func:`block_tiles` * C elements, shared by the blocks.
        accumulate: see :class:`TileBlock`.
    """
    channels, (down, across), step = array.shape[3], tiles, min(size, TILE)
    blocks = []
    for images, lines in _cut(array.shape[0], down, across):
        shape = (images.stop - images.start, lines.stop - lines.start, across, channels)
        count = size * size * shape[0] * shape[1] * across * channels
        own = scratch[:count].reshape(size, size, *shape)
        copies, empty = _pair(own, array[images], size, step, lines)
        flat = own.reshape(size * size, -1, channels)
        blocks.append(TileBlock(flat, tuple(copies), tuple(empty), accumulate))
    return blocks


def block_tiles(batch: int, tiles: tuple[int, int]) -> int:
    """Tiles of the largest block, which is the first."""
    images, lines = next(_cut(batch, *tiles))
    return int(images.stop * lines.stop * tiles[1])


def _cut(batch: int, down: int, across: int) -> Iterator[tuple[slice, slice]]:
    """Images and lines of tiles of each block."""
    images = max(1, MOST_TILES // (down * across))
    lines = down if down * across <= MOST_TILES else max(1, MOST_TILES // across)
    for n in range(0, batch, images):
        for h in range(0, down, lines):
            yield slice(n, min(n + images, batch)), slice(h, min(h + lines, down))


def _pair(
    own: Array, array: Array, size: int, step: int, lines: slice
) -> tuple[list[tuple[Array, Array]], list[Array]]:
    """Views of the scratch and the array that belong together, and of the rest of the scratch."""
    copies, empty = [], []
    step_n, step_h, step_w, step_c = array.strides
    across = slice(0, own.shape[4])
    for v in _parts(lines, size, step, array.shape[1]):
        rows = slice(v.tiles.start - lines.start, v.tiles.stop - lines.start)
        for h in _parts(across, size, step, array.shape[2]):
            target = own[:, :, :, rows, h.tiles]
            inside = target[: v.inside, : h.inside]
            corner = array[:, step * v.tiles.start :, step * h.tiles.start :]
            source = as_strided(
                corner,
                inside.shape,
                (step_h, step_w, step_n, step * step_h, step * step_w, step_c),
            )
            copies.append((inside, source))
            empty += [target[v.inside :], target[: v.inside, h.inside :]]
    return copies, [view for view in empty if view.size]
