"""CoSENT and AnglE against sentence-transformers, and against their formula in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from vembed_fs2.losses import Objective, RowInfo, create_loss
from vembed_fs2.losses.cosent import AnglE, AnglEConfig, CoSENT, CoSENTConfig, ordering_loss, rank_correlation

from .objectives import assert_equal, embeddings

nan = math.nan


def scored(scores: list[float], num_queries: int, negative_rows: list[int] | None = None) -> RowInfo:
    rows = RowInfo.distinct(num_queries, len(scores))
    rows.scores = torch.tensor(scores)
    rows.negative_rows = None if negative_rows is None else torch.tensor(negative_rows, dtype=torch.int64)
    return rows


def naive(similarity: list[Tensor], scores: list[float], temperature: float) -> Tensor:
    total = torch.ones((), dtype=torch.float64)
    for higher, y in zip(similarity, scores):
        for lower, other in zip(similarity, scores):
            if y > other:
                total = total + torch.exp((lower - higher) / temperature)
    return total.log()


def angle(x: Tensor, y: Tensor) -> Tensor:
    """By complex numbers."""
    x, y = x.double(), y.double()
    if x.numel() % 2:
        x, y = (torch.cat([v, v.new_zeros(1)]) for v in (x, y))
    half = x.numel() // 2
    z, w = torch.complex(x[:half], x[half:]), torch.complex(y[:half], y[half:])
    ratio = (z * w.conj()).sum() / (x.norm() * y.norm())
    return (ratio.real + ratio.imag).abs()


Pairs = tuple[int, list[float], list[int], int]


@st.composite
def pairs(draw: st.DrawFn) -> Pairs:
    """Scores of few values, so that some tie, for positives and for some of a ragged number of negatives."""
    num = draw(st.integers(1, 6))
    values = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 3.0])
    negative_rows = draw(st.lists(st.integers(0, num - 1), max_size=5))
    scores = draw(st.lists(values, min_size=num, max_size=num))
    extra = draw(st.lists(st.one_of(values, st.just(nan)), min_size=len(negative_rows), max_size=len(negative_rows)))
    return num, scores + extra, negative_rows, draw(st.integers(0, 99))


@settings(max_examples=60)
@given(pairs(), st.sampled_from(["cosine", "dot", "angle"]), st.sampled_from([0.05, 1.0]), st.sampled_from([5, 6]))
def test_value_and_gradient_are_those_of_the_formula(case: Pairs, kind: Any, temperature: float, dim: int) -> None:
    num, scores, negative_rows, seed = case
    q, d = embeddings(num, seed, dim), embeddings(len(scores), seed + 100, dim)
    loss: Objective = AnglE(AnglEConfig(temperature=temperature))
    if kind != "angle":
        loss = CoSENT(CoSENTConfig(temperature=temperature, similarity=kind))
    output = loss(q, d, scored(scores, num, negative_rows))
    similarity, kept = [], []
    for j, score in enumerate(scores):
        i = j if j < num else negative_rows[j - num]
        if not math.isnan(score):
            x, y = q[i].double(), d[j].double()
            cosine = normalize(x, dim=0) @ normalize(y, dim=0)
            similarity.append({"cosine": cosine, "dot": x @ y, "angle": angle(q[i], d[j])}[kind])
            kept.append(score)
    expected = naive(similarity, kept, temperature) + 0.0 * q.sum()
    assert_equal(output.loss, expected, [q, d], factor=1 / num)


@pytest.mark.parametrize("name", ["CoSENTLoss", "AnglELoss"])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_pairs_equal_sentence_transformers(name: str, scale: float) -> None:
    from sentence_transformers import SentenceTransformer, losses

    theirs = getattr(losses, name)(SentenceTransformer(modules=[torch.nn.Identity()]), scale=scale)
    q, d = embeddings(9, 1, 7), embeddings(9, 2, 7)
    scores = [0.1, 0.9, 0.5, 0.5, 0.3, 0.0, 1.0, 0.3, 0.2]
    expected = theirs.compute_loss_from_embeddings([q, d], torch.tensor(scores))
    loss: Objective = CoSENT(CoSENTConfig(temperature=1 / scale))
    if name == "AnglELoss":
        loss = AnglE(AnglEConfig(temperature=1 / scale))
    output = loss(q, d, scored(scores, 9))
    assert_equal(output.loss, expected, [q, d], factor=1 / 9)


def test_scored_negatives_equal_pairs_of_sentence_transformers() -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import AnglELoss

    q, p, n = (embeddings(4, seed) for seed in range(3))
    labels = torch.tensor([1.0, 0.8, 0.7, 0.9])
    expected = AnglELoss(SentenceTransformer(modules=[torch.nn.Identity()])).compute_loss_from_embeddings(
        [q, p, n], labels
    )
    rows = scored([*labels.tolist(), *(1 - labels).tolist()], 4)
    assert_equal(AnglE()(q, torch.cat([p, n]), rows).loss, expected, [q, p, n], factor=1 / 4)


def test_many_pairs_of_extreme_similarities_equal_all_pairs_at_once() -> None:
    g = torch.Generator().manual_seed(0)
    similarity = (torch.randn(300, generator=g, dtype=torch.float64) * 40).requires_grad_()
    scores = torch.randint(0, 50, (300,), generator=g).float()
    loss = ordering_loss(similarity, scores, 0.05)
    differences = (similarity[None] - similarity[:, None]) / 0.05
    ordered = torch.where(scores[:, None] > scores[None], differences, -torch.inf)
    expected = torch.cat([ordered.reshape(-1), similarity.new_zeros(1)]).logsumexp(0)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    (got,), (reference,) = torch.autograd.grad(loss, similarity), torch.autograd.grad(expected, similarity)
    torch.testing.assert_close(got, reference, rtol=1e-9, atol=1e-12)


def test_memory_does_not_grow_with_pairs_of_pairs() -> None:
    num = 20_000  # All pairs of pairs would take 1.6 GB.
    q, d = embeddings(num, 1, 2), embeddings(num, 2, 2)
    largest = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = CoSENT()(q, d, scored((torch.arange(num) % 100).tolist(), num))
    output.loss.backward()
    assert largest <= 2 * num
    assert output.loss.isfinite()


def test_rank_correlation_is_spearmans() -> None:
    from scipy.stats import spearmanr

    x = torch.tensor([0.3, 0.1, 0.1, 0.9, -0.5, 0.3])
    y = torch.tensor([1.0, 0.0, 2.0, 2.0, 0.0, 0.0])
    assert float(rank_correlation(x, y)) == pytest.approx(spearmanr(x.numpy(), y.numpy())[0], rel=1e-5)
    assert float(rank_correlation(x, torch.ones(6))) == 0.0
    rows = scored(y.tolist(), 6)
    output = CoSENT(CoSENTConfig(similarity="dot"))(torch.eye(6), torch.eye(6) * x[:, None], rows)
    assert float(output.metrics["rank_correlation"]) == pytest.approx(6 * spearmanr(x.numpy(), y.numpy())[0], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [CoSENT(), AnglE()])
def test_embeddings_of_low_precision_are_compared_in_float32(dtype: torch.dtype, loss: Objective) -> None:
    q, d = embeddings(5, 1).to(dtype), embeddings(5, 2).to(dtype)
    rows = scored([0.1, 0.2, 0.3, 0.2, 0.0], 5)
    assert torch.equal(loss(q, d, rows).loss, loss(q.float(), d.float(), rows).loss)


@pytest.mark.parametrize("loss", [CoSENT(), AnglE()])
def test_pairs_of_one_score_have_no_order(loss: Objective) -> None:
    q, d = embeddings(3, 1), embeddings(3, 2)
    output = loss(q, d, scored([0.5, 0.5, 0.5], 3))
    assert float(output.loss.detach()) == 0.0
    assert all((g == 0).all() for g in torch.autograd.grad(output.loss, [q, d]))


@pytest.mark.parametrize("loss", [CoSENT(), AnglE()])
def test_no_queries_give_a_loss_of_zero(loss: Objective) -> None:
    for rows in (RowInfo.distinct(0, 0), scored([], 0)):
        output = loss(embeddings(0, 1), embeddings(0, 2), rows)
        output.loss.backward()
        assert float(output.loss.detach()) == 0.0
        assert {k: float(v) for k, v in output.metrics.items()} == {"rank_correlation": 0.0}


def test_scores_are_asked_for() -> None:
    assert CoSENT().needs_scores
    assert AnglE().needs_scores


def test_wrong_inputs_are_errors() -> None:
    q, d = embeddings(3, 1), embeddings(4, 2)
    for rows in (RowInfo.distinct(3, 4), scored([0.1, nan, 0.2, 0.3], 3), scored([0.1, math.inf, 0.2, 0.3], 3)):
        rows.negative_rows = torch.tensor([0])
        with pytest.raises(ValueError, match="a finite score for each query and its positive: give `scores`"):
            CoSENT()(q, d, rows)
    with pytest.raises(ValueError, match=r"`rows\.negative_rows` must say whose they are"):
        CoSENT()(q, d, scored([0.1, 0.2, 0.3, 0.4], 3))
    with pytest.raises(ValueError, match="compare single vectors"):
        AnglE()(q[:, None], d[:, None], scored([0.1, 0.2, 0.3, 0.4], 3))


def test_it_is_registered() -> None:
    assert isinstance(create_loss("cosent"), CoSENT)
    assert isinstance(create_loss("angle"), AnglE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "`temperature` must be positive"),
        ({"negatives": "all"}, "`negatives` must be one of global, local"),
        ({"similarity": "maxsim"}, "`similarity` must be one of cosine, dot, but is 'maxsim'"),
    ],
)
def test_a_wrong_configuration_is_an_error(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoSENT(CoSENTConfig(**values))
    if "similarity" not in values:
        with pytest.raises(ValueError, match=message):
            AnglE(AnglEConfig(**values))
