"""Objectives that order pairs by their scores: CoSENT and AnglE.

Huang et al., "CoSENT: Consistent Sentence Embedding via Similarity Ranking",
2024, https://doi.org/10.1109/TASLP.2024.3402087; Li and Li, "AnglE-optimized
Text Embeddings", 2023, https://arxiv.org/abs/2309.12871.

Legend: b queries of this rank, B of all ranks, m documents of this rank,
p scored pairs of this rank, P of all ranks, D embedding size.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from vembed_fs2.distributed import RowGather
from vembed_fs2.losses.common import (
    LossInput,
    LossOutput,
    Negatives,
    Objective,
    RowInfo,
    checked,
    choice_errors,
    known_rows,
    positive_errors,
    scope,
)


@dataclass(kw_only=True)
class CoSENTConfig:
    temperature: float = 0.05
    """What differences of similarities are divided by."""

    similarity: Literal["cosine", "dot"] = "cosine"
    """How the two embeddings of a pair are compared."""

    negatives: Negatives = "global"
    """Whether a pair is ordered among the pairs of all ranks or of its own rank only."""

    def errors(self) -> list[str]:
        """Return what is wrong with the values, one sentence each."""
        return positive_errors(self, ["temperature"]) + choice_errors(self, ["similarity", "negatives"])


@dataclass(kw_only=True)
class AnglEConfig:
    temperature: float = 0.05
    """What differences of similarities are divided by."""

    negatives: Negatives = "global"
    """Whether a pair is ordered among the pairs of all ranks or of its own rank only."""

    def errors(self) -> list[str]:
        """Return what is wrong with the values, one sentence each."""
        return positive_errors(self, ["temperature"]) + choice_errors(self, ["negatives"])


class _ScoredPairs(Objective):
    """An objective over the similarities and scores of all pairs of a query and a document of its row."""

    def __init__(self, temperature: float, gather: RowGather) -> None:
        self._temperature = temperature
        self._gather = gather

    @property
    def needs_scores(self) -> bool:
        return True

    def compute(self, inputs: LossInput) -> LossOutput:
        """
        :raises ValueError: a positive has no score, or embeddings are of several vectors.
        """
        if inputs.query.ndim != 2:
            raise ValueError("CoSENT and AnglE compare single vectors, but the model gives several per row.")

        index, score_p = _scored(inputs.rows)
        row = known_rows(inputs.rows.document_rows()[index])
        dtype = torch.promote_types(inputs.query.dtype, torch.float32)
        query, document = inputs.query.to(dtype), inputs.document.to(dtype)
        similarity_p = self._similarity(query, document, row, index)
        counts = self._gather.counts(similarity_p.size(0))

        similarity_P, score_P = self._gather(similarity_p, counts), self._gather(score_p, counts)
        if bool(score_P.isinf().any()):
            raise ValueError("Ordering pairs needs a finite score for each query and its positive: give `scores`.")

        # Every rank has the loss of the whole batch. Weighted by its queries, the sum over ranks is the loss times B.
        loss = inputs.num_queries * ordering_loss(similarity_P, score_P, self._temperature)
        correlation = rank_correlation(similarity_P.detach(), score_P)
        return LossOutput(loss, {"rank_correlation": inputs.num_queries * correlation})

    @abstractmethod
    def _similarity(self, query_bD: Tensor, document_mD: Tensor, row: Tensor, index: Tensor) -> Tensor:
        """Compare queries with documents, pair by pair. *Returns:* ``[p]``."""


def _scored(rows: RowInfo) -> tuple[Tensor, Tensor]:
    """The documents of scored pairs, and their scores.

    A positive without a score has an infinite one: all ranks are to see it and to fail.
    """
    num_queries, scores_m = rows.query_ids.size(0), rows.scores
    if scores_m is None:
        scores_m = torch.full(rows.document_ids.shape, torch.nan, device=rows.document_ids.device)

    scores_m = scores_m.to(torch.float32, copy=True)
    scores_m[:num_queries].masked_fill_(scores_m[:num_queries].isnan(), torch.inf)
    index = torch.nonzero(~scores_m.isnan()).squeeze(1)

    return index, scores_m[index]


def ordering_loss(similarity_P: Tensor, score_P: Tensor, temperature: float) -> Tensor:
    r"""Pairs of higher scores must be more similar.

    .. math:: \log\Big(1 + \sum_{y_i > y_j} e^{(c_j - c_i)/\tau}\Big)

    Sorted by score, the sum over ``j`` is one of a prefix; so it takes
    ``O(P log P)`` time and ``O(P)`` memory. Pairs of the same score are not ordered.

    *Returns:* a scalar.
    """
    order = torch.argsort(score_P)
    z_P, score_P = similarity_P[order] / temperature, score_P[order]
    num_lower = torch.searchsorted(score_P, score_P)
    above = num_lower > 0
    prefix = torch.logcumsumexp(z_P, 0)
    exponents = prefix[num_lower[above] - 1] - z_P[above]

    return torch.logsumexp(torch.cat([z_P.new_zeros(1), exponents]), 0)


def rank_correlation(similarity_P: Tensor, score_P: Tensor) -> Tensor:
    """Spearman's rank correlation; 0 if all similarities or all scores are the same. *Returns:* a scalar."""
    ranks = []
    for values in (similarity_P, score_P):
        ordered = torch.sort(values).values
        rank = torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)
        centered = rank - rank.to(similarity_P.dtype).mean()
        ranks.append(normalize(centered, dim=0))

    return (ranks[0] * ranks[1]).sum()


class CoSENT(_ScoredPairs):
    r"""Pairs of higher scores must be more similar.

    .. math:: L = \log\Big(1 + \sum_{y_i > y_j} e^{(c_j - c_i)/\tau}\Big)

    :math:`c_i` is the similarity and :math:`y_i` the score of pair :math:`i`: a
    query and its positive, or a query and an explicit negative of its row that
    has a score. Positives must have one. Pairs of the same score are not
    ordered. The sum is over the pairs of all ranks, of which only similarities
    and scores are gathered.

    :math:`L` is one value of the whole batch, not a sum over rows. To be divided
    by the number of queries of all ranks like any other objective, a rank
    returns it times the number of its own queries.
    """

    def __init__(self, config: CoSENTConfig | None = None, gather: RowGather | None = None) -> None:
        """
        :param gather: appends the rows of all ranks; ``None`` for one process.
        :raises ValueError: ``config`` is not valid.
        """
        config = checked(config or CoSENTConfig())
        super().__init__(config.temperature, scope(gather, config.negatives))
        self._unit = config.similarity == "cosine"

    def _similarity(self, query_bD: Tensor, document_mD: Tensor, row: Tensor, index: Tensor) -> Tensor:
        if self._unit:
            query_bD, document_mD = normalize(query_bD, dim=-1), normalize(document_mD, dim=-1)
        return (query_bD[row] * document_mD[index]).sum(1)


class AnglE(_ScoredPairs):
    r"""CoSENT with a similarity by angles in complex space, for pairs whose cosines have hardly any gradient.

    The first halves of embeddings are real parts and the second halves
    imaginary ones: :math:`q = a + ib` and :math:`d = u + iv`. Then

    .. math:: c = \Big|\sum_k \mathrm{Re}\,w_k + \mathrm{Im}\,w_k\Big|, \quad
        w_k = \frac{q_k \bar{d}_k}{\lVert q \rVert \lVert d \rVert}

    which is how the paper's own code takes the difference of angles, and
    sentence-transformers after it. An odd size is filled up with a zero. The
    paper adds CoSENT and InfoNCE to it. Pairs and what is returned are as for
    :class:`CoSENT`.
    """

    def __init__(self, config: AnglEConfig | None = None, gather: RowGather | None = None) -> None:
        """
        :param gather: appends the rows of all ranks; ``None`` for one process.
        :raises ValueError: ``config`` is not valid.
        """
        config = checked(config or AnglEConfig())
        super().__init__(config.temperature, scope(gather, config.negatives))

    def _similarity(self, query_bD: Tensor, document_mD: Tensor, row: Tensor, index: Tensor) -> Tensor:
        odd = query_bD.size(1) % 2
        query_bD, document_mD = (pad(normalize(x, dim=-1), (0, odd)) for x in (query_bD, document_mD))
        real, imaginary = query_bD.chunk(2, dim=1)

        # Re + Im of (a + ib)(u - iv) is (a + b)u + (b - a)v.
        turned = torch.cat([real + imaginary, imaginary - real], dim=1)

        return (turned[row] * document_mD[index]).sum(1).abs()
