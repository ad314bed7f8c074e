"""Matryoshka over other objectives."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from vembed_fs2.losses import (
    Combined,
    Distillation,
    DistillationConfig,
    EmbeddingDistillation,
    InfoNCE,
    InfoNCEConfig,
    LossInput,
    LossOutput,
    Matryoshka,
    MatryoshkaConfig,
    Objective,
    RowInfo,
)

DIM = 8


def random(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def rows_of(num: int, total: int) -> RowInfo:
    rows = RowInfo.distinct(num, total)
    rows.labels = torch.arange(num) % 3
    rows.scores = random(5, total)
    rows.teacher_query, rows.teacher_document = random(6, num, 5), random(7, total, 5)
    return rows


INNER: dict[str, Objective] = {
    "infonce": InfoNCE(InfoNCEConfig(directions=["query_to_document", "document_to_query"], partition="joint")),
    "learned": InfoNCE(InfoNCEConfig(learn_temperature=True)),
    "filtered": InfoNCE(InfoNCEConfig(false_negatives="filter_by_teacher")),
    "distillation": Distillation(),
    "from a teacher": Distillation(DistillationConfig(source="teacher")),
    "embeddings": EmbeddingDistillation(),
    "combined": Combined({"infonce": InfoNCE(), "embedding_distillation": EmbeddingDistillation()}),
}


@settings(max_examples=80)
@given(
    st.sampled_from(sorted(INNER)),
    st.lists(st.integers(1, DIM), min_size=1, max_size=4, unique=True),
    st.booleans(),
    st.integers(0, 99),
)
def test_value_and_gradients_are_the_weighted_sum_over_sizes(
    name: str, dims: list[int], weighted: bool, seed: int
) -> None:
    num, total = 4, 8
    rows, inner = rows_of(num, total), INNER[name]
    weights = [0.5 + i for i in range(len(dims))] if weighted else []
    leaves = [random(seed, num, DIM), random(seed + 1, total, DIM), torch.tensor([1.5]), random(seed + 2, 5, DIM)]
    q, d, scale, projection = (x.requires_grad_() for x in leaves)

    output = Matryoshka(inner, dims, weights)(q, d, rows, scale, teacher_projection=projection)

    # The reference: in double precision, each size by itself, one graph for all.
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = torch.zeros((), dtype=torch.float64)
    for dim, weight in zip(dims, weights or [1.0] * len(dims)):
        part = inner(exact[0][:, :dim], exact[1][:, :dim], rows, exact[2], teacher_projection=exact[3][:, :dim])
        expected = expected + weight * part.loss
        assert float(output.metrics[f"loss@{dim}"]) == pytest.approx(float(part.loss.detach()), rel=1e-4, abs=1e-4)
        if dim == max(dims):
            for key, value in part.metrics.items():
                assert float(output.metrics[key]) == pytest.approx(float(value), rel=1e-4, abs=1e-4), key
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=1e-4)
    references = torch.autograd.grad(expected, exact, allow_unused=True)
    for got, reference in zip(torch.autograd.grad(output.loss, leaves), references):
        reference = torch.zeros_like(got).double() if reference is None else reference
        bound = float(reference.abs().max())
        torch.testing.assert_close(got.double(), reference, rtol=1e-4, atol=1e-5 * max(bound, 1.0))


def test_equals_sentence_transformers() -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

    model = SentenceTransformer(modules=[torch.nn.Identity()])
    theirs = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model, scale=20.0), [2, 8, 4], [1.0, 0.3, 2.0])
    leaves = [random(seed, 5, DIM).requires_grad_() for seed in range(3)]
    expected = theirs([{"sentence_embedding": x} for x in leaves], None)  # type: ignore[arg-type]
    ours = Matryoshka(InfoNCE(InfoNCEConfig(temperature=1 / 20)), [2, 8, 4], [1.0, 0.3, 2.0])
    loss = ours(leaves[0], torch.cat(leaves[1:])).loss / 5
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for got, reference in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-5)


def test_the_order_of_sizes_does_not_matter() -> None:
    outputs = []
    for dims, weights in (([2, 4, 8], [1.0, 2.0, 3.0]), ([8, 2, 4], [3.0, 1.0, 2.0])):
        q, d = random(0, 4, DIM).requires_grad_(), random(1, 6, DIM).requires_grad_()
        output = Matryoshka(InfoNCE(), dims, weights)(q, d)
        outputs.append((output, torch.autograd.grad(output.loss, [q, d])))
    (first, first_grads), (second, second_grads) = outputs
    torch.testing.assert_close(first.loss, second.loss)
    torch.testing.assert_close(first_grads, second_grads)
    assert first.metrics.keys() == second.metrics.keys()
    torch.testing.assert_close(first.metrics["accuracy"], second.metrics["accuracy"])


def test_each_vector_of_a_multi_vector_model_is_truncated() -> None:
    q, d = random(0, 3, 2, DIM).requires_grad_(), random(1, 4, 5, DIM).requires_grad_()
    masks = {"query_mask": torch.tensor([[True, True], [True, False], [True, True]]), "document_mask": None}
    inner = InfoNCE(InfoNCEConfig(similarity="maxsim"))
    output = Matryoshka(inner, [2, DIM])(q, d, **masks)
    expected = inner(q[..., :2], d[..., :2], **masks).loss + inner(q, d, **masks).loss
    torch.testing.assert_close(output.loss, expected)
    got, reference = (torch.autograd.grad(x, [q, d]) for x in (output.loss, expected))
    torch.testing.assert_close(got, reference)


class Remembering(Objective):
    """Makes a large graph, and knows whether those of before are gone."""

    def __init__(self) -> None:
        self.alive_before: list[int] = []
        self._graphs: list[weakref.ref[Tensor]] = []

    def compute(self, inputs: LossInput) -> LossOutput:
        self.alive_before.append(sum(graph() is not None for graph in self._graphs))
        hidden = inputs.query.exp()
        self._graphs.append(weakref.ref(hidden))
        return LossOutput((hidden * hidden).sum(), {})


def test_no_graph_of_another_size_is_in_memory() -> None:
    inner = Remembering()
    q = random(0, 3, DIM).requires_grad_()
    output = Matryoshka(inner, [8, 4, 2])(q, random(1, 3, DIM))
    assert inner.alive_before == [0, 0, 0]
    output.loss.backward()
    assert q.grad is not None
    factor = torch.tensor([3.0, 3.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    torch.testing.assert_close(q.grad, 2 * factor * (2 * q.detach()).exp())


def test_gradients_of_half_precision_survive_until_the_loss_scale() -> None:
    """They would be zero in float16, were they rounded before they are multiplied by it."""

    class Tiny(Objective):
        def compute(self, inputs: LossInput) -> LossOutput:
            return LossOutput(inputs.query.sum() * 2e-8, {})

    q = random(0, 3, DIM).half().requires_grad_()
    output = Matryoshka(Tiny(), [4, DIM])(q, random(1, 3, DIM).half())
    (output.loss * 2.0**16).backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float16
    torch.testing.assert_close(q.grad[:, :4].float(), torch.full((3, 4), 2 * 2e-8 * 2.0**16), rtol=1e-3, atol=0)
    torch.testing.assert_close(q.grad[:, 4:].float(), torch.full((3, 4), 2e-8 * 2.0**16), rtol=1e-3, atol=0)


def test_without_gradients_nothing_is_carried_backward() -> None:
    q, d = random(0, 3, DIM).requires_grad_(), random(1, 3, DIM)

    class Watching(InfoNCE):
        def compute(self, inputs: LossInput) -> LossOutput:
            assert not inputs.query.requires_grad
            return super().compute(inputs)

    with torch.no_grad():
        output = Matryoshka(Watching(), [4, DIM])(q, d)
    assert not output.loss.requires_grad
    torch.testing.assert_close(output.loss, Matryoshka(InfoNCE(), [4, DIM])(q, d).loss.detach())
    output = Matryoshka(InfoNCE(), [4, DIM])(q, d)
    output.loss.backward()
    with pytest.raises(RuntimeError, match="carried backward twice"):
        output.loss.backward()


def test_what_it_needs_is_what_its_objective_needs() -> None:
    learned = Matryoshka(InfoNCE(InfoNCEConfig(temperature=0.1, learn_temperature=True)), [2, 4])
    (scale,) = learned.learned_parts(4)
    assert (scale.name, scale.mean) == ("logit_scale", pytest.approx(-math.log(0.1)))
    assert [learned.needs_teacher, learned.needs_scores, learned.needs_negatives] == [False] * 3
    scores = Matryoshka(Distillation(), [2])
    assert scores.needs_scores
    assert scores.needs_negatives
    embeddings = Matryoshka(EmbeddingDistillation(), [4, 8])
    assert embeddings.needs_teacher
    # At 4 dimensions, a projection is needed although the model and the teacher both have 8.
    assert [part.shape for part in embeddings.learned_parts(8, 8)] == [(8, 8)]
    assert not Matryoshka(EmbeddingDistillation(), [8]).learned_parts(8, 8)


def test_sizes_that_do_not_fit_are_errors() -> None:
    loss = Matryoshka(Matryoshka(InfoNCE(), [2, 6]), [4, 8, 9])
    assert loss.dim_errors(8) == [
        "`dims` holds 6, but embeddings have only 4 dimensions.",
        "`dims` holds 9, but embeddings have only 8 dimensions.",
    ]
    assert Matryoshka(InfoNCE(), [8, 4]).dim_errors(8) == []
    with pytest.raises(ValueError, match="`dims` holds 9, but embeddings have only 8 dimensions"):
        Matryoshka(InfoNCE(), [9])(random(0, 3, 8), random(1, 3, 8))


@pytest.mark.parametrize(
    ("dims", "weights", "expected"),
    [
        ([], [], "`dims` must hold"),
        ([4, 4], [], "`dims` must hold"),
        ([4, 0], [], "`dims` must hold"),
        ([4, 8], [1.0], "`weights` must have an entry for each of the 2 `dims`, but has 1"),
        ([4, 8], [1.0, -1.0], "`weights` must be positive"),
        ([4, 8], [1.0, math.nan], "`weights` must be positive"),
    ],
)
def test_values_that_are_not_valid_are_errors(dims: Any, weights: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Matryoshka(InfoNCE(), dims, weights)
    assert expected in MatryoshkaConfig(dims=dims, weights=weights).errors()[0]


def test_truncated_embeddings_are_normalised_anew() -> None:
    q, d = random(0, 3, DIM), random(1, 3, DIM)
    output = Matryoshka(InfoNCE(), [4])(q, d)
    torch.testing.assert_close(output.loss, InfoNCE()(normalize(q[:, :4], dim=1), normalize(d[:, :4], dim=1)).loss)


@pytest.mark.parametrize("name", sorted(INNER))
def test_a_rank_without_rows_has_no_loss(name: str) -> None:
    leaves = [torch.zeros(0, DIM), torch.zeros(0, DIM), torch.tensor([1.5]), random(2, 5, DIM)]
    q, d, scale, projection = (x.requires_grad_() for x in leaves)
    for loss in (INNER[name], Matryoshka(INNER[name], [2, DIM])):
        output = loss(q, d, rows_of(0, 0), scale, teacher_projection=projection)
        assert float(output.loss.detach()) == 0.0
        assert all(float(value) == 0.0 for value in output.metrics.values())
        grads = torch.autograd.grad(output.loss, leaves, allow_unused=True)
        assert all(grad is None or not grad.any() for grad in grads)
