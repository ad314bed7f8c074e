"""Attention of bfloat16 states in inference on CPUs.

torch's fused kernel multiplies small matrices one by one there, which takes a
good part of its time unless the processor has units for tiles of matrices
(AMX). This one multiplies those of many heads at once, in blocks that are small
enough for the cache. It is as exact: attention weights are computed in float32
from the queries and keys, up to the softmax, and rounded once.

Shapes: N sequences, S queries, T keys, H heads, K head size.
"""

from __future__ import annotations

from typing import Final

import torch
from fairseq2.device import CPU
from torch import Tensor

from vembed_fs2.dtypes import has_bfloat16_products, has_matrix_tiles

# Attention weights of a block, for each thread.
_BLOCK: Final = 2**19

# With more keys, the fused kernel is as fast; if half of the weights do not count, from fewer on.
_MAX_KEYS: Final = 1024
_MAX_CAUSAL_KEYS: Final = 256


def can_attend_in_bfloat16(q: Tensor, k: Tensor, *, causal: bool) -> bool:
    """Whether :func:`attend_in_bfloat16` computes the attention of ``[N, S, H, K]`` faster than torch's own."""
    max_keys = _MAX_CAUSAL_KEYS if causal else _MAX_KEYS
    if q.dtype != torch.bfloat16 or q.device != CPU or q.numel() == 0 or not 0 < k.size(1) <= max_keys:
        return False
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return False
    return has_bfloat16_products() and not has_matrix_tiles()


def attend_in_bfloat16(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, causal: bool = False) -> Tensor:
    """Compute scaled dot-product attention, without a graph.

    :param q: on the CPU. *Shape:* ``[N, S, H, K]``.
    :param k: as is ``v``, *Shape:* ``[N, T, H, K]``.
    :param bias: True where a key counts, or what is added to the weights before the softmax.
        *Shape:* ``[N, H, S, T]``; a size of 1 stands for all.
    :param causal: if ``True``, the keys after a query do not count.
    :returns: *Shape:* as is ``q``.
    """
    size, length, heads, _ = q.shape
    if causal:
        bias = torch.ones(length, k.size(1), dtype=torch.bool).tril_()[None, None]
    if bias is not None and bias.dtype == torch.bool:
        # Not infinity: the softmax of a query without any key would be no number.
        bias = torch.zeros(bias.shape).masked_fill_(~bias, torch.finfo(torch.float32).min)

    # Several whole sequences, or some queries of one.
    budget = _BLOCK * torch.get_num_threads()
    num_seqs = min(size, max(1, budget // (heads * length * k.size(1))))
    num_queries = length if num_seqs > 1 else min(length, max(1, budget // (heads * k.size(1))))

    scale = q.size(3) ** -0.5
    attns = q.new_empty((size, length, heads, v.size(3)))
    buffer = torch.empty(num_seqs * heads * num_queries * k.size(1), dtype=torch.float32)
    rounded = torch.empty_like(buffer, dtype=q.dtype)

    # Autocast would multiply in bfloat16 where float32 is meant.
    with torch.autocast("cpu", enabled=False):
        for first in range(0, size, num_seqs):
            seqs = slice(first, first + num_seqs)
            keys, values = _by_head(k[seqs], torch.float32).transpose(1, 2), _by_head(v[seqs], v.dtype)

            for start in range(0, length, num_queries):
                queries = slice(start, start + num_queries)
                part = _by_head(q[seqs, queries], torch.float32)

                shape = (part.size(0), part.size(1), keys.size(2))
                count = part.size(0) * part.size(1) * keys.size(2)

                weights = buffer[:count].view(shape)
                if bias is not None:
                    weights.view(-1, heads, *shape[1:]).copy_(_cut(bias, seqs, queries))
                torch.baddbmm(weights, part, keys, beta=float(bias is not None), alpha=scale, out=weights)
                torch.softmax(weights, -1, out=weights)

                found = rounded[:count].view(shape).copy_(weights) @ values
                attns[seqs, queries] = found.view(-1, heads, *found.shape[1:]).transpose(1, 2)

    return attns


def _by_head(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``[n, S, H, K]`` becomes ``[n * H, S, K]``."""
    x = x.transpose(1, 2)
    # To convert and to transpose in one copy takes a tenth of the time of ``to``.
    return torch.empty(x.shape, dtype=dtype).copy_(x).flatten(0, 1)


def _cut(bias: Tensor, seqs: slice, queries: slice) -> Tensor:
    if bias.size(0) > 1:
        bias = bias[seqs]
    return bias[:, :, queries] if bias.size(2) > 1 else bias
