"""The grid of cells, against a division written down cell by cell."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from dynacomm_async.errors import ShapeError
from dynacomm_async.ranges import Range
from dynacomm_async.wire import CELL_FLOATS, CELL_NBYTES, MAX_FLOATS, Grid, LayerSpec
from dynacomm_async.wire.grid import as_layer_specs

near_a_cell = st.sampled_from([1, 2, 4095, 4096, 4097, 8191, 8192, 8193, 12288])
counts = near_a_cell | st.integers(1, 20_000)
tables = st.lists(st.tuples(counts, st.just(0) | counts), min_size=1, max_size=6).map(
    lambda rows: [
        LayerSpec(f"layer{i}", count, decay=count // 2, statistics=statistics)
        for i, (count, statistics) in enumerate(rows)
    ]
)


def list_cells(layers: list[LayerSpec]) -> list[tuple[int, int, int]]:
    """Every cell as (layer, first float, floats): parameters first, then statistics."""
    cells, start = [], 0
    for lengths in ([s.count for s in layers], [s.statistics for s in layers]):
        for layer, left in enumerate(lengths):
            while left:
                n = min(left, 4096)
                cells.append((layer, start, n))
                start += n
                left -= n
    return cells


@given(tables)
def test_cells_are_4096_floats_restart_at_each_layer_and_end_short(
    layers: list[LayerSpec],
) -> None:
    grid, cells = Grid(layers), list_cells(layers)
    assert (CELL_FLOATS, CELL_NBYTES) == (4096, 16384)
    assert grid.n_cells == len(cells)
    assert [grid.floats(i, 1) for i in range(grid.n_cells)] == [
        (start, start + n) for _, start, n in cells
    ]
    assert grid.n_floats == sum(n for _, _, n in cells)


@given(tables)
def test_statistics_lie_behind_all_parameters(layers: list[LayerSpec]) -> None:
    grid = Grid(layers)
    assert grid.n_parameters == sum(spec.count for spec in layers)
    assert grid.n_statistics == sum(spec.statistics for spec in layers)
    assert grid.parameter_nbytes == 4 * grid.n_parameters
    first, count = grid.statistics_cells
    assert (first, first + count) == (grid.n_parameter_cells, grid.n_cells)
    assert grid.floats(first, count) == (grid.n_parameters, grid.n_floats)


@given(tables, st.data())
def test_layers_and_cells_find_each_other(layers: list[LayerSpec], data: st.DataObject) -> None:
    grid, cells = Grid(layers), list_cells(layers)
    owners = [layer for layer, _, _ in cells[: grid.n_parameter_cells]]
    assert [grid.layer_of_cell(i) for i in range(grid.n_parameter_cells)] == owners
    for layer, spec in enumerate(layers):
        assert grid.layer_cells(layer) == (owners.index(layer), owners.count(layer))
        part = grid.layer_slice(layer)
        assert (part.start, part.stop) == grid.floats(*grid.layer_cells(layer))
        assert part.stop - part.start == spec.count
    first = data.draw(st.integers(0, len(layers) - 1))
    last = data.draw(st.integers(first, len(layers) - 1))
    run = grid.layers_cells(first, last)
    assert run.first == grid.layer_cells(first).first
    assert run.count == sum(grid.layer_cells(i).count for i in range(first, last + 1))


@given(tables, st.data())
def test_bytes_of_ranges_are_those_of_their_cells(
    layers: list[LayerSpec], data: st.DataObject
) -> None:
    grid, cells = Grid(layers), list_cells(layers)
    first = data.draw(st.integers(0, grid.n_cells - 1))
    count = data.draw(st.integers(1, grid.n_cells - first))
    expected = 4 * sum(n for _, _, n in cells[first : first + count])
    assert grid.nbytes([Range(first, count)]) == expected
    assert grid.nbytes([Range(first, count), Range(0, 1)]) == expected + 4 * cells[0][2]


@pytest.mark.parametrize(
    ("first", "count", "holds"),
    [(0, 3, True), (2, 1, True), (0, 4, False), (3, 1, False), (0, 0, False), (-1, 1, False)],
)
def test_a_range_must_be_a_run_of_cells_that_exist(first: int, count: int, holds: bool) -> None:
    grid = Grid([LayerSpec("a", 4097), LayerSpec("b", 1)])
    assert grid.holds([Range(first, count)]) is holds
    assert grid.holds([Range(0, 1), Range(first, count)]) is holds


BASE = [LayerSpec("a", 10, 5, 2), LayerSpec("b", 3)]


@pytest.mark.parametrize(
    "other",
    [
        [LayerSpec("A", 10, 5, 2), LayerSpec("b", 3)],
        [LayerSpec("a", 11, 5, 2), LayerSpec("b", 3)],
        [LayerSpec("a", 10, 4, 2), LayerSpec("b", 3)],
        [LayerSpec("a", 10, 5, 3), LayerSpec("b", 3)],
        [LayerSpec("b", 3), LayerSpec("a", 10, 5, 2)],
        [LayerSpec("a", 10, 5, 2)],
    ],
    ids=["name", "count", "decay", "statistics", "order", "missing"],
)
def test_any_difference_of_the_layer_tables_changes_the_fingerprint(
    other: list[LayerSpec],
) -> None:
    assert Grid(BASE).fingerprint == Grid(list(BASE)).fingerprint
    assert Grid(other).fingerprint != Grid(BASE).fingerprint


def test_the_fingerprint_is_the_same_on_every_machine_and_in_every_release() -> None:
    assert Grid(BASE).fingerprint == "0a2231046d354f0145744abcfbda3d3f"


def test_a_mapping_of_counts_decays_everywhere_and_keeps_its_order() -> None:
    assert as_layer_specs({"z": 2, "a": 1}) == (LayerSpec("z", 2, 2), LayerSpec("a", 1, 1))
    assert as_layer_specs(iter(BASE)) == tuple(BASE)


@pytest.mark.parametrize("count", [1.0, "3", True, None])
def test_a_count_that_is_no_whole_number_is_refused(count: object) -> None:
    with pytest.raises(ShapeError, match=r"layer 'a'.*expected a whole number"):
        as_layer_specs({"a": count})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (("", 1), "no name"),
        (("a", 0), "'a' has 0 parameters, expected 1 or more"),
        (("a", -4), "'a' has -4 parameters"),
        (("a", 4, 5), "'a': weight decay on 5 of 4"),
        (("a", 4, -1), "'a': weight decay on -1 of 4"),
        (("a", 4, 0, -1), "'a' has -1 statistics"),
    ],
)
def test_a_layer_that_cannot_be_is_refused_by_name(row: tuple, complaint: str) -> None:
    with pytest.raises(ShapeError, match=complaint):
        LayerSpec(*row)


def test_a_model_without_layers_or_with_a_name_twice_is_refused() -> None:
    with pytest.raises(ShapeError, match="no layers"):
        Grid([])
    with pytest.raises(ShapeError, match="two layers are named 'b'"):
        Grid([LayerSpec("a", 1), LayerSpec("b", 1), LayerSpec("b", 2)])


def test_a_model_too_large_for_any_machine_is_refused_before_it_costs_memory() -> None:
    with pytest.raises(ShapeError, match=f"expected at most {MAX_FLOATS}"):
        Grid([LayerSpec("a", 2**62), LayerSpec("b", 1)])
