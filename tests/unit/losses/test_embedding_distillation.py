"""Distillation of embeddings against sentence-transformers, and against its formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vembed_fs2.losses import EmbeddingDistillation, EmbeddingDistillationConfig, RowInfo

from .test_distillation import Case, assert_same, cases, random


def distance(x: Tensor, teacher: Tensor, kind: str) -> Tensor:
    if kind == "mse":
        return (x - teacher).square().mean()
    return 1.0 - cosine_similarity(x, teacher, dim=0)


@settings(max_examples=60)
@given(cases(), st.sampled_from(["cosine", "mse"]), st.sampled_from([None, 3, 6, 8]))
def test_value_and_gradient_are_those_of_the_formula(case: Case, kind: Any, projected_to: int | None) -> None:
    size = projected_to or 6
    q, d = random(case.seed, case.num, 6).requires_grad_(), random(case.seed + 1, case.total, 6).requires_grad_()
    projection = None if projected_to is None else random(case.seed + 2, size, 6).requires_grad_()
    teacher_q, teacher_d = random(case.seed + 3, case.num, size), random(case.seed + 4, case.total, size)
    rows = case.rows(teacher_query=teacher_q, teacher_document=teacher_d)
    loss = EmbeddingDistillation(EmbeddingDistillationConfig(kind=kind))
    output = loss(q, d, rows, teacher_projection=projection)

    matrix = torch.eye(6, dtype=torch.float64) if projection is None else projection.double()
    losses, cosines = [], list[float]()
    for i in range(case.num):
        pairs = [(q[i], teacher_q[i]), *((d[j], teacher_d[j]) for j in case.own(i))]
        projected = [(matrix @ x.double(), t.double()) for x, t in pairs]
        losses.append(torch.stack([distance(x, t, kind) for x, t in projected]).mean())
        cosines.append(float(torch.stack([cosine_similarity(x, t, dim=0) for x, t in projected]).mean().detach()))
    assert_same(output.loss, torch.stack(losses).sum(), [q, d, *([] if projection is None else [projection])])
    assert float(output.metrics["teacher_cosine"]) == pytest.approx(sum(cosines), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
@pytest.mark.parametrize("teacher_dim", [None, 9])
def test_equals_sentence_transformers(kind: Any, teacher_dim: int | None) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import EmbedDistillLoss

    model = SentenceTransformer(modules=[torch.nn.Identity()])
    theirs = EmbedDistillLoss(model, distance_metric=kind)
    projection = None
    if teacher_dim is not None:
        theirs.projection = torch.nn.Linear(6, teacher_dim)
        torch.nn.init.zeros_(theirs.projection.bias)
        projection = theirs.projection.weight
    student = [random(seed, 5, 6).requires_grad_() for seed in range(3)]
    teacher = [random(seed, 5, teacher_dim or 6) for seed in range(3, 6)]
    expected = theirs.compute_loss_from_embeddings(student, teacher)
    rows = RowInfo.distinct(5, 10)
    rows.teacher_query, rows.teacher_document = teacher[0], torch.cat(teacher[1:])
    loss = EmbeddingDistillation(EmbeddingDistillationConfig(kind=kind))
    output = loss(student[0], torch.cat(student[1:]), rows, teacher_projection=projection)
    torch.testing.assert_close(output.loss / 5, expected, rtol=1e-6, atol=1e-6)
    leaves = [*student, *([] if projection is None else [projection])]
    for got, reference in zip(torch.autograd.grad(output.loss / 5, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(got, reference, rtol=1e-5, atol=1e-6)


def test_a_projection_is_needed_where_sizes_differ() -> None:
    loss = EmbeddingDistillation()
    assert loss.needs_teacher
    assert not loss.learned_parts(6, 6)
    assert [part.shape for part in loss.learned_parts(6, 9)] == [(9, 6)]


def test_what_is_missing_is_said() -> None:
    q, d, rows = random(0, 3, 6), random(1, 3, 6), RowInfo.distinct(3, 3)
    with pytest.raises(ValueError, match="needs a teacher's, of queries and documents"):
        EmbeddingDistillation()(q, d, rows)
    rows.teacher_query, rows.teacher_document = random(2, 3, 9), random(3, 3, 9)
    with pytest.raises(ValueError, match="6 dimensions, but the teacher's have 9"):
        EmbeddingDistillation()(q, d, rows)
    with pytest.raises(ValueError, match="for a teacher of 8 dimensions, but it has 9"):
        EmbeddingDistillation()(q, d, rows, teacher_projection=random(4, 8, 6))
    with pytest.raises(ValueError, match="multi-vector"):
        EmbeddingDistillation()(random(0, 3, 2, 9), random(1, 3, 2, 9), rows)
    with pytest.raises(ValueError, match="`kind` must be one of"):
        EmbeddingDistillation(EmbeddingDistillationConfig(kind="l2"))  # type: ignore[arg-type]
