"""Sums over tiles: the same whatever the tiles, with one gradient for each tensor, and never all pairs in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from vembed_fs2.losses import InfoNCE, InfoNCEConfig, RowInfo
from vembed_fs2.losses import tiles as module
from vembed_fs2.losses.similarity import DotProduct, MaxSim
from vembed_fs2.losses.tiles import Block, TileGrads, by_autograd, choose_rows_per_tile, sum_over_tiles


def embeddings(rows: int, seed: int, dim: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


@contextmanager
def sizes(tile_bytes: int, strip_bytes: int) -> Iterator[None]:
    tile, strip = {"cpu": tile_bytes}, {"cpu": strip_bytes}
    with patch.object(module, "_TILE_BYTES", tile), patch.object(module, "_STRIP_BYTES", strip):
        yield


def cosines(x: Tensor, y: Tensor) -> Tensor:
    return normalize(x, dim=-1) @ normalize(y, dim=-1).T


def curved(scores: list[Tensor], rows: slice, scalars: list[Tensor]) -> Tensor:
    """Something that depends on all scores of a row, on which row it is, and on the scalars."""
    scale, bias = scalars
    number = torch.arange(rows.start + 1, rows.stop + 1, dtype=scores[0].dtype)
    logits = torch.cat(scores, 1) * scale + bias
    return (torch.logsumexp(logits, 1) * number).sum() + logits.tanh().sum()


@settings(max_examples=100)
@given(st.data())
def test_value_and_gradients_do_not_depend_on_tiles(data: st.DataObject) -> None:
    draw = data.draw
    b, num_columns, seed = draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.integers(0, 99))
    before, behind = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    x, y = embeddings(before + b + behind, seed, dtype=dtype), embeddings(num_columns, seed + 1, dtype=dtype)
    scale, bias = torch.tensor([1.7], requires_grad=True), torch.tensor(0.3, requires_grad=True)
    leaves, own = [x, y, scale, bias], slice(before, before + b)
    # The anchors of the second block are columns of its own; the third does not normalise.
    blocks = [
        Block(x, y, DotProduct(), True, anchor_rows=own),
        Block(x, x, DotProduct(), True, anchor_rows=own),
        Block(x, y, DotProduct(), False, anchor_rows=own),
    ][: draw(st.integers(1, 3))]
    strip = draw(st.sampled_from([1, 100, 10**6]))
    with sizes(draw(st.sampled_from([1, 200, 10**6])), strip):
        loss = sum_over_tiles(blocks, by_autograd(curved), [scale, bias])
    a, d = x[own].double(), y.double()
    scores = [cosines(a, d), cosines(a, x.double()), a @ d.T][: len(blocks)]
    expected = curved(scores, slice(0, b), [scale.double(), bias.double()])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert loss.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    for leaf, got, wanted in zip(leaves, *(torch.autograd.grad(v * 3.0, leaves) for v in (loss, expected))):
        atol = (1e-5 if leaf.dtype == torch.float32 else tolerance) * max(1.0, float(wanted.abs().amax()))
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=atol)


def test_gradients_may_be_new_tensors_the_scores_themselves_or_none() -> None:
    x, y = embeddings(5, 1), embeddings(6, 2)
    block = Block(x, y, DotProduct(), True)

    def grads_of(compute: Any) -> tuple[Tensor, ...]:
        with sizes(100, 1):
            return torch.autograd.grad(sum_over_tiles([block, block], compute), [x, y])

    def in_place(scores: list[Tensor], rows: slice, scalars: list[Tensor]) -> TileGrads:
        return TileGrads(scores[0].sum() * 0, [scores[0].mul_(2.0), None])

    def new(scores: list[Tensor], rows: slice, scalars: list[Tensor]) -> TileGrads:
        return TileGrads(scores[0].sum() * 0, [scores[1] * 2.0, torch.zeros(()).expand_as(scores[1])])

    expected = torch.autograd.grad(cosines(x, y).square().sum(), [x, y])
    torch.testing.assert_close(grads_of(in_place), expected)
    torch.testing.assert_close(grads_of(new), expected)


def test_a_function_without_gradients_or_without_some_is_fine() -> None:
    x, y = embeddings(3, 1), embeddings(4, 2)
    scalar = torch.tensor([2.0], requires_grad=True)
    blocks = [Block(x, y, DotProduct(), False), Block(x, x, DotProduct(), False)]
    one = sum_over_tiles(blocks, by_autograd(lambda scores, rows, scalars: scores[1].sum()), [scalar])
    grads = torch.autograd.grad(one, [x, y, scalar])
    torch.testing.assert_close(grads[0], 2 * x.sum(0).expand_as(x))
    assert not grads[1].any()
    assert not grads[2].any()
    none = sum_over_tiles(blocks, by_autograd(lambda scores, rows, scalars: scores[0].detach().sum()), [scalar])
    assert not any(g.any() for g in torch.autograd.grad(none, [x, y, scalar]))


def test_no_rows_give_zero_and_gradients_of_zero() -> None:
    x, y = embeddings(0, 1), embeddings(4, 2)
    scalar = torch.tensor([2.0], requires_grad=True)
    loss = sum_over_tiles([Block(x, y, DotProduct(), True)], by_autograd(curved), [scalar, scalar])
    grads = torch.autograd.grad(loss, [x, y, scalar])
    assert float(loss.detach()) == 0.0
    assert not any(g.any() for g in grads)


def test_vectors_of_zero_have_finite_gradients_as_in_torch() -> None:
    x, y = torch.zeros(1, 3, requires_grad=True), torch.tensor([[3.0, 4.0, 0.0]])
    loss = sum_over_tiles([Block(x, y, DotProduct(), True)], by_autograd(lambda s, rows, scalars: s[0].sum()))
    (grad,) = torch.autograd.grad(loss, [x])
    (expected,) = torch.autograd.grad(cosines(x, y).sum(), [x])
    torch.testing.assert_close(grad, expected)


def test_a_second_backward_pass_is_an_error() -> None:
    x = embeddings(3, 1)
    loss = sum_over_tiles([Block(x, x, DotProduct(), True)], by_autograd(lambda s, rows, scalars: s[0].sum()))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="carried backward twice"):
        loss.backward()


class Seen(TorchDispatchMode):
    """What was computed: the largest tensor, and how many matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.num_products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_products += "mm" in func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_products_are_three_of_training_two_of_frozen_documents_and_one_of_validation() -> None:
    q, d = embeddings(8, 1), embeddings(8, 2)
    loss = InfoNCE()
    with Seen() as seen:
        loss(q, d).loss.backward()
    assert seen.num_products == 3
    with Seen() as seen:
        loss(q, d.detach()).loss.backward()
    assert seen.num_products == 2
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), Seen() as seen:
            value = loss(q, d).loss
        assert seen.num_products == 1
        assert not value.requires_grad


ALL = ["query_to_document", "document_to_query", "query_to_query", "document_to_document"]
CONFIGS: list[dict[str, Any]] = [
    {},
    {"directions": ALL[:2], "learn_temperature": True},
    {"directions": ALL, "partition": "joint"},
    {"hardest": 3},
    {"false_negatives": "filter", "false_negative_margin": 0.1},
    {"false_negatives": "filter_by_teacher", "directions": ALL[:2]},
    {"hardness": "in_batch", "hardness_strength": 1.0},
    {"similarity": "dot"},
    {"similarity": "maxsim", "directions": ALL[:2]},
]


@pytest.mark.parametrize("values", CONFIGS, ids=lambda v: ",".join(map(str, v)) or "defaults")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_pairs_are_never_in_memory(values: dict[str, Any], dtype: torch.dtype) -> None:
    num = 256
    q, d = embeddings(num, 1, dtype=dtype), embeddings(num, 2, dtype=dtype)
    if values.get("similarity") == "maxsim":
        q, d = (torch.stack([x, x.flip(1)], 1).detach().requires_grad_() for x in (q, d))
    rows = RowInfo.distinct(num, num)
    rows.document_ids[:2] = 1  # So that pairs are left out.
    rows.teacher_query, rows.teacher_document = embeddings(num, 3).float(), embeddings(num, 4).float()
    scale = torch.tensor([2.0], requires_grad=True)
    loss = InfoNCE(InfoNCEConfig(**values))
    leaves = [q, d, scale] if values.get("learn_temperature") else [q, d]
    expected = torch.autograd.grad(loss(q, d, rows, scale).loss, leaves)
    limit = 2**12
    with sizes(4 * limit, limit), patch.dict("vembed_fs2.losses.similarity._MAXSIM_VECTORS", cpu=64), Seen() as seen:
        grads = torch.autograd.grad(loss(q, d, rows, scale).loss, leaves)
    assert seen.elements <= limit
    assert limit < num * num / 8
    for got, reference in zip(grads, expected):
        torch.testing.assert_close(got, reference, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


def test_tiles_are_as_large_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.zeros(10, 4), torch.zeros(1000, 4)
    one, words = Block(x, y, DotProduct(), True), Block(x.view(10, 2, 2), y.view(1000, 2, 2), MaxSim(), True)
    with sizes(4 * 10**5, 1):
        assert choose_rows_per_tile([one]) == 100
        assert choose_rows_per_tile([one, one]) == 50
        # Of each pair it keeps the nearest vector to both of the anchor's.
        assert choose_rows_per_tile([words]) == 50
    with sizes(1, 1):
        assert choose_rows_per_tile([one]) == 1
    # As if there were a GPU with 800 MB free, and 80 MB that its allocator holds for later.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (800 * 10**6, 10**10))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 180 * 10**6)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100 * 10**6)
    assert module._tile_bytes(torch.device("cuda", 0)) == 110 * 10**6
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**12, 10**12))
    assert module._tile_bytes(torch.device("cuda", 0)) == module._TILE_BYTES["cuda"]
