"""Similarities of all rows of a tile with all columns, and their gradients.

Legend: b anchors, t anchors of a tile, C columns, D embedding size, L and K
vectors per anchor and per column of multi-vector models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import normalize

SimilarityName: TypeAlias = Literal["cosine", "dot", "maxsim"]

# Elements of the largest temporary of MaxSim: similarities of single vectors.
_MAXSIM_ELEMENTS: Final = 4 * 2**20


class Vectors:
    """Embeddings that take part in similarities, and the gradient that is collected for them.

    :param raw: embeddings of single vectors ``[N, D]``, or of several ``[N, L, D]``.
    :param mask: the vectors that count, of several. *Shape:* ``[N, L]``, bool.
    :param unit: if ``True``, vectors are normalised, as ``cosine`` and ``maxsim`` ask for.
    """

    def __init__(self, raw: Tensor, mask: Tensor | None, *, unit: bool, needs_grad: bool) -> None:
        # Similarities are computed in single precision at least: their differences decide.
        self._dtype = torch.float64 if raw.dtype == torch.float64 else torch.float32
        self._raw = raw.detach()
        self._unit = unit
        self._all: Tensor | None = None
        self._mask = mask
        self.grad = torch.zeros(raw.shape, dtype=self._dtype, device=raw.device) if needs_grad else None

    def __len__(self) -> int:
        return self._raw.size(0)

    @property
    def width(self) -> int:
        """The number of vectors per row."""
        return self._raw.size(1) if self._raw.ndim == 3 else 1

    def mask_of(self, rows: slice) -> Tensor:
        """The vectors that count. *Returns:* ``[n, L]``, bool."""
        if self._mask is not None:
            return self._mask[rows].bool()
        return torch.ones(self._raw[rows].shape[:2], dtype=torch.bool, device=self._raw.device)

    def rows(self, rows: slice) -> Tensor:
        """The vectors of some rows, normalised where asked."""
        x = self._raw[rows].to(self._dtype)
        return normalize(x, dim=-1) if self._unit else x

    def all(self) -> Tensor:
        """All vectors; they stay in memory until :meth:`raw_grad`."""
        if self._all is None:
            self._all = self.rows(slice(None))
        return self._all

    def add_grad(self, rows: slice, grad: Tensor) -> None:
        if self.grad is not None:
            self.grad[rows] += grad.view_as(self.grad[rows])

    def raw_grad(self) -> Tensor | None:
        """Return the gradient with respect to the embeddings as they were given, and free all else."""
        self._all = None
        grad, self.grad = self.grad, None
        if grad is None:
            return None
        if self._unit:
            for rows in _slices(len(self), max(2**20 // max(grad[:1].numel(), 1), 1)):
                x = self._raw[rows].to(self._dtype)
                norm = x.norm(dim=-1, keepdim=True)
                safe = norm.clamp_min(1e-12)  # As `normalize` has it.
                part = grad[rows]
                along = (part * x).sum(-1, keepdim=True) / safe.square()
                part.sub_(x * torch.where(norm > 1e-12, along, 0.0)).div_(safe)
        return grad


class Similarity(Protocol):
    """Compares all anchors of a tile with all columns."""

    def scores(self, anchors: Vectors, rows: slice, columns: Vectors) -> Tensor:
        """*Returns:* ``[t, C]``."""

    def backward(self, grad_tC: Tensor, anchors: Vectors, rows: slice, columns: Vectors) -> None:
        """Add the gradients that follow from that of the scores."""


class DotProduct(Similarity):
    """``s(x, y) = x . y``; of normalised vectors, their cosine."""

    def scores(self, anchors: Vectors, rows: slice, columns: Vectors) -> Tensor:
        return anchors.rows(rows) @ columns.all().T

    def backward(self, grad_tC: Tensor, anchors: Vectors, rows: slice, columns: Vectors) -> None:
        """Add the gradients that follow from that of the scores."""
        if anchors.grad is not None:
            anchors.grad[rows].addmm_(grad_tC, columns.all())
        if columns.grad is not None:
            columns.grad.addmm_(grad_tC.T, anchors.rows(rows))


class MaxSim(Similarity):
    r"""Late interaction: each vector of the anchor with the nearest one of the column.

    .. math:: s(x, y) = \sum_l \max_k x_l \cdot y_k

    Khattab and Zaharia, "ColBERT", 2020, https://arxiv.org/abs/2004.12832.
    Masked vectors take no part; a column without any scores 0. Columns are
    taken a few at a time, so that the similarities of single vectors are never
    all in memory.

    :param anchors_query: whether the anchors are the queries, whose vectors are
        summed over; if ``False``, the columns are.
    """

    def __init__(self, *, anchors_query: bool = True) -> None:
        self._anchors_query = anchors_query

    def scores(self, anchors: Vectors, rows: slice, columns: Vectors) -> Tensor:
        """*Returns:* ``[t, C]``."""
        x_tLD = anchors.rows(rows)
        scores = x_tLD.new_empty(x_tLD.size(0), len(columns))
        for part in self._parts(x_tLD, columns):
            best, _, counts = self._best(x_tLD, anchors, rows, columns, part)
            scores[:, part] = torch.where(counts, best, 0.0).sum(1 if self._anchors_query else 2)
        return scores

    def backward(self, grad_tC: Tensor, anchors: Vectors, rows: slice, columns: Vectors) -> None:
        """Add the gradients that follow from that of the scores."""
        x_tLD = anchors.rows(rows)
        t, num_vectors, dim = x_tLD.shape
        x_grad = torch.zeros(t * num_vectors, dim, dtype=x_tLD.dtype, device=x_tLD.device)
        for part in self._parts(x_tLD, columns):
            y_cKD = columns.rows(part)
            _, index, counts = self._best(x_tLD, anchors, rows, columns, part)
            over_columns, over_anchors = (3, 1) if self._anchors_query else (1, 2)
            grad = torch.where(counts, grad_tC[:, part].unsqueeze(over_anchors), 0.0)
            pairs = x_tLD.new_zeros(t, num_vectors, y_cKD.size(0), y_cKD.size(1))
            pairs.scatter_(over_columns, index.unsqueeze(over_columns), grad.unsqueeze(over_columns))
            flat = pairs.view(t * num_vectors, -1)
            x_grad.addmm_(flat, y_cKD.reshape(-1, dim))
            columns.add_grad(part, flat.T @ x_tLD.reshape(-1, dim))
        anchors.add_grad(rows, x_grad)

    def _parts(self, x_tLD: Tensor, columns: Vectors) -> list[slice]:
        size = x_tLD.size(0) * x_tLD.size(1) * columns.width
        return list(_slices(len(columns), max(_MAXSIM_ELEMENTS // max(size, 1), 1)))

    def _best(
        self, x_tLD: Tensor, anchors: Vectors, rows: slice, columns: Vectors, part: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The nearest vector of the other side, for each vector that is summed over.

        *Returns:* similarities, indices and whether they count: ``[t, L, c]``,
        or ``[t, c, K]`` if the columns are the queries.
        """
        y_cKD = columns.rows(part)
        flat = x_tLD.reshape(-1, x_tLD.size(2)) @ y_cKD.reshape(-1, y_cKD.size(2)).T
        pairs = flat.view(*x_tLD.shape[:2], *y_cKD.shape[:2])
        x_mask, y_mask = anchors.mask_of(rows), columns.mask_of(part)
        summed, searched = x_mask[:, :, None], y_mask[None, None]
        if not self._anchors_query:
            summed, searched = y_mask[None], x_mask[:, :, None, None]
        best, index = pairs.masked_fill_(~searched, -torch.inf).max(3 if self._anchors_query else 1)
        return best, index, summed & (best > -torch.inf)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, length)) for i in range(0, length, step))
