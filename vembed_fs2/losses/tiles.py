"""Objectives over all pairs of rows, a few rows at a time.

The similarities of b anchors with C columns are never in memory together: a
tile of t rows is computed, reduced to its part of the loss, and carried
backward at once. So an objective needs memory for ``t x C`` similarities and
for the gradients of the embeddings, and no more matrix products than one that
holds all ``b x C`` (three).

Legend: b anchors of this rank, t anchors of a tile, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vembed_fs2.losses.similarity import Similarity, Vectors

# A tile should stay in or near the cache, but be large enough for efficient matrix products.
_TILE_BYTES: Final = {"cpu": 24 * 2**20, "cuda": 256 * 2**20}


@dataclass(frozen=True)
class Block:
    """Anchors that are compared with columns."""

    anchor: Tensor
    """*Shape:* ``[b, D]``, or ``[b, L, D]``."""

    column: Tensor
    """*Shape:* ``[C, D]``, or ``[C, K, D]``."""

    similarity: Similarity
    unit: bool
    """Whether vectors are normalised first."""

    anchor_mask: Tensor | None = None
    column_mask: Tensor | None = None


@dataclass
class TileGrads:
    """What an objective makes of a tile."""

    loss: Tensor
    """The sum over the tile's anchors. A scalar."""

    scores: Sequence[Tensor]
    """The gradient with respect to the scores of each block. *Shape:* ``[t, C]``."""

    scalars: Sequence[Tensor | None] = ()
    """The gradient with respect to each scalar."""


class TileLoss(Protocol):
    """An objective on a tile.

    It may overwrite the scores that it is given.
    """

    def __call__(self, scores: list[Tensor], rows: slice, scalars: list[Tensor]) -> TileGrads: ...


def by_autograd(function: Callable[[list[Tensor], slice, list[Tensor]], Tensor]) -> TileLoss:
    """Make a tile objective of a plain function that returns the sum over the tile's anchors."""

    def compute(scores: list[Tensor], rows: slice, scalars: list[Tensor]) -> TileGrads:
        with torch.set_grad_enabled(True):
            leaves = [x.detach().requires_grad_() for x in (*scores, *scalars)]
            loss = function(leaves[: len(scores)], rows, leaves[len(scores) :])
            if not loss.requires_grad:
                return TileGrads(loss, [torch.zeros_like(s) for s in scores], [None] * len(scalars))
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        of_scores = [torch.zeros_like(s) if g is None else g for s, g in zip(scores, grads)]
        return TileGrads(loss.detach(), of_scores, grads[len(scores) :])

    return compute


def sum_over_tiles(
    blocks: Sequence[Block], tile_loss: TileLoss, scalars: Sequence[Tensor] = (), *, rows_per_tile: int | None = None
) -> Tensor:
    """Return the sum of an objective over all anchors.

    :param blocks: what is compared; all have the same number of anchors.
    :param scalars: learned scalars that the objective needs, such as a temperature. *Shape:* any of one element.
    :param rows_per_tile: anchors per tile; ``None`` chooses them by memory.
    :returns: a scalar that can be carried backward once.
    """
    if rows_per_tile is None:
        rows_per_tile = choose_rows_per_tile(blocks)
    tensors = [t for block in blocks for t in (block.anchor, block.column)]
    return _SumOverTiles.apply(list(blocks), tile_loss, rows_per_tile, *tensors, *scalars)  # type: ignore[no-any-return, no-untyped-call]


def choose_rows_per_tile(blocks: Sequence[Block]) -> int:
    """Return how many anchors' scores are computed together."""
    limit = _TILE_BYTES.get(blocks[0].anchor.device.type, _TILE_BYTES["cpu"])
    return max(limit // (4 * max(sum(block.column.size(0) for block in blocks), 1)), 1)


class _SumOverTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: list[Block], tile_loss: TileLoss, rows_per_tile: int, *tensors: Tensor) -> Tensor:
        needed = ctx.needs_input_grad[3:]
        embeddings, scalars = tensors[: 2 * len(blocks)], [s.detach() for s in tensors[2 * len(blocks) :]]
        vectors = []
        for idx, block in enumerate(blocks):
            for x, mask, needs in (
                (embeddings[2 * idx], block.anchor_mask, needed[2 * idx]),
                (embeddings[2 * idx + 1], block.column_mask, needed[2 * idx + 1]),
            ):
                vectors.append(Vectors(x, mask, unit=block.unit, needs_grad=needs))
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in embeddings) else torch.float32
        loss = torch.zeros((), dtype=dtype, device=embeddings[0].device)
        scalar_grads = [torch.zeros_like(s) for s in scalars]
        for start in range(0, embeddings[0].size(0), rows_per_tile):
            rows = slice(start, min(start + rows_per_tile, embeddings[0].size(0)))
            scores = [
                block.similarity.scores(vectors[2 * idx], rows, vectors[2 * idx + 1])
                for idx, block in enumerate(blocks)
            ]
            tile = tile_loss(scores, rows, scalars)
            del scores
            loss += tile.loss
            for total, grad in zip(scalar_grads, tile.scalars):
                if grad is not None:
                    total += grad.view_as(total)
            if any(needed):
                for idx, (block, grad) in enumerate(zip(blocks, tile.scores)):
                    block.similarity.backward(grad, vectors[2 * idx], rows, vectors[2 * idx + 1])
        ctx.grads = [*(v.raw_grad() for v in vectors), *scalar_grads]
        ctx.dtypes = [t.dtype for t in tensors]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("The objective was carried backward twice; its gradients are gone.")
        # In place, because nothing else holds these; to half precision only now, when a loss scale has been applied.
        scaled = (None if g is None else g.mul_(grad).to(dtype) for g, dtype in zip(grads, ctx.dtypes))
        return (None, None, None, *scaled)
