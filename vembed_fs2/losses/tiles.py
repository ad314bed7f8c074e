"""Objectives over all pairs of rows, a few rows at a time.

The similarities of b anchors with C columns are never in memory together: a
tile of t rows is computed, reduced to its part of the loss, and carried
backward at once. So an objective needs memory for ``t x C`` similarities and
for the gradients of the embeddings, and no more matrix products than one that
holds all ``b x C`` (three).

A tile is as large as efficient products ask for. An objective sees strips of it,
of s rows, so that what it needs besides the scores is smaller than a tile.

Legend: b anchors of this rank, t anchors of a tile, s of a strip, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vembed_fs2.losses.similarity import Scoring, Vectors, slices

# At most; see `_tile_bytes`. With 192 rows or more a product is at its full rate: so a CPU has up to 65,536 columns.
_TILE_BYTES: Final = {"cpu": 48 * 2**20, "cuda": 512 * 2**20}

# An objective may need several times as much. Threads wait for each other after each operation, so they should be few.
_STRIP_BYTES: Final = {"cpu": 16 * 2**20, "cuda": 64 * 2**20}


@dataclass(frozen=True)
class Block:
    """Anchors that are compared with columns."""

    anchor: Tensor
    """*Shape:* ``[b, D]``, or ``[b, L, D]``."""

    column: Tensor
    """*Shape:* ``[C, D]``, or ``[C, K, D]``."""

    similarity: Scoring
    unit: bool
    """Whether vectors are normalised first."""

    anchor_mask: Tensor | None = None
    column_mask: Tensor | None = None

    anchor_rows: slice | None = None
    """The rows of ``anchor`` that are the anchors, if not all are. A tensor that is both the anchors' and the columns'
    has one gradient, in this block or over several."""


@dataclass
class TileGrads:
    """What an objective makes of a tile."""

    loss: Tensor
    """The sum over the tile's anchors. A scalar."""

    scores: Sequence[Tensor | None]
    """The gradient with respect to the scores of each block; ``None`` if they have none. *Shape:* ``[s, C]``."""

    scalars: Sequence[Tensor | None] = ()
    """The gradient with respect to each scalar."""


class TileLoss(Protocol):
    """An objective on some rows.

    It may overwrite the scores that it is given, and return them as the gradients.
    """

    def __call__(self, scores: list[Tensor], rows: slice, scalars: list[Tensor]) -> TileGrads: ...


def by_autograd(function: Callable[[list[Tensor], slice, list[Tensor]], Tensor]) -> TileLoss:
    """Make a tile objective of a plain function that returns the sum over the tile's anchors."""

    def compute(scores: list[Tensor], rows: slice, scalars: list[Tensor]) -> TileGrads:
        with torch.set_grad_enabled(True):
            leaves = [x.detach().requires_grad_() for x in (*scores, *scalars)]

            loss = function(leaves[: len(scores)], rows, leaves[len(scores) :])
            if not loss.requires_grad:
                return TileGrads(loss, [None] * len(scores))
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)

        return TileGrads(loss.detach(), grads[: len(scores)], grads[len(scores) :])

    return compute


def sum_over_tiles(
    blocks: Sequence[Block], tile_loss: TileLoss, scalars: Sequence[Tensor] = (), *, rows_per_tile: int | None = None
) -> Tensor:
    """Return the sum of an objective over all anchors.

    :param blocks: what is compared; all have the same number of anchors.
    :param scalars: learned scalars that the objective needs, such as a temperature. *Shape:* any of one element.
    :param rows_per_tile: anchors per tile; ``None`` chooses them by memory.
    :returns: a scalar that can be carried backward once.
    :raises ValueError: rows have single vectors where a similarity compares several, or the other way round.
    """
    for block in blocks:
        _check(block)

    plan = _Plan(blocks, tile_loss, rows_per_tile or choose_rows_per_tile(blocks))
    tensors = [tensor for tensor, _, _ in plan.sides]
    return _SumOverTiles.apply(plan, *tensors, *scalars)  # type: ignore[no-any-return, no-untyped-call]


def _check(block: Block) -> None:
    for x in (block.anchor, block.column):
        if x.ndim != block.similarity.ndim:
            what = "[N, L, D], of multi-vector models" if block.similarity.ndim == 3 else "[N, D]"
            raise ValueError(f"This similarity is for embeddings {what}, but they have the shape {list(x.shape)}.")


def choose_rows_per_tile(blocks: Sequence[Block]) -> int:
    """Return how many anchors' scores are computed together."""
    num_values = _tile_bytes(blocks[0].anchor.device) // 4 // len(blocks)
    return max(min(b.similarity.rows_per_tile(b.anchor, b.column, num_values) for b in blocks), 1)


def _tile_bytes(device: torch.device) -> int:
    most = _TILE_BYTES.get(device.type, _TILE_BYTES["cpu"])
    if device.type != "cuda":
        return most

    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(most, free // 8)


@dataclass
class _Pair:
    """A block, by the numbers of its sides."""

    similarity: Scoring
    anchor: int
    start: int
    """The row of the first anchor in its side."""

    column: int


class _Plan:
    """The sides that are compared. Embeddings that take part several times are one side, with one gradient."""

    def __init__(self, blocks: Sequence[Block], tile_loss: TileLoss, rows_per_tile: int) -> None:
        self.sides: list[tuple[Tensor, Tensor | None, bool]] = []
        self.pairs: list[_Pair] = []
        for block in blocks:
            rows = block.anchor_rows or slice(0, block.anchor.size(0))
            anchor = self._side(block.anchor, block.anchor_mask, block.unit)
            column = self._side(block.column, block.column_mask, block.unit)
            self.pairs.append(_Pair(block.similarity, anchor, rows.start, column))
            self.num_anchors = rows.stop - rows.start

        self.tile_loss = tile_loss
        self.rows_per_tile = min(rows_per_tile, max(self.num_anchors, 1))

        # Inside an autograd function this is always off.
        self.grad_enabled = torch.is_grad_enabled()

    def _side(self, tensor: Tensor, mask: Tensor | None, unit: bool) -> int:
        for idx, side in enumerate(self.sides):
            if side[0] is tensor and side[1] is mask and side[2] == unit:
                return idx

        self.sides.append((tensor, mask, unit))
        return len(self.sides) - 1


class _SumOverTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> Tensor:
        needed = [plan.grad_enabled and needs for needs in ctx.needs_input_grad[1:]]
        embeddings, scalars = tensors[: len(plan.sides)], [s.detach() for s in tensors[len(plan.sides) :]]
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in embeddings) else torch.float32
        sides = [
            Vectors(x, mask, unit=unit, needs_grad=needs, dtype=dtype)
            for x, (_, mask, unit), needs in zip(embeddings, plan.sides, needed)
        ]

        tiles = _Tiles(plan, sides, scalars, dtype)
        for rows in slices(plan.num_anchors, plan.rows_per_tile):
            tiles.add(rows)

        ctx.grads = [*(side.raw_grad() for side in sides), *tiles.scalar_grads()]
        ctx.dtypes = [t.dtype for t in tensors]
        return tiles.loss()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("The objective was carried backward twice; its gradients are gone.")

        # In place, because nothing else holds these; to half precision only now, when a loss scale has been applied.
        scaled = (None if g is None else g.mul_(grad).to(dtype) for g, dtype in zip(grads, ctx.dtypes))
        return (None, *scaled)


class _Tiles:
    """Adds up the loss of tiles, and their gradients in the sides."""

    def __init__(self, plan: _Plan, sides: list[Vectors], scalars: list[Tensor], dtype: torch.dtype) -> None:
        self._plan = plan
        self._sides = sides
        self._scalars = scalars
        self._losses = [torch.zeros((), dtype=dtype, device=sides[0].device)]
        self._scalar_grads = [[torch.zeros_like(s)] for s in scalars]

        # The same memory for all tiles: fresh memory costs a third of a product.
        widths = [len(sides[pair.column]) for pair in plan.pairs]
        self._scores = [torch.empty(plan.rows_per_tile, width, dtype=dtype, device=sides[0].device) for width in widths]
        strip_bytes = _STRIP_BYTES.get(sides[0].device.type, _STRIP_BYTES["cpu"])
        self._rows_per_strip = max(strip_bytes // (dtype.itemsize * max(sum(widths), 1)), 1)

    def add(self, rows: slice) -> None:
        """Compute a tile and carry it backward."""
        num_rows = rows.stop - rows.start
        scores = [s[:num_rows] for s in self._scores]
        saved = [
            pair.similarity.scores(self._sides[pair.anchor], _shifted(rows, pair.start), self._sides[pair.column], s)
            for pair, s in zip(self._plan.pairs, scores)
        ]

        for strip in slices(num_rows, self._rows_per_strip):
            self._add_strip([s[strip] for s in scores], _shifted(strip, rows.start))

        for pair, s, kept in zip(self._plan.pairs, scores, saved):
            if self._needs_grad(pair):
                anchors, columns = self._sides[pair.anchor], self._sides[pair.column]
                pair.similarity.backward(s, anchors, _shifted(rows, pair.start), columns, kept)

    def _add_strip(self, scores: list[Tensor], rows: slice) -> None:
        """Replace scores by their gradients."""
        for pair, s in zip(self._plan.pairs, scores):
            pair.similarity.scale_(s, self._sides[pair.column])

        result = self._plan.tile_loss(scores, rows, self._scalars)
        self._losses.append(result.loss)

        for total, grad in zip(self._scalar_grads, result.scalars):
            if grad is not None:
                total.append(grad.view_as(total[0]))

        for pair, s, grad in zip(self._plan.pairs, scores, result.scores):
            if self._needs_grad(pair):
                if grad is None:
                    s.zero_()
                elif grad is not s:
                    s.copy_(grad)
                pair.similarity.scale_(s, self._sides[pair.column])

    def _needs_grad(self, pair: _Pair) -> bool:
        return self._sides[pair.anchor].grad is not None or self._sides[pair.column].grad is not None

    def loss(self) -> Tensor:
        return torch.stack(self._losses).sum()

    def scalar_grads(self) -> list[Tensor]:
        return [torch.stack(grads).sum(0) for grads in self._scalar_grads]


def _shifted(rows: slice, by: int) -> slice:
    return slice(rows.start + by, rows.stop + by)
