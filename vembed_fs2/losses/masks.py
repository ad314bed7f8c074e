"""Which pairs of rows are known to be no negatives.

Legend: b anchors of this rank, t anchors of a tile, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """The column of each anchor's own row. It is the positive, which is kept in any case; or, if the anchor is
    one-sided, the anchor itself, which is left out in any case. *Shape:* ``[b]``."""

    one_sided: Tensor | None = None
    """The anchors whose positives are the other rows of their label; ``None`` if there are none. *Shape:* ``[b]``."""

    labels: tuple[Tensor, Tensor] | None = None
    """The label of each anchor ``[b]`` and of each column ``[C]``, if rows of a label are no negatives or positives."""

    mask_labels: bool = True
    """Whether rows of one label are left out as negatives."""

    _keys: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, anchor_b: Tensor, column_C: Tensor, *, copies: bool = False) -> None:
        """Leave out pairs of the same key, if there are any besides the anchors' own.

        :param copies: whether such a column is the anchor once more, so that it is no positive either.
        """
        if self._matches(anchor_b, column_C):
            self._keys.append((anchor_b, column_C))
            if copies:
                self._copies.append((anchor_b, column_C))

    def add_labels(self, anchor_b: Tensor, column_C: Tensor, *, mask: bool) -> None:
        """
        :param mask: whether to leave out pairs of the same label.
        """
        self.mask_labels = mask and self._matches(anchor_b, column_C)
        self.labels = (anchor_b, column_C)

    def mask(self, rows: slice) -> Tensor | None:
        """The pairs of a tile that are no negatives. *Returns:* ``[t, C]``, bool; ``None`` if there are none."""
        keys = self._keys
        if self.labels is not None and self.mask_labels:
            keys = [*keys, self.labels]

        mask = _same(keys, rows)
        if self.one_sided is not None and self.own is not None:
            if mask is None:
                mask = self._no_pairs(rows)
            mask.scatter_(1, self.own[rows].unsqueeze(1), self.one_sided[rows].unsqueeze(1))
        elif mask is not None and self.own is not None:
            mask.scatter_(1, self.own[rows].unsqueeze(1), False)

        return mask

    def positives(self, rows: slice) -> Tensor:
        """The positives of a tile: of an anchor its own column; or, if it is one-sided, the other rows of its label,
        without copies of itself that are left out. *Returns:* ``[t, C]``, bool."""
        assert self.own is not None
        own = self.own[rows].unsqueeze(1)
        if self.one_sided is None:
            return self._no_pairs(rows).scatter_(1, own, True)

        assert self.labels is not None
        one_sided = self.one_sided[rows].unsqueeze(1)

        positive = _same([self.labels], rows)
        assert positive is not None
        if (copies := _same(self._copies, rows)) is not None:
            positive.logical_and_(copies.logical_not_())

        return positive.logical_and_(one_sided).scatter_(1, own, ~one_sided)

    def _matches(self, anchor_b: Tensor, column_C: Tensor) -> bool:
        ordered = torch.sort(column_C).values

        matches = torch.searchsorted(ordered, anchor_b, right=True) - torch.searchsorted(ordered, anchor_b)
        if self.own is not None:
            matches = matches - (column_C[self.own] == anchor_b).long()
        return bool((matches > 0).any())

    def _no_pairs(self, rows: slice) -> Tensor:
        assert self.labels is not None
        anchor, column = self.labels
        return torch.zeros(anchor[rows].size(0), column.size(0), dtype=torch.bool, device=column.device)


def _same(keys: Sequence[tuple[Tensor, Tensor]], rows: slice) -> Tensor | None:
    """The pairs of a tile that have one of several keys in common."""
    mask: Tensor | None = None
    for anchor, column in keys:
        same = anchor[rows].unsqueeze(1) == column.unsqueeze(0)
        mask = same if mask is None else mask.logical_or_(same)

    return mask


def query_to_document(rows: GlobalRows, *, mask_same: bool = True) -> Exclusions:
    """Documents that are no negatives of this rank's queries: copies of the positive and of the query, and the
    positives of rows with the same query or label."""
    excluded = Exclusions(own=rows.target, one_sided=rows.one_sided)
    own, everyone = rows.inputs.rows, rows.rows
    if mask_same:
        excluded.add(everyone.document_ids[rows.target], everyone.document_ids)
        excluded.add(own.query_ids, everyone.document_ids, copies=True)
        excluded.add(own.query_ids, _at_positives(rows, everyone.query_ids))

    labels = _at_positives(rows, _label_keys(everyone.labels, _NO_COLUMN))
    excluded.add_labels(_label_keys(own.labels, _NO_ANCHOR), labels, mask=mask_same)
    return excluded


def document_to_query(rows: GlobalRows, *, mask_same: bool = True) -> Exclusions:
    """Queries that are no negatives of this rank's positives."""
    excluded = Exclusions(own=rows.row, one_sided=rows.one_sided)
    own, everyone = rows.inputs.rows, rows.rows
    if mask_same:
        positive_ids = everyone.document_ids[rows.positive]
        excluded.add(positive_ids[rows.row], positive_ids)
        excluded.add(positive_ids[rows.row], everyone.query_ids, copies=True)
        excluded.add(own.query_ids, everyone.query_ids)

    labels = _label_keys(everyone.labels, _NO_COLUMN)
    excluded.add_labels(_label_keys(own.labels, _NO_ANCHOR), labels, mask=mask_same)
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
