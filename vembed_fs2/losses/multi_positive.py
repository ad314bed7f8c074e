"""Several positives per query: supervised contrastive learning.

Khosla et al., "Supervised Contrastive Learning", 2020,
https://arxiv.org/abs/2004.11362.

Legend: b anchors of this rank, t anchors of a tile, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vembed_fs2.distributed import RowGather
from vembed_fs2.embedding.head import Similarity
from vembed_fs2.embedding.learned import LearnedPart
from vembed_fs2.losses import masks
from vembed_fs2.losses.common import (
    LossInput,
    LossOutput,
    Negatives,
    Objective,
    checked,
    choice_errors,
    gather_all,
    learned_scale,
    positive_errors,
    scale_parts,
    scope,
    without_positive,
)
from vembed_fs2.losses.infonce import softmax_
from vembed_fs2.losses.tiles import TileGrads, sum_over_tiles


@dataclass(kw_only=True)
class MultiPositiveConfig:
    temperature: float = 0.05
    """What similarities are divided by. The initial value, if it is learned and the model has none."""

    learn_temperature: bool = False
    """If ``True``, the temperature is a parameter of the model."""

    symmetric: bool = False
    """If ``True``, documents look for their queries as well; the loss is the mean of both directions."""

    similarity: Similarity = "cosine"
    """How embeddings are compared. ``maxsim`` is for multi-vector models; it sums over the vectors of a query."""

    negatives: Negatives = "global"
    """Whether positives and negatives come from all ranks or from this rank only."""

    mask_same: bool = True
    """If ``True``, rows with different labels but the same query or document are not each other's negatives."""

    def errors(self) -> list[str]:
        """Return what is wrong with the values, one sentence each."""
        return positive_errors(self, ["temperature"]) + choice_errors(self, ["similarity", "negatives"])


class MultiPositive(Objective):
    r"""Cross-entropy of all documents of a query's class among all documents.

    .. math:: \ell_i = -\frac{1}{|P_i|} \sum_{p \in P_i}
        \log \frac{e^{s(q_i, d_p)/\tau}}{\sum_{j \in C_i} e^{s(q_i, d_j)/\tau}}

    This is the paper's :math:`L_{out}`, between queries and documents instead of
    two views. :math:`P_i` holds the positives of all rows with the label of
    :math:`i`, with its own; without a label, its own only, which makes it
    InfoNCE. :math:`C_i` holds :math:`P_i` and the negatives: the positives of
    all other rows and the explicit negatives of all rows, without those that are
    known to be none (``mask_same``).

    A row with a label but without a positive of its own is compared with all rows
    but itself: :math:`P_i` holds the other rows of its label, as in the paper,
    without copies of the row (``mask_same``). If there are none, its loss is zero.

    ``accuracy`` counts queries whose most similar document is of their class.
    """

    def __init__(self, config: MultiPositiveConfig | None = None, gather: RowGather | None = None) -> None:
        """
        :param gather: appends the rows of all ranks; ``None`` for one process.
        :raises ValueError: ``config`` is not valid.
        """
        self._config = checked(config or MultiPositiveConfig())
        self._gather = scope(gather, self._config.negatives)

    def learned_parts(self, embedding_dim: int, teacher_dim: int | None = None) -> Sequence[LearnedPart]:
        return scale_parts(self._config)

    @property
    def uses_labels(self) -> bool:
        return True

    def compute(self, inputs: LossInput) -> LossOutput:
        """
        :raises ValueError: the temperature is to be learned, but the model does not give it.
        """
        config = self._config
        scale = self._scale(inputs)
        rows = gather_all(inputs, self._gather)
        anchor_key, document_key = masks.same_class(rows)
        excluded = masks.query_to_document(rows, mask_same=config.mask_same)
        tile = _ClassSoftmax(anchor_key, document_key, excluded)

        loss = sum_over_tiles([rows.block("query", "document", config.similarity)], tile, [scale])
        if config.symmetric:
            excluded = masks.document_to_query(rows, mask_same=config.mask_same)
            back = _ClassSoftmax(anchor_key, document_key[rows.positive], excluded)
            loss = (loss + sum_over_tiles([rows.block("document", "query", config.similarity)], back, [scale])) / 2

        metrics = tile.metrics | without_positive(inputs, tile.num_without)
        metrics["temperature"] = inputs.num_queries / scale.detach().squeeze()
        return LossOutput(loss, metrics)

    def _scale(self, inputs: LossInput) -> Tensor:
        if not self._config.learn_temperature:
            return torch.tensor([1.0 / self._config.temperature], device=inputs.query.device)
        return learned_scale(inputs)


class _ClassSoftmax:
    """The loss of a tile of anchors, its gradient, and what was seen.

    :param anchor_key: the class of each anchor. *Shape:* ``[b]``.
    :param column_key: the class of each column. *Shape:* ``[C]``.
    :param excluded: what is left out, if it is not of the anchor's class.
    """

    def __init__(self, anchor_key: Tensor, column_key: Tensor, excluded: masks.Exclusions) -> None:
        self._anchor_key = anchor_key
        self._column_key = column_key
        self._excluded = excluded
        zero = torch.zeros((), device=anchor_key.device)
        self.metrics = dict.fromkeys(("accuracy", "num_positives", "num_negatives", "masked_fraction"), zero)
        self.num_without = zero
        """The number of anchors without a positive."""

    def __call__(self, scores: list[Tensor], rows: slice, scalars: list[Tensor]) -> TileGrads:
        (s_tC,), (scale,) = scores, scalars

        positive = self._positives(rows)
        has_positive = positive.any(1, keepdim=True)
        excluded = self._excluded.mask(rows)
        if excluded is not None:
            excluded.logical_and_(~positive)

        self._add_metrics(s_tC, positive, excluded, rows)
        self.num_without = self.num_without + (~has_positive).sum()

        z_tC = s_tC * scale
        if excluded is not None:
            # All may be left out of a row that counts for nothing.
            z_tC.masked_fill_(excluded.logical_and_(has_positive), -torch.inf)

        target_tC = positive.to(s_tC.dtype).div_(positive.sum(1, keepdim=True).clamp_(min=1))
        log_sum = softmax_([z_tC])
        loss = ((log_sum - (target_tC * s_tC).sum(1) * scale) * has_positive.squeeze(1)).sum()

        # The gradient of the logits: probabilities less those that are asked for.
        grad_tC = z_tC.sub_(target_tC).mul_(has_positive)
        scale_grad = s_tC.mul_(grad_tC).sum()

        return TileGrads(loss, [torch.mul(grad_tC, scale, out=s_tC)], [scale_grad])

    def _positives(self, rows: slice) -> Tensor:
        positive = self._anchor_key[rows].unsqueeze(1) == self._column_key.unsqueeze(0)
        one_sided = self._excluded.one_sided
        if one_sided is None:
            return positive
        return torch.where(one_sided[rows].unsqueeze(1), self._excluded.positives(rows), positive)

    def _add_metrics(self, scores_tC: Tensor, positive: Tensor, excluded: Tensor | None, rows: slice) -> None:
        others = positive if excluded is None else positive | excluded
        best = scores_tC.masked_fill(~positive, -torch.inf).amax(1)

        # A tie with a negative does not count as found.
        found = best > scores_tC.masked_fill(others, -torch.inf).amax(1)
        num_masked = torch.zeros_like(found.sum()) if excluded is None else excluded.sum()
        if self._excluded.one_sided is not None:
            num_masked = num_masked - self._excluded.one_sided[rows].sum()  # A row is no candidate of its own.

        values = {
            "accuracy": found.sum(),
            "num_positives": positive.sum(),
            "num_negatives": (~others).sum(),
            "masked_fraction": num_masked / max(scores_tC.size(1) - 1, 1),
        }
        self.metrics = {name: self.metrics[name] + value for name, value in values.items()}
