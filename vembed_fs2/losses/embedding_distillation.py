"""Distillation of embeddings: the student's are to be the teacher's.

Reimers and Gurevych, "Making Monolingual Sentence Embeddings Multilingual using
Knowledge Distillation", 2020, https://arxiv.org/abs/2004.09813; with a
projection, Kim et al., "EmbedDistill: A Geometric Knowledge Distillation for
Information Retrieval", 2023, https://arxiv.org/abs/2301.12005.

Legend: b queries of this rank, m its documents, n inputs of a role, D the student's and T the teacher's embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vembed_fs2.distributed import RowGather
from vembed_fs2.embedding.learned import TEACHER_PROJECTION, LearnedPart, teacher_projection
from vembed_fs2.losses.common import (
    LossInput,
    LossOutput,
    Objective,
    checked,
    choice_errors,
    known_rows,
)


@dataclass(kw_only=True)
class EmbeddingDistillationConfig:
    kind: Literal["cosine", "mse"] = "cosine"
    """How far an embedding is from the teacher's: 1 minus their cosine, or their mean squared difference."""

    def errors(self) -> list[str]:
        """Return what is wrong with the values, one sentence each."""
        return choice_errors(self, ["kind"])


class EmbeddingDistillation(Objective):
    r"""Brings each embedding close to a teacher's embedding of the same input.

    .. math:: \ell_i = \frac{1}{|X_i|} \sum_{x \in X_i} \delta(W x, t_x),\qquad
              \delta(x, t) = 1 - \cos(x, t) \ \text{ or } \ \frac{1}{T} \lVert x - t \rVert^2

    :math:`X_i` holds the embeddings of the query, the positive and the explicit
    negatives of row :math:`i`, :math:`t_x` is the teacher's embedding of the
    same input. If sizes differ, the model learns the projection :math:`W`
    and has no use for it after the training. Embeddings are compared as they
    are: with ``mse`` the student also learns the length of the teacher's.

    Other rows, and so other ranks, have no part in it. The metric
    ``teacher_cosine`` is the mean of :math:`\cos(W x, t_x)`.
    """

    def __init__(self, config: EmbeddingDistillationConfig | None = None, gather: RowGather | None = None) -> None:
        """:raises ValueError: ``config`` is not valid."""
        self._config = checked(config or EmbeddingDistillationConfig())

    @property
    def needs_teacher(self) -> bool:
        return True

    def learned_parts(self, embedding_dim: int, teacher_dim: int | None = None) -> Sequence[LearnedPart]:
        if teacher_dim is None or teacher_dim == embedding_dim:
            return []
        return [teacher_projection(teacher_dim, embedding_dim)]

    def compute(self, inputs: LossInput) -> LossOutput:
        rows = inputs.rows
        if rows.teacher_query is None or rows.teacher_document is None:
            raise ValueError("Distillation of embeddings needs a teacher's, of queries and documents, in `rows`.")

        row = known_rows(rows.document_rows())
        weight = 1.0 / (1.0 + torch.bincount(row, minlength=inputs.num_queries))
        loss, cosine = (
            query + document
            for query, document in zip(
                self._compare(inputs, inputs.query, rows.teacher_query, weight),
                self._compare(inputs, inputs.document, rows.teacher_document, weight[row]),
            )
        )

        return LossOutput(loss, {"teacher_cosine": cosine})

    def _compare(self, inputs: LossInput, x_nD: Tensor, teacher_nT: Tensor, weight_n: Tensor) -> tuple[Tensor, Tensor]:
        """*Returns:* the weighted sums of distances and of cosines."""
        x_nT = _project(x_nD, inputs.parts.get(TEACHER_PROJECTION), teacher_nT.size(-1))
        teacher_nT = teacher_nT.to(x_nT.dtype)
        cosine = cosine_similarity(x_nT, teacher_nT, dim=-1)
        distance = 1.0 - cosine if self._config.kind == "cosine" else (x_nT - teacher_nT).square().mean(-1)
        return (distance * weight_n).sum(), (cosine.detach() * weight_n).sum()


def _project(x_nD: Tensor, projection_TD: Tensor | None, teacher_dim: int) -> Tensor:
    """Take embeddings to the teacher's size. *Returns:* ``[n, T]``."""
    if x_nD.ndim != 2:
        raise ValueError("The embeddings of multi-vector models cannot be compared with a teacher's.")

    x_nD = x_nD.to(torch.promote_types(x_nD.dtype, torch.float32))
    if projection_TD is None:
        if x_nD.size(1) != teacher_dim:
            raise ValueError(
                f"Embeddings have {x_nD.size(1)} dimensions, but the teacher's have {teacher_dim}: the model must give"
                " a `teacher_projection`."
            )
        return x_nD

    if projection_TD.size(0) != teacher_dim:
        raise ValueError(
            f"`teacher_projection` is for a teacher of {projection_TD.size(0)} dimensions, but it has {teacher_dim}."
        )

    # All dimensions of it, if the model holds it although no objective declares it.
    return x_nD @ projection_TD[:, : x_nD.size(1)].to(x_nD.dtype).T
