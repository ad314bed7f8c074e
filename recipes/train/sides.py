"""The two sides of each row, of which some rows have only one.

Legend: b rows, m documents, D embedding size, L and K vectors per query and document of multi-vector models.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from vembed_fs2.embedding.model import Embeddings
from vembed_fs2.losses import RowInfo


def complete_queries(query: Embeddings | None, document: Embeddings, rows: RowInfo) -> Embeddings:
    """Return the embedding of each row's query; a row without a positive of its own is its own document.

    :param query: of the rows that have a positive, in row order; ``None`` if none has.
    :param document: *Shape:* ``[m, D]`` or ``[m, K, D]``.
    :returns: *Shape:* ``[b, D]`` or ``[b, L, D]``.
    """
    num_rows = rows.query_ids.size(0)
    if query is not None and query.values.size(0) == num_rows:
        return query

    mask = None if document.mask is None else document.mask[:num_rows]
    own = document._replace(values=document.values[:num_rows], mask=mask)
    if query is None:
        return own

    assert rows.one_sided is not None
    position = (~rows.one_sided).cumsum(0) - 1
    number = torch.arange(num_rows, device=position.device) + query.values.size(0)
    index = torch.where(rows.one_sided, number, position)

    values = _append(query.values, own.values)[index]
    if query.mask is None or own.mask is None:
        return query._replace(values=values)
    return query._replace(values=values, mask=_append(query.mask, own.mask)[index])


def _append(x: Tensor, y: Tensor) -> Tensor:
    """Append rows; where they hold several vectors, they become as wide as the wider ones."""
    if x.ndim == 2 and x.dtype != torch.bool:
        return torch.cat([x, y])

    width = max(x.size(1), y.size(1))
    return torch.cat([pad(z, [0, 0] * (z.ndim - 2) + [0, width - z.size(1)]) for z in (x, y)])
