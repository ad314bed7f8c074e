"""Distillation of scores: the student ranks documents as a teacher does.

Kullback-Leibler divergence: Hinton et al., "Distilling the Knowledge in a
Neural Network", 2015, https://arxiv.org/abs/1503.02531; of the scores of
retrieval models, Lin et al., "Distilling Dense Representations for Ranking
using Tightly-Coupled Teachers", 2020, https://arxiv.org/abs/2010.11386.
Margins: Hofstaetter et al., "Improving Efficient Neural Ranking Models with
Cross-Architecture Knowledge Distillation", 2020, https://arxiv.org/abs/2010.02666.

Legend: b queries of this rank, m its documents, t queries of a tile, C documents of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vembed_fs2.distributed import RowGather
from vembed_fs2.embedding.head import Similarity, is_late_interaction
from vembed_fs2.losses.common import (
    LossInput,
    LossOutput,
    Negatives,
    Objective,
    checked,
    choice_errors,
    gather_all,
    known_rows,
    positive_errors,
    scope,
)
from vembed_fs2.losses.infonce import softmax_
from vembed_fs2.losses.tiles import TileGrads, sum_over_tiles


@dataclass(kw_only=True)
class DistillationConfig:
    kind: Literal["kl", "margin_mse"] = "kl"
    """The quantities that are compared: distributions over documents, or margins between the positive and negatives."""

    source: Literal["scores", "teacher"] = "scores"
    """What the student learns from: scores of a row's own documents in the data, or the cosines of a teacher's
    embeddings of each query with all documents of the batch."""

    temperature: float = 0.05
    """What the student's similarities are divided by."""

    teacher_temperature: float | None = None
    """What the teacher's scores are divided by. By default 1 for scores of the data, which may be of any scale, and
    ``temperature`` for cosines of a teacher."""

    similarity: Similarity = "cosine"
    """How the student's embeddings are compared. ``maxsim`` is for multi-vector models."""

    negatives: Negatives = "global"
    """With a teacher: whether documents come from all ranks or from this rank only."""

    def errors(self) -> list[str]:
        """Return what is wrong with the values, one sentence each."""
        errors = choice_errors(self, ["kind", "source", "similarity", "negatives"])
        errors += positive_errors(self, ["temperature"])
        if self.teacher_temperature is not None:
            errors += positive_errors(self, ["teacher_temperature"])
        if (self.kind, self.source) == ("margin_mse", "teacher"):
            errors.append("`source` must be 'scores' with `kind` 'margin_mse'.")

        return errors


class Distillation(Objective):
    r"""Brings scores of documents close to a teacher's scores.

    With :math:`z_{ij} = s(q_i, d_j) / \tau` and the teacher's :math:`y_{ij}`,
    divided by its own temperature, over the documents :math:`D_i`:

    .. math:: \text{kl:}\quad \ell_i = \sum_{j \in D_i} t_{ij} (\log t_{ij} - \log p_{ij}),\qquad
              t_i = \text{softmax}(y_i),\ p_i = \text{softmax}(z_i)
    .. math:: \text{margin\_mse:}\quad \ell_i = \frac{1}{|N_i|} \sum_{n \in N_i}
              \left( (z_{ii} - z_{in}) - (y_{ii} - y_{in}) \right)^2

    :math:`D_i` holds the positive and the explicit negatives :math:`N_i` of the
    row (``source: scores``), or all documents of all ranks (``source:
    teacher``). The divergence is not multiplied by the square of a temperature,
    so that it weighs as much as InfoNCE of the same one.

    The metric ``agreement`` is the fraction of queries for which the student
    and the teacher like the same document best.
    """

    def __init__(self, config: DistillationConfig | None = None, gather: RowGather | None = None) -> None:
        """
        :param gather: appends the rows of all ranks; ``None`` for one process.
        :raises ValueError: ``config`` is not valid.
        """
        self._config = config = checked(config or DistillationConfig())
        self._gather = scope(gather, config.negatives)
        default = config.temperature if config.source == "teacher" else 1.0
        self._teacher_temperature = config.teacher_temperature or default

    @property
    def needs_teacher(self) -> bool:
        return self._config.source == "teacher"

    @property
    def needs_scores(self) -> bool:
        return self._config.source == "scores"

    @property
    def needs_negatives(self) -> bool:
        return self._config.source == "scores"

    def compute(self, inputs: LossInput) -> LossOutput:
        if self._config.source == "teacher":
            return self._compare_all(inputs)

        scores = inputs.rows.scores
        if scores is None or bool(scores.isnan().any()):
            raise ValueError("Distillation needs `scores` in the data, for the positive and each negative of each row.")

        row_m = known_rows(inputs.rows.document_rows())
        z_m = pair_scores(inputs, row_m, self._config.similarity) / self._config.temperature
        y_m = scores.to(z_m.dtype) / self._teacher_temperature
        compare = _divergence if self._config.kind == "kl" else _margin_error
        best = [_best_of_each_row(x.detach(), row_m, inputs.num_queries) for x in (z_m, y_m)]
        agreement = (best[0] == best[1]).sum()

        return LossOutput(compare(z_m, y_m, row_m, inputs.num_queries), {"agreement": agreement})

    def _compare_all(self, inputs: LossInput) -> LossOutput:
        rows = gather_all(inputs, self._gather)

        query, document = rows.rows.teacher_query, rows.rows.teacher_document
        if query is None or document is None:
            raise ValueError("Distillation from a teacher needs its embeddings of queries and documents in `rows`.")

        query, document = (normalize(x.float(), dim=-1) for x in (query, document))
        tile = _Divergence(query[rows.row], document, self._config.temperature, self._teacher_temperature)
        loss = sum_over_tiles([rows.block("query", "document", self._config.similarity)], tile)

        return LossOutput(loss, {"agreement": tile.agreement})


class _Divergence:
    """The divergence of a tile of queries from a teacher's distribution over all documents."""

    def __init__(self, query_bT: Tensor, document_CT: Tensor, temperature: float, teacher_temperature: float) -> None:
        self._query = query_bT
        self._document = document_CT
        self._scale = 1.0 / temperature
        self._teacher_scale = 1.0 / teacher_temperature
        self.agreement = torch.zeros((), dtype=torch.int64, device=query_bT.device)

    def __call__(self, scores: list[Tensor], rows: slice, scalars: list[Tensor]) -> TileGrads:
        z_tC = scores[0].mul_(self._scale)
        y_tC = (self._query[rows] @ self._document.T).to(z_tC.dtype).mul_(self._teacher_scale)
        self.agreement += (z_tC.argmax(1) == y_tC.argmax(1)).sum()
        difference = y_tC - z_tC
        teacher_log_sum, log_sum = softmax_([y_tC]), softmax_([z_tC])

        # log t - log p, weighted by t: no logarithm of a probability that has underflowed.
        loss = (y_tC * difference).sum() + (log_sum - teacher_log_sum).sum()

        return TileGrads(loss, [z_tC.sub_(y_tC).mul_(self._scale)])


def pair_scores(inputs: LossInput, row_m: Tensor, similarity: Similarity) -> Tensor:
    """Compare each document with the query of its row. *Returns:* ``[m]``."""
    dtype = torch.promote_types(inputs.query.dtype, torch.float32)

    query, document = inputs.query.to(dtype), inputs.document.to(dtype)
    if similarity != "dot":
        query, document = normalize(query, dim=-1), normalize(document, dim=-1)
    if not is_late_interaction(similarity):
        return (query[row_m] * document).sum(-1)

    pairs = query[row_m] @ document.transpose(1, 2)
    if inputs.document_mask is not None:
        pairs = pairs.masked_fill(~inputs.document_mask.bool().unsqueeze(1), -torch.inf)

    best = pairs.amax(2)

    counts = best > -torch.inf  # A document without any vector scores 0.
    if inputs.query_mask is not None:
        counts = counts & inputs.query_mask.bool()[row_m]

    return torch.where(counts, best, 0.0).sum(1)


def _divergence(z_m: Tensor, y_m: Tensor, row_m: Tensor, num_rows: int) -> Tensor:
    log_p, log_t = (_log_softmax_of_each_row(x, row_m, num_rows) for x in (z_m, y_m))
    return (log_t.exp() * (log_t - log_p)).sum()


def _log_softmax_of_each_row(x_m: Tensor, row_m: Tensor, num_rows: int) -> Tensor:
    """*Returns:* the log probability of each document among the documents of its row. ``[m]``."""
    x_m = x_m - _max_of_each_row(x_m.detach(), row_m, num_rows)[row_m]
    total = x_m.new_zeros(num_rows).index_add(0, row_m, x_m.exp())
    return x_m - total.log()[row_m]


def _margin_error(z_m: Tensor, y_m: Tensor, row_m: Tensor, num_rows: int) -> Tensor:
    row = row_m[num_rows:]
    margins = [x[:num_rows][row] - x[num_rows:] for x in (z_m, y_m)]
    count = torch.bincount(row, minlength=num_rows)[row]
    return ((margins[0] - margins[1]).square() / count).sum()


def _best_of_each_row(x_m: Tensor, row_m: Tensor, num_rows: int) -> Tensor:
    """The first of the best documents of each row. *Returns:* ``[b]``."""
    is_best = x_m == _max_of_each_row(x_m, row_m, num_rows)[row_m]
    number = torch.arange(x_m.size(0), device=x_m.device)
    last = torch.full((num_rows,), x_m.size(0), device=x_m.device)
    return last.scatter_reduce(0, row_m[is_best], number[is_best], "amin")


def _max_of_each_row(x_m: Tensor, row_m: Tensor, num_rows: int) -> Tensor:
    """*Returns:* ``[b]``."""
    return x_m.new_full((num_rows,), -torch.inf).scatter_reduce(0, row_m, x_m, "amax")
