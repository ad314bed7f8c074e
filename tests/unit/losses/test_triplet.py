"""The triplet loss against sentence-transformers, and against its formula in float64."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import softplus

from vembed_fs2.losses import RowInfo, create_loss
from vembed_fs2.losses.triplet import Triplet, TripletConfig

from .objectives import Case, assert_equal, cases, embeddings, same_pairs, similarities

Mining = Literal["hardest", "semi_hard", "all"]


def naive(s_bm: Tensor, excluded: Tensor, config: TripletConfig) -> tuple[Tensor, float]:
    """*Returns:* the loss, and the sum of the fractions of active triplets."""
    total, active = torch.zeros((), dtype=torch.float64), 0.0
    for i in range(s_bm.size(0)):
        negatives = [s_bm[i, j] for j in range(s_bm.size(1)) if j != i and not excluded[i, j]]
        if not negatives:
            continue
        if config.mining == "hardest":
            negatives = [max(negatives)]
        elif config.mining == "semi_hard":
            below = [s for s in negatives if s < s_bm[i, i]]
            negatives = [max(below) if below else min(negatives)]
        x = torch.stack(negatives) - s_bm[i, i] + config.margin
        active += float((x > 0).double().mean())
        if config.soft_margin:
            total = total + softplus(x).mean()
        elif (x > 0).any():
            total = total + x[x > 0].mean()
    return total, active


@settings(max_examples=60)
@given(
    cases(),
    st.sampled_from(["hardest", "semi_hard", "all"]),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_value_gradient_and_metrics_are_those_of_the_formula(
    case: Case, mining: Mining, margin: float, soft: bool, cosine: bool, mask: bool
) -> None:
    q, d = case.embeddings()
    config = TripletConfig(
        mining=mining, margin=margin, soft_margin=soft, similarity="cosine" if cosine else "dot", mask_same=mask
    )
    with case.tiles():
        output = Triplet(config)(q, d, case.rows)
    s_bm = similarities(q, d, cosine=cosine)
    num, others = case.num_queries, case.num_documents - 1
    excluded = same_pairs(case.rows) & mask
    expected, active = naive(s_bm, excluded, config)
    assert_equal(output.loss, expected + 0.0 * q.sum() + 0.0 * d.sum(), [q, d])
    negatives = ~torch.eye(num, others + 1, dtype=torch.bool) & ~excluded
    metrics = {
        "accuracy": sum(bool((s_bm[i, i] > s_bm[i][negatives[i]]).all()) for i in range(num)),
        "active_fraction": active,
        "num_negatives": int(negatives.sum()),
        "masked_fraction": int(excluded.sum()) / max(others, 1),
    }
    assert {k: float(v) for k, v in output.metrics.items()} == pytest.approx(metrics, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("BatchHardTripletLoss", {"mining": "hardest", "margin": 0.3}),
        ("BatchHardSoftMarginTripletLoss", {"mining": "hardest", "margin": 0.0, "soft_margin": True}),
        ("BatchSemiHardTripletLoss", {"mining": "semi_hard", "margin": 0.3}),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_classes_of_two_equal_sentence_transformers(name: str, values: Any, seed: int) -> None:
    """Theirs takes anchors, positives and negatives from one set: with two rows per class, each has one positive."""
    from sentence_transformers import SentenceTransformer, losses

    distance = losses.BatchHardTripletLossDistanceFunction.cosine_distance
    margin = {} if values.get("soft_margin") else {"margin": values["margin"]}
    theirs = getattr(losses, name)(
        SentenceTransformer(modules=[torch.nn.Identity()]), distance_metric=distance, **margin
    )
    x, labels = embeddings(12, seed, 3), torch.arange(12) // 2 + 1
    expected = theirs.compute_loss_from_embeddings([x], labels)
    partner = x.view(6, 2, 3).flip(1).reshape(12, 3)
    rows = RowInfo(torch.arange(12), torch.arange(12) + 50, labels)
    output = Triplet(TripletConfig(**values))(x, partner, rows)
    assert_equal(output.loss, expected, [x], factor=1 / 12)


def test_a_negative_as_similar_as_the_positive_is_not_semi_hard() -> None:
    query, document = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.0], [0.5, 1.0], [0.25, 0.0], [2.0, 0.0]])
    config = TripletConfig(mining="semi_hard", similarity="dot", margin=1.0)
    assert float(Triplet(config)(query, document).loss) == 0.75
    # Only harder ones: the least similar of all.
    assert float(Triplet(config)(query, document[[0, 3, 1]]).loss) == 1.0


def test_without_negatives_there_is_no_loss() -> None:
    q, d = embeddings(2, 1), embeddings(2, 2)
    rows = RowInfo(torch.tensor([1, 1]), torch.tensor([2, 3]), torch.tensor([0, 0]))
    for mining in ("hardest", "semi_hard", "all"):
        for soft in (False, True):
            output = Triplet(TripletConfig(mining=mining, soft_margin=soft, margin=5.0))(q, d, rows)  # type: ignore[arg-type]
            assert float(output.loss.detach()) == 0.0
            grads = torch.autograd.grad(output.loss, [q, d])
            assert all((g == 0).all() for g in grads)
            assert float(output.metrics["active_fraction"]) == 0.0


def test_late_interaction_compares_vectors() -> None:
    q, d = embeddings(12, 1).view(3, 4, 6), embeddings(20, 2).view(4, 5, 6)
    config = TripletConfig(similarity="maxsim", mining="all")
    unit_q, unit_d = (x.double() / x.double().norm(dim=-1, keepdim=True) for x in (q, d))
    s_bm = torch.einsum("bld,mkd->bmlk", unit_q, unit_d).amax(3).sum(2)
    expected, _ = naive(s_bm, torch.zeros(3, 4, dtype=torch.bool), config)
    assert_equal(Triplet(config)(q, d).loss, expected, [q, d])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_of_low_precision_are_compared_in_float32(dtype: torch.dtype) -> None:
    q, d = embeddings(5, 1).to(dtype), embeddings(5, 2).to(dtype)
    assert torch.equal(Triplet()(q, d).loss, Triplet()(q.float(), d.float()).loss)


def test_a_broken_embedding_is_not_a_loss_of_zero() -> None:
    for mining in ("hardest", "semi_hard", "all"):
        output = Triplet(TripletConfig(mining=mining))(embeddings(3, 1) * math.nan, embeddings(3, 2))  # type: ignore[arg-type]
        assert output.loss.isnan()
        assert int(output.metrics["accuracy"]) == 0


def test_no_queries_give_a_loss_of_zero() -> None:
    output = Triplet()(embeddings(0, 1), embeddings(0, 2))
    output.loss.backward()
    assert float(output.loss.detach()) == 0.0
    assert len(output.metrics) == 4
    assert not any(float(v) for v in output.metrics.values())


def test_it_is_registered() -> None:
    assert isinstance(create_loss("triplet"), Triplet)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"margin": -0.1}, "`margin` must not be negative, but is -0.1"),
        ({"margin": math.nan}, "`margin` must not be negative"),
        ({"margin": math.inf}, "`margin` must be finite, but is inf"),
        ({"mining": "easy"}, "`mining` must be one of hardest, semi_hard, all"),
        ({"similarity": "l2"}, "`similarity` must be one of cosine, dot"),
        ({"negatives": "all"}, "`negatives` must be one of global, local"),
    ],
)
def test_a_wrong_configuration_is_an_error(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Triplet(TripletConfig(**values))
