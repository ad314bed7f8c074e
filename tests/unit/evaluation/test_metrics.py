"""Metrics against trec_eval (through pytrec_eval) and against hand-made cases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vembed_fs2.evaluation import metrics as m

torch.set_num_threads(1)

NUM_DOCUMENTS = 12


@st.composite
def judged_rankings(draw: st.DrawFn) -> tuple[list[list[int]], list[dict[int, int]]]:
    """Ranked lists (whole or cut) and graded judgements of one to four queries."""
    count = draw(st.integers(1, 4))
    lists, judgements = [], []
    length = draw(st.integers(1, NUM_DOCUMENTS))
    for _ in range(count):
        lists.append(draw(st.permutations(range(NUM_DOCUMENTS)))[:length])
        relevant = draw(st.sets(st.integers(0, NUM_DOCUMENTS - 1), min_size=1))
        judgements.append({d: draw(st.integers(1, 3)) for d in sorted(relevant)})
    return lists, judgements


def padded(judgements: list[dict[int, int]]) -> tuple[Tensor, Tensor]:
    width = max(len(j) for j in judgements)
    index = torch.full((len(judgements), width), -1)
    grades = torch.zeros(len(judgements), width)
    for i, judged in enumerate(judgements):
        index[i, : len(judged)] = torch.tensor(list(judged))
        grades[i, : len(judged)] = torch.tensor(list(judged.values())).float()
    return index, grades


def trec_eval(lists: list[list[int]], judgements: list[dict[int, int]]) -> dict[str, dict[str, float]]:
    pytrec_eval: Any = pytest.importorskip("pytrec_eval")
    measures = {"map", "recip_rank", "recall.1,3,5", "success.1,5,10", "ndcg_cut.1,3,10"}
    qrels = {f"q{i}": {f"d{d}": g for d, g in judged.items()} for i, judged in enumerate(judgements)}
    run = {f"q{i}": {f"d{d}": float(-rank) for rank, d in enumerate(order)} for i, order in enumerate(lists)}
    return dict(pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run))


@settings(max_examples=150)
@given(judged_rankings())
def test_every_metric_equals_trec_eval(case: tuple[list[list[int]], list[dict[int, int]]]) -> None:
    lists, judgements = case
    index, grades = padded(judgements)
    ranks = m.ranks_in_lists(torch.tensor(lists), index)
    ours = {
        "map": m.average_precision(ranks),
        "recip_rank": m.reciprocal_rank(ranks),
        **{f"recall_{k}": m.recall_at_k(ranks, k) for k in (1, 3, 5)},
        **{f"success_{k}": m.hit_at_k(ranks, k) for k in (1, 5, 10)},
        **{f"ndcg_cut_{k}": m.ndcg_at_k(ranks, k, grades) for k in (1, 3, 10)},
    }
    expected = trec_eval(lists, judgements)
    for name, values in ours.items():
        for i, value in enumerate(values.tolist()):
            assert value == pytest.approx(expected[f"q{i}"][name], abs=1e-9), name


def test_values_of_a_case_worked_out_by_hand() -> None:
    ranks = torch.tensor([[2, 5, 0], [1, 2, m.NOT_RETRIEVED]])
    assert m.recall_at_k(ranks, 2).tolist() == [1 / 2, 2 / 3]
    assert m.hit_at_k(ranks, 1).tolist() == [0.0, 1.0]
    assert m.reciprocal_rank(ranks).tolist() == [1 / 2, 1.0]
    assert m.reciprocal_rank(ranks, 1).tolist() == [0.0, 1.0]
    assert m.average_precision(ranks).tolist() == pytest.approx([(1 / 2 + 2 / 5) / 2, 2 / 3])
    best = 1 + 1 / math.log2(3)
    assert m.ndcg_at_k(ranks, 10)[0].item() == pytest.approx((1 / math.log2(3) + 1 / math.log2(6)) / best)


def test_recall_of_one_relevant_document_is_the_hit_rate() -> None:
    ranks = torch.randint(1, 30, (50, 1))
    for k in (1, 5, 10):
        assert torch.equal(m.recall_at_k(ranks, k), m.hit_at_k(ranks, k))


def test_a_document_that_is_not_retrieved_counts_as_nothing() -> None:
    ranks = torch.tensor([[m.NOT_RETRIEVED]])
    values = [m.recall_at_k(ranks, 10), m.hit_at_k(ranks, 10), m.reciprocal_rank(ranks), m.average_precision(ranks)]
    assert [v.item() for v in [*values, m.ndcg_at_k(ranks, 10)]] == [0.0] * 5


@pytest.mark.parametrize(
    "metric", [lambda r: m.recall_at_k(r, 1), lambda r: m.hit_at_k(r, 1), m.reciprocal_rank, m.average_precision]
)
def test_a_query_without_relevant_documents_is_an_error(metric: Any) -> None:
    with pytest.raises(ValueError, match="without relevant documents"):
        metric(torch.tensor([[1], [0]]))


@pytest.mark.parametrize("grade", [0.0, -1.0, math.nan, math.inf])
def test_a_grade_must_be_a_positive_number(grade: float) -> None:
    with pytest.raises(ValueError, match="grade"):
        m.ndcg_at_k(torch.tensor([[1]]), 10, torch.tensor([[grade]]))


def test_k_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        m.recall_at_k(torch.tensor([[1]]), 0)


def test_a_list_that_repeats_a_document_is_an_error() -> None:
    with pytest.raises(ValueError, match="twice"):
        m.ranks_in_lists(torch.tensor([[3, 1, 3]]), torch.tensor([[3]]))
    padded_list = m.ranks_in_lists(torch.tensor([[3, -1, -1]]), torch.tensor([[3, 4, -1]]))
    assert padded_list.tolist() == [[1, m.NOT_RETRIEVED, 0]]
