"""Distillation of scores against sentence-transformers, and against its formulas in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import log_softmax, normalize

from vembed_fs2.losses import Distillation, DistillationConfig, RowInfo, tiles


def random(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@dataclass
class Case:
    """Rows of which each has a number of explicit negatives of its own, in any order."""

    num: int
    negative_rows: list[int]
    seed: int

    @property
    def total(self) -> int:
        return self.num + len(self.negative_rows)

    def rows(self, **more: Any) -> RowInfo:
        rows = RowInfo.distinct(self.num, self.total)
        rows.negative_rows = torch.tensor(self.negative_rows, dtype=torch.int64)
        for name, value in more.items():
            setattr(rows, name, value)
        return rows

    def own(self, row: int) -> list[int]:
        return [row, *(self.num + i for i, r in enumerate(self.negative_rows) if r == row)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num = draw(st.integers(1, 5))
    return Case(num, draw(st.lists(st.integers(0, num - 1), max_size=8)), draw(st.integers(0, 99)))


def similarity(q: Tensor, d: Tensor, kind: str) -> Tensor:
    """Of one query with one document, in float64."""
    q, d = q.double(), d.double()
    return q @ d if kind == "dot" else normalize(q, dim=-1) @ normalize(d, dim=-1)


def late_interaction(q: Tensor, q_mask: Tensor, d: Tensor, d_mask: Tensor) -> Tensor:
    pairs = normalize(q.double(), dim=-1)[q_mask] @ normalize(d.double(), dim=-1)[d_mask].T
    return pairs.amax(1).sum() if pairs.size(1) else pairs.sum()


def naive(kind: str, z: list[Tensor], y: list[Tensor]) -> Tensor:
    """The formulas, row by row, of the scores of each row's documents."""
    total = 0.0 * z[0].sum()
    for student, teacher in zip(z, y):
        if kind == "kl":
            log_t, log_p = log_softmax(teacher, 0), log_softmax(student, 0)
            total = total + (log_t.exp() * (log_t - log_p)).sum()
        elif len(student) > 1:
            total = total + ((student[0] - student[1:]) - (teacher[0] - teacher[1:])).square().mean()
    return total


def assert_same(loss: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=1e-5)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    for got, reference in zip(grads, torch.autograd.grad(expected, leaves, allow_unused=True)):
        reference = torch.zeros_like(got) if reference is None else reference
        torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-5)


@settings(max_examples=80)
@given(
    cases(),
    st.sampled_from(["kl", "margin_mse"]),
    st.sampled_from(["cosine", "dot"]),
    st.sampled_from([0.3, 1.0, 2.0]),
    st.sampled_from([None, 0.5, 3.0]),
)
def test_scores_of_own_documents_equal_the_formula(
    case: Case, kind: Any, compared: Any, temperature: float, teacher_temperature: float | None
) -> None:
    q, d = random(case.seed, case.num, 6).requires_grad_(), random(case.seed + 100, case.total, 6).requires_grad_()
    scores = 3.0 * random(case.seed + 200, case.total)
    config = DistillationConfig(
        kind=kind, similarity=compared, temperature=temperature, teacher_temperature=teacher_temperature
    )
    output = Distillation(config)(q, d, case.rows(scores=scores))
    z = [torch.stack([similarity(q[i], d[j], compared) for j in case.own(i)]) / temperature for i in range(case.num)]
    y = [scores[case.own(i)].double() / (teacher_temperature or 1.0) for i in range(case.num)]
    assert_same(output.loss, naive(kind, z, y), [q, d])
    agreement = sum(int(a.argmax()) == int(b.argmax()) for a, b in zip(z, y))
    assert int(output.metrics["agreement"]) == agreement


@settings(max_examples=40)
@given(cases(), st.sampled_from(["kl", "margin_mse"]), st.booleans())
def test_late_interaction_equals_the_formula(case: Case, kind: Any, masked: bool) -> None:
    q, d = random(case.seed, case.num, 3, 6).requires_grad_(), random(case.seed + 1, case.total, 4, 6).requires_grad_()
    q_mask = torch.ones(case.num, 3, dtype=torch.bool)
    d_mask = torch.ones(case.total, 4, dtype=torch.bool)
    if masked:  # Also documents of which nothing is left.
        q_mask, d_mask = (random(case.seed + 2 + i, *m.shape) > 0 for i, m in enumerate((q_mask, d_mask)))
    scores = random(case.seed + 9, case.total)
    config = DistillationConfig(kind=kind, similarity="maxsim", temperature=0.7)
    masks = {"query_mask": q_mask, "document_mask": d_mask} if masked else {}
    output = Distillation(config)(q, d, case.rows(scores=scores), **masks)
    z = [
        torch.stack([late_interaction(q[i], q_mask[i], d[j], d_mask[j]) for j in case.own(i)]) / 0.7
        for i in range(case.num)
    ]
    y = [scores[case.own(i)].double() for i in range(case.num)]
    assert_same(output.loss, naive(kind, z, y), [q, d])


@settings(max_examples=60)
@given(
    cases(),
    st.sampled_from(["cosine", "dot"]),
    st.sampled_from([0.05, 0.5]),
    st.sampled_from([None, 0.1]),
    st.sampled_from([1, 2, 100]),
)
def test_a_teachers_similarities_with_all_documents_equal_the_formula(
    case: Case, compared: Any, temperature: float, teacher_temperature: float | None, rows_per_tile: int
) -> None:
    q, d = random(case.seed, case.num, 6).requires_grad_(), random(case.seed + 1, case.total, 6).requires_grad_()
    teacher_q, teacher_d = random(case.seed + 2, case.num, 3), random(case.seed + 3, case.total, 3)
    rows = case.rows(teacher_query=teacher_q, teacher_document=teacher_d)
    config = DistillationConfig(
        source="teacher", similarity=compared, temperature=temperature, teacher_temperature=teacher_temperature
    )
    with mock.patch.object(tiles, "choose_rows_per_tile", return_value=rows_per_tile):
        output = Distillation(config)(q, d, rows)
    z, y = [], []
    for i in range(case.num):
        z.append(torch.stack([similarity(q[i], x, compared) for x in d]) / temperature)
        teacher = torch.stack([similarity(teacher_q[i], x, "cosine") for x in teacher_d])
        y.append(teacher / (teacher_temperature or temperature))
    assert_same(output.loss, naive("kl", z, y), [q, d])
    agreement = sum(int(a.argmax()) == int(b.argmax()) for a, b in zip(z, y))
    assert int(output.metrics["agreement"]) == agreement


@pytest.mark.parametrize("kind", ["kl", "margin_mse"])
@pytest.mark.parametrize("num_negatives", [1, 3])
def test_equals_sentence_transformers(kind: Any, num_negatives: int) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import DistillKLDivLoss, MarginMSELoss

    model = SentenceTransformer(modules=[torch.nn.Identity()])
    theirs: Any = DistillKLDivLoss(model, temperature=2.0) if kind == "kl" else MarginMSELoss(model)
    q, *documents = (random(seed, 7, 6).requires_grad_() for seed in range(2 + num_negatives))
    scores = random(10, 7, 1 + num_negatives)
    expected = theirs.compute_loss_from_embeddings([q, *documents], scores)
    temperature = 2.0 if kind == "kl" else 1.0
    config = DistillationConfig(kind=kind, similarity="dot", temperature=temperature, teacher_temperature=temperature)
    rows = RowInfo.distinct(7, 7 * (1 + num_negatives))
    rows.scores = scores.T.flatten()
    loss = Distillation(config)(q, torch.cat(documents), rows).loss / 7
    loss = loss * temperature**2  # As theirs does, and ours leaves to the weight.
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    leaves = [q, *documents]
    for got, reference in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(got, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("source", ["scores", "teacher"])
def test_what_the_teacher_says_is_reached(source: Any) -> None:
    """Students that agree in full have no loss and no gradient."""
    q, d = random(0, 4, 6).requires_grad_(), random(1, 8, 6).requires_grad_()
    rows = RowInfo.distinct(4, 8)
    rows.teacher_query, rows.teacher_document = q.detach(), d.detach()
    rows.scores = torch.stack([similarity(q[j % 4], d[j], "cosine") for j in range(8)]).detach().float()
    output = Distillation(DistillationConfig(source=source, temperature=0.2, teacher_temperature=0.2))(q, d, rows)
    if source == "scores":
        output = Distillation(DistillationConfig(temperature=1.0))(q, d, rows)
    assert float(output.loss.detach()) == pytest.approx(0.0, abs=1e-5)
    assert int(output.metrics["agreement"]) == 4
    for grad in torch.autograd.grad(output.loss, [q, d]):
        assert float(grad.abs().max()) < 1e-5


@pytest.mark.parametrize("source", ["scores", "teacher"])
def test_half_precision_computes_in_single_precision(source: Any) -> None:
    q, d = random(0, 4, 6).bfloat16(), random(1, 8, 6).bfloat16()
    rows = RowInfo.distinct(4, 8)
    rows.teacher_query, rows.teacher_document = random(2, 4, 3), random(3, 8, 3)
    rows.scores = random(4, 8)
    loss = Distillation(DistillationConfig(source=source))
    halves, singles = [q.requires_grad_(), d.requires_grad_()], [x.detach().float().requires_grad_() for x in (q, d)]
    of_half, of_single = loss(*halves, rows).loss, loss(*singles, rows).loss
    torch.testing.assert_close(of_half, of_single)
    for got, reference in zip(torch.autograd.grad(of_half, halves), torch.autograd.grad(of_single, singles)):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), reference, rtol=1e-2, atol=1e-2 * float(reference.abs().max()))


def test_what_is_missing_is_said() -> None:
    q, d = random(0, 3, 6), random(1, 7, 6)
    rows = RowInfo.distinct(3, 7)
    with pytest.raises(ValueError, match="needs `scores` in the data"):
        Distillation()(q, d, rows)
    rows.scores = torch.tensor([1.0, 2.0, 3.0, torch.nan, 5.0, 6.0, 7.0])
    with pytest.raises(ValueError, match="needs `scores` in the data"):
        Distillation()(q, d, rows)
    rows.scores = torch.ones(7)
    with pytest.raises(ValueError, match=r"`rows.negative_rows` must say"):
        Distillation()(q, d, rows)
    with pytest.raises(ValueError, match="needs its embeddings"):
        Distillation(DistillationConfig(source="teacher"))(q, d, rows)


def test_values_that_are_not_valid_are_listed() -> None:
    config: Any = DistillationConfig(
        kind="mse", source="x", temperature=0.0, teacher_temperature=-1.0, similarity="l2", negatives="x"
    )  # type: ignore[arg-type]
    assert len(config.errors()) == 6
    with pytest.raises(ValueError, match="`source` must be 'scores' with `kind` 'margin_mse'"):
        Distillation(DistillationConfig(kind="margin_mse", source="teacher"))


def test_needs_are_those_of_the_source() -> None:
    scores, teacher = Distillation(), Distillation(DistillationConfig(source="teacher"))
    assert (scores.needs_scores, scores.needs_negatives, scores.needs_teacher) == (True, True, False)
    assert (teacher.needs_scores, teacher.needs_negatives, teacher.needs_teacher) == (False, False, True)
