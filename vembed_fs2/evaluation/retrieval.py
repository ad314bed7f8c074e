"""Retrieval metrics of embeddings, and of an embedder on a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import torch
from torch import Tensor

from vembed_fs2.console import Screen
from vembed_fs2.distributed import RowGather
from vembed_fs2.embedding.head import MAXSIM, Similarity
from vembed_fs2.errors import DataError
from vembed_fs2.evaluation.metrics import (
    NOT_RETRIEVED,
    PADDING,
    average_precision,
    hit_at_k,
    ndcg_at_k,
    recall_at_k,
    reciprocal_rank,
)
from vembed_fs2.evaluation.search import DOCUMENT_BLOCK, QUERY_BLOCK, pad_vectors, relevant_ranks
from vembed_fs2.evaluation.shares import gather_shares, share_of
from vembed_fs2.evaluation.task import NOTHING_RELEVANT, Relevant

if TYPE_CHECKING:
    from vembed_fs2.evaluation.task import RetrievalTask


Compress: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Returns queries and documents, ``[Q, D]`` and ``[N, D]`` on the CPU, as they are after a compression that loses."""

DEFAULT_KS: Final = (1, 5, 10)

LABEL_KS: Final = (1, 5, 10, 100, 1000)
"""Where rows of labels are searched among themselves: with the cut-offs of Stanford Online Products (Song et al., "Deep
Metric Learning via Lifted Structured Feature Embedding", 2016, https://arxiv.org/abs/1511.06452)."""


class SupportsEncode(Protocol):
    """What :func:`evaluate_embedder` needs of an embedder."""

    def encode_query(self, inputs: Any, *, batch_size: int | None = None) -> Any: ...

    def encode_document(self, inputs: Any, *, batch_size: int | None = None) -> Any: ...


def evaluate_retrieval(
    queries: Tensor,
    corpus: Tensor,
    relevant: Sequence[Relevant],
    *,
    ks: Sequence[int] = DEFAULT_KS,
    similarity: Similarity = "cosine",
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    exclude: Sequence[int] | Tensor | None = None,
    missing: Sequence[Sequence[float]] = (),
    query_block: int = QUERY_BLOCK,
    document_block: int = DOCUMENT_BLOCK,
    device: torch.device | None = None,
) -> dict[str, float]:
    """Rank the whole corpus for every query and return the means over queries.

    The keys are ``recall@k`` and ``hit@k`` for every k, ``mrr`` (over the whole
    ranking), ``mrr@10``, ``ndcg@10``, ``map``, ``num_queries``,
    ``num_documents`` and ``num_queries_without_relevant``. The metrics are
    defined in :mod:`vembed_fs2.evaluation.metrics`. A query without relevant
    documents takes no part in the means and is counted apart. Memory does not
    grow with queries x documents.

    :param queries: *Shape:* ``[Q, D]``; ``[Q, L, D]`` for ``maxsim``.
    :param corpus: *Shape:* ``[N, D]``; ``[N, V, D]`` for ``maxsim``.
    :param relevant: For each query the indices of its relevant documents, or a mapping from index to grade.
        Grades that are not greater than 0 mean "not relevant".
    :param query_mask: The vectors of each query that count, for ``maxsim``. *Shape:* ``[Q, L]``, bool.
    :param document_mask: The vectors of each document that count, for ``maxsim``. *Shape:* ``[N, V]``, bool.
    :param exclude: For each query a document that it must not find (for example itself), or -1; never relevant.
    :param missing: For each query the grades of relevant documents that the corpus lacks: they count as not found.
    :param device: Where to compare; the device of ``queries`` by default.

    :raises EmbeddingValueError: an embedding holds NaN or infinity.
    :raises DataError: no query has a relevant document.
    """
    scores = _score_queries(
        queries,
        corpus,
        relevant,
        ks=ks,
        similarity=similarity,
        masks=(query_mask, document_mask),
        exclude=exclude,
        missing=missing,
        blocks=(query_block, document_block),
        device=device,
    )
    return _mean_scores(scores, ks, num_documents=corpus.size(0))


def _score_queries(
    queries: Tensor,
    corpus: Tensor,
    relevant: Sequence[Relevant],
    *,
    ks: Sequence[int],
    similarity: Similarity,
    masks: tuple[Tensor | None, Tensor | None],
    exclude: Sequence[int] | Tensor | None,
    missing: Sequence[Sequence[float]] = (),
    blocks: tuple[int, int] = (QUERY_BLOCK, DOCUMENT_BLOCK),
    device: torch.device | None,
) -> Tensor:
    """Return each metric of each query; NaN for queries without relevant documents. *Shape:* ``[Q, M]``, float64."""
    if len(relevant) != queries.size(0):
        raise ValueError(f"There are {queries.size(0)} queries, but relevant documents of {len(relevant)}.")

    (query_mask, document_mask), (query_block, document_block) = masks, blocks
    excluded = _as_indices(exclude, queries.size(0))
    scores = torch.full((queries.size(0), len(_metric_names(ks))), torch.nan, dtype=torch.float64)
    for rows in _blocks_of_rows(relevant, query_block, document_block):
        index, grades = _padded(relevant[rows], excluded[rows].tolist())
        lost = _missing_grades(missing[rows], index.size(0))

        keep = (index >= 0).any(1) | (lost > 0).any(1)
        if not keep.any():
            continue

        kept = keep.to(queries.device)
        ranks = relevant_ranks(
            queries[rows][kept],
            corpus,
            index[keep],
            similarity=similarity,
            query_mask=None if query_mask is None else query_mask[rows][kept],
            document_mask=document_mask,
            exclude=excluded[rows][keep],
            query_block=query_block,
            document_block=document_block,
            device=device or queries.device,
        )
        ranks = torch.cat([ranks.cpu(), torch.where(lost[keep] > 0, NOT_RETRIEVED, PADDING)], dim=1)
        metrics = metrics_of_ranks(ranks, torch.cat([grades[keep], lost[keep]], dim=1), ks)
        scores[rows][keep] = torch.stack(list(metrics.values()), dim=1)

    return scores


def _mean_scores(scores: Tensor, ks: Sequence[int], *, num_documents: int) -> dict[str, float]:
    """Return the means over queries, and the numbers of queries and documents.

    :param scores: *Shape:* ``[Q, M]``; the rows of all ranks in input order, so that their number changes no bit.
    :raises DataError: no query has a relevant document.
    """
    counted = scores[~scores.isnan().all(1)]
    if counted.size(0) == 0:
        raise DataError(NOTHING_RELEVANT)

    results = dict(zip(_metric_names(ks), counted.mean(0).tolist()))
    results["num_queries"] = float(counted.size(0))
    results["num_documents"] = float(num_documents)
    results["num_queries_without_relevant"] = float(scores.size(0) - counted.size(0))

    return results


def _metric_names(ks: Sequence[int]) -> list[str]:
    return list(metrics_of_ranks(torch.empty(0, 1, dtype=torch.int64), None, ks))


def metrics_of_ranks(ranks: Tensor, grades: Tensor | None, ks: Sequence[int] = DEFAULT_KS) -> dict[str, Tensor]:
    """Return every metric of every query, by name.

    :param ranks: Ranks of the relevant documents, 0 pads. *Shape:* ``[Q, R]``.
    :param grades: Grades of the same documents. *Shape:* ``[Q, R]``.

    :returns: Tensors of the shape ``[Q]``, float64.
    """
    metrics = {f"recall@{k}": recall_at_k(ranks, k) for k in ks}
    metrics |= {f"hit@{k}": hit_at_k(ranks, k) for k in ks}
    metrics["mrr"] = reciprocal_rank(ranks)
    metrics["mrr@10"] = reciprocal_rank(ranks, 10)
    metrics["ndcg@10"] = ndcg_at_k(ranks, 10, grades)
    metrics["map"] = average_precision(ranks)

    return metrics


def evaluate_embedder(
    embedder: SupportsEncode,
    task: RetrievalTask,
    *,
    batch_size: int | None = None,
    ks: Sequence[int] = DEFAULT_KS,
    similarity: Similarity = "cosine",
    device: torch.device | None = None,
    gather: RowGather | None = None,
    truncate_dim: int | None = None,
    compress: Compress | None = None,
    show_progress_bar: bool | Screen | None = None,
) -> dict[str, float]:
    """Encode a task's queries and documents and return what :func:`evaluate_retrieval` does.

    If the queries are the documents (``task.exclude_self``), they are encoded
    once, as documents. On a gang, each rank encodes its share of both, and ranks
    all documents for its share of the queries; all ranks return the results.

    :param batch_size: Given to the embedder.
    :param similarity: How single vectors are compared. An embedder that returns a list, of the vectors of each
        input (``[L_i, D]``), is evaluated by ``maxsim``.
    :param device: Where to compare the embeddings; the CPU by default.
    :param gather: The gang, of a backend that takes tensors on the CPU; one process by default.
    :param truncate_dim: The leading dimensions that are kept; given to the embedder if it is not ``None``.
    :param compress: What single vectors go through before they are compared, for example to bytes and back.
    :param show_progress_bar: Given to the embedder, if it is given here.
    """
    gather = gather or RowGather()
    options: dict[str, Any] = {"batch_size": batch_size}
    if truncate_dim is not None:
        options["truncate_dim"] = truncate_dim
    if show_progress_bar is not None:  # An embedder need not know it.
        options["show_progress_bar"] = show_progress_bar

    own = share_of(len(task.queries), gather)
    items = [task.corpus[i] for i in share_of(len(task.corpus), gather)]

    encoded = embedder.encode_document(items, **options)
    corpus, document_mask = _padded_vectors(gather_shares(encoded, len(task.corpus), gather))
    excluded = task.excluded()
    exclude = None if excluded is None else torch.tensor([excluded[i] for i in own], dtype=torch.int64)
    if task.exclude_self:
        rows = torch.tensor(own, dtype=torch.int64)
        queries, query_mask = corpus[rows], None if document_mask is None else document_mask[rows]
    else:
        encoded = embedder.encode_query([task.queries[i] for i in own], **options)
        queries, query_mask = _padded_vectors(encoded)

    if compress is not None:
        queries, corpus = compress(queries, corpus)

    scores = _score_queries(
        queries,
        corpus,
        [task.relevant[i] for i in own],
        ks=ks,
        similarity=similarity if document_mask is None else MAXSIM,
        masks=(query_mask, document_mask),
        exclude=exclude,
        missing=[task.missing[i] for i in own] if task.missing else (),
        device=device,
    )

    return _mean_scores(
        gather_shares(scores, len(task.queries), gather),
        ks,
        num_documents=len(task.corpus),
    )


def _padded_vectors(embeddings: Any) -> tuple[Tensor, Tensor | None]:
    """What an embedder returned, and the mask of several vectors per input."""
    if isinstance(embeddings, list) and embeddings:
        return pad_vectors([torch.as_tensor(vectors) for vectors in embeddings])
    return torch.as_tensor(embeddings), None


def _blocks_of_rows(relevant: Sequence[Relevant], query_block: int, document_block: int) -> list[slice]:
    """Cut the queries so that a block, padded to its largest set, has at most a block's number of elements."""
    limit = query_block * document_block
    blocks: list[slice] = []
    start, widest = 0, 1
    for i, documents in enumerate(relevant):
        widest = max(widest, len(documents))
        if (i > start and (i - start + 1) * widest > limit) or i - start == query_block:
            blocks.append(slice(start, i))
            start, widest = i, max(1, len(documents))

    return [*blocks, slice(start, len(relevant))] if relevant else []


def _padded(relevant: Sequence[Relevant], excluded: Sequence[int]) -> tuple[Tensor, Tensor]:
    rows = [_graded(documents, left_out) for documents, left_out in zip(relevant, excluded)]
    width = max((len(row) for row in rows), default=0)

    index = torch.full((len(rows), width), -1, dtype=torch.int64)
    grades = torch.zeros(len(rows), width, dtype=torch.float64)
    for i, row in enumerate(rows):
        index[i, : len(row)] = torch.tensor(list(row), dtype=torch.int64)
        grades[i, : len(row)] = torch.tensor(list(row.values()), dtype=torch.float64)

    return index, grades


def _as_indices(exclude: Sequence[int] | Tensor | None, num_queries: int) -> Tensor:
    """*Returns:* a document for each query, or -1. ``[Q]``, int64."""
    if exclude is None:
        return torch.full((num_queries,), -1)
    return exclude.cpu() if isinstance(exclude, Tensor) else torch.tensor(list(exclude), dtype=torch.int64)


def _missing_grades(missing: Sequence[Sequence[float]], num_queries: int) -> Tensor:
    """The grades of relevant documents that the corpus lacks; 0 pads. *Shape:* ``[q, R]``, float64."""
    width = max(map(len, missing), default=0)
    grades = torch.zeros(num_queries, width, dtype=torch.float64)
    for query, values in enumerate(missing):
        grades[query, : len(values)] = torch.tensor(values, dtype=torch.float64)
    return grades


def _graded(documents: Relevant, excluded: int) -> dict[int, float]:
    if not isinstance(documents, Mapping):
        documents = dict.fromkeys(documents, 1.0)
    if documents and min(documents) < 0:
        raise ValueError(f"The index of a relevant document must not be negative, but one is {min(documents)}.")

    # Not `grade > 0`: NaN must reach the metrics, which refuse it.
    return {d: float(grade) for d, grade in documents.items() if not grade <= 0 and d != excluded}
