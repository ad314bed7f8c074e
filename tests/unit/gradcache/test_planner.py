"""Cutting rows into chunks, and budgets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vembed_fs2.embedding.batch import Profile
from vembed_fs2.gradcache import parse_budget, plan_chunks, planner
from vembed_fs2.gradcache.planner import count_kept, match_counts

CPU = torch.device("cpu")

Row = tuple[int, int, int]
"""The kind, the tokens and the patches of a row."""

rows = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 40), st.sampled_from([0, 0, 1, 5, 16])), max_size=60)

budgets = st.tuples(st.integers(1, 100), st.none() | st.integers(1, 60))


def profile_of(data: list[Row]) -> Profile:
    kinds, tokens, patches = ([row[i] for row in data] for i in range(3))
    return Profile(kinds, tokens, patches)


@given(rows, budgets)
def test_chunks_hold_every_row_once_within_both_budgets_and_of_one_kind(
    data: list[Row], budget: tuple[int, int | None]
) -> None:
    chunks = plan_chunks(profile_of(data), *budget)
    assert sorted(r for c in chunks for r in c.rows) == list(range(len(data)))
    for chunk in chunks:
        assert {data[r][0] for r in chunk.rows} == {chunk.kind}
        # A row without tokens and patches counts as one of one token.
        width = max(data[r][1] or (0 if data[r][2] else 1) for r in chunk.rows)
        tokens, patches = width * len(chunk.rows), sum(data[r][2] for r in chunk.rows)
        assert chunk.tokens == tokens + patches
        fits = chunk.tokens <= budget[0] if budget[1] is None else tokens <= budget[0] and patches <= budget[1]
        assert fits or len(chunk.rows) == 1
        assert not chunk.dummy


@given(rows, budgets)
def test_the_most_expensive_rows_of_a_kind_come_first(data: list[Row], budget: tuple[int, int | None]) -> None:
    chunks = plan_chunks(profile_of(data), *budget)
    order = [(data[r][0], -data[r][1] - data[r][2]) for c in chunks for r in c.rows]
    assert order == sorted(order)


@given(rows, budgets, st.integers(1, 4))
def test_chunks_hold_no_more_rows_than_they_may(data: list[Row], budget: tuple[int, int | None], limit: int) -> None:
    chunks = plan_chunks(profile_of(data), *budget, max_rows=limit)
    assert sorted(r for c in chunks for r in c.rows) == list(range(len(data)))
    assert all(len(c.rows) <= limit for c in chunks)
    if all(len(c.rows) <= limit for c in plan_chunks(profile_of(data), *budget)):
        assert chunks == plan_chunks(profile_of(data), *budget)


@given(rows.filter(bool), budgets, st.data())
def test_matched_chunks_have_the_counts_and_still_every_row_once(
    data: list[Row], budget: tuple[int, int | None], draw: st.DataObject
) -> None:
    profile = profile_of(data)
    chunks = plan_chunks(profile, *budget)
    counts = {k: sum(c.kind == k for c in chunks) + draw.draw(st.integers(0, 5)) for k in set(profile.kinds)}
    matched = match_counts(chunks, counts, profile)
    assert {k: sum(c.kind == k for c in matched) for k in counts} == counts
    assert sorted(r for c in matched if not c.dummy for r in c.rows) == list(range(len(data)))
    for kind in counts:
        assert not next(c for c in matched if c.kind == kind).dummy
    assert all(c.rows for c in matched)


def test_a_kind_that_only_other_ranks_have_gets_chunks_without_rows() -> None:
    profile = Profile([1, 1], [3, 3], [0, 0])
    matched = match_counts(plan_chunks(profile, 10), {1: 1, 2: 2}, profile)
    assert [(c.kind, c.rows, c.dummy) for c in matched] == [(1, (0, 1), False), (2, (), True), (2, (), True)]


def test_patches_are_summed_and_tokens_are_padded() -> None:
    profile = Profile([3] * 3, [4, 3, 2], [10, 20, 30])
    assert [c.rows for c in plan_chunks(profile, 100, 50)] == [(2, 1), (0,)]
    assert [c.rows for c in plan_chunks(profile, 8, 1000)] == [(2, 1), (0,)]
    assert [c.tokens for c in plan_chunks(profile, 1000, 1000)] == [3 * 4 + 60]


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
