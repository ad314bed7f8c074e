"""Rows -> batches for the encoders and the objective."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from fairseq2.device import SupportsDeviceTransfer
from torch import Tensor
from typing_extensions import override

from vembed_fs2.data.example import Example
from vembed_fs2.data.schema import content_id, label_id
from vembed_fs2.embedding.model import EncoderBatch
from vembed_fs2.errors import DataError
from vembed_fs2.losses import RowInfo
from vembed_fs2.processing.processor import Processor

_T = TypeVar("_T")


@dataclass
class ContrastiveBatch(SupportsDeviceTransfer):
    """One rank's rows of a step.

    A row with a label but without a positive of its own is encoded once, as a document.
    """

    query: EncoderBatch | None
    """The queries of the rows that have a positive; ``None`` if none has."""

    document: EncoderBatch
    """The positive of each row, or the row itself if it has none, in row order; then all explicit negatives."""

    rows: RowInfo

    teacher_query: EncoderBatch | None = None
    """The queries as the teacher takes them."""

    teacher_document: EncoderBatch | None = None

    @property
    def num_queries(self) -> int:
        return self.rows.query_ids.size(0)

    @override
    def to(self, device: torch.device, *, non_blocking: bool = False) -> None:
        """Move all tensors in place."""
        for part in (self.query, self.document, self.rows, self.teacher_query, self.teacher_document):
            if part is not None:
                part.to(device, non_blocking=non_blocking)


@dataclass(frozen=True)
class LoadedRow:
    """A row, with its items as the model and the teacher take them: query, positive, negatives."""

    example: Example
    items: tuple[Any, ...]
    teacher_items: tuple[Any, ...]


class Collator:
    """Prepares rows for a model: images row by row, so that few are in memory decoded; texts in batches.

    :param teacher: prepares the same rows for a teacher.
    """

    def __init__(self, processor: Processor[Any], teacher: Processor[Any] | None = None) -> None:
        self._processor = processor
        self._teacher = teacher

    def load(self, example: Example) -> LoadedRow:
        """Read and transform the images of a row.

        :raises DataError: an image cannot be read; the message names file and line.
        """
        try:
            items = tuple(self._processor.prepare(item) for item in example.items)
            teacher_items = () if self._teacher is None else tuple(map(self._teacher.prepare, example.items))
        except DataError as ex:
            raise DataError(f"{example.source}: {ex}") from ex

        return LoadedRow(example, items, teacher_items)

    def __call__(self, rows: Sequence[LoadedRow]) -> ContrastiveBatch:
        examples = [row.example for row in rows]
        query, document = _collate(self._processor, examples, [row.items for row in rows])
        batch = ContrastiveBatch(query, document, _row_info(examples))

        if self._teacher is not None:
            teacher_items = [row.teacher_items for row in rows]
            batch.teacher_query, batch.teacher_document = _collate(self._teacher, examples, teacher_items)

        return batch


def _collate(
    processor: Processor[Any], examples: Sequence[Example], rows: Sequence[tuple[Any, ...]]
) -> tuple[EncoderBatch | None, EncoderBatch]:
    queries = [items[0] for example, items in zip(examples, rows) if example.positive is not None]
    query = processor.collate(queries, role="query") if queries else None
    return query, processor.collate(_documents(examples, rows), role="document")


def _documents(examples: Sequence[Example], rows: Sequence[tuple[_T, ...]]) -> list[_T]:
    """The positive of each row, or its query if it has none; then all negatives."""
    first = [0 if example.positive is None else 1 for example in examples]
    negatives = (negative for start, items in zip(first, rows) for negative in items[start + 1 :])
    return [*(items[start] for start, items in zip(first, rows)), *negatives]


def _row_info(examples: Sequence[Example]) -> RowInfo:
    # Rows are told apart by their data, not by decoded pixels.
    return RowInfo(
        torch.tensor([content_id(e.query) for e in examples]),
        torch.tensor([content_id(document) for document in _documents(examples, [e.items for e in examples])]),
        torch.tensor([0 if e.label is None else label_id(e.label) for e in examples]),
        torch.tensor([row for row, e in enumerate(examples) for _ in e.negatives], dtype=torch.int64),
        _scores(examples),
        one_sided=torch.tensor([e.positive is None for e in examples]),
    )


def _scores(examples: Sequence[Example]) -> Tensor:
    """Return the scores of the documents, in their order; NaN if there is none. Always a tensor: ranks gather it."""
    scores = [e.scores or (math.nan,) * (1 + len(e.negatives)) for e in examples]
    return torch.tensor([s[0] for s in scores] + [x for s in scores for x in s[1:]], dtype=torch.float32)
