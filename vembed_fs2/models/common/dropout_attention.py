"""Attention with dropout on CPUs, for which torch has no fused kernel.

It goes in blocks that are small enough for the cache. For short sequences it
keeps the attention weights for the backward pass; of long ones, like
FlashAttention (Dao et al., 2022, https://arxiv.org/abs/2205.14135), it computes
them again, with the same dropout.

Shapes: N sequences, S queries, T keys, H heads, K head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vembed_fs2.models.common.dropout import Masks

_Index: TypeAlias = "tuple[slice, ...]"

# Attention weights of a block.
_BLOCK: Final = 2**21

# With more keys, the attention weights would take much more memory than all else.
_KEPT_WIDTH: Final = 1024


def attend_with_dropout(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, masks: Masks, *, causal: bool = False
) -> Tensor:
    """Compute scaled dot-product attention. It can be differentiated once.

    :param q: on the CPU. *Shape:* ``[N, H, S, K]``.
    :param k: *Shape:* ``[N, H, T, K]``.
    :param v: *Shape:* ``[N, H, T, K_v]``.
    :param bias: True where a key counts, or what is added to the weights before the softmax.
        *Shape:* ``[N, H, S, T]``; a size of 1 stands for all.
    :param masks: what is dropped.
    :param causal: if ``True``, the keys after a query do not count.
    :returns: *Shape:* ``[N, H, S, K_v]``, a view of what is contiguous as ``[N, S, H, K_v]``.
    """
    if bias is not None and bias.dtype == torch.bool:
        bias = q.new_zeros(bias.shape).masked_fill_(~bias, -torch.inf)
    return _DropoutAttention.apply(q, k, v, bias, masks, causal)  # type: ignore[no-any-return, no-untyped-call]


class _DropoutAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, masks: Masks, causal: bool) -> Tensor:
        attns = _empty_like(q, v.size(3))
        kept = []

        # Autocast would make float32 of the weights; softmax itself rounds only its result.
        with torch.autocast("cpu", enabled=False):
            for heads, queries in _blocks(q, k):
                signed = _signed_weights(q, k, bias, masks, heads, queries, causal)
                attns[queries] = (signed.relu() @ v[heads]).mul_(masks.scale)
                if any(ctx.needs_input_grad) and k.size(2) <= _KEPT_WIDTH:
                    kept.append(signed)

        ctx.save_for_backward(q, k, v, bias, attns, *kept)
        ctx.masks, ctx.causal = masks, causal
        return attns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, attns, *kept = ctx.saved_tensors
        grad_q = _empty_like(q, q.size(3))

        grad_k, grad_v = _empty_like(k, k.size(3)).zero_(), _empty_like(v, v.size(3)).zero_()
        grad_bias = torch.zeros_like(bias) if ctx.needs_input_grad[3] else None
        scale = q.size(3) ** -0.5
        with torch.autocast("cpu", enabled=False):
            # What the softmax takes off the gradients of a row: their mean, weighted by the attention weights.
            mean = (grad * attns).sum(-1, keepdim=True)
            grad = grad * ctx.masks.scale
            ctx.masks.restart()

            for i, (heads, queries) in enumerate(_blocks(q, k)):
                signed = kept[i] if kept else _signed_weights(q, k, bias, ctx.masks, heads, queries, ctx.causal)
                dropped = signed.relu()
                grad_v[heads] += dropped.transpose(-1, -2) @ grad[queries]
                grad_weights = (grad[queries] @ v[heads].transpose(-1, -2)).mul_(dropped)
                grad_weights.addcmul_(signed.abs(), mean[queries], value=-1.0)

                if grad_bias is not None:
                    part = _part(grad_bias, queries)
                    part += grad_weights.sum_to_size(part.shape)

                grad_q[queries] = (grad_weights @ k[heads]).mul_(scale)
                grad_k[heads] += (grad_weights.transpose(-1, -2) @ q[queries]).mul_(scale)

        return grad_q, grad_k, grad_v, grad_bias, None, None


def _signed_weights(
    q: Tensor, k: Tensor, bias: Tensor | None, masks: Masks, heads: _Index, queries: _Index, causal: bool
) -> Tensor:
    """The weights of a block; those that are dropped are negative. *Shape:* ``[rows, heads, queries, T]``."""
    logits = (q[queries] * q.size(3) ** -0.5) @ k[heads].transpose(-1, -2)
    if bias is not None:
        logits += _part(bias, queries)
    if causal:
        logits += logits.new_full(logits.shape[-2:], -torch.inf).triu_(queries[2].start + 1)

    weights: Tensor = logits.softmax(-1)
    dropped = masks.draw(weights)
    sign_bit = torch.iinfo(dropped.dtype).min
    weights.view(dropped.dtype).bitwise_or_(dropped.bitwise_and_(sign_bit))

    return weights


def _part(bias: Tensor, queries: _Index) -> Tensor:
    """What of ``bias`` belongs to a block."""
    return bias[tuple(index if size > 1 else slice(None) for index, size in zip(queries, bias.shape))]


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[_Index, _Index]]:
    """Which rows and heads a block takes, and of these which queries."""
    size, heads, length, _ = q.shape
    per_block = (
        _BLOCK // max(1, heads * length * k.size(2)),
        _BLOCK // max(1, length * k.size(2)),
        _BLOCK // k.size(2),
    )

    num_rows, num_heads, num_queries = (max(1, n) for n in per_block)
    for row in range(0, size, num_rows):
        for head in range(0, heads, num_heads):
            for query in range(0, length, num_queries):
                index = slice(row, row + num_rows), slice(head, head + num_heads)
                yield index, (*index, slice(query, query + num_queries))


def _empty_like(x: Tensor, head_dim: int) -> Tensor:
    """A view of the heads of each token one after the other, as projections take and give them."""
    size, heads, length, _ = x.shape
    return x.new_empty((size, length, heads, head_dim)).transpose(1, 2)
