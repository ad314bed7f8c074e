"""Similarities of the anchors of a tile with all columns, and their gradients.

Legend: b anchors, t anchors of a tile, C columns, D embedding size, L and K
vectors per anchor and per column of multi-vector models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

# As `torch.nn.functional.normalize` has it.
_EPSILON: Final = 1e-12

# The number of elements that are worked on at once, so that no copy of all embeddings is needed.
_SLICE_ELEMENTS: Final = 2**18

# Rows and columns of the largest product of MaxSim: enough for an efficient one.
_MAXSIM_VECTORS: Final = {"cpu": 2048, "cuda": 4096}


class Vectors:
    """Embeddings that take part in similarities, and the gradient that is collected for them.

    :param raw: embeddings of single vectors ``[N, D]``, or of several ``[N, L, D]``.
    :param mask: the vectors that count, of several. *Shape:* ``[N, L]``, bool.
    :param unit: if ``True``, vectors are normalised, as ``cosine`` and ``maxsim`` ask for.
    :param dtype: what to compute in; by default the type of ``raw``, but single precision at least.
    """

    def __init__(
        self, raw: Tensor, mask: Tensor | None, *, unit: bool, needs_grad: bool, dtype: torch.dtype | None = None
    ) -> None:
        self.dtype = dtype or torch.promote_types(raw.dtype, torch.float32)
        self.mask = None if mask is None else mask.bool()
        self._raw = raw.detach()
        self._values: Tensor | None = None

        # Norms, because a normalised copy would be as large as the embeddings.
        self.inverse_norm = self._inverse_norm() if unit else None

        # As if the norms were constants, until `raw_grad`.
        self.grad = torch.zeros(raw.shape, dtype=self.dtype, device=raw.device) if needs_grad else None

    def __len__(self) -> int:
        return self._raw.size(0)

    @property
    def device(self) -> torch.device:
        return self._raw.device

    @property
    def width(self) -> int:
        """The number of vectors per row."""
        return self._raw.size(1) if self._raw.ndim == 3 else 1

    def rows(self, rows: slice) -> Tensor:
        """The vectors of some rows, normalised where asked."""
        x = self._raw[rows].to(self.dtype)
        return x if self.inverse_norm is None else x * self.inverse_norm[rows].unsqueeze(-1)

    def values(self) -> Tensor:
        """All vectors, not normalised. Vectors of half precision become a copy that stays until :meth:`raw_grad`."""
        if self._values is None:
            self._values = self._raw.to(self.dtype)
        return self._values

    def add_grad(self, rows: slice, grad: Tensor) -> None:
        """Add the gradient with respect to what :meth:`rows` returns; ``grad`` is overwritten."""
        if self.grad is not None:
            total = self.grad[rows]
            grad = grad.view_as(total)
            total += grad if self.inverse_norm is None else grad.mul_(self.inverse_norm[rows].unsqueeze(-1))

    def raw_grad(self) -> Tensor | None:
        """Return the gradient with respect to the embeddings as they were given. Can be called once."""
        self._values = None
        grad, self.grad = self.grad, None
        if grad is not None and self.inverse_norm is not None:
            for rows in self._slices():
                # The length of x does not change x / |x|, so only what is orthogonal to x counts.
                unit, part = self.rows(rows), grad[rows]
                part.sub_(unit * (part * unit).sum(-1, keepdim=True))

        return grad

    def _inverse_norm(self) -> Tensor:
        norm = torch.empty(self._raw.shape[:-1], dtype=self.dtype, device=self._raw.device)
        for rows in self._slices():
            norm[rows] = self._raw[rows].to(self.dtype).norm(dim=-1)
        return norm.clamp_(min=_EPSILON).reciprocal_()

    def _slices(self) -> Iterator[slice]:
        return slices(len(self), max(_SLICE_ELEMENTS // max(self._raw[:1].numel(), 1), 1))


class Scoring(Protocol):
    """Compares the anchors of a tile with all columns."""

    ndim: int
    """2 if it compares single vectors, 3 if rows have several."""

    def scores(self, anchors: Vectors, rows: slice, columns: Vectors, out_tC: Tensor) -> list[Tensor]:
        """Write the scores, but for what :meth:`scale_` does.

        :returns: what :meth:`backward` needs to know of them.
        """

    def scale_(self, values_tC: Tensor, columns: Vectors) -> None:
        """Finish the scores of some rows, or turn their gradient into the gradient of what :meth:`scores` wrote.

        Apart from these, because some rows that were just used are in the cache.
        """

    def backward(self, grad_tC: Tensor, anchors: Vectors, rows: slice, columns: Vectors, saved: list[Tensor]) -> None:
        """Add the gradients that follow from the gradient of what :meth:`scores` wrote."""

    def rows_per_tile(self, anchor: Tensor, column: Tensor, num_values: int) -> int:
        """The number of anchors whose comparison needs up to ``num_values`` numbers in memory."""


class DotProduct(Scoring):
    """``s(x, y) = x . y``; of normalised vectors, their cosine."""

    ndim = 2

    def scores(self, anchors: Vectors, rows: slice, columns: Vectors, out_tC: Tensor) -> list[Tensor]:
        torch.mm(anchors.rows(rows), columns.values().T, out=out_tC)
        return []

    def scale_(self, values_tC: Tensor, columns: Vectors) -> None:
        if columns.inverse_norm is not None:
            values_tC.mul_(columns.inverse_norm)

    def backward(self, grad_tC: Tensor, anchors: Vectors, rows: slice, columns: Vectors, saved: list[Tensor]) -> None:
        if anchors.grad is not None:
            anchors.add_grad(rows, grad_tC @ columns.values())
        if columns.grad is not None:
            columns.grad.addmm_(grad_tC.T, anchors.rows(rows))

    def rows_per_tile(self, anchor: Tensor, column: Tensor, num_values: int) -> int:
        return num_values // max(column.size(0), 1)


class MaxSim(Scoring):
    r"""Late interaction: each vector of a query with the nearest one of the document.

    .. math:: s(x, y) = \sum_l \max_k x_l \cdot y_k

    Khattab and Zaharia, "ColBERT", 2020, https://arxiv.org/abs/2004.12832.
    Masked vectors take no part; a document without any scores 0.

    Columns are taken a few at a time, so that the similarities of single
    vectors are never all in memory. A tile keeps only which vector was the nearest.

    :param anchors_query: whether the anchors are the queries, whose vectors are
        summed over; if ``False``, the columns are.

    Legend: q queries and d documents of a part, of L and K vectors.
    """

    ndim = 3

    def __init__(self, *, anchors_query: bool = True) -> None:
        self._anchors_query = anchors_query

    def scores(self, anchors: Vectors, rows: slice, columns: Vectors, out_tC: Tensor) -> list[Tensor]:
        saved = []
        for part in self._parts(anchors, rows, columns):
            queries, q, documents, d = self._oriented(anchors, rows, columns, part)
            x_qLD, y_dKD = queries.rows(q), documents.rows(d)

            pairs = (x_qLD.flatten(0, 1) @ y_dKD.flatten(0, 1).T).view(*x_qLD.shape[:2], *y_dKD.shape[:2])
            if documents.mask is not None:
                # Faster than to fill them, and unit vectors have finite products.
                pairs.add_(torch.zeros_like(pairs[0, 0]).masked_fill_(~documents.mask[d], -torch.inf))

            best_qLd, index_qLd = pairs.max(3)
            score_qd = _counted(best_qLd, queries, q, documents, d).sum(1)
            out_tC[:, part] = score_qd if self._anchors_query else score_qd.T
            saved.append(index_qLd.int())

        return saved

    def scale_(self, values_tC: Tensor, columns: Vectors) -> None:
        return None

    def backward(self, grad_tC: Tensor, anchors: Vectors, rows: slice, columns: Vectors, saved: list[Tensor]) -> None:
        for part, index_qLd in zip(self._parts(anchors, rows, columns), saved):
            queries, q, documents, d = self._oriented(anchors, rows, columns, part)
            grad_qd = grad_tC[:, part] if self._anchors_query else grad_tC[:, part].T
            grad_qLd = _counted(grad_qd.unsqueeze(1).expand(index_qLd.shape), queries, q, documents, d)
            _add_to_queries(grad_qLd, index_qLd, queries, q, documents.rows(d))
            _add_to_documents(grad_qLd, index_qLd, documents, d, queries.rows(q))

    def rows_per_tile(self, anchor: Tensor, column: Tensor, num_values: int) -> int:
        query = anchor if self._anchors_query else column
        num_kept = column.size(0) * query.size(1)
        return min(num_values // max(num_kept, 1), _product_size(anchor.device) // max(anchor.size(1), 1))

    def _parts(self, anchors: Vectors, rows: slice, columns: Vectors) -> Iterator[slice]:
        per_column = (rows.stop - rows.start) * anchors.width * columns.width
        return slices(len(columns), max(_product_size(anchors.device) ** 2 // max(per_column, 1), 1))

    def _oriented(
        self, anchors: Vectors, rows: slice, columns: Vectors, part: slice
    ) -> tuple[Vectors, slice, Vectors, slice]:
        """Queries first."""
        return (anchors, rows, columns, part) if self._anchors_query else (columns, part, anchors, rows)


def _counted(values_qLd: Tensor, queries: Vectors, q: slice, documents: Vectors, d: slice) -> Tensor:
    """Put 0 where a vector of a query is masked, or all of a document are."""
    if queries.mask is not None:
        values_qLd = values_qLd.masked_fill(~queries.mask[q].unsqueeze(2), 0.0)
    if documents.mask is not None:
        values_qLd = values_qLd.masked_fill(~documents.mask[d].any(1), 0.0)
    return values_qLd


def _add_to_queries(grad_qLd: Tensor, index_qLd: Tensor, queries: Vectors, q: slice, y_dKD: Tensor) -> None:
    """Each vector of a query gets the weighted sum of its nearest vectors."""
    if queries.grad is not None:
        num_documents, num_vectors, _ = y_dKD.shape
        first_d = torch.arange(num_documents, device=y_dKD.device) * num_vectors
        position, weight = (index_qLd + first_d).flatten(0, 1), grad_qLd.flatten(0, 1)
        queries.add_grad(q, embedding_bag(position, y_dKD.flatten(0, 1), mode="sum", per_sample_weights=weight))


def _add_to_documents(grad_qLd: Tensor, index_qLd: Tensor, documents: Vectors, d: slice, x_qLD: Tensor) -> None:
    """Each vector of a document gets the weighted sum of those that it was nearest to."""
    if documents.grad is not None:
        # Few of these are not 0; but the product is faster than to sort them by vector.
        pairs = grad_qLd.new_zeros(*grad_qLd.shape, documents.width)
        pairs.scatter_(3, index_qLd.long().unsqueeze(3), grad_qLd.unsqueeze(3))
        documents.add_grad(d, pairs.view(x_qLD.size(0) * x_qLD.size(1), -1).T @ x_qLD.flatten(0, 1))


def _product_size(device: torch.device) -> int:
    return _MAXSIM_VECTORS.get(device.type, _MAXSIM_VECTORS["cpu"])


def slices(length: int, step: int) -> Iterator[slice]:
    """Cut rows from 0 to ``length`` into slices of up to ``step``."""
    return (slice(i, min(i + step, length)) for i in range(0, length, step))
