"""The inputs of an evaluation, shared among the ranks of a gang.

Shapes: n rows of this rank, N rows of all, L vectors of a row, D embedding size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vembed_fs2.distributed import RowGather


def share_of(size: int, gather: RowGather) -> range:
    """The rows of this rank. Neighbours, which are often alike, go to different ranks."""
    return range(gather.rank, size, gather.size)


def gather_shares(embeddings: Any, size: int, gather: RowGather) -> Any:
    """Bring what the ranks have encoded together, in input order, on every rank.

    :param embeddings: what an embedder returned for this rank's rows: ``[n, D]``, or a list of ``[L_i, D]``.
    :param size: the number of rows of all ranks.
    :returns: the same kind, of all rows; what was given if there is one process.
    """
    if gather.size == 1:
        return embeddings

    order = torch.tensor([row for rank in range(gather.size) for row in range(rank, size, gather.size)])
    counts = [len(range(rank, size, gather.size)) for rank in range(gather.size)]
    if not isinstance(embeddings, list):
        rows = gather(torch.as_tensor(embeddings).cpu(), counts)
        return torch.empty_like(rows).index_copy_(0, order, rows)

    vectors = [torch.as_tensor(row).cpu() for row in embeddings]
    lengths = gather(torch.tensor([len(row) for row in vectors], dtype=torch.int64), counts)

    # A rank without a row does not know how long a vector is.
    (dim,) = set(gather.counts(vectors[0].size(1) if vectors else 0)) - {0}
    flat = torch.cat(vectors) if vectors else torch.empty(0, dim)

    rows_in_rank_order = torch.split(gather(flat, gather.counts(flat.size(0))), lengths.tolist())
    ordered: list[Tensor] = [torch.empty(0)] * size
    for row, values in zip(order.tolist(), rows_in_rank_order):
        ordered[row] = values

    return ordered
