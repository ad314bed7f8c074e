"""Exact search in bounded memory: blocks of queries against blocks of documents.

No tensor has more than ``query_block x document_block`` elements (or as many as
the answer has, or as two rows need); of embeddings of several vectors per row, a
block has that many vectors. Every score has a single int64 key, its fp32 bits in order above
the document's index in reverse: comparing keys compares scores, and of two
equal scores the document with the smaller index comes first. The rule knows
nothing about relevance, so a model that gives everything the same embedding
gets the score of chance.

Shapes: Q queries, N documents, D embedding size, L and V vectors per query and
per document of multi-vector models, K results, R relevant documents of a query,
q and n the rows of a block of queries and of documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple, get_args

import torch
from torch import Tensor

from vembed_fs2.embedding.head import MAXSIM, Similarity, is_late_interaction
from vembed_fs2.errors import VembedError

QUERY_BLOCK: Final = 512
DOCUMENT_BLOCK: Final = 8192

_LOW_BITS: Final = 2**31 - 1
_EXCLUDED: Final = torch.iinfo(torch.int64).min


class EmbeddingValueError(VembedError, ValueError):
    """Embeddings that cannot be compared: NaN, infinite, or too large for fp32."""


class SearchResult(NamedTuple):
    """The best documents of each query, best first."""

    scores: Tensor
    """*Shape:* ``[Q, K]``, fp32; minus infinity where a query has fewer than K documents."""

    indices: Tensor
    """*Shape:* ``[Q, K]``, int64; -1 where a query has fewer than K documents."""


class _Blocks:
    """Two sets of embeddings, cut into blocks, and the scores and keys of every pair of blocks."""

    def __init__(
        self,
        queries: Tensor,
        documents: Tensor,
        masks: tuple[Tensor | None, Tensor | None],
        similarity: Similarity,
        exclude_Q: Tensor | None,
        sizes: tuple[int, int],
        device: torch.device | None,
    ) -> None:
        if similarity not in get_args(Similarity):
            raise ValueError(f"`similarity` must be 'cosine', 'dot' or 'maxsim', but is {similarity!r}.")

        self.several = is_late_interaction(similarity)
        _check_shapes(queries, documents, exclude_Q, sizes, several=self.several)
        _check_masks((queries, documents), masks, several=self.several)
        self.queries, self.documents = queries, documents

        self.query_mask, self.document_mask = masks
        self.similarity, self.exclude = similarity, exclude_Q
        self.query_block, self.document_block = sizes
        if self.several:
            self.query_block = max(self.query_block // queries.size(1), 1)
            self.document_block = max(self.document_block // documents.size(1), 1)

        self.device = device or queries.device

    def query_slices(self) -> Iterator[slice]:
        return _slices(self.queries.size(0), self.query_block)

    def document_slices(self) -> Iterator[slice]:
        return _slices(self.documents.size(0), self.document_block)

    def prepared_queries(self, rows: slice) -> Tensor:
        return self._prepare(self.queries, self.query_mask, rows, "query")

    def keys(self, query: Tensor, rows: slice, columns: slice) -> Tensor:
        """Return the keys of a block of prepared queries and a block of documents, ``[q, n]``."""
        key_qn = _to_keys(self.scores(query, columns), columns.start)
        if self.exclude is not None:
            column = self.exclude[rows].to(self.device) - columns.start
            (hit,) = torch.nonzero((column >= 0) & (column < key_qn.size(1)), as_tuple=True)
            key_qn[hit, column[hit]] = _EXCLUDED
        return key_qn

    def scores(self, query: Tensor, columns: slice) -> Tensor:
        """Return the scores of a block of prepared queries and a block of documents, ``[q, n]``."""
        document = self._prepare(self.documents, self.document_mask, columns, "document")
        if not self.several:
            return query @ document.T

        pair_qLnV = (query.flatten(0, 1) @ document.flatten(0, 1).T).view(*query.shape[:2], *document.shape[:2])
        if self.document_mask is None:
            return pair_qLnV.amax(3).sum(1)

        pair_qLnV.masked_fill_(~self.document_mask[columns].to(self.device), -torch.inf)
        best_qLn = pair_qLnV.amax(3)

        # Vectors of a query that do not count are zero, so they add nothing; nor does a document without vectors.
        return best_qLn.masked_fill_(best_qLn == -torch.inf, 0.0).sum(1)

    def _prepare(self, embeddings: Tensor, mask: Tensor | None, rows: slice, what: str) -> Tensor:
        """Return a block in fp32; normalised, and with zeros for masked vectors, as the similarity asks for."""
        block = embeddings[rows].to(self.device, torch.float32)
        if mask is not None:
            block = torch.where(mask[rows].to(self.device).unsqueeze(2), block, 0.0)

        largest = block.abs().amax(dim=-1, keepdim=True)
        limit = 1e18 / block.size(1) ** 0.5 if self.similarity == "dot" else torch.finfo(torch.float32).max

        (bad,) = torch.nonzero(~(largest <= limit).flatten(1).all(1), as_tuple=True)
        if bad.numel():
            raise EmbeddingValueError(
                f"The embedding of {what} {rows.start + int(bad[0])} holds NaN, infinity or values too large to"
                " compare. Such scores have no order, so nothing is measured."
            )

        if self.similarity == "dot":
            return block

        # Scaled first: the squares of very large or very small values do not fit fp32.
        block = block / torch.where(largest > 0, largest, 1.0)
        return torch.nn.functional.normalize(block, dim=-1)


def exact_search(
    queries: Tensor,
    documents: Tensor,
    k: int,
    *,
    similarity: Similarity = "cosine",
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    exclude: Tensor | None = None,
    query_block: int = QUERY_BLOCK,
    document_block: int = DOCUMENT_BLOCK,
    device: torch.device | None = None,
) -> SearchResult:
    """Return the ``k`` best documents of every query, exactly.

    Scores are computed in fp32 whatever the dtype of the embeddings. The cosine
    with a vector of zeros is 0. Equal scores are ordered by document index.
    ``maxsim`` sums, over the vectors of a query, the cosine with the nearest
    vector of the document (Khattab and Zaharia, "ColBERT", 2020,
    https://arxiv.org/abs/2004.12832).

    :param queries: *Shape:* ``[Q, D]``; ``[Q, L, D]`` for ``maxsim``.
    :param documents: *Shape:* ``[N, D]``; ``[N, V, D]`` for ``maxsim``.
    :param query_mask: The vectors that count, for ``maxsim``; all by default. *Shape:* ``[Q, L]``, bool.
    :param document_mask: The same of documents; one without any scores 0. *Shape:* ``[N, V]``, bool.
    :param k: How many; ``min(k, N)`` are returned.
    :param exclude: The document that each query must not find (for example itself), or -1. *Shape:* ``[Q]``, int64.
    :param device: Where to compute, block by block; the device of ``queries`` by default.

    :raises EmbeddingValueError: an embedding holds NaN or infinity.
    """
    if k < 1:
        raise ValueError(f"`k` must be at least 1, but is {k}.")

    masks = (query_mask, document_mask)

    blocks = _Blocks(queries, documents, masks, similarity, exclude, (query_block, document_block), device)
    k = min(k, documents.size(0))
    found = torch.empty(queries.size(0), k, dtype=torch.int64, device=queries.device)
    with _exact_matmul(blocks.device):
        for rows in blocks.query_slices():
            found[rows] = _best_keys(blocks, rows, k).to(found.device)

    return _from_keys(found)


def _best_keys(blocks: _Blocks, rows: slice, k: int) -> Tensor:
    query = blocks.prepared_queries(rows)
    best_qk = torch.empty(query.size(0), 0, dtype=torch.int64, device=blocks.device)
    for columns in blocks.document_slices():
        key_qn = blocks.keys(query, rows, columns)
        top_qk = key_qn.topk(min(k, key_qn.size(1)), dim=1).values
        best_qk = torch.cat([best_qk, top_qk], dim=1)
        best_qk = best_qk.topk(min(k, best_qk.size(1)), dim=1).values

    return best_qk


def relevant_ranks(
    queries: Tensor,
    documents: Tensor,
    relevant: Tensor,
    *,
    similarity: Similarity = "cosine",
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    exclude: Tensor | None = None,
    query_block: int = QUERY_BLOCK,
    document_block: int = DOCUMENT_BLOCK,
    device: torch.device | None = None,
) -> Tensor:
    """Return the exact rank of every relevant document among all documents.

    The rank is 1 plus the number of documents that score higher, or the same
    with a smaller index. The scores of a block are computed twice, once to find
    the relevant documents' own and once to count, because only the same product
    of the same blocks gives the same bits, and equal scores must compare equal.

    :param queries: *Shape:* ``[Q, D]``; ``[Q, L, D]`` for ``maxsim``.
    :param documents: *Shape:* ``[N, D]``; ``[N, V, D]`` for ``maxsim``.
    :param query_mask: As in :func:`exact_search`. *Shape:* ``[Q, L]``, bool.
    :param document_mask: As in :func:`exact_search`. *Shape:* ``[N, V]``, bool.
    :param relevant: Indices of documents, -1 pads. *Shape:* ``[Q, R]``, int64.
    :param exclude: As in :func:`exact_search`; an excluded document must not be relevant. *Shape:* ``[Q]``, int64.

    :returns: Ranks from 1; 0 for padding. *Shape:* ``[Q, R]``, int64.

    :raises EmbeddingValueError: an embedding holds NaN or infinity.
    """
    masks = (query_mask, document_mask)
    blocks = _Blocks(queries, documents, masks, similarity, exclude, (query_block, document_block), device)

    if relevant.dim() != 2 or relevant.size(0) != queries.size(0):
        raise ValueError(f"`relevant` must have a row per query, but its shape is {tuple(relevant.shape)}.")
    if relevant.numel() and int(relevant.max()) >= documents.size(0):
        raise ValueError(f"`relevant` names document {int(relevant.max())} of {documents.size(0)}.")
    if exclude is not None and (relevant == exclude.to(relevant.device)[:, None])[relevant >= 0].any():
        raise ValueError("A document cannot be both relevant and excluded.")

    ranks = torch.zeros_like(relevant)
    if relevant.size(1) == 0:
        return ranks

    with _exact_matmul(blocks.device):
        for rows in blocks.query_slices():
            ranks[rows] = _block_ranks(blocks, rows, relevant[rows].to(blocks.device)).to(ranks.device)

    return ranks


def _block_ranks(blocks: _Blocks, rows: slice, relevant_qR: Tensor) -> Tensor:
    query = blocks.prepared_queries(rows)
    own_qR = torch.full_like(relevant_qR, _EXCLUDED)
    for columns in blocks.document_slices():
        inside_qR = (relevant_qR >= columns.start) & (relevant_qR < columns.stop)
        if inside_qR.any():
            position_qR = torch.where(inside_qR, relevant_qR - columns.start, 0)
            own_qR = torch.where(inside_qR, blocks.keys(query, rows, columns).gather(1, position_qR), own_qR)

    # bin[j] counts the documents between the j-th and the next relevant one, worst first.
    own_qR, order_qR = own_qR.sort(dim=1)
    bins_qR = own_qR.new_zeros(own_qR.size(0), own_qR.size(1) + 1)
    for columns in blocks.document_slices():
        key_qn = blocks.keys(query, rows, columns)
        if own_qR.size(1) == 1:  # The usual case, and comparing is much faster than searching.
            bins_qR[:, 1] += (key_qn > own_qR).sum(1)
            continue

        bin_qn = torch.searchsorted(own_qR, key_qn)
        bins_qR.scatter_add_(1, bin_qn, torch.ones_like(bin_qn))

    higher_qR = bins_qR[:, 1:].flip(1).cumsum(1).flip(1)
    ranks_qR = torch.zeros_like(own_qR).scatter_(1, order_qR, higher_qR + 1)
    return torch.where(relevant_qR >= 0, ranks_qR, 0)


def maxsim_scores(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    *,
    query_block: int = QUERY_BLOCK,
    document_block: int = DOCUMENT_BLOCK,
) -> Tensor:
    """Return the MaxSim of every query with every document, in bounded memory besides the answer.

    :param queries: *Shape:* ``[Q, L, D]``.
    :param documents: *Shape:* ``[N, V, D]``.
    :param query_mask: As in :func:`exact_search`. *Shape:* ``[Q, L]``, bool.
    :param document_mask: As in :func:`exact_search`. *Shape:* ``[N, V]``, bool.

    :returns: *Shape:* ``[Q, N]``, fp32, on the device of ``queries``.

    :raises EmbeddingValueError: an embedding holds NaN or infinity.
    """
    masks = (query_mask, document_mask)

    blocks = _Blocks(queries, documents, masks, MAXSIM, None, (query_block, document_block), None)
    scores_QN = torch.empty(queries.size(0), documents.size(0), device=blocks.device)
    with _exact_matmul(blocks.device):
        for rows in blocks.query_slices():
            query = blocks.prepared_queries(rows)
            for columns in blocks.document_slices():
                scores_QN[rows, columns] = blocks.scores(query, columns)

    return scores_QN


def pad_vectors(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Make one tensor of the vectors of several rows, at least one.

    :param rows: The vectors of each row. *Shape:* ``[L_i, D]``.

    :returns: *Shape:* ``[N, L, D]``, and a mask of the vectors that count, ``[N, L]``.
    """
    if any(row.dim() != 2 or row.size(1) != rows[0].size(1) for row in rows):
        raise ValueError("The vectors of each row must be a matrix, of the same number of columns for all rows.")

    width = max(1, *(row.size(0) for row in rows))

    values = rows[0].new_zeros(len(rows), width, rows[0].size(1))
    mask = torch.zeros(len(rows), width, dtype=torch.bool, device=values.device)
    for i, row in enumerate(rows):
        values[i, : row.size(0)], mask[i, : row.size(0)] = row, True

    return values, mask


def _to_keys(scores: Tensor, first_index: int) -> Tensor:
    """Order-preserving integers: fp32 bits (negative numbers reversed) above the reversed index."""
    bits = (scores + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0: they are the same score.
    keys = (bits ^ ((bits >> 31) & _LOW_BITS)).to(torch.int64)
    index = torch.arange(first_index, first_index + scores.size(1), device=scores.device)
    return keys.mul_(2**32).add_(_LOW_BITS - index)


def _from_keys(keys: Tensor) -> SearchResult:
    excluded = keys == _EXCLUDED
    bits = (keys >> 32).to(torch.int32)
    scores = (bits ^ ((bits >> 31) & _LOW_BITS)).view(torch.float32)
    indices = _LOW_BITS - (keys & 0xFFFFFFFF)
    return SearchResult(scores.masked_fill(excluded, -torch.inf), indices.masked_fill(excluded, -1))


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


@contextmanager
def _exact_matmul(device: torch.device) -> Iterator[None]:
    """Full fp32 products: no autocast, no TF32 or bf16 behind ``float32_matmul_precision``."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")

    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _check_shapes(
    queries: Tensor, documents: Tensor, exclude: Tensor | None, sizes: tuple[int, int], *, several: bool
) -> None:
    num_dims = 3 if several else 2
    if queries.dim() != num_dims or documents.dim() != num_dims or queries.size(-1) != documents.size(-1):
        kind = "matrices with the same number of columns"
        if several:
            kind = "of shape [rows, vectors, dimensions] for 'maxsim', with the same number of dimensions"

        raise ValueError(
            f"Queries and documents must be {kind}, but have the shapes {tuple(queries.shape)} and"
            f" {tuple(documents.shape)}."
        )

    if documents.size(0) == 0 or 0 in (*queries.shape[1:], *documents.shape[1:]):
        raise ValueError("There must be at least one document, and at least one value in each row.")
    if exclude is not None and exclude.shape != queries.shape[:1]:
        raise ValueError(f"`exclude` must have one index per query, but its shape is {tuple(exclude.shape)}.")
    if min(sizes) < 1:
        raise ValueError(f"The sizes of blocks must be at least 1, but are {sizes}.")


def _check_masks(
    embeddings: tuple[Tensor, Tensor], masks: tuple[Tensor | None, Tensor | None], *, several: bool
) -> None:
    for name, x, mask in zip(("query_mask", "document_mask"), embeddings, masks):
        if mask is not None and not (several and mask.dtype == torch.bool and mask.shape == x.shape[:2]):
            raise ValueError(
                f"`{name}` must say which of several vectors per row count: bool, of shape {tuple(x.shape[:2])},"
                f" and only for 'maxsim'. It is {mask.dtype}, of shape {tuple(mask.shape)}."
            )
