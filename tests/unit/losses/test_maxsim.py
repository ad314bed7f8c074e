"""Late interaction against its formula in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from vembed_fs2.losses import InfoNCE, InfoNCEConfig
from vembed_fs2.losses.similarity import MaxSim
from vembed_fs2.losses.tiles import Block, TileGrads, sum_over_tiles


@dataclass
class Texts:
    """Vectors of some texts, and which of them count."""

    x: Tensor
    mask: Tensor | None

    def double(self) -> Texts:
        return Texts(self.x.double(), self.mask)


def texts(rows: int, width: int, seed: int, *, masked: bool = True, dtype: torch.dtype = torch.float32) -> Texts:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, 5, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    lengths = torch.randint(0, width + 1, (rows, 1), generator=g)  # Some texts have no vector at all.
    return Texts(x, torch.arange(width) < lengths if masked else None)


def naive(query: Texts, document: Texts) -> Tensor:
    """Each vector of the query with the nearest of the document. *Returns:* ``[q, d]``."""
    pairs = torch.einsum("qld,nkd->qnlk", normalize(query.x, dim=-1), normalize(document.x, dim=-1))
    if document.mask is not None:
        pairs = pairs.masked_fill(~document.mask[:, None], -torch.inf)
    best = pairs.amax(3)
    best = torch.where(best > -torch.inf, best, 0.0)
    if query.mask is not None:
        best = torch.where(query.mask[:, None], best, 0.0)
    return best.sum(2)


def few_vectors(count: int) -> Any:
    return patch.dict("vembed_fs2.losses.similarity._MAXSIM_VECTORS", cpu=count)


@settings(max_examples=100)
@given(st.data())
def test_scores_and_gradients_equal_the_formula(data: st.DataObject) -> None:
    draw = data.draw
    dtype, seed = draw(st.sampled_from([torch.float32, torch.float64])), draw(st.integers(0, 99))
    masked = draw(st.tuples(st.booleans(), st.booleans()))
    anchors_query = draw(st.booleans())
    sizes = [(draw(st.integers(1, 6)), draw(st.integers(1, 5))) for _ in range(2)]
    query, document = (texts(*size, seed + n, masked=masked[n], dtype=dtype) for n, size in enumerate(sizes))
    weights = torch.randn(sizes[0][0], sizes[1][0], generator=torch.Generator().manual_seed(seed), dtype=dtype)
    if not anchors_query:
        weights = weights.T
    seen = torch.zeros_like(weights)

    def weigh(scores: list[Tensor], rows: slice, scalars: list[Tensor]) -> TileGrads:
        seen[rows] = scores[0]
        return TileGrads((scores[0] * weights[rows]).sum(), [weights[rows]])

    a, c = (query, document) if anchors_query else (document, query)
    block = Block(a.x, c.x, MaxSim(anchors_query=anchors_query), True, a.mask, c.mask)
    with few_vectors(draw(st.integers(1, 20))), patch.dict("vembed_fs2.losses.tiles._STRIP_BYTES", cpu=1):
        loss = sum_over_tiles([block], weigh, rows_per_tile=draw(st.sampled_from([1, 2, 3, None])))
    expected = naive(query.double(), document.double())
    scores = seen if anchors_query else seen.T
    torch.testing.assert_close(scores.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    reference = (expected * (weights if anchors_query else weights.T)).sum()
    leaves = [query.x, document.x]
    grads = torch.autograd.grad(loss, leaves)
    for got, wanted in zip(grads, torch.autograd.grad(reference, leaves)):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * max(1.0, float(wanted.abs().amax())))


DIRECTIONS = ["query_to_document", "document_to_query", "query_to_query", "document_to_document"]


@settings(max_examples=50)
@given(st.data())
def test_infonce_equals_the_formula(data: st.DataObject) -> None:
    draw = data.draw
    num, seed = draw(st.integers(1, 5)), draw(st.integers(0, 99))
    total = num * draw(st.integers(1, 2))
    masked = draw(st.booleans())
    query, document = texts(num, 3, seed, masked=masked), texts(total, 4, seed + 1, masked=masked)
    chosen = draw(st.sampled_from([DIRECTIONS[:1], DIRECTIONS[:2], DIRECTIONS]))
    config = InfoNCEConfig(similarity="maxsim", directions=chosen, partition="joint")  # type: ignore[arg-type]
    masks = {"query_mask": query.mask, "document_mask": document.mask}
    rows_per_tile = draw(st.integers(1, 3))
    with few_vectors(4), patch("vembed_fs2.losses.tiles.choose_rows_per_tile", lambda blocks: rows_per_tile):
        loss = InfoNCE(config)(query.x, document.x, **masks).loss
    q, d = query.double(), document.double()
    own = torch.eye(num, dtype=torch.bool)
    scores = naive(q, d)
    logits = [scores]
    if len(chosen) > 1:
        logits.append(scores[:, :num].T)
    if len(chosen) > 2:
        positive = Texts(d.x[:num], None if d.mask is None else d.mask[:num])
        logits.append(naive(q, q).masked_fill(own, -torch.inf))
        logits.append(naive(positive, d).masked_fill(own.repeat(1, total // num), -torch.inf))
    expected = (torch.logsumexp(20 * torch.cat(logits, 1), 1) - 20 * scores.diagonal()).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(loss, [query.x, document.x])
    for got, wanted in zip(grads, torch.autograd.grad(expected, [query.x, document.x])):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * max(1.0, float(wanted.abs().amax())))


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("directions", [DIRECTIONS[:1], DIRECTIONS[:2]])
def test_similarities_of_vectors_are_never_all_in_memory(directions: Any) -> None:
    num, num_query, num_document = 64, 16, 32
    query, document = texts(num, num_query, 1), texts(num, num_document, 2)
    config = InfoNCEConfig(similarity="maxsim", directions=directions)
    masks = {"query_mask": query.mask, "document_mask": document.mask}
    with Largest() as largest, few_vectors(128), patch.dict("vembed_fs2.losses.tiles._TILE_BYTES", cpu=2**15):
        output = InfoNCE(config)(query.x, document.x, **masks)
    # All of them are a million.
    assert largest.elements <= max(128**2, document.x.numel())
    scores = 20 * naive(query.double(), document.double())
    expected = torch.logsumexp(scores, 1) - scores.diagonal()
    if len(directions) == 2:
        expected = (expected + torch.logsumexp(scores, 0) - scores.diagonal()) / 2
    torch.testing.assert_close(output.loss.double(), expected.sum(), rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(output.loss, [query.x, document.x])
    for got, wanted in zip(grads, torch.autograd.grad(expected.sum(), [query.x, document.x])):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().amax()))


def test_low_precision_is_compared_in_float32() -> None:
    query, document = texts(4, 3, 1, dtype=torch.bfloat16), texts(4, 3, 2, dtype=torch.bfloat16)
    masks = {"query_mask": query.mask, "document_mask": document.mask}
    high = [t.x.detach().float().requires_grad_() for t in (query, document)]
    loss = InfoNCE(InfoNCEConfig(similarity="maxsim"))
    low = loss(query.x, document.x, **masks).loss
    reference = loss(*high, **masks).loss
    assert torch.equal(low, reference)
    grads = torch.autograd.grad(low, [query.x, document.x])
    for got, wanted in zip(grads, torch.autograd.grad(reference, high)):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), wanted, rtol=2**-8, atol=1e-6)


def test_single_vectors_are_an_error_and_so_are_several_for_other_similarities() -> None:
    x, several = torch.randn(3, 4), torch.randn(3, 2, 4)
    with pytest.raises(ValueError, match=r"for embeddings \[N, L, D\], of multi-vector models, .* \[3, 4\]"):
        InfoNCE(InfoNCEConfig(similarity="maxsim"))(x, x)
    with pytest.raises(ValueError, match=r"for embeddings \[N, D\], but they have the shape \[3, 2, 4\]"):
        InfoNCE()(several, several)
