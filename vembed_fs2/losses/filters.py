"""False negatives and hard ones: what InfoNCE makes of the scores of a tile.

Legend: t anchors of a tile, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vembed_fs2.losses.common import GlobalRows


class FalseNegativeFilter:
    r"""Leaves out negatives that are nearly as similar as the positive, or more.

    .. math:: s_{ij} > s_{ii} - m \quad\text{or}\quad s_{ij} > s_{ii} - m |s_{ii}|

    by the own similarity, or by the cosine of a teacher's embeddings.
    """

    def __init__(
        self, rows: GlobalRows, directions: Sequence[str], margin: float, *, relative: bool, by_teacher: bool
    ) -> None:
        self._margin = margin
        self._relative = relative
        self._own = [{"query_to_document": rows.target, "document_to_query": rows.row}.get(d) for d in directions]
        self._sides: list[tuple[Tensor, Tensor]] = []
        if by_teacher:
            everyone = rows.rows
            if everyone.teacher_query is None or everyone.teacher_document is None:
                raise ValueError("Filtering by a teacher needs its embeddings of queries and documents in `rows`.")
            query, document = (
                normalize(x.float(), dim=-1) for x in (everyone.teacher_query, everyone.teacher_document)
            )
            anchors = {"query": query[rows.row], "document": document[rows.target]}
            columns = {"query": query, "document": document}
            names = [d.partition("_to_") for d in directions]
            self._sides = [(anchors[a], columns[c]) for a, _, c in names]
            self._positive = (anchors["query"] * anchors["document"]).sum(1)

    def __call__(self, idx: int, scores_tC: Tensor, positive_t: Tensor, rows: slice, excluded: Tensor | None) -> Tensor:
        """Return the pairs of a direction's tile that are left out. *Returns:* ``[t, C]``, bool."""
        if self._sides:
            anchor, column = self._sides[idx]
            scores_tC, positive_t = anchor[rows] @ column.T, self._positive[rows]
        margin = self._margin * positive_t.abs() if self._relative else self._margin
        false = scores_tC > (positive_t - margin).unsqueeze(1)
        own = self._own[idx]
        if own is not None:
            false.scatter_(1, own[rows].unsqueeze(1), False)
        return false if excluded is None else false.logical_or_(excluded)


class Hardness:
    """Adds a multiple of a negative's similarity, which has no gradient, to its logit."""

    def __init__(self, rows: GlobalRows, which: Literal["in_batch", "explicit", "all"], strength: float) -> None:
        self._rows = rows
        self._which = which
        self._strength = strength

    def __call__(self, scores_tC: Tensor, rows: slice) -> Tensor:
        """*Returns:* what to add to the logits of a tile of queries against documents. ``[t, C]``."""
        own = self._rows.row[rows].unsqueeze(1) == self._rows.document_row.unsqueeze(0)
        positive = self._rows.target[rows].unsqueeze(1)
        weighted = own if self._which == "explicit" else ~own
        if self._which == "all":
            weighted = torch.ones_like(own)
        weighted.scatter_(1, positive, False)
        # Excluded pairs have a score of -inf and keep it.
        return torch.where(weighted, scores_tC.nan_to_num(neginf=0.0) * self._strength, 0.0)
