"""InfoNCE against CLIP's loss, and against its formula in float64. For its options, see test_infonce_options.py."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from vembed_fs2.distributed import _GatherRows
from vembed_fs2.losses import MAX_LOGIT_SCALE, InfoNCE, InfoNCEConfig, RowInfo, create_loss
from vembed_fs2.losses.infonce import Direction

BOTH: tuple[Direction, ...] = ("query_to_document", "document_to_query")


def embeddings(rows: int, seed: int, dim: int = 6) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def naive(
    query: Tensor, document: Tensor, rows: RowInfo, scale: float, *, both: bool = False, cosine: bool = True
) -> tuple[Tensor, list[int], list[int]]:
    """The formula, row by row in float64. *Returns:* the loss, the negatives and the masked documents of each query."""
    q, d = query.double(), document.double()
    if cosine:
        q, d = normalize(q, dim=-1), normalize(d, dim=-1)
    num, total = q.size(0), d.size(0)
    ids, docs, labels = rows.query_ids.tolist(), rows.document_ids.tolist(), rows.labels.tolist()

    def same(i: int, j: int) -> bool:
        return (labels[i] != 0 and labels[i] == labels[j]) or ids[i] == ids[j]

    losses, negatives, masked = [], [], []
    for i in range(num):
        out = [j for j in range(total) if j != i and (docs[j] in (docs[i], ids[i]) or (j < num and same(i, j)))]
        kept = [j for j in range(total) if j not in out]
        loss = torch.logsumexp(scale * (q[i] @ d[kept].T), 0) - scale * (q[i] @ d[i])
        if both:
            kept = [j for j in range(num) if j == i or not (docs[i] in (docs[j], ids[j]) or same(i, j))]
            loss = (loss + torch.logsumexp(scale * (d[i] @ q[kept].T), 0) - scale * (q[i] @ d[i])) / 2
        losses.append(loss)
        negatives.append(total - len(out) - 1)
        masked.append(len(out))
    return torch.stack(losses).sum(), negatives, masked


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, RowInfo, int]:
    num = draw(st.integers(1, 6))
    extra = draw(st.integers(0, 5))
    small = st.integers(1, 8)  # Small, so that some are the same.
    ids = draw(st.lists(small, min_size=num, max_size=num))
    docs = draw(st.lists(small, min_size=num + extra, max_size=num + extra))
    labels = draw(st.lists(st.integers(-3, 2), min_size=num, max_size=num))
    return num, num + extra, RowInfo(*(torch.tensor(x) for x in (ids, docs, labels))), draw(st.integers(0, 99))


@settings(max_examples=60)
@given(cases(), st.booleans(), st.booleans())
def test_value_gradient_and_metrics_are_those_of_the_formula(
    case: tuple[int, int, RowInfo, int], both: bool, cosine: bool
) -> None:
    num, total, rows, seed = case
    q, d = embeddings(num, seed), embeddings(total, seed + 100)
    config = InfoNCEConfig(
        temperature=0.2, directions=BOTH if both else BOTH[:1], similarity="cosine" if cosine else "dot"
    )
    output = InfoNCE(config)(q, d, rows)
    grads = torch.autograd.grad(output.loss, [q, d])
    expected, negatives, masked = naive(q, d, rows, 5.0, both=both, cosine=cosine)
    assert float(output.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-5)
    for got, reference in zip(grads, torch.autograd.grad(expected, [q, d])):
        torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-5)
    assert int(output.metrics["num_negatives"]) == sum(negatives)
    assert float(output.metrics["masked_fraction"]) == pytest.approx(sum(masked) / max(total - 1, 1))
    assert float(output.metrics["temperature"]) == pytest.approx(0.2 * num)


def test_two_directions_equal_clip() -> None:
    from transformers.models.clip.modeling_clip import clip_loss

    q, d = embeddings(7, 1), embeddings(7, 2)
    scale = torch.tensor([2.5], requires_grad=True)
    logits = normalize(q, dim=-1) @ normalize(d, dim=-1).T * scale.exp()
    # Theirs compares texts with images and images with texts; the mean of both is the same.
    expected = clip_loss(logits)
    loss = InfoNCE(InfoNCEConfig(learn_temperature=True, directions=BOTH))
    output = loss(q, d, RowInfo.distinct(7, 7), scale)
    assert float(output.loss.detach() / 7) == pytest.approx(float(expected.detach()), rel=1e-6)
    grads = torch.autograd.grad(output.loss / 7, [q, d, scale])
    for got, reference in zip(grads, torch.autograd.grad(expected, [q, d, scale])):
        torch.testing.assert_close(got, reference, rtol=0, atol=1e-6)


def test_explicit_negatives_of_all_rows_serve_all_queries() -> None:
    q, d = embeddings(3, 1), embeddings(5, 2)
    output = InfoNCE()(q, d, RowInfo.distinct(3, 5))
    assert int(output.metrics["num_negatives"]) == 3 * 4
    (grad,) = torch.autograd.grad(output.loss, [d])
    assert (grad[3:].norm(dim=1) > 0).all()


def test_accuracy_counts_positives_that_are_strictly_nearest() -> None:
    document = torch.eye(3)
    query = torch.stack([document[0], document[1] + 0.5 * document[2], document[0] + document[2]])
    # Right, right, and tied with another row's positive.
    output = InfoNCE()(query, document, RowInfo.distinct(3, 3))
    assert int(output.metrics["accuracy"]) == 2
    broken = InfoNCE()(query * math.nan, document, RowInfo.distinct(3, 3))
    assert int(broken.metrics["accuracy"]) == 0


def test_masks_can_be_turned_off() -> None:
    rows = RowInfo(torch.tensor([1, 1]), torch.tensor([2, 2]), torch.tensor([3, 3]))
    q, d = embeddings(2, 1), embeddings(2, 2)
    assert int(InfoNCE()(q, d, rows).metrics["num_negatives"]) == 0
    output = InfoNCE(InfoNCEConfig(mask_same=False))(q, d, rows)
    assert int(output.metrics["num_negatives"]) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_round_similarities(dtype: torch.dtype) -> None:
    q, d = embeddings(16, 1, 64), embeddings(16, 2, 64)
    rows = RowInfo.distinct(16, 16)
    expected = InfoNCE()(q, d, rows).loss
    with torch.autocast("cpu", dtype):
        assert torch.equal(InfoNCE()(q, d, rows).loss, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_of_low_precision_are_compared_in_float32(dtype: torch.dtype) -> None:
    q, d = embeddings(5, 1).to(dtype), embeddings(5, 2).to(dtype)
    rows = RowInfo.distinct(5, 5)
    assert torch.equal(InfoNCE()(q, d, rows).loss, InfoNCE()(q.float(), d.float(), rows).loss)


@pytest.mark.parametrize(("value", "has_gradient"), [(2.0, True), (MAX_LOGIT_SCALE, True), (4.7, False)])
def test_a_learned_temperature_is_bounded_as_in_clip(value: float, has_gradient: bool) -> None:
    loss = InfoNCE(InfoNCEConfig(learn_temperature=True))
    scale = torch.tensor([value], requires_grad=True)
    output = loss(embeddings(4, 1), embeddings(4, 2), RowInfo.distinct(4, 4), scale)
    output.loss.backward()
    assert float(output.metrics["temperature"]) == pytest.approx(4 * max(math.exp(-value), 0.01), rel=1e-5)
    assert scale.grad is not None
    assert bool(scale.grad != 0) == has_gradient


def test_a_learned_temperature_starts_from_the_configuration() -> None:
    loss = create_loss("infonce", InfoNCEConfig(temperature=0.07, learn_temperature=True))
    assert [part.mean for part in loss.learned_parts(4)] == [pytest.approx(-math.log(0.07))]
    assert not create_loss("infonce", InfoNCEConfig(temperature=0.07)).learned_parts(4)


def test_no_queries_give_a_loss_of_zero() -> None:
    q, d = embeddings(0, 1), embeddings(0, 2)
    output = InfoNCE(InfoNCEConfig(directions=BOTH))(q, d, RowInfo.distinct(0, 0))
    output.loss.backward()
    assert float(output.loss.detach()) == 0.0
    assert not any(float(v) for v in output.metrics.values())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "`temperature` must be positive"),
        ({"temperature": math.nan}, "`temperature` must be positive"),
        ({"directions": "two"}, "`directions` must be a list, but is 'two'"),
        ({"similarity": "l2"}, "`similarity` must be one of cosine, dot"),
        ({"negatives": "all"}, "`negatives` must be one of global, local"),
    ],
)
def test_a_wrong_configuration_is_an_error(values: Any, message: str) -> None:
    config = InfoNCEConfig(**values)
    assert any(message in e for e in config.errors())
    with pytest.raises(ValueError, match=message):
        InfoNCE(config)


def test_wrong_inputs_are_errors() -> None:
    q, d = embeddings(3, 1), embeddings(4, 2)
    with pytest.raises(ValueError, match="gives no `logit_scale`"):
        InfoNCE(InfoNCEConfig(learn_temperature=True))(q, d, RowInfo.distinct(3, 4))
    with pytest.raises(ValueError, match="3 queries needs a positive, but there are 2 documents"):
        InfoNCE()(q, d[:2], RowInfo.distinct(3, 2))
    with pytest.raises(ValueError, match="3 queries and 4 documents, but `rows` has 3 query ids, 3 labels and 5"):
        InfoNCE()(q, d, RowInfo.distinct(3, 5))
    with pytest.raises(KeyError):
        create_loss("no such loss", InfoNCEConfig())


def test_gathering_leaves_gradients_of_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd may hand the same tensor to several nodes, so none may write to it."""

    def double(tensor: Tensor, group: Any) -> None:
        tensor.mul_(2)

    class Context:
        counts, group, rank = [2], None, 0

    monkeypatch.setattr("torch.distributed.all_reduce", double)
    grad = torch.ones(2, 3)
    assert _GatherRows.backward(Context(), grad)[0].eq(2).all()
    assert grad.eq(1).all()


@pytest.mark.parametrize(("num", "extra"), product([1, 4], [0, 3]))
def test_distinct_rows_mask_nothing(num: int, extra: int) -> None:
    rows = RowInfo.distinct(num, num + extra)
    output = InfoNCE()(embeddings(num, 1), embeddings(num + extra, 2), rows)
    assert float(output.metrics["masked_fraction"]) == 0.0
