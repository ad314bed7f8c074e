"""Supervised contrastive learning against InfoNCE, and against its formula in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vembed_fs2.losses import MAX_LOGIT_SCALE, InfoNCE, InfoNCEConfig, RowInfo, create_loss
from vembed_fs2.losses.multi_positive import MultiPositive, MultiPositiveConfig

from .objectives import Case, assert_equal, cases, embeddings, same_label, same_pairs, similarities


def naive(s: Tensor, rows: RowInfo, out: Tensor, scale: Tensor) -> Tensor:
    """One direction. ``out`` are pairs that are left out; columns beyond the rows have no class."""
    total, num = torch.zeros((), dtype=torch.float64), s.size(0)
    for i in range(num):
        positives = [j for j in range(num) if j == i or same_label(rows, i, j)]
        columns = [j for j in range(s.size(1)) if j in positives or not out[i, j]]
        log_sum = torch.logsumexp(s[i, columns] * scale, 0)
        total = total - torch.stack([s[i, p] * scale - log_sum for p in positives]).mean()
    return total


def same_queries(rows: RowInfo) -> Tensor:
    """Queries that are known to be no negatives of a positive. *Returns:* ``[b, b]``, bool."""
    ids, docs = rows.query_ids.tolist(), rows.document_ids.tolist()
    num = len(ids)
    pairs = [
        [j != i and (ids[i] == ids[j] or same_label(rows, i, j) or docs[i] in (docs[j], ids[j])) for j in range(num)]
        for i in range(num)
    ]
    return torch.tensor(pairs)


@settings(max_examples=60)
@given(
    cases(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.5, 5.0, 20.0]),
)
def test_value_gradient_and_metrics_are_those_of_the_formula(
    case: Case, symmetric: bool, learn: bool, cosine: bool, mask: bool, scale: float
) -> None:
    q, d = case.embeddings()
    config = MultiPositiveConfig(
        temperature=1 / scale,
        learn_temperature=learn,
        symmetric=symmetric,
        similarity="cosine" if cosine else "dot",
        mask_same=mask,
    )
    log_scale = torch.tensor([math.log(scale)], requires_grad=True)
    with case.tiles():
        output = MultiPositive(config)(q, d, case.rows, log_scale if learn else None)
    num, total = case.num_queries, case.num_documents
    s_bm = similarities(q, d, cosine=cosine)
    out = same_pairs(case.rows) & mask
    exact = log_scale.double().exp().squeeze()
    expected = naive(s_bm, case.rows, out, exact)
    if symmetric:
        back = naive(s_bm[:, :num].T, case.rows, same_queries(case.rows) & mask, exact)
        expected = (expected + back) / 2
    assert_equal(output.loss, expected, [q, d, log_scale] if learn else [q, d])
    positive = torch.zeros(num, total, dtype=torch.bool)
    for i in range(num):
        for j in range(num):
            positive[i, j] = i == j or same_label(case.rows, i, j)
    out, negative = out & ~positive, ~out & ~positive
    found = [not negative[i].any() or s_bm[i][positive[i]].max() > s_bm[i][negative[i]].max() for i in range(num)]
    metrics = {
        "accuracy": sum(map(bool, found)),
        "num_positives": int(positive.sum()),
        "num_negatives": int(negative.sum()),
        "masked_fraction": int(out.sum()) / max(total - 1, 1),
        "temperature": num / scale,
    }
    assert {k: float(v) for k, v in output.metrics.items()} == pytest.approx(metrics, rel=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_without_labels_it_is_infonce(symmetric: bool) -> None:
    q, d = embeddings(5, 1), embeddings(8, 2)
    rows = RowInfo(torch.tensor([1, 2, 3, 1, 5]), torch.tensor([11, 12, 13, 14, 11, 11, 17, 18]), torch.zeros(5).long())
    directions: Any = ("query_to_document", "document_to_query")[: 1 + symmetric]
    expected = InfoNCE(InfoNCEConfig(directions=directions))(q, d, rows)
    output = MultiPositive(MultiPositiveConfig(symmetric=symmetric))(q, d, rows)
    assert_equal(output.loss, expected.loss, [q, d])
    for name, value in expected.metrics.items():
        assert float(output.metrics[name]) == pytest.approx(float(value)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_of_low_precision_are_compared_in_float32(dtype: torch.dtype) -> None:
    q, d = embeddings(5, 1).to(dtype), embeddings(5, 2).to(dtype)
    loss = MultiPositive()
    assert torch.equal(loss(q, d).loss, loss(q.float(), d.float()).loss)


def test_late_interaction_compares_vectors() -> None:
    q, d = embeddings(12, 1).view(3, 4, 6), embeddings(20, 2).view(4, 5, 6)
    rows = RowInfo(torch.arange(3), torch.arange(4) + 10, torch.tensor([1, 1, 0]))
    output = MultiPositive(MultiPositiveConfig(similarity="maxsim", symmetric=True, temperature=0.5))(q, d, rows)
    unit_q, unit_d = (x.double() / x.double().norm(dim=-1, keepdim=True) for x in (q, d))
    s_bm = torch.einsum("bld,mkd->bmlk", unit_q, unit_d).amax(3).sum(2)
    scale = torch.tensor(2.0, dtype=torch.float64)
    expected = naive(s_bm, rows, same_pairs(rows), scale) + naive(s_bm[:, :3].T, rows, same_queries(rows), scale)
    assert_equal(output.loss, expected / 2, [q, d])


def test_a_learned_temperature() -> None:
    loss = MultiPositive(MultiPositiveConfig(temperature=0.07, learn_temperature=True))
    assert [part.mean for part in loss.learned_parts(4)] == [pytest.approx(-math.log(0.07))]
    assert not MultiPositive().learned_parts(4)
    q, d = embeddings(4, 1), embeddings(4, 2)
    at, above = (loss(q, d, None, torch.tensor([v])) for v in (MAX_LOGIT_SCALE, 9.0))
    assert torch.equal(at.loss, above.loss)
    with pytest.raises(ValueError, match="gives no `logit_scale`"):
        loss(q, d)


def test_no_queries_give_a_loss_of_zero() -> None:
    output = MultiPositive(MultiPositiveConfig(symmetric=True))(embeddings(0, 1), embeddings(0, 2))
    output.loss.backward()
    assert float(output.loss.detach()) == 0.0
    assert len(output.metrics) == 5
    assert not any(float(v) for v in output.metrics.values())


def test_it_is_registered() -> None:
    assert isinstance(create_loss("multi_positive"), MultiPositive)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "`temperature` must be positive"),
        ({"similarity": "l2"}, "`similarity` must be one of cosine, dot"),
        ({"negatives": "all"}, "`negatives` must be one of global, local"),
    ],
)
def test_a_wrong_configuration_is_an_error(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiPositive(MultiPositiveConfig(**values))
