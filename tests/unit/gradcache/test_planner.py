"""Cutting rows into chunks, and budgets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vembed_fs2.gradcache import parse_budget, plan_chunks, planner
from vembed_fs2.gradcache.planner import count_kept, match_counts

CPU = torch.device("cpu")

rows = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3)), max_size=60)


@given(rows, st.integers(1, 100))
def test_chunks_hold_every_row_once_within_the_budget_and_of_one_kind(data: list[tuple[int, int]], budget: int) -> None:
    costs, kinds = [c for c, _ in data], [k for _, k in data]
    chunks = plan_chunks(costs, kinds, budget)
    assert sorted(r for c in chunks for r in c.rows) == list(range(len(data)))
    for chunk in chunks:
        assert {kinds[r] for r in chunk.rows} == {chunk.kind}
        width = max(1, *(costs[r] for r in chunk.rows))
        assert chunk.tokens == width * len(chunk.rows)
        assert chunk.tokens <= budget or len(chunk.rows) == 1
        assert not chunk.dummy


@given(rows, st.integers(1, 100))
def test_the_longest_rows_of_a_kind_come_first(data: list[tuple[int, int]], budget: int) -> None:
    chunks = plan_chunks([c for c, _ in data], [k for _, k in data], budget)
    order = [(kind, -cost) for c in chunks for cost, kind in (data[r] for r in c.rows)]
    assert order == sorted(order)


@given(rows.filter(bool), st.integers(1, 100), st.data())
def test_matched_chunks_have_the_counts_and_still_every_row_once(
    data: list[tuple[int, int]], budget: int, draw: st.DataObject
) -> None:
    costs, kinds = [c for c, _ in data], [k for _, k in data]
    chunks = plan_chunks(costs, kinds, budget)
    own = {k: sum(c.kind == k for c in chunks) for k in set(kinds)}
    counts = {k: n + draw.draw(st.integers(0, 5)) for k, n in own.items()}
    matched = match_counts(chunks, counts, costs)
    assert {k: sum(c.kind == k for c in matched) for k in counts} == counts
    assert sorted(r for c in matched if not c.dummy for r in c.rows) == list(range(len(data)))
    for kind in counts:
        assert not next(c for c in matched if c.kind == kind).dummy
    assert all(c.rows for c in matched)


def test_a_kind_that_only_other_ranks_have_is_an_error() -> None:
    chunks = plan_chunks([3, 3], [1, 1], 10)
    with pytest.raises(ValueError, match="no row of images"):
        match_counts(chunks, {1: 1, 2: 1}, [3, 3])


@pytest.mark.parametrize(
    ("sizes", "budget", "expected"),
    [([10, 10, 10], 29, 2), ([10, 10, 10], 30, 3), ([10, 1], 5, 0), ([], 5, 0), ([5, 100, 1], 50, 1)],
)
def test_a_prefix_of_chunks_that_fits_is_kept(sizes: list[int], budget: int, expected: int) -> None:
    assert count_kept(sizes, budget) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0),
        ("0", 0),
        (17, 17),
        ("17", 17),
        ("4GiB", 4 * 2**30),
        (" 1.5 mib ", 3 * 2**19),
        ("2kB", 2000),
        ("all", 2**62),
    ],
)
def test_budgets_are_read(value: int | str, expected: int) -> None:
    assert parse_budget(value, CPU) == expected


@pytest.mark.parametrize("value", [-1, "-1", "many", "4 GiBs", "", "1e9", True, 1.5, None])
def test_a_wrong_budget_is_an_error_that_says_what_is_right(value: object) -> None:
    with pytest.raises(ValueError, match=r"'auto', 'all', 0, or a size such as '4GiB', but is"):
        parse_budget(value, CPU)  # type: ignore[arg-type]


def test_the_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "_available", lambda: 800)
    monkeypatch.setattr(planner, "_container_headroom", lambda: 10_000)
    assert parse_budget("auto", CPU) == 400
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert parse_budget("auto", CPU) == 100
    monkeypatch.setattr(planner, "_container_headroom", lambda: 80)
    assert parse_budget("auto", CPU) == 10


def test_automatic_budgets_are_positive_on_this_machine() -> None:
    assert 0 < parse_budget("auto", CPU) < 2**50
