"""False negatives and hard ones: what InfoNCE makes of the scores of a tile.

Legend: s anchors of a strip of a tile, C columns.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vembed_fs2.losses.common import GlobalRows
from vembed_fs2.losses.similarity import DotProduct
from vembed_fs2.losses.tiles import Block


def teacher_block(rows: GlobalRows, anchors: str, columns: str, anchor_rows: slice) -> Block:
    """Compare a teacher's embeddings of this rank's queries (or positives) with its embeddings of all.

    :param anchor_rows: where this rank's queries (or positives) are among all ranks'.
    :raises ValueError: there are none.
    """
    sides = {"query": rows.rows.teacher_query, "document": rows.rows.teacher_document}

    anchor, column = sides[anchors], sides[columns]
    if anchor is None or column is None:
        raise ValueError("Filtering by a teacher needs its embeddings of queries and documents in `rows`.")
    return Block(anchor, column, DotProduct(), unit=True, anchor_rows=anchor_rows)


def highest_negative(positive: Tensor, margin: float, *, relative: bool) -> Tensor:
    r"""Return the greatest similarity that a negative may have; one that is more similar counts as a false one.

    .. math:: s_{ii} - m \quad\text{or}\quad s_{ii} - m |s_{ii}|
    """
    return positive - (margin * positive.abs() if relative else margin)


class Hardness:
    """Adds a multiple of a negative's similarity, which has no gradient, to its logit."""

    def __init__(self, rows: GlobalRows, which: Literal["in_batch", "explicit", "all"], strength: float) -> None:
        self._which = which
        self._strength = strength
        self._target = rows.target
        self._row = rows.row
        self._document_row = None if which == "all" else rows.document_row

    def __call__(self, scores_sC: Tensor, rows: slice) -> Tensor:
        """*Returns:* what to add to the logits of queries against documents. ``[s, C]``."""
        # Pairs that are left out have a score of -inf, and keep it.
        extra = scores_sC * self._strength
        if self._document_row is not None:
            row = self._row[rows].unsqueeze(1)
            is_own = self._document_row == row
            extra.masked_fill_(is_own if self._which == "in_batch" else ~is_own, 0.0)
        return extra.scatter_(1, self._target[rows].unsqueeze(1), 0.0)
