"""Retrieval metrics, as functions of the ranks of the relevant documents.

Every metric here needs no more than the rank of each relevant document, so
nothing of the size queries x documents is ever held. Ranks start at 1. All
definitions are ``trec_eval``'s, and its names are given.

Shapes: Q queries, R relevant documents of a query (padded to the largest
number), K retrieved documents.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

NOT_RETRIEVED: Final = torch.iinfo(torch.int64).max
"""The rank of a relevant document that was not retrieved."""

PADDING: Final = 0
"""The rank in the places of rows that have fewer relevant documents than others."""


def ranks_in_lists(retrieved: Tensor, relevant: Tensor) -> Tensor:
    """Return the rank of each relevant document in a ranked list.

    :param retrieved: Document ids, best first; -1 for none. *Shape:* ``[Q, K]``.
    :param relevant: Ids of the relevant documents; -1 pads. *Shape:* ``[Q, R]``.

    :returns: Ranks, ``NOT_RETRIEVED`` or ``PADDING``. *Shape:* ``[Q, R]``, int64.

    :raises ValueError: a list names a document twice.
    """
    ordered = retrieved.sort(dim=1).values
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise ValueError("A ranked list names the same document twice.")

    ranks = torch.full_like(relevant, NOT_RETRIEVED)
    for position in range(retrieved.size(1) - 1, -1, -1):
        ranks[relevant == retrieved[:, position : position + 1]] = position + 1

    ranks[relevant < 0] = PADDING
    return ranks


def recall_at_k(ranks: Tensor, k: int) -> Tensor:
    """The share of the relevant documents that are among the first ``k`` (``recall_k``).

    With one relevant document per query this is :func:`hit_at_k`. With more, it
    cannot exceed ``k / R``; what metric-learning papers (Stanford Online
    Products and others) call "Recall@K" is :func:`hit_at_k`.

    :param ranks: *Shape:* ``[Q, R]``.
    :returns: *Shape:* ``[Q]``, float64.
    """
    return _within(ranks, k).sum(1).double() / _num_relevant(ranks)


def hit_at_k(ranks: Tensor, k: int) -> Tensor:
    """1 if at least one relevant document is among the first ``k``, else 0 (``success_k``).

    ``hit_at_k(ranks, 1)`` is the accuracy of a nearest-neighbour classifier.

    :param ranks: *Shape:* ``[Q, R]``.
    :returns: *Shape:* ``[Q]``, float64.
    """
    _num_relevant(ranks)
    return _within(ranks, k).any(1).double()


def reciprocal_rank(ranks: Tensor, k: int | None = None) -> Tensor:
    """One over the rank of the first relevant document (``recip_rank``); 0 if it is not among the first ``k``.

    The mean over queries is MRR, or MRR@k.

    :param ranks: *Shape:* ``[Q, R]``.
    :returns: *Shape:* ``[Q]``, float64.
    """
    best = _sorted(ranks)[:, 0]
    found = best < NOT_RETRIEVED if k is None else best <= _positive(k)
    return torch.where(found, 1.0 / best.double(), 0.0)


def average_precision(ranks: Tensor) -> Tensor:
    """The mean over the relevant documents of the precision at each one's rank (``map``).

    A relevant document that was not retrieved counts as precision 0. The mean
    over queries is MAP.

    :param ranks: *Shape:* ``[Q, R]``.
    :returns: *Shape:* ``[Q]``, float64.
    """
    ordered = _sorted(ranks)
    found = torch.arange(1, ordered.size(1) + 1, device=ranks.device, dtype=torch.float64)
    precision = torch.where(ordered < NOT_RETRIEVED, found / ordered.double(), 0.0)
    return precision.sum(1) / _num_relevant(ranks)


def ndcg_at_k(ranks: Tensor, k: int, grades: Tensor | None = None) -> Tensor:
    """Normalised discounted cumulative gain of the first ``k`` (``ndcg_cut_k``).

    A document of grade g at rank r gains ``g / log2(r + 1)`` (Järvelin and
    Kekäläinen, 2002, with linear gain); the sum is divided by the sum of the best
    possible order.

    :param ranks: *Shape:* ``[Q, R]``.
    :param grades: How relevant each document is, greater than 0; all 1 by default. *Shape:* ``[Q, R]``.

    :returns: *Shape:* ``[Q]``, float64.
    """
    _num_relevant(ranks)

    relevant = ranks != PADDING
    gain = relevant.double() if grades is None else grades.double()
    if not (torch.isfinite(gain) & (gain > 0))[relevant].all():
        raise ValueError("The grade of a relevant document must be a finite number greater than 0.")

    gain = torch.where(relevant, gain, 0.0)
    discount = 1.0 / torch.log2(ranks.double() + 1.0)
    gained = torch.where(_within(ranks, k), gain * discount, 0.0).sum(1)
    best = gain.sort(dim=1, descending=True).values[:, :k]
    position = torch.arange(2, best.size(1) + 2, device=ranks.device, dtype=torch.float64)

    return gained / (best / torch.log2(position)).sum(1)


def _within(ranks: Tensor, k: int) -> Tensor:
    return (ranks != PADDING) & (ranks <= _positive(k))


def _positive(k: int) -> int:
    if k < 1:
        raise ValueError(f"`k` must be at least 1, but is {k}.")
    return k


def _num_relevant(ranks: Tensor) -> Tensor:
    count = (ranks != PADDING).sum(1)
    if (count == 0).any():
        raise ValueError("A query without relevant documents has no score; leave it out.")
    return count


def _sorted(ranks: Tensor) -> Tensor:
    """Ranks in ascending order; padding becomes ``NOT_RETRIEVED``, at the end."""
    _num_relevant(ranks)
    return torch.where(ranks == PADDING, NOT_RETRIEVED, ranks).sort(dim=1).values
