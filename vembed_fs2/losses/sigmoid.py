"""The sigmoid loss of SigLIP.

Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023,
https://arxiv.org/abs/2303.15343.

Legend: b queries of this rank, t queries of a tile, C documents of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from vembed_fs2.distributed import RowGather
from vembed_fs2.embedding.head import Similarity
from vembed_fs2.embedding.learned import LOGIT_BIAS, LearnedPart
from vembed_fs2.losses import masks
from vembed_fs2.losses.common import (
    GlobalRows,
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
from vembed_fs2.losses.tiles import TileGrads, sum_over_tiles


@dataclass(kw_only=True)
class SigmoidConfig:
    temperature: float = 0.1
    """What similarities are divided by. The initial value, if it is learned and the model has none."""

    bias: float = -10.0
    """
    The value that is added to similarities over temperature; near the log of positives per negative, so that
    training does not begin with a large correction. The initial value, if it is learned and the model has none."""

    learn_temperature: bool = True
    """If ``True``, the temperature is a parameter of the model."""

    learn_bias: bool = True
    """If ``True``, the bias is a parameter of the model."""

    similarity: Similarity = "cosine"
    """How embeddings are compared. ``maxsim`` is for multi-vector models; it sums over the vectors of a query."""

    negatives: Negatives = "global"
    """Whether negatives come from all ranks or from this rank only."""

    same: Literal["mask", "positive", "negative"] = "mask"
    """What a query and a document of another row are, if the rows have the same label, query or document, or if the
    document is a copy of the query: left out, a positive pair, or a negative one."""

    def errors(self) -> list[str]:
        """Return what is wrong with the values, one sentence each."""
        errors = positive_errors(self, ["temperature"])
        if not math.isfinite(self.bias):
            errors.append(f"`bias` must be finite, but is {self.bias}.")
        return errors + choice_errors(self, ["similarity", "negatives", "same"])


class Sigmoid(Objective):
    r"""Says of each pair of a query and a document whether they belong together.

    .. math:: \ell_i = \sum_j \log(1 + e^{-z_{ij} (s(q_i, d_j)/\tau + \beta)})

    :math:`z_{ij}` is 1 for the positive of :math:`i` and -1 for the positives of
    all other rows and the explicit negatives of all rows, without those that are
    known to be no negatives (``same``).

    For a row with a label but without a positive of its own it is 1 for the other
    rows of its label, whatever ``same`` says; the row itself is left out, and copies
    of it as ``same`` says. A row without any positive has a loss of zero.
    """

    def __init__(self, config: SigmoidConfig | None = None, gather: RowGather | None = None) -> None:
        """
        :param gather: appends the rows of all ranks; ``None`` for one process.
        :raises ValueError: ``config`` is not valid.
        """
        self._config = checked(config or SigmoidConfig())
        self._gather = scope(gather, self._config.negatives)

    def learned_parts(self, embedding_dim: int, teacher_dim: int | None = None) -> Sequence[LearnedPart]:
        bias = [LearnedPart(name=LOGIT_BIAS, mean=self._config.bias)] if self._config.learn_bias else []
        return [*scale_parts(self._config), *bias]

    @property
    def uses_labels(self) -> bool:
        return True

    def compute(self, inputs: LossInput) -> LossOutput:
        """
        :raises ValueError: the temperature or the bias is to be learned, but the model does not give it.
        """
        config, num_queries = self._config, inputs.num_queries
        scale, bias = self._scale(inputs), self._bias(inputs)
        rows = gather_all(inputs, self._gather)
        tile = (_SigmoidTile if rows.one_sided is None else _SeveralPositives)(rows, config.same)
        loss = sum_over_tiles([rows.block("query", "document", config.similarity)], tile, [scale, bias])
        metrics = tile.metrics | without_positive(inputs, tile.num_without)
        metrics["temperature"] = num_queries / scale.detach().squeeze()
        metrics["bias"] = num_queries * bias.detach().squeeze()

        return LossOutput(loss, metrics)

    def _scale(self, inputs: LossInput) -> Tensor:
        if not self._config.learn_temperature:
            return torch.tensor([1.0 / self._config.temperature], device=inputs.query.device)
        return learned_scale(inputs)

    def _bias(self, inputs: LossInput) -> Tensor:
        if not self._config.learn_bias:
            return torch.tensor([self._config.bias], device=inputs.query.device)
        return inputs.get_part(LOGIT_BIAS).float()


class _SigmoidTile:
    """The loss of a tile of queries, its gradient, and what was seen."""

    def __init__(self, rows: GlobalRows, same: Literal["mask", "positive", "negative"]) -> None:
        self._target = rows.target
        self._same = masks.query_to_document(rows, mask_same=same != "negative")
        self._same_is_positive = same == "positive"
        zero = torch.zeros((), device=rows.query.device)
        self.metrics = {"accuracy": zero, "num_negatives": zero, "masked_fraction": zero}
        self.num_without = zero
        """The number of queries without a positive."""

    def __call__(self, scores: list[Tensor], rows: slice, scalars: list[Tensor]) -> TileGrads:
        (s_tC,), (scale, bias) = scores, scalars
        own = self._target[rows].unsqueeze(1)
        same = self._same.mask(rows)
        self._add_metrics(s_tC, own, same)
        positive = same if self._same_is_positive else None

        # The loss is log(1 + e^x) of the logits of negatives and of the negated ones of positives.
        x_tC = torch.addcmul(bias, s_tC, scale)
        _negate(x_tC, own, positive)

        if same is not None and positive is None:
            x_tC.masked_fill_(same, -torch.inf)

        loss = softplus(x_tC).sum()
        grad_tC = x_tC.sigmoid_()
        _negate(grad_tC, own, positive)
        bias_grad = grad_tC.sum()
        scale_grad = s_tC.mul_(grad_tC).sum()

        return TileGrads(loss, [torch.mul(grad_tC, scale, out=s_tC)], [scale_grad, bias_grad])

    def _add_metrics(self, scores_tC: Tensor, own: Tensor, same: Tensor | None) -> None:
        # A tie with the positive does not count as found.
        ahead = scores_tC >= scores_tC.gather(1, own)
        if same is not None:
            ahead.masked_fill_(same, False)

        num_others = scores_tC.size(1) - 1
        num_same = 0 if same is None else same.sum()
        num_masked = 0 if self._same_is_positive else num_same
        values = {
            "accuracy": (ahead.sum(1) == 1).sum(),
            "num_negatives": scores_tC.size(0) * num_others - num_same,
            "masked_fraction": num_masked / max(num_others, 1),
        }
        self.metrics = {name: self.metrics[name] + value for name, value in values.items()}


class _SeveralPositives(_SigmoidTile):
    """The same for rows of which some have several positives, or none."""

    def __init__(self, rows: GlobalRows, same: Literal["mask", "positive", "negative"]) -> None:
        super().__init__(rows, same)
        assert rows.one_sided is not None
        self._one_sided = rows.one_sided

    def __call__(self, scores: list[Tensor], rows: slice, scalars: list[Tensor]) -> TileGrads:
        (s_tC,), (scale, bias) = scores, scalars
        positive, left_out = self._same.positives(rows), self._same.mask(rows)
        assert left_out is not None  # The rows themselves.

        if self._same_is_positive:
            itself = torch.zeros_like(positive)
            itself.scatter_(1, self._target[rows].unsqueeze(1), self._one_sided[rows].unsqueeze(1))
            positive, left_out = positive | (left_out & ~itself), itself

        left_out.logical_and_(~positive)
        has_positive = positive.any(1, keepdim=True)
        self._count(s_tC, positive, left_out, rows)

        sign = 1.0 - 2.0 * positive
        x_tC = torch.addcmul(bias, s_tC, scale).mul_(sign).masked_fill_(left_out | ~has_positive, -torch.inf)
        loss = softplus(x_tC).sum()
        grad_tC = x_tC.sigmoid_().mul_(sign)
        bias_grad = grad_tC.sum()
        scale_grad = s_tC.mul_(grad_tC).sum()

        return TileGrads(loss, [torch.mul(grad_tC, scale, out=s_tC)], [scale_grad, bias_grad])

    def _count(self, scores_tC: Tensor, positive: Tensor, left_out: Tensor, rows: slice) -> None:
        best = scores_tC.masked_fill(~positive, -torch.inf).amax(1)
        negative = ~(positive | left_out)
        found = best > scores_tC.masked_fill(~negative, -torch.inf).amax(1)

        values = {
            "accuracy": found.sum(),
            "num_negatives": negative.sum(),
            "masked_fraction": (left_out.sum() - self._one_sided[rows].sum()) / max(scores_tC.size(1) - 1, 1),
        }
        self.metrics = {name: self.metrics[name] + value for name, value in values.items()}
        self.num_without = self.num_without + (~positive.any(1)).sum()


def _negate(x_tC: Tensor, own: Tensor, others: Tensor | None) -> None:
    """Change the sign of each row's own entry, and of others, in place."""
    if others is not None:
        x_tC.mul_(1.0 - 2.0 * others)
    x_tC.scatter_(1, own, -x_tC.gather(1, own))
