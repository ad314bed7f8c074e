"""Regularisers that spread embeddings out over the sphere.

Zhang et al., "Learning Spread-out Local Feature Descriptors", 2017,
https://arxiv.org/abs/1708.06320, whose second moment is also a part of
EmbeddingGemma's objective (https://arxiv.org/abs/2509.20354); Wang and Isola,
"Understanding Contrastive Representation Learning through Alignment and
Uniformity on the Hypersphere", 2020, https://arxiv.org/abs/2005.10242.

Legend: n rows of this rank, t rows of a tile, N rows of all ranks, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vembed_fs2.distributed import RowGather
from vembed_fs2.losses.common import (
    LossInput,
    LossOutput,
    Negatives,
    Objective,
    checked,
    choice_errors,
    positive_errors,
    scope,
)
from vembed_fs2.losses.similarity import DotProduct
from vembed_fs2.losses.tiles import Block, TileGrads, sum_over_tiles

# Beyond it, sums of exp(2ts) over many pairs leave the range of single precision.
_MAX_UNIFORMITY_SCALE: Final = 32.0


@dataclass(kw_only=True)
class SpreadConfig:
    kind: Literal["global_orthogonal", "uniformity"] = "global_orthogonal"
    """Which regulariser; see :class:`Spread`."""

    mean_weight: float = 1.0
    """Weight of the squared mean similarity in ``global_orthogonal``."""

    second_moment_weight: float = 1.0
    """Weight of the second moment in ``global_orthogonal``. EmbeddingGemma has only this one."""

    uniformity_scale: float = 2.0
    """The factor ``t`` of squared distances in ``uniformity``."""

    negatives: Negatives = "global"
    """Whether the rows of all ranks are spread out together, or each rank's rows by themselves."""

    def errors(self) -> list[str]:
        """Return what is wrong with the values, one sentence each."""
        errors = choice_errors(self, ["kind", "negatives"]) + positive_errors(self, ["uniformity_scale"])
        if self.uniformity_scale > _MAX_UNIFORMITY_SCALE:
            errors.append(
                f"`uniformity_scale` must be at most {_MAX_UNIFORMITY_SCALE}, but is {self.uniformity_scale}."
            )

        weights = {"mean_weight": self.mean_weight, "second_moment_weight": self.second_moment_weight}
        errors += [
            f"`{name}` must not be negative, but is {value}." for name, value in weights.items() if not value >= 0
        ]
        if not any(weights.values()):
            errors.append("`mean_weight` and `second_moment_weight` must not both be 0.")

        return errors


class Spread(Objective):
    r"""A penalty on embeddings that lie close together, whatever they belong to.

    With :math:`s_{ij}` the cosines of all N(N-1) pairs of different rows,
    ``global_orthogonal`` compares their moments with the moments of the uniform distribution:

    .. math:: L = w_1 M_1^2 + w_2 \max(M_2 - 1/D, 0), \quad
        M_1 = \mathrm{mean}\,s_{ij}, \quad M_2 = \mathrm{mean}\,s_{ij}^2

    and ``uniformity`` takes the potential of a Gaussian kernel, :math:`x_i` being unit vectors:

    .. math:: L = \log \mathrm{mean}\, e^{-t \lVert x_i - x_j \rVert^2}

    It is computed over the queries and over the documents (positives and
    explicit negatives) of all ranks; the result is the mean of the two. Copies
    of a row count as other rows do. Fewer than two rows have a loss of zero.

    The value is one of the whole batch, not a sum over rows. To be divided by
    the number of queries of all ranks like any other objective, a rank returns
    it times the number of its own queries.
    """

    def __init__(self, config: SpreadConfig | None = None, gather: RowGather | None = None) -> None:
        """
        :param gather: appends the rows of all ranks; ``None`` for one process.
        :raises ValueError: ``config`` is not valid.
        """
        self._config = checked(config or SpreadConfig())
        self._gather = scope(gather, self._config.negatives)

    @property
    def uses_labels(self) -> bool:
        return True  # It asks for no positive.

    def compute(self, inputs: LossInput) -> LossOutput:
        """
        :raises ValueError: embeddings are of several vectors.
        """
        if inputs.query.ndim != 2:
            raise ValueError("Single vectors are spread out, but the model gives several per row.")

        compute = self._global_orthogonal if self._config.kind == "global_orthogonal" else self._uniformity
        parts = [compute(_Pairs(x, self._gather)) for x in (inputs.query, inputs.document)]

        # Every rank has the value of the whole batch. Weighted by its queries, the sum over ranks is the value times B.
        num_queries = inputs.num_queries
        loss = num_queries * torch.stack([loss for loss, _ in parts]).mean()
        names = parts[0][1]
        metrics = {n: num_queries * torch.stack([m[n].detach() for _, m in parts]).mean() for n in names}

        return LossOutput(loss, metrics)

    def _global_orthogonal(self, pairs: _Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        config = self._config
        mean = pairs.sum_of_similarities() / max(pairs.number, 1)

        loss, metrics = config.mean_weight * mean.square(), {"mean_similarity": mean}
        if config.second_moment_weight:
            second = pairs.sum_of(_square) / max(pairs.number, 1)
            loss = loss + config.second_moment_weight * (second - 1.0 / pairs.dim).clamp_min(0.0)
            metrics["second_moment"] = second

        return loss, metrics

    def _uniformity(self, pairs: _Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        t = self._config.uniformity_scale
        total = pairs.sum_of(lambda scores_tN, own: _exponential(scores_tN, own, 2.0 * t))

        # -t |x - y|^2 = 2t s - 2t. With no pairs the sum is 0; times 0, it keeps its place in the graph.
        value = (total / pairs.number).log() - 2.0 * t if pairs.number else total * 0.0
        return value, {"uniformity": value}


class _Pairs:
    """All pairs of different rows of all ranks.

    :param x_nD: this rank's embeddings.
    """

    def __init__(self, x_nD: Tensor, gather: RowGather) -> None:
        self._x = x_nD
        self._gather = gather
        self._counts = gather.counts(x_nD.size(0))
        self.dim = x_nD.size(1)
        num_rows = sum(self._counts)
        self.number = num_rows * (num_rows - 1)

    def sum_of_similarities(self) -> Tensor:
        """Sum the cosines of all pairs: that needs only the sum of the vectors. *Returns:* a scalar."""
        dtype = torch.promote_types(self._x.dtype, torch.float32)
        x_nD = normalize(self._x.to(dtype), dim=-1)
        total = self._over_ranks(torch.cat([x_nD.sum(0), x_nD.square().sum().view(1)]))
        return total[:-1].square().sum() - total[-1]

    def sum_of(self, function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        """Sum a function of the cosine over all pairs.

        :param function: takes the scores of a tile and the columns of its own
            rows; gives the sum over all others, and its gradient.
        :returns: a scalar.
        """
        start = sum(self._counts[: self._gather.rank])
        own = torch.arange(start, start + self._x.size(0), device=self._x.device)

        def tile(scores: list[Tensor], rows: slice, scalars: list[Tensor]) -> TileGrads:
            value, grad_tN = function(scores[0], own[rows].unsqueeze(1))
            # A pair is met in both orders, and both change the same row alike; so columns need no gradient,
            # nor ranks each other's.
            return TileGrads(value, [grad_tN.mul_(2.0)])

        everyone = self._gather(self._x.detach(), self._counts)
        total = sum_over_tiles([Block(self._x, everyone, DotProduct(), unit=True)], tile)
        return self._over_ranks(total.view(1)).squeeze()

    def _over_ranks(self, values: Tensor) -> Tensor:
        """Sum the values of all ranks."""
        return self._gather(values.unsqueeze(0), [1] * self._gather.size).sum(0)


def _square(scores_tN: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    scores_tN.scatter_(1, own, 0.0)
    return scores_tN.square().sum(), scores_tN.mul_(2.0)


def _exponential(scores_tN: Tensor, own: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores_tN.mul_(scale).scatter_(1, own, -torch.inf).exp_()
    return scores_tN.sum(), scores_tN.mul_(scale)
