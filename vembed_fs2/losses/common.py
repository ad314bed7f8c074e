"""What objectives share.

Legend: b queries of this rank, m documents of this rank (the b positives, in
query order, then the explicit negatives), B and M of all ranks, D
embedding size, L and K vectors per query and document of multi-vector models.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal, Protocol, TypeAlias, TypeVar, get_args, get_type_hints

import torch
import torch.distributed as dist
from torch import Tensor

from vembed_fs2.distributed import RowGather
from vembed_fs2.embedding.head import Similarity, is_late_interaction
from vembed_fs2.embedding.learned import LOGIT_BIAS, LOGIT_SCALE, LearnedPart
from vembed_fs2.losses.similarity import DotProduct, MaxSim, Scoring
from vembed_fs2.losses.tiles import Block

MAX_LOGIT_SCALE: Final = math.log(100.0)
"""CLIP's bound of a learned scale: a temperature below 0.01 makes training unstable.

A parameter above it has no gradient; like CLIP's own training, keep it below by
``logit_scale.clamp_(max=MAX_LOGIT_SCALE)`` in each step.
"""

Negatives: TypeAlias = Literal["global", "local"]


class _Config(Protocol):
    def errors(self) -> list[str]: ...


class _LearnsTemperature(Protocol):
    temperature: float
    learn_temperature: bool


_ConfigT = TypeVar("_ConfigT", bound=_Config)


@dataclass
class RowInfo:
    """The facts about rows besides their embeddings."""

    query_ids: Tensor
    """Content hash of each query. *Shape:* ``[b]``, int64."""

    document_ids: Tensor
    """Content hash of each document. *Shape:* ``[m]``, int64."""

    labels: Tensor
    """Class of each row; 0 if it has none. *Shape:* ``[b]``, int64."""

    negative_rows: Tensor | None = None
    """The row that each explicit negative belongs to; rows may have different numbers of them. By default, each row's
    first negative comes first, in row order, then each row's second. *Shape:* ``[m - b]``, int64."""

    scores: Tensor | None = None
    """Scores of the documents for the queries of their rows, by a teacher or a human; NaN if there is none.
    *Shape:* ``[m]``, float."""

    teacher_query: Tensor | None = None
    """A teacher's embeddings of the queries. *Shape:* ``[b, T]``, float."""

    teacher_document: Tensor | None = None
    """A teacher's embeddings of the documents. *Shape:* ``[m, T]``, float."""

    one_sided: Tensor | None = None
    """The rows that have a label but no positive of their own. Their query and their positive are one embedding, which
    is given as both; their positives are the other rows of their label. ``None`` if there are none on any rank.
    *Shape:* ``[b]``, bool."""

    @staticmethod
    def of_labels(labels: Tensor, ids: Tensor | None = None) -> RowInfo:
        """Rows of one embedding each, which is given as query and as document: ``loss(x, x, RowInfo.of_labels(y))``.

        :param labels: the class of each row; 0 if it has none. *Shape:* ``[b]``, int64.
        :param ids: content hash of each row; all are different if ``None``. *Shape:* ``[b]``, int64.
        """
        if ids is None:
            ids = RowInfo.distinct(labels.size(0), 0, labels.device).query_ids
        return RowInfo(ids, ids, labels, one_sided=torch.ones_like(labels, dtype=torch.bool))

    @staticmethod
    def distinct(num_queries: int, num_documents: int, device: torch.device | None = None) -> RowInfo:
        """Rows of which nothing is the same as anything else, nor as a row of another rank."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        ids = torch.arange(num_queries + num_documents, device=device) + (rank << 40)
        return RowInfo(ids[:num_queries], ids[num_queries:], torch.zeros_like(ids[:num_queries]))

    def check(self, num_queries: int, num_documents: int) -> None:
        """Check that these are the facts about that many rows.

        :raises ValueError: they are not, or a query has no positive.
        """
        if num_documents < num_queries:
            raise ValueError(
                f"Each of {num_queries} queries needs a positive, but there are {num_documents} documents."
            )

        sizes = (self.query_ids.size(0), self.labels.size(0), self.document_ids.size(0))
        if sizes != (num_queries, num_queries, num_documents):
            raise ValueError(
                f"There are {num_queries} queries and {num_documents} documents, but `rows` has {sizes[0]} query ids,"
                f" {sizes[1]} labels and {sizes[2]} document ids."
            )

        expected = {"negative_rows": num_documents - num_queries, "scores": num_documents}
        expected |= {"teacher_query": num_queries, "teacher_document": num_documents, "one_sided": num_queries}
        for name, size in expected.items():
            value = getattr(self, name)
            if value is not None and value.size(0) != size:
                raise ValueError(f"`rows.{name}` must have {size} entries, but has {value.size(0)}.")

    def document_rows(self) -> Tensor:
        """The row that each document belongs to; -1 where that is not known. *Returns:* ``[m]``, int64."""
        num_queries, num_documents = self.query_ids.size(0), self.document_ids.size(0)
        own = torch.arange(num_queries, device=self.query_ids.device)
        negative_rows, num_negatives = self.negative_rows, num_documents - num_queries
        if negative_rows is None and num_negatives % max(num_queries, 1) == 0:
            negative_rows = own.repeat(num_negatives // max(num_queries, 1))
        if negative_rows is None:
            negative_rows = own.new_full((num_negatives,), -1)

        return torch.cat([own, negative_rows])

    def to(self, device: torch.device, *, non_blocking: bool = False) -> None:
        """Move all tensors in place."""
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.to(device, non_blocking=non_blocking))


@dataclass
class LossOutput:
    """The value of an objective, and what it saw."""

    loss: Tensor
    """The sum over this rank's queries. A scalar."""

    metrics: dict[str, Tensor]
    """Sums over this rank's queries. Scalars without a graph."""


@dataclass
class LossInput:
    """What an objective sees of a rank's rows."""

    query: Tensor
    """*Shape:* ``[b, D]``, or ``[b, L, D]`` for multi-vector models."""

    document: Tensor
    """The positive of each query, in query order, then explicit negatives. *Shape:* ``[m, D]`` or ``[m, K, D]``."""

    rows: RowInfo

    query_mask: Tensor | None = None
    """The vectors of a query that count. *Shape:* ``[b, L]``, bool."""

    document_mask: Tensor | None = None
    """The vectors of a document that count. *Shape:* ``[m, K]``, bool."""

    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """What objectives learn besides the encoder, by name; see :meth:`Objective.learned_parts`."""

    @property
    def num_queries(self) -> int:
        return self.query.size(0)

    @property
    def teacher_dim(self) -> int | None:
        """The size of a teacher's embeddings, if there are any."""
        return None if self.rows.teacher_query is None else self.rows.teacher_query.size(-1)

    def get_part(self, name: str) -> Tensor:
        """Return what was learned.

        :raises ValueError: the model does not hold it.
        """
        if name not in self.parts:
            raise ValueError(f"The objective learns `{name}`, but the model gives no `{name}`.")
        return self.parts[name]


class Objective(ABC):
    """A loss over the queries and documents of a step.

    Subclasses implement :meth:`compute`. It must run the same collectives on
    all ranks, whatever their rows.
    """

    def __call__(
        self,
        query: Tensor,
        document: Tensor,
        rows: RowInfo | None = None,
        logit_scale: Tensor | None = None,
        *,
        query_mask: Tensor | None = None,
        document_mask: Tensor | None = None,
        **parts: Tensor | None,
    ) -> LossOutput:
        """
        :param query: embeddings of this rank's queries. *Shape:* ``[b, D]`` or ``[b, L, D]``.
        :param document: embeddings of this rank's documents: the positive of
            each query, in query order, then explicit negatives. *Shape:* ``[m, D]`` or ``[m, K, D]``.
        :param rows: what is known of them; ``None`` if no row is like another.
        :param logit_scale: log of the inverse temperature, if it is learned. *Shape:* ``[1]``.
        :param query_mask: the vectors of a query that count. *Shape:* ``[b, L]``, bool.
        :param document_mask: the vectors of a document that count. *Shape:* ``[m, K]``, bool.
        :param parts: what else is learned, by name.
        """
        if rows is None:
            rows = RowInfo.distinct(query.size(0), document.size(0), query.device)

        rows.check(query.size(0), document.size(0))

        # Autocast would round similarities to 8 bits before the temperature enlarges them.
        with torch.autocast(query.device.type, enabled=False):
            given = {name: x for name, x in {LOGIT_SCALE: logit_scale, **parts}.items() if x is not None}
            return self.compute(LossInput(query, document, rows, query_mask, document_mask, given))

    @abstractmethod
    def compute(self, inputs: LossInput) -> LossOutput:
        """Compute the loss, without autocast."""

    def learned_parts(self, embedding_dim: int, teacher_dim: int | None = None) -> Sequence[LearnedPart]:
        """Return what the objective learns besides the encoder. The model holds it, and ``inputs.parts`` gives it.

        :param embedding_dim: the size of the embeddings that it compares.
        :param teacher_dim: the size of a teacher's, if there is one.
        """
        return _parts_of_properties(self)

    @property
    def uses_labels(self) -> bool:
        """Whether a row may have a label in place of a positive (:attr:`RowInfo.one_sided`)."""
        return False

    @property
    def needs_teacher(self) -> bool:
        """Whether rows need a teacher's embeddings."""
        return False

    @property
    def needs_scores(self) -> bool:
        """Whether rows need scores of their documents."""
        return False

    @property
    def needs_negatives(self) -> bool:
        """Whether each row needs explicit negatives."""
        return False

    def dim_errors(self, embedding_dim: int) -> list[str]:
        """Return what is wrong for embeddings of that size, one sentence each."""
        return []


def scope(gather: RowGather | None, negatives: Negatives) -> RowGather:
    """Return what gathers the rows that an objective compares: all ranks' rows, or its own rank's."""
    return gather if gather is not None and negatives == "global" else RowGather()


def without_positive(inputs: LossInput, num_rows: Tensor) -> dict[str, Tensor]:
    """Return the metric that counts this rank's rows without a positive, where rows may have none."""
    return {} if inputs.rows.one_sided is None else {"without_positive": num_rows}


def checked(config: _ConfigT) -> _ConfigT:
    """Return a configuration.

    :raises ValueError: lists what is wrong with it.
    """
    if errors := config.errors():
        raise ValueError(" ".join(errors))
    return config


def scale_parts(config: _LearnsTemperature) -> list[LearnedPart]:
    """Declare the temperature of a configuration, if it is to be learned."""
    init = -math.log(config.temperature)
    return [LearnedPart(name=LOGIT_SCALE, mean=init, max=MAX_LOGIT_SCALE)] if config.learn_temperature else []


def _parts_of_properties(objective: Objective) -> list[LearnedPart]:
    """What an objective of an older plugin learns: it has ``initial_logit_scale`` or ``initial_logit_bias``."""
    parts = []
    for name, bound in ((LOGIT_SCALE, MAX_LOGIT_SCALE), (LOGIT_BIAS, None)):
        if (init := getattr(objective, f"initial_{name}", None)) is not None:
            text = f"{type(objective).__name__}.initial_{name} is deprecated: define `learned_parts` instead."
            warnings.warn(text, DeprecationWarning, stacklevel=3)
            parts.append(LearnedPart(name=name, mean=init, max=bound))

    return parts


def learned_scale(inputs: LossInput) -> Tensor:
    """Return the learned inverse temperature. *Returns:* ``[1]``.

    :raises ValueError: the model does not give it.
    """
    return inputs.get_part(LOGIT_SCALE).float().clamp(max=MAX_LOGIT_SCALE).exp()


def known_rows(row: Tensor) -> Tensor:
    """Return the rows that documents belong to.

    :raises ValueError: it is not known of some.
    """
    if bool((row < 0).any()):
        raise ValueError(
            "Rows have different numbers of explicit negatives: `rows.negative_rows` must say whose they are."
        )
    return row


def choice_errors(config: Any, names: Sequence[str]) -> list[str]:
    """Return what is wrong with fields of a configuration that must be one of a few words."""
    hints, errors = get_type_hints(type(config)), []
    for name in names:
        value, known = getattr(config, name), get_args(hints[name])
        if value not in known:
            errors.append(f"`{name}` must be one of {', '.join(map(str, known))}, but is {value!r}.")
    return errors


def positive_errors(config: Any, names: Sequence[str]) -> list[str]:
    """Return what is wrong with fields of a configuration that must be positive numbers."""
    values = {name: getattr(config, name) for name in names}
    errors = [f"`{n}` must be positive, but is {v}." for n, v in values.items() if not v > 0.0]
    return errors + [f"`{n}` must be finite, but is {v}." for n, v in values.items() if v == math.inf]


@dataclass
class GlobalRows:
    """The rows of all ranks, in rank order: what this rank's rows are compared with."""

    inputs: LossInput
    """This rank's."""

    query: Tensor
    """*Shape:* ``[B, D]`` or ``[B, L, D]``."""

    query_mask: Tensor | None
    document: Tensor
    """For each rank its positives, then its explicit negatives. *Shape:* ``[M, D]`` or ``[M, K, D]``."""

    document_mask: Tensor | None
    rows: RowInfo
    """``negative_rows`` is not set; see :attr:`document_row`."""

    _document_row: Tensor

    positive: Tensor
    """The column of the positive of each of the B queries. *Shape:* ``[B]``."""

    start: int
    """The row of this rank's first query among all."""

    one_sided: Tensor | None = None
    """This rank's rows whose query is their document; ``None`` if it has none. *Shape:* ``[b]``, bool."""

    @property
    def document_row(self) -> Tensor:
        """The row (from 0 to B - 1) that each document belongs to. *Returns:* ``[M]``.

        :raises ValueError: it is not known of some.
        """
        return known_rows(self._document_row)

    @property
    def row(self) -> Tensor:
        """The rows of this rank's queries among all. *Returns:* ``[b]``."""
        return torch.arange(self.start, self.start + self.inputs.num_queries, device=self.positive.device)

    @property
    def target(self) -> Tensor:
        """The columns of the positives of this rank's queries. *Returns:* ``[b]``."""
        return self.positive[self.row]

    def block(
        self,
        anchors: Literal["query", "document"],
        columns: Literal["query", "document"],
        similarity: Similarity,
    ) -> Block:
        """Compare this rank's queries (or positives) with all queries (or documents)."""
        inputs = self.inputs
        num_queries = inputs.num_queries
        anchor, anchor_mask = inputs.query, inputs.query_mask
        if anchors == "document":
            anchor = inputs.document[:num_queries]
            anchor_mask = None if inputs.document_mask is None else inputs.document_mask[:num_queries]

        column, column_mask = (self.query, self.query_mask)
        if columns == "document":
            column, column_mask = self.document, self.document_mask

        kind: Scoring = DotProduct()
        if is_late_interaction(similarity):
            # The vectors of a query look for their nearest, on whichever side it stands.
            kind = MaxSim(anchors_query=(anchors, columns) != ("document", "query"))

        return Block(anchor, column, kind, similarity != "dot", anchor_mask, column_mask)


def gather_all(inputs: LossInput, gather: RowGather) -> GlobalRows:
    """Gather the rows of all ranks. Gradients flow back to the ranks that they come from."""
    rows, num_queries = inputs.rows, inputs.num_queries
    counts_b, counts_m = gather.counts(num_queries), gather.counts(inputs.document.size(0))
    start = sum(counts_b[: gather.rank])

    positive, column = [], 0
    for queries, documents in zip(counts_b, counts_m):
        positive.append(torch.arange(column, column + queries, device=inputs.query.device))
        column += documents

    query, query_mask = _gather_vectors(inputs.query, inputs.query_mask, gather, counts_b)
    document, document_mask = _gather_vectors(inputs.document, inputs.document_mask, gather, counts_m)
    info = RowInfo(
        gather(rows.query_ids, counts_b),
        gather(rows.document_ids, counts_m),
        gather(rows.labels, counts_b),
        scores=None if rows.scores is None else gather(rows.scores, counts_m),
        teacher_query=None if rows.teacher_query is None else gather(rows.teacher_query, counts_b),
        teacher_document=None if rows.teacher_document is None else gather(rows.teacher_document, counts_m),
    )
    own = rows.document_rows()
    document_row = gather(torch.where(own < 0, own, own + start), counts_m)
    one_sided = rows.one_sided if rows.one_sided is not None and bool(rows.one_sided.any()) else None

    return GlobalRows(
        inputs, query, query_mask, document, document_mask, info, document_row, torch.cat(positive), start, one_sided
    )


def _gather_vectors(
    x: Tensor, mask: Tensor | None, gather: RowGather, counts: list[int]
) -> tuple[Tensor, Tensor | None]:
    if gather.size == 1 or x.ndim == 2:
        return gather(x, counts), None if mask is None else gather(mask, counts)

    # Ranks have texts of different lengths; what fills them up is masked.
    width = max(gather.counts(x.size(1)))

    if mask is None:
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)

    x = torch.nn.functional.pad(x, (0, 0, 0, width - x.size(1)))
    mask = torch.nn.functional.pad(mask, (0, width - mask.size(1)))
    return gather(x, counts), gather(mask, counts)
