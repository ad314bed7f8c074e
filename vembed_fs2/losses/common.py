"""What objectives share.

Legend: b queries of this rank, m documents of this rank (the b positives, in
query order, then the explicit negatives), B and M those of all ranks, D
embedding size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from vembed_fs2.distributed import RowGather

MAX_LOGIT_SCALE: Final = math.log(100.0)
"""CLIP's bound of a learned scale: a temperature below 0.01 makes training unstable.

A parameter above it has no gradient; like CLIP's own training, keep it below by
``logit_scale.clamp_(max=MAX_LOGIT_SCALE)`` in each step.
"""


@dataclass
class RowInfo:
    """What is known of rows besides their embeddings."""

    query_ids: Tensor
    """Content hash of each query. *Shape:* ``[b]``, int64."""

    document_ids: Tensor
    """Content hash of each document. *Shape:* ``[m]``, int64."""

    labels: Tensor
    """Class of each row; 0 if it has none. *Shape:* ``[b]``, int64."""

    @staticmethod
    def distinct(num_queries: int, num_documents: int, device: torch.device | None = None) -> RowInfo:
        """Rows of which nothing is the same as anything else, nor as a row of another rank."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        ids = torch.arange(num_queries + num_documents, device=device) + (rank << 40)
        return RowInfo(ids[:num_queries], ids[num_queries:], torch.zeros_like(ids[:num_queries]))

    def check(self, num_queries: int, num_documents: int) -> None:
        """Check that these are the facts about that many rows.

        :raises ValueError: they are not, or a query has no positive.
        """
        if num_documents < num_queries:
            raise ValueError(
                f"Each of {num_queries} queries needs a positive, but there are {num_documents} documents."
            )
        sizes = (self.query_ids.size(0), self.labels.size(0), self.document_ids.size(0))
        if sizes != (num_queries, num_queries, num_documents):
            raise ValueError(
                f"There are {num_queries} queries and {num_documents} documents, but `rows` has {sizes[0]} query ids,"
                f" {sizes[1]} labels and {sizes[2]} document ids."
            )


@dataclass
class LossOutput:
    """The value of an objective, and what it saw."""

    loss: Tensor
    """The sum over this rank's queries. A scalar."""

    metrics: dict[str, Tensor]
    """Sums over this rank's queries. Scalars without a graph."""


class ContrastiveLoss(ABC):
    """An objective over queries and documents."""

    @abstractmethod
    def __call__(
        self, query_bD: Tensor, document_mD: Tensor, rows: RowInfo, logit_scale: Tensor | None = None
    ) -> LossOutput:
        """
        :param query_bD: embeddings of this rank's queries.
        :param document_mD: embeddings of this rank's documents: the positive of
            each query, in query order, then explicit negatives.
        :param logit_scale: log of the inverse temperature, where it is learned. *Shape:* ``[1]``.
        """

    @property
    def initial_logit_scale(self) -> float | None:
        """The log inverse temperature to start from, if it is to be learned; else ``None``."""
        return None


def gather_rows(rows: RowInfo, gather: RowGather, counts_b: list[int], counts_m: list[int]) -> RowInfo:
    """Return the same facts about the rows of all ranks."""
    return RowInfo(gather(rows.query_ids, counts_b), gather(rows.document_ids, counts_m), gather(rows.labels, counts_b))
