"""Exact search against full score matrices, with ties, small blocks and bad embeddings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from vembed_fs2.embedding.head import Similarity
from vembed_fs2.evaluation import EmbeddingValueError, exact_search, relevant_ranks

torch.set_num_threads(1)


@st.composite
def whole_numbers(draw: st.DrawFn) -> dict[str, Any]:
    """Embeddings of small whole numbers: their products are exact, and ties are frequent."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    num_queries, num_documents = draw(st.integers(1, 7)), draw(st.integers(1, 23))
    dim, largest = draw(st.integers(1, 4)), draw(st.integers(0, 3))

    def numbers(rows: int) -> Tensor:
        return torch.randint(-largest, largest + 1, (rows, dim), generator=generator).float()

    excluded = torch.randint(-1, num_documents, (num_queries,), generator=generator)
    return {
        "queries": numbers(num_queries),
        "documents": numbers(num_documents),
        "exclude": draw(st.sampled_from([None, excluded])),
        "query_block": draw(st.integers(1, 8)),
        "document_block": draw(st.integers(1, 25)),
    }


def full_order(scores: Tensor, exclude: Tensor | None) -> list[list[int]]:
    """Every query's documents by score and then index, the excluded one left out."""
    orders = []
    for i, row in enumerate(scores.tolist()):
        left_out = -1 if exclude is None else int(exclude[i])
        orders.append(sorted((d for d in range(len(row)) if d != left_out), key=lambda d: (-row[d], d)))
    return orders


@settings(max_examples=150)
@given(whole_numbers(), st.integers(1, 30))
def test_search_equals_sorting_the_full_matrix(case: dict[str, Any], k: int) -> None:
    scores = case["queries"] @ case["documents"].T
    found = exact_search(k=k, similarity="dot", **case)
    width = min(k, case["documents"].size(0))
    assert found.indices.shape == found.scores.shape == (case["queries"].size(0), width)
    for i, order in enumerate(full_order(scores, case["exclude"])):
        missing = max(0, width - len(order))
        assert found.indices[i].tolist() == order[:width] + [-1] * missing
        assert found.scores[i].tolist() == [scores[i, d].item() for d in order[:width]] + [-math.inf] * missing


@settings(max_examples=150)
@given(whole_numbers(), st.integers(1, 5), st.integers(0, 2**31))
def test_ranks_equal_positions_in_the_full_order(case: dict[str, Any], width: int, seed: int) -> None:
    num_queries, num_documents = case["queries"].size(0), case["documents"].size(0)
    generator = torch.Generator().manual_seed(seed)
    relevant = torch.full((num_queries, width), -1)
    for i in range(num_queries):
        chosen = torch.randperm(num_documents, generator=generator)[: int(torch.randint(0, width + 1, (1,)))]
        if case["exclude"] is not None:
            chosen = chosen[chosen != case["exclude"][i]]
        relevant[i, : len(chosen)] = chosen
    ranks = relevant_ranks(case["queries"], case["documents"], relevant, similarity="dot", **_options(case))
    orders = full_order(case["queries"] @ case["documents"].T, case["exclude"])
    expected = [[0 if d < 0 else orders[i].index(d) + 1 for d in row] for i, row in enumerate(relevant.tolist())]
    assert ranks.tolist() == expected


def _options(case: dict[str, Any]) -> dict[str, Any]:
    return {key: case[key] for key in ("exclude", "query_block", "document_block")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_cosine_equals_topk_of_normalised_embeddings(dtype: torch.dtype) -> None:
    queries, documents = torch.randn(20, 16).to(dtype), (torch.randn(300, 16) * 7).to(dtype)
    found = exact_search(queries, documents, 10, query_block=7, document_block=64)
    expected = (normalize(queries.float(), dim=1) @ normalize(documents.float(), dim=1).T).topk(10)
    assert torch.equal(found.indices, expected.indices)
    assert found.scores.dtype == torch.float32
    torch.testing.assert_close(found.scores, expected.values)


def test_cosine_of_very_large_small_and_zero_vectors() -> None:
    documents = torch.tensor([[1e30, 1e30], [1e-30, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    found = exact_search(torch.tensor([[1e-25, 0.0]]), documents, 4)
    assert found.indices.tolist() == [[1, 0, 2, 3]]
    assert found.scores.tolist()[0] == pytest.approx([1.0, 0.5**0.5, 0.0, -1.0])


def test_a_collapsed_model_is_not_rewarded() -> None:
    same = torch.ones(100, 8)
    ranks = relevant_ranks(same, same, torch.arange(100)[:, None], query_block=16, document_block=16)
    assert ranks.squeeze(1).tolist() == list(range(1, 101))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_embeddings_that_are_not_finite_are_an_error(value: float, similarity: Similarity) -> None:
    good, bad = torch.randn(30, 4), torch.randn(30, 4)
    bad[17, 2] = value
    with pytest.raises(EmbeddingValueError, match="document 17 holds NaN"):
        exact_search(good, bad, 3, similarity=similarity, document_block=5)
    with pytest.raises(EmbeddingValueError, match="query 17 holds NaN"):
        relevant_ranks(bad, good, torch.zeros(30, 1, dtype=torch.int64), similarity=similarity, query_block=4)


def test_dot_products_that_would_overflow_are_an_error() -> None:
    with pytest.raises(EmbeddingValueError, match="too large"):
        exact_search(torch.full((1, 2), 1e30), torch.full((1, 2), 1e30), 1, similarity="dot")


def test_lower_precision_settings_do_not_reach_the_scores() -> None:
    queries, documents = torch.randn(8, 64), torch.randn(50, 64)
    expected = exact_search(queries, documents, 50)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = exact_search(queries, documents, 50)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found.scores, expected.scores)


class _LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return result


def test_no_tensor_is_larger_than_a_block() -> None:
    queries, documents = torch.randn(400, 8), torch.randn(3000, 8)
    relevant = torch.randint(0, 3000, (400, 3))
    # Views of the inputs have up to 3000 x 8 elements; a full matrix would have 1,200,000.
    with _LargestTensor() as memory:
        exact_search(queries, documents, 10, query_block=100, document_block=500)
        relevant_ranks(queries, documents, relevant, query_block=100, document_block=500)
    assert memory.largest <= 100 * 500


def test_no_tensor_of_several_vectors_per_row_is_larger_than_a_block() -> None:
    queries, documents = torch.randn(40, 9, 8), torch.randn(300, 11, 8)
    mask, relevant = torch.rand(300, 11) < 0.7, torch.randint(0, 300, (40, 3))
    options: dict[str, Any] = {"similarity": "maxsim", "document_mask": mask, "query_block": 100, "document_block": 500}
    # Views of the inputs have up to 300 x 11 x 8 elements; all pairs of vectors are 1,188,000.
    with _LargestTensor() as memory:
        exact_search(queries, documents, 10, **options)
        relevant_ranks(queries, documents, relevant, **options)
    assert memory.largest <= 100 * 500


def test_wrong_arguments_are_errors() -> None:
    x = torch.randn(3, 4)
    bad: list[tuple[str, Any]] = [
        ("at least 1", lambda: exact_search(x, x, 0)),
        ("same number of columns", lambda: exact_search(x, torch.randn(3, 5), 1)),
        ("same number of columns", lambda: exact_search(x[0], x, 1)),
        ("at least one document", lambda: exact_search(x, x[:0], 1)),
        ("one index per query", lambda: exact_search(x, x, 1, exclude=torch.zeros(2))),
        ("blocks", lambda: exact_search(x, x, 1, document_block=0)),
        ("must be 'cosine', 'dot' or 'maxsim'", lambda: exact_search(x, x, 1, similarity="l2")),  # type: ignore[arg-type]
        ("names document 3 of 3", lambda: relevant_ranks(x, x, torch.full((3, 1), 3))),
        ("a row per query", lambda: relevant_ranks(x, x, torch.zeros(2, 1, dtype=torch.int64))),
        ("both relevant and excluded", lambda: relevant_ranks(x, x, torch.ones(3, 1).long(), exclude=torch.ones(3))),
    ]
    for message, call in bad:
        with pytest.raises(ValueError, match=message):
            call()


def test_no_queries_give_an_empty_result() -> None:
    found = exact_search(torch.randn(0, 4), torch.randn(5, 4), 3)
    assert found.indices.shape == (0, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_finds_the_same() -> None:
    queries, documents = torch.randint(-3, 4, (50, 16)).float(), torch.randint(-3, 4, (700, 16)).float()
    expected = exact_search(queries, documents, 20, similarity="dot", document_block=128)
    found = exact_search(queries, documents, 20, similarity="dot", document_block=128, device=torch.device("cuda"))
    assert torch.equal(found.indices, expected.indices)
