"""The triplet loss over negatives of the batch.

Schroff et al., "FaceNet: A Unified Embedding for Face Recognition and
Clustering", 2015, https://arxiv.org/abs/1503.03832; batch-hard, batch-all and
the soft margin, Hermans et al., "In Defense of the Triplet Loss for Person
Re-Identification", 2017, https://arxiv.org/abs/1703.07737.

Legend: b queries of this rank, t queries of a tile, C documents of all ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from vembed_fs2.distributed import RowGather
from vembed_fs2.embedding.head import Similarity
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
    scope,
    without_positive,
)
from vembed_fs2.losses.tiles import TileGrads, sum_over_tiles


@dataclass(kw_only=True)
class TripletConfig:
    margin: float = 0.2
    """How much more similar to its query than a negative a positive must be. On unit vectors, FaceNet's squared
    distance is ``2 - 2 * cosine``: its margin of 0.2 is 0.1 here."""

    soft_margin: bool = False
    """If ``True``, the loss of a triplet is ``log(1 + exp(x))`` in place of ``max(x, 0)``."""

    mining: Literal["hardest", "semi_hard", "all"] = "hardest"
    """Which negatives a query is compared with; see :class:`Triplet`."""

    similarity: Similarity = "cosine"
    """How embeddings are compared. ``maxsim`` is for multi-vector models; it sums over the vectors of a query."""

    negatives: Negatives = "global"
    """Whether negatives come from all ranks or from this rank only."""

    mask_same: bool = True
    """If ``True``, rows with the same label, query or document are not each other's negatives."""

    def errors(self) -> list[str]:
        """Return what is wrong with the values, one sentence each."""
        errors = choice_errors(self, ["mining", "similarity", "negatives"])
        if not 0.0 <= self.margin < math.inf:
            rule = "must be finite" if self.margin == math.inf else "must not be negative"
            errors.append(f"`margin` {rule}, but is {self.margin}.")
        return errors


class Triplet(Objective):
    r"""A positive must be more similar to its query than negatives are, by a margin.

    .. math:: \ell(i, n) = \phi(m + s(q_i, d_n) - s(q_i, d_i))

    with :math:`\phi(x) = \max(x, 0)`, or :math:`\log(1 + e^x)` for a soft
    margin. In terms of the distance :math:`1 - s`, it is
    :math:`\phi(m + \delta(q_i, d_i) - \delta(q_i, d_n))`. The negatives of a
    query are the positives of all other rows and the explicit negatives of all
    rows, without those that are known to be none (``mask_same``). The loss of a
    query is, by ``mining``:

    - ``hardest``: the loss of its most similar negative.
    - ``semi_hard``: the loss of the most similar negative that is less similar than
      the positive; if there is none, the loss of the least similar negative of all.
      (FaceNet does not say what to do then; this is what the implementations in
      TensorFlow Addons and sentence-transformers do.)
    - ``all``: the mean over its negatives whose loss is not zero. For a
      soft margin, which is never zero, over all of them.

    A row with a label but without a positive of its own has the other rows of its
    label as positives, without copies of itself (``mask_same``): ``hardest`` compares
    the least similar of them (batch hard of Hermans et al.), ``semi_hard`` takes the
    mean over them, and ``all`` over all pairs of a positive and a negative.

    A query without negatives, or without positives, has a loss of zero. ``active_fraction`` is the
    fraction of the chosen negatives (of all, for ``all``) that violate the margin.
    """

    def __init__(self, config: TripletConfig | None = None, gather: RowGather | None = None) -> None:
        """
        :param gather: appends the rows of all ranks; ``None`` for one process.
        :raises ValueError: ``config`` is not valid.
        """
        self._config = checked(config or TripletConfig())
        self._gather = scope(gather, self._config.negatives)

    @property
    def uses_labels(self) -> bool:
        return True

    def compute(self, inputs: LossInput) -> LossOutput:
        config = self._config
        rows = gather_all(inputs, self._gather)
        tile = (_TripletTile if rows.one_sided is None else _SeveralPositives)(rows, config)
        loss = sum_over_tiles([rows.block("query", "document", config.similarity)], tile)
        return LossOutput(loss, tile.metrics | without_positive(inputs, tile.num_without))


class _TripletTile:
    """The loss of a tile of queries, its gradient, and what was seen."""

    def __init__(self, rows: GlobalRows, config: TripletConfig) -> None:
        self._config = config
        self._target = rows.target
        self._excluded = masks.query_to_document(rows, mask_same=config.mask_same)
        zero = torch.zeros((), device=rows.query.device)
        names = ("accuracy", "active_fraction", "num_negatives", "masked_fraction")
        self.metrics = dict.fromkeys(names, zero)
        self.num_without = zero
        """The number of queries without a positive."""

    def __call__(self, scores: list[Tensor], rows: slice, scalars: list[Tensor]) -> TileGrads:
        s_tC = scores[0]
        own = self._target[rows].unsqueeze(1)
        positive = s_tC.gather(1, own)

        excluded = self._excluded.mask(rows)
        if excluded is not None:
            s_tC.masked_fill_(excluded, -torch.inf)

        s_tC.scatter_(1, own, -torch.inf)  # Only the negatives are left.
        num_negatives = (s_tC != -torch.inf).sum(1)
        found = s_tC.amax(1, keepdim=True) < positive

        if self._config.mining == "all":
            loss, active = self._all(s_tC, positive, num_negatives)
        else:
            loss, active = self._one(s_tC, positive)

        # Each row holds the gradient of its negatives now; the positive's is the opposite.
        s_tC.scatter_(1, own, -s_tC.sum(1, keepdim=True))
        num_others = s_tC.size(1) - 1
        values = {
            "accuracy": found.sum(),
            "active_fraction": active.sum(),
            "num_negatives": num_negatives.sum(),
            "masked_fraction": (num_others - num_negatives).sum() / max(num_others, 1),
        }
        self.metrics = {name: self.metrics[name] + value for name, value in values.items()}

        return TileGrads(loss, [s_tC])

    def _one(self, s_tC: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        """Compare each query with one negative; replace the scores of negatives by their gradient.

        *Returns:* the sum of the losses, and whether each query violates the margin: ``[t]``.
        """
        best, index = s_tC.max(1, keepdim=True) if self._config.mining == "hardest" else _semi_hard(s_tC, positive)
        x = best + (self._config.margin - positive)
        loss = softplus(x) if self._config.soft_margin else x.clamp_min(0.0)
        grad = x.sigmoid() if self._config.soft_margin else (x > 0.0).to(x.dtype)
        s_tC.zero_().scatter_(1, index, grad)

        return loss.sum(), (x > 0.0).squeeze(1)

    def _all(self, s_tC: Tensor, positive: Tensor, num_negatives: Tensor) -> tuple[Tensor, Tensor]:
        """Compare each query with all negatives; replace their scores by their gradient.

        *Returns:* the sum of the losses, and the fraction of each query's negatives that violate the margin: ``[t]``.
        """
        x_tC = s_tC.add_(self._config.margin - positive)
        num_active = (x_tC > 0.0).sum(1)
        if self._config.soft_margin:
            count, losses = num_negatives.clamp_min(1), softplus(x_tC).sum(1)
            x_tC.sigmoid_()
        else:
            count, losses = num_active.clamp_min(1), x_tC.clamp_min_(0.0).sum(1)
            x_tC.sign_()

        x_tC.div_(count.unsqueeze(1))
        return (losses / count).sum(), num_active / num_negatives.clamp_min(1)


class _SeveralPositives(_TripletTile):
    """The same for rows of which some have several positives, or none."""

    def __init__(self, rows: GlobalRows, config: TripletConfig) -> None:
        super().__init__(rows, config)
        assert rows.one_sided is not None
        self._one_sided = rows.one_sided.long()

    def __call__(self, scores: list[Tensor], rows: slice, scalars: list[Tensor]) -> TileGrads:
        (s_tC,) = scores
        positive, excluded = self._excluded.positives(rows), self._excluded.mask(rows)
        others = positive if excluded is None else positive | excluded
        negatives = s_tC.masked_fill(others, -torch.inf)
        num_positives, num_negatives = positive.sum(1), (~others).sum(1)
        best = s_tC.masked_fill(~positive, -torch.inf).amax(1)
        found = best > negatives.amax(1)

        if self._config.mining == "hardest":
            loss, active, grad_tC = self._hardest(s_tC, positive, negatives)
        else:
            loss, active, grad_tC = self._each(s_tC, positive, negatives, num_positives, num_negatives)

        num_masked = (s_tC.size(1) - self._one_sided[rows] - num_positives - num_negatives).sum()
        self.num_without = self.num_without + (num_positives == 0).sum()
        values = {
            "accuracy": found.sum(),
            "active_fraction": active.sum(),
            "num_negatives": num_negatives.sum(),
            "masked_fraction": num_masked / max(s_tC.size(1) - 1, 1),
        }
        self.metrics = {name: self.metrics[name] + value for name, value in values.items()}

        return TileGrads(loss, [grad_tC])

    def _hardest(self, s_tC: Tensor, positive: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compare the least similar positive with the most similar negative.

        *Returns:* the sum of the losses; whether each row violates the margin, ``[t]``; and the gradient, ``[t, C]``.
        """
        worst, worst_index = s_tC.masked_fill(~positive, torch.inf).min(1, keepdim=True)
        best, best_index = negatives.max(1, keepdim=True)

        x = best + (self._config.margin - worst)  # -inf without either.
        slope = self._slope(x)
        grad_tC = torch.zeros_like(s_tC).scatter_(1, best_index, slope)
        grad_tC.scatter_add_(1, worst_index, -slope)

        return self._loss(x).sum(), (x > 0.0).squeeze(1), grad_tC

    def _each(
        self, s_tC: Tensor, positive: Tensor, negatives: Tensor, num_positives: Tensor, num_negatives: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compare one positive after the other with its negatives, so that no table of all triplets is needed.

        *Returns:* as :meth:`_hardest`; but of each row the fraction of its triplets that violate the margin.
        """
        is_all = self._config.mining == "all"
        loss_t, num_active = torch.zeros_like(s_tC[:, 0]), torch.zeros_like(num_positives)
        grad_tC = torch.zeros_like(s_tC)
        columns = positive.byte().sort(dim=1, descending=True, stable=True).indices
        for number in range(int(num_positives.max())):
            # A row that has no more positives has a loss of zero from here on.
            column = columns[:, number : number + 1]
            similarity = s_tC.gather(1, column).masked_fill_((num_positives <= number).unsqueeze(1), torch.inf)

            best, index = (negatives, None) if is_all else _semi_hard(negatives, similarity)
            x = best + (self._config.margin - similarity)
            slope = self._slope(x)
            if index is None:
                grad_tC += slope
            else:
                grad_tC.scatter_add_(1, index, slope)

            grad_tC.scatter_add_(1, column, -slope.sum(1, keepdim=True))
            loss_t += self._loss(x).sum(1)
            num_active += (x > 0.0).sum(1)

        num_pairs = num_positives * (num_negatives if is_all else 1)
        count = num_active if is_all and not self._config.soft_margin else num_pairs
        count = count.clamp(min=1)

        return (loss_t / count).sum(), num_active / num_pairs.clamp(min=1), grad_tC.div_(count.unsqueeze(1))

    def _loss(self, x: Tensor) -> Tensor:
        return softplus(x) if self._config.soft_margin else x.clamp_min(0.0)

    def _slope(self, x: Tensor) -> Tensor:
        return x.sigmoid() if self._config.soft_margin else (x > 0.0).to(x.dtype)


def _semi_hard(s_tC: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """The most similar negative that is less similar than the positive; else the least similar.

    *Returns:* scores (-inf for a query without negatives) and columns: ``[t, 1]``.
    """
    below, index = s_tC.masked_fill(s_tC >= positive, -torch.inf).max(1, keepdim=True)
    least, least_index = s_tC.masked_fill(s_tC == -torch.inf, torch.inf).min(1, keepdim=True)
    none = below == -torch.inf
    least = least.masked_fill(least == torch.inf, -torch.inf)
    return torch.where(none, least, below), torch.where(none, least_index, index)
