"""Runs of cells, against sets of cells."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, strategies as st

from dynacomm_async.ranges import Range, merge, subtract

RANGES = st.lists(st.builds(Range, st.integers(0, 40), st.integers(1, 9)), max_size=9)


def cells_of(ranges: tuple[Range, ...] | list[Range]) -> set[int]:
    return {cell for first, count in ranges for cell in range(first, first + count)}


@given(RANGES)
def test_merging_keeps_the_cells_in_ascending_runs_that_do_not_touch(ranges: list[Range]) -> None:
    merged = merge(ranges)
    assert cells_of(merged) == cells_of(ranges)
    assert all(a.first + a.count < b.first for a, b in pairwise(merged))


@given(st.builds(Range, st.integers(0, 40), st.integers(1, 30)), RANGES)
def test_subtracting_leaves_the_other_cells_in_order(cells: Range, holes: list[Range]) -> None:
    rest = list(subtract(cells, merge(holes)))
    assert cells_of(rest) == cells_of([cells]) - cells_of(holes)
    assert rest == sorted(rest)
    assert all(part.count for part in rest)
