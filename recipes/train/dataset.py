"""Rows -> batches for the encoders and the objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from fairseq2.device import SupportsDeviceTransfer
from typing_extensions import override

from vembed_fs2.data.example import Example, Item
from vembed_fs2.data.schema import content_id, label_id
from vembed_fs2.errors import DataError
from vembed_fs2.losses import RowInfo
from vembed_fs2.models.embedding import EncoderBatch
from vembed_fs2.processing.processor import Processor


@dataclass
class ContrastiveBatch(SupportsDeviceTransfer):
    """One rank's rows of a step."""

    query: EncoderBatch
    document: EncoderBatch
    """The positive of each query, in query order, then all explicit negatives."""

    rows: RowInfo

    @property
    def num_queries(self) -> int:
        return self.query.num_rows

    @override
    def to(self, device: torch.device, *, non_blocking: bool = False) -> None:
        """Move all tensors in place."""
        self.query.to(device, non_blocking=non_blocking)
        self.document.to(device, non_blocking=non_blocking)
        for name, value in vars(self.rows).items():
            setattr(self.rows, name, value.to(device, non_blocking=non_blocking))


class Collator:
    """Prepares rows for a model: images row by row, so that few are in memory decoded; texts in batches."""

    def __init__(self, processor: Processor) -> None:
        self._processor = processor

    def load(self, example: Example) -> tuple[Example, Example]:
        """Read and transform the images of a row.

        :returns: the row as it was, and with pixel values in place of images.
        :raises DataError: an image cannot be read; the message names file and line.
        """
        if example.positive is None:
            raise DataError(f"{example.source}: the row has no positive to train on.")
        try:
            prepared = replace(
                example,
                query=self._prepare(example.query),
                positive=self._prepare(example.positive),
                negatives=tuple(self._prepare(n) for n in example.negatives),
            )
        except DataError as ex:
            raise DataError(f"{example.source}: {ex}") from ex
        return example, prepared

    def __call__(self, rows: Sequence[tuple[Example, Example]]) -> ContrastiveBatch:
        originals, prepared = [r[0] for r in rows], [r[1] for r in rows]
        processor = self._processor
        # Identity is that of the data, not of decoded pixels.
        info = RowInfo(
            torch.tensor([content_id(e.query) for e in originals]),
            torch.tensor([content_id(d) for d in _documents(originals)]),
            torch.tensor([0 if e.label is None else label_id(e.label) for e in originals]),
        )
        query = processor([e.query for e in prepared], prompt=processor.prompt_for("query"))
        document = processor(_documents(prepared), prompt=processor.prompt_for("document"))
        return ContrastiveBatch(query, document, info)

    def _prepare(self, item: Item) -> Item:
        if not item.images:
            return item
        # The processor takes pixel values for images; nothing else sees these items.
        pixels: tuple[Any, ...] = tuple(self._processor.prepare_image(i) for i in item.images)
        return replace(item, images=pixels)


def _documents(examples: Sequence[Example]) -> list[Item]:
    positives = [e.positive for e in examples if e.positive is not None]
    return [*positives, *(n for e in examples for n in e.negatives)]
