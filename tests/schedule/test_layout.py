from __future__ import annotations

import random

import pytest

from dynacomm_async.errors import PlanError
from dynacomm_async.ranges import CELL_NBYTES
from dynacomm_async.schedule import Layout
from dynacomm_async.wire import Grid, LayerSpec


@pytest.mark.parametrize("seed", range(30))
def test_cells_lie_where_counting_puts_them(seed: int) -> None:
    numbers = random.Random(seed)
    cell_nbytes = numbers.randint(1, 9)
    sizes = [numbers.randint(1, 40) for _ in range(numbers.randint(1, 6))]
    layout = Layout(sizes, cell_nbytes)
    cells = []  # layer and offset of each
    offset = 0
    for layer, size in enumerate(sizes):
        cells += [(layer, offset + place) for place in range(0, size, cell_nbytes)]
        offset += size
    assert (layout.n_layers, layout.n_cells, layout.nbytes) == (len(sizes), len(cells), offset)
    for cell, (layer, begin) in enumerate(cells):
        assert (layout.layer_of(cell), layout.offset(cell)) == (layer, begin)
    assert layout.offset(len(cells)) == offset
    starts = [begin for _, begin in cells] + [offset]
    for place in range(offset + 1):
        before = max(cell for cell, begin in enumerate(starts) if begin <= place)
        assert layout.cell_before(place) == before


def test_the_layout_is_the_grids() -> None:
    sizes = [1, 4096, 4097, 12_289, 7]
    grid = Grid([LayerSpec(f"layer{index}", count) for index, count in enumerate(sizes)])
    layout = Layout(4 * count for count in sizes)
    assert layout.cell_nbytes == CELL_NBYTES
    assert layout.n_cells == grid.n_parameter_cells
    for first in range(len(sizes)):
        for last in range(first, len(sizes)):
            assert layout.layers_cells(first, last) == grid.layers_cells(first, last)


@pytest.mark.parametrize(("sizes", "cell_nbytes"), [([], 1), ([1, 0], 1), ([1], 0)])
def test_a_layout_that_cannot_be_is_not_made(sizes: list[int], cell_nbytes: int) -> None:
    with pytest.raises(PlanError, match="expected at least one layer"):
        Layout(sizes, cell_nbytes)
