"""Attention on CPUs in blocks, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vembed_fs2.models.common import dropout_attention
from vembed_fs2.models.common.attention import attend
from vembed_fs2.models.common.dropout import Masks, dropout
from vembed_fs2.models.common.dropout_attention import attend_with_dropout


def attend_by_formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, keep: Tensor) -> Tensor:
    """:param keep: what attention weights are multiplied with."""
    logits = q @ k.transpose(-1, -2) * q.size(-1) ** -0.5
    if bias is not None:
        logits = logits.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else logits + bias
    if causal:
        future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        logits = logits.masked_fill(future, -torch.inf)
    return (logits.softmax(-1) * keep) @ v


def create_inputs(size: int = 3, length: int = 7, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys and values as projections give them. *Shape:* ``[N, H, S, K]`` each."""
    torch.manual_seed(0)
    return [torch.randn(size, length, 4, 6, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


def create_bias(kind: str) -> Tensor | None:
    generator = torch.Generator().manual_seed(1)
    match kind:
        case "keys":
            return torch.arange(7)[None, None, None, :] < torch.tensor([7, 3, 5])[:, None, None, None]
        case "queries":
            return (torch.rand(3, 1, 7, 7, generator=generator) < 0.5) | torch.eye(7, dtype=torch.bool)
        case "learned":
            return torch.randn(1, 4, 7, 7, dtype=torch.float64, generator=generator).requires_grad_()
    return None


# Everything at once; some rows; some heads of a row; some queries of a head.
@pytest.mark.parametrize("block", [2**19, 2 * 4 * 7 * 7, 3 * 7 * 7, 2 * 7])
@pytest.mark.parametrize("kind", ["none", "keys", "queries", "learned"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kept_width", [0, 7])
def test_values_and_gradients_are_those_of_the_formula(
    block: int, kind: str, causal: bool, kept_width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dropout_attention, "_BLOCK", block)
    monkeypatch.setattr(dropout_attention, "_KEPT_WIDTH", kept_width)
    inputs, bias = create_inputs(), create_bias(kind)
    learned = [*inputs, bias] if bias is not None and bias.requires_grad else inputs
    masks = Masks(0.3)
    # With the identity for values, attention returns its weights.
    weights = attend_with_dropout(*inputs[:2], torch.eye(7, dtype=torch.float64).expand(3, 4, 7, 7), None, masks)
    keep = (weights != 0).double() * masks.scale
    assert 0 < int((weights == 0).sum()) < keep.numel() / 2
    masks.restart()
    got = attend_with_dropout(*inputs, bias, masks, causal=causal)
    expected = attend_by_formula(*inputs, bias, causal, keep)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, learned, grad), torch.autograd.grad(expected, learned, grad)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_of_long_sequences_are_not_kept(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout_attention, "_KEPT_WIDTH", 63)
    assert count_kept(*create_inputs(2, 64, dtype)) == 4 * 2 * 4 * 64 * 6
    assert count_kept(*create_inputs(2, 63, dtype)) == 4 * 2 * 4 * 63 * 6 + 2 * 4 * 63 * 63


def count_kept(q: Tensor, k: Tensor, v: Tensor) -> int:
    """The elements that are kept for the backward pass."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attend_with_dropout(q, k, v, None, Masks(0.1))
    return sum(kept.values())


def test_half_precision_drops_what_others_drop() -> None:
    inputs = create_inputs(2, 40, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    grad = torch.randn(inputs[0].shape, dtype=torch.bfloat16)
    masks = Masks(0.1)
    got = attend_with_dropout(*inputs, None, masks)
    grads = torch.autograd.grad(got, inputs, grad)
    masks.restart()
    expected = attend_with_dropout(*exact, None, masks)
    for a, b in zip((got, *grads), (expected, *torch.autograd.grad(expected, exact, grad.double()))):
        assert float(((a - b).norm() / b.norm()).detach()) < 1e-2


def test_attention_with_dropout_follows_the_generator_of_torch() -> None:
    inputs = [x.transpose(1, 2) for x in create_inputs(dtype=torch.float32)]
    torch.manual_seed(5)
    first = attend(*inputs, None, dropout_p=0.5)
    other = attend(*inputs, None, dropout_p=0.5)
    torch.manual_seed(5)
    again = attend(*inputs, None, dropout_p=0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_mask_is_drawn_again_for_the_backward_pass_and_not_kept() -> None:
    x = torch.randn(300, 1000).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = dropout(x, 0.1)
    assert not kept
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad == 0, y == 0)
