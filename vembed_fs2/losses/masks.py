"""Which pairs of rows are known to be no negatives.

Legend: b anchors of this rank, t anchors of a tile, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from vembed_fs2.losses.common import GlobalRows

# Values that equal nothing: no hash, label or row is as low, though these may be negative.
_LOWEST: Final = torch.iinfo(torch.int64).min
_NO_ANCHOR: Final = _LOWEST
_NO_COLUMN: Final = _LOWEST + 1


@dataclass
class Exclusions:
    """Pairs that an objective leaves out, found tile by tile.

    A pair is left out if one of several keys is the same on both sides.
    """

    own: Tensor | None = None
    """The column of each anchor that is kept in any case: its positive. *Shape:* ``[b]``."""

    _keys: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, anchor_b: Tensor, column_C: Tensor) -> None:
        """Leave out pairs of the same key, if there are any besides the anchors' own."""
        ordered = torch.sort(column_C).values

        matches = torch.searchsorted(ordered, anchor_b, right=True) - torch.searchsorted(ordered, anchor_b)
        if self.own is not None:
            matches = matches - (column_C[self.own] == anchor_b).long()
        if bool((matches > 0).any()):
            self._keys.append((anchor_b, column_C))

    def mask(self, rows: slice) -> Tensor | None:
        """The pairs of a tile that are left out. *Returns:* ``[t, C]``, bool; ``None`` if there are none."""
        if not self._keys:
            return None

        mask: Tensor | None = None
        for anchor, column in self._keys:
            same = anchor[rows].unsqueeze(1) == column.unsqueeze(0)
            mask = same if mask is None else mask.logical_or_(same)

        assert mask is not None

        if self.own is not None:
            mask.scatter_(1, self.own[rows].unsqueeze(1), False)

        return mask


def query_to_document(rows: GlobalRows, *, mask_same: bool = True) -> Exclusions:
    """Documents that are no negatives of this rank's queries: copies of the positive and of the query, and the
    positives of rows with the same query or label."""
    excluded = Exclusions(own=rows.target)
    if mask_same:
        own, everyone = rows.inputs.rows, rows.rows
        excluded.add(everyone.document_ids[rows.target], everyone.document_ids)
        excluded.add(own.query_ids, everyone.document_ids)
        excluded.add(own.query_ids, _at_positives(rows, everyone.query_ids))
        excluded.add(_label_keys(own.labels, _NO_ANCHOR), _at_positives(rows, _label_keys(everyone.labels, _NO_COLUMN)))

    return excluded


def document_to_query(rows: GlobalRows, *, mask_same: bool = True) -> Exclusions:
    """Queries that are no negatives of this rank's positives."""
    excluded = Exclusions(own=rows.row)
    if mask_same:
        own, everyone = rows.inputs.rows, rows.rows
        positive_ids = everyone.document_ids[rows.positive]
        excluded.add(positive_ids[rows.row], positive_ids)
        excluded.add(positive_ids[rows.row], everyone.query_ids)
        excluded.add(own.query_ids, everyone.query_ids)
        excluded.add(_label_keys(own.labels, _NO_ANCHOR), _label_keys(everyone.labels, _NO_COLUMN))

    return excluded


def query_to_query(rows: GlobalRows, *, mask_same: bool = True) -> Exclusions:
    """Queries that are not negatives of this rank's queries: each itself, and the ones in :func:`document_to_query`."""
    excluded = document_to_query(rows, mask_same=mask_same)
    excluded.own = None
    excluded.add(rows.row, torch.arange(rows.positive.size(0), device=rows.positive.device))
    return excluded


def document_to_document(rows: GlobalRows, *, mask_same: bool = True) -> Exclusions:
    """Documents that are not negatives of this rank's positives: all of their own row, and the ones in
    :func:`query_to_document`."""
    excluded = query_to_document(rows, mask_same=mask_same)
    excluded.own = None
    excluded.add(rows.row, rows.document_row)
    return excluded


def same_class(rows: GlobalRows) -> tuple[Tensor, Tensor]:
    """Keys of this rank's rows and of all documents that are equal for rows of a class.

    A row without a label is a class of its own; explicit negatives have none.
    *Returns:* ``[b]`` and ``[M]``.
    """
    labels = rows.rows.labels

    # A row without a label has its number as the key, made unlike any label.
    number = torch.arange(labels.size(0), device=labels.device)
    key = torch.where(labels != 0, labels, _LOWEST + 2 + number)
    return key[rows.row], _at_positives(rows, key)


def _at_positives(rows: GlobalRows, values_B: Tensor) -> Tensor:
    """Put a value of each row at its positive's column; explicit negatives belong to no class and answer no query."""
    column = values_B.new_full((rows.document.size(0),), _NO_COLUMN, dtype=torch.int64)
    column[rows.positive] = values_B.long()
    return column


def _label_keys(labels: Tensor, none: int) -> Tensor:
    return torch.where(labels != 0, labels.long(), none)
