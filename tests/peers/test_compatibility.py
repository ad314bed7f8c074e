"""Folders of other libraries give the vectors that those give, and ours give ours in them."""

from __future__ import annotations

import pytest

from .cases import list_cases
from .compare import Cell, Results

CELLS = dict.fromkeys(
    Cell(case.family, case.layout, peer, side)
    for case in list_cases()
    for peer in ("present", "newest")
    for side in ("read", "written")
)


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_vectors_are_equal(results: Results, cell: Cell) -> None:
    assert not results.errors.get(cell), "\n".join(results.errors[cell])
    differences = results.differences.get(cell)
    if not differences:
        pytest.skip("We do not write such models in this layout.")
    assert results.is_equal(cell), differences
