"""Rows -> batches for the encoders and the objective."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from fairseq2.device import SupportsDeviceTransfer
from torch import Tensor
from typing_extensions import override

from vembed_fs2.data.example import Example, Item
from vembed_fs2.data.schema import content_id, label_id
from vembed_fs2.embedding.model import EncoderBatch
from vembed_fs2.errors import DataError
from vembed_fs2.losses import RowInfo
from vembed_fs2.processing.processor import Processor


@dataclass
class ContrastiveBatch(SupportsDeviceTransfer):
    """One rank's rows of a step."""

    query: EncoderBatch
    document: EncoderBatch
    """The positive of each query, in query order, then all explicit negatives."""

    rows: RowInfo

    teacher_query: EncoderBatch | None = None
    """The queries as the teacher takes them."""

    teacher_document: EncoderBatch | None = None

    @property
    def num_queries(self) -> int:
        return self.query.num_rows

    @override
    def to(self, device: torch.device, *, non_blocking: bool = False) -> None:
        """Move all tensors in place."""
        for part in (self.query, self.document, self.rows, self.teacher_query, self.teacher_document):
            if part is not None:
                part.to(device, non_blocking=non_blocking)


Loaded: TypeAlias = tuple[Example, Example, Example]
"""A row as it was, and as the model and the teacher take it: with pixel values in place of images."""


class Collator:
    """Prepares rows for a model: images row by row, so that few are in memory decoded; texts in batches.

    :param teacher: prepares the same rows for a teacher.
    """

    def __init__(self, processor: Processor, teacher: Processor | None = None) -> None:
        self._processor = processor
        self._teacher = teacher

    def load(self, example: Example) -> Loaded:
        """Read and transform the images of a row.

        :raises DataError: an image cannot be read; the message names file and line.
        """
        try:
            prepared = _prepare_row(self._processor, example)
            return example, prepared, example if self._teacher is None else _prepare_row(self._teacher, example)
        except DataError as ex:
            raise DataError(f"{example.source}: {ex}") from ex

    def __call__(self, rows: Sequence[Loaded]) -> ContrastiveBatch:
        batch = ContrastiveBatch(*_encode(self._processor, [r[1] for r in rows]), _row_info([r[0] for r in rows]))
        if self._teacher is not None:
            batch.teacher_query, batch.teacher_document = _encode(self._teacher, [r[2] for r in rows])
        return batch


def _prepare_row(processor: Processor, example: Example) -> Example:
    def prepare(item: Item) -> Item:
        if not item.images:
            return item
        # The processor takes pixel values for images; nothing else sees these items.
        pixels: tuple[Any, ...] = tuple(processor.prepare_image(i) for i in item.images)
        return replace(item, images=pixels)

    assert example.positive is not None
    negatives = tuple(prepare(n) for n in example.negatives)
    return replace(example, query=prepare(example.query), positive=prepare(example.positive), negatives=negatives)


def _encode(processor: Processor, examples: Sequence[Example]) -> tuple[EncoderBatch, EncoderBatch]:
    query = processor([e.query for e in examples], prompt=processor.prompt_for("query"))
    return query, processor(_documents(examples), prompt=processor.prompt_for("document"))


def _row_info(examples: Sequence[Example]) -> RowInfo:
    # Identity is that of the data, not of decoded pixels.
    return RowInfo(
        torch.tensor([content_id(e.query) for e in examples]),
        torch.tensor([content_id(d) for d in _documents(examples)]),
        torch.tensor([0 if e.label is None else label_id(e.label) for e in examples]),
        torch.tensor([row for row, e in enumerate(examples) for _ in e.negatives], dtype=torch.int64),
        _scores(examples),
    )


def _documents(examples: Sequence[Example]) -> list[Item]:
    positives = [e.positive for e in examples if e.positive is not None]
    return [*positives, *(n for e in examples for n in e.negatives)]


def _scores(examples: Sequence[Example]) -> Tensor:
    """The scores of the documents, in their order; NaN where there is none. A tensor in any case: ranks gather it."""
    scores = [e.scores or (math.nan,) * (1 + len(e.negatives)) for e in examples]
    return torch.tensor([s[0] for s in scores] + [x for s in scores for x in s[1:]], dtype=torch.float32)
