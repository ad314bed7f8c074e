"""Retrieval metrics on held-out data, during training.

Legend: n rows, D embedding size, L vectors per row of multi-vector models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import fairseq2.recipe  # noqa: F401  (before the evaluator, which imports it in a circle)
import torch
from fairseq2.datasets import DataReader
from fairseq2.device import SupportsDeviceTransfer
from fairseq2.evaluator import EvalUnit
from fairseq2.gang import Gang
from fairseq2.metrics import MetricBag
from fairseq2.metrics.aggregation import Sum
from torch import Tensor
from typing_extensions import Self, override

from vembed_fs2.data.example import Item, Role
from vembed_fs2.distributed import RowGather
from vembed_fs2.embedding.batch import EncoderBatch, Profile
from vembed_fs2.embedding.model import EmbeddingModel
from vembed_fs2.evaluation.retrieval import evaluate_retrieval
from vembed_fs2.evaluation.task import RetrievalTask
from vembed_fs2.gradcache.planner import match_counts, plan_chunks
from vembed_fs2.inference.prepare import WINDOW_IMAGES, WINDOW_ROWS, PreparedWindows
from vembed_fs2.processing.processor import Processor
from vembed_fs2.recipes.metrics import VALID_METRICS


@dataclass
class ValidBatch(SupportsDeviceTransfer):
    """Inputs of one role."""

    role: str
    indices: Tensor
    """The positions of the rows among all inputs of the role. *Shape:* ``[n]``."""

    inputs: EncoderBatch

    @override
    def to(self, device: torch.device, *, non_blocking: bool = False) -> None:
        """Move the inputs in place."""
        self.inputs.to(device, non_blocking=non_blocking)


class ValidReader(DataReader[ValidBatch]):
    """Reads a rank's share of the queries and documents of a task, longest first in each block.

    All ranks read the same number of batches of each kind (texts, images, both),
    because the parts of a sharded model run on all ranks together. So some
    inputs are read twice. Rows that are searched among themselves are read as documents only.
    """

    def __init__(
        self, task: RetrievalTask, processor: Processor[Any], *, batch_size: int, chunk_tokens: int, gather: RowGather
    ) -> None:
        self._items: dict[Role, Sequence[Item]] = {"query": task.queries, "document": task.corpus}
        if task.exclude_self:
            del self._items["query"]

        self._processor = processor
        self._batch_size = batch_size
        self._chunk_tokens = chunk_tokens
        self._gather = gather
        self._iterator = self._read()

    def _read(self) -> Iterator[ValidBatch]:
        for role, items in self._items.items():
            for rows in _by_kind(items):
                yield from self._read_kind(role, self._share(rows))

    def _share(self, rows: Sequence[int]) -> list[int]:
        """This rank's share of the rows; all shares have the same size."""
        size, last = self._gather.size, len(rows) - 1
        return [rows[min(i + self._gather.rank, last)] for i in range(0, len(rows), size)]

    def _read_kind(self, role: Role, share: Sequence[int]) -> Iterator[ValidBatch]:
        """Read rows of one kind; all ranks read as many blocks."""
        items = self._items[role]
        size = WINDOW_IMAGES if items[share[0]].images else WINDOW_ROWS

        blocks = [share[start : start + size] for start in range(0, len(share), size)]

        windows = ([items[i] for i in block] for block in blocks)
        with PreparedWindows(windows, self._processor, role=role) as batches:
            for block, inputs in zip(blocks, batches):
                for rows in self._plan(inputs.profile()):
                    yield ValidBatch(role, torch.tensor([block[r] for r in rows]), inputs.select(rows))

    def _plan(self, profile: Profile) -> Iterator[tuple[int, ...]]:
        """Cut a block into as many batches as the other ranks do."""
        chunks = plan_chunks(profile, self._chunk_tokens, max_rows=self._batch_size)
        count = max(self._gather.counts(len(chunks)))
        for chunk in match_counts(chunks, {profile.kinds[0]: count}, profile):
            yield chunk.rows

    @override
    def __iter__(self) -> Self:
        return self

    @override
    def __next__(self) -> list[ValidBatch]:
        return [next(self._iterator)]

    @override
    def reset(self) -> None:
        self._iterator = self._read()

    @override
    def state_dict(self) -> dict[str, object]:
        return {}

    @override
    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.reset()

    @property
    @override
    def num_accumulate(self) -> int:
        return 1


def _by_kind(items: Sequence[Item]) -> list[list[int]]:
    """The indices of the items with texts only, with images only, and with both."""
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for idx, item in enumerate(items):
        kinds.setdefault((item.text is None, not item.images), []).append(idx)
    return [kinds[kind] for kind in sorted(kinds)]


class _Part(NamedTuple):
    """The embeddings of a batch."""

    indices: Tensor
    """The positions of the rows among all inputs of the role. *Shape:* ``[n]``."""

    values: Tensor
    """*Shape:* ``[n, D]``, or ``[n, L, D]`` of multi-vector models."""

    mask: Tensor | None
    """The vectors that count, of multi-vector models. *Shape:* ``[n, L]``."""


@final
class RetrievalEvalUnit(EvalUnit[ValidBatch]):
    """Encodes all queries and documents over the ranks; ranks documents exactly on the first."""

    on_start: Callable[[], None] | None = None
    """Called by all ranks before they encode."""

    on_batch: Callable[[int], None] | None = None
    """Called after each batch, with its number of inputs."""

    def __init__(self, model: EmbeddingModel, task: RetrievalTask, dp_gang: Gang) -> None:
        self._model = model
        self._task = task
        self._is_first = dp_gang.rank == 0
        self.num_inputs = -(-(len(task.queries) + len(task.corpus)) // dp_gang.size)
        """How many queries and documents this rank encodes, or a few more."""

        self._gather = RowGather(dp_gang.as_process_group() if dp_gang.size > 1 else None)
        self._parts: dict[str, list[_Part]] = {"query": [], "document": []}

    @override
    def prepare_metric_bag(self, metric_bag: MetricBag) -> None:
        for name in VALID_METRICS:
            metric_bag.add(name, Sum())

    @override
    def set_train_step_nr(self, step_nr: int) -> None:
        if self.on_start is not None:
            self.on_start()

    @override
    def process_batch(self, batch: ValidBatch, metric_bag: MetricBag) -> None:
        output = self._model(batch.inputs)
        self._parts[batch.role].append(_Part(batch.indices, output.values.float(), output.mask))
        if self.on_batch is not None:
            self.on_batch(batch.indices.size(0))

    @override
    def finalize(self, metric_bag: MetricBag) -> None:
        corpus, document_mask = self._collect("document", len(self._task.corpus))
        queries, query_mask = corpus, document_mask
        if not self._task.exclude_self:
            queries, query_mask = self._collect("query", len(self._task.queries))

        if not self._is_first:
            return

        # Autocast would round the similarities that documents are ranked by.
        with torch.autocast(queries.device.type, enabled=False):
            metrics = evaluate_retrieval(
                queries,
                corpus,
                self._task.relevant,
                exclude=self._task.excluded(),
                missing=self._task.missing,
                similarity=self._model.similarity,
                query_mask=query_mask,
                document_mask=document_mask,
            )

        for name in VALID_METRICS:
            metric_bag.get(name, Sum).update(metrics[name])

    def _collect(self, role: str, size: int) -> tuple[Tensor, Tensor | None]:
        """Bring the embeddings of all ranks together, in input order.

        *Returns:* ``[size, D]`` and ``None``, or ``[size, L, D]`` and a mask ``[size, L]``.
        """
        parts, self._parts[role] = self._parts[role], []
        device = next(self._model.parameters()).device
        indices = torch.cat([p.indices for p in parts]) if parts else torch.empty(0, dtype=torch.int64)
        indices = indices.to(device)
        counts = self._gather.counts(indices.size(0))
        order = self._gather(indices, counts)

        def gathered(rows: Tensor) -> Tensor:
            ordered = rows.new_empty(size, *rows.shape[1:])
            ordered[order] = self._gather(rows, counts)
            return ordered

        if self._model.is_multi_vector:
            values, mask = self._append_vectors(parts, indices.size(0), device)
            return gathered(values), gathered(mask)

        values = torch.cat([p.values for p in parts]) if parts else torch.empty(0, self._model.embedding_dim)
        return gathered(values.to(device)), None

    def _append_vectors(self, parts: Sequence[_Part], num_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Append embeddings, as wide as any rank's. *Returns:* ``[n, L, D]`` and a mask ``[n, L]``."""
        width = max(self._gather.counts(max((p.values.size(1) for p in parts), default=1)))

        values = torch.zeros(num_rows, width, self._model.embedding_dim, device=device)
        mask = torch.zeros(num_rows, width, dtype=torch.bool, device=device)
        start = 0
        for part in parts:
            rows, length = slice(start, start + part.values.size(0)), part.values.size(1)
            values[rows, :length] = part.values
            mask[rows, :length] = True if part.mask is None else part.mask
            start = rows.stop

        return values, mask
