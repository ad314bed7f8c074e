"""InfoNCE.

van den Oord et al., "Representation Learning with Contrastive Predictive
Coding", 2018, https://arxiv.org/abs/1807.03748; in two directions, Radford et
al., "Learning Transferable Visual Models From Natural Language Supervision",
2021, https://arxiv.org/abs/2103.00020; in four with one partition, Li et al.,
"Towards General Text Embeddings with Multi-stage Contrastive Learning", 2023,
https://arxiv.org/abs/2308.03281.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from vembed_fs2.distributed import RowGather
from vembed_fs2.losses import masks
from vembed_fs2.losses.common import (
    MAX_LOGIT_SCALE,
    GlobalRows,
    LossInput,
    LossOutput,
    Negatives,
    Objective,
    choice_errors,
    gather_all,
    positive_errors,
    scope,
)
from vembed_fs2.losses.filters import FalseNegativeFilter, Hardness
from vembed_fs2.losses.similarity import SimilarityName
from vembed_fs2.losses.tiles import Block, TileGrads, sum_over_tiles

Direction: TypeAlias = Literal["query_to_document", "document_to_query", "query_to_query", "document_to_document"]

_EXCLUSIONS: Final = {
    "query_to_document": masks.query_to_document,
    "document_to_query": masks.document_to_query,
    "query_to_query": masks.query_to_query,
    "document_to_document": masks.document_to_document,
}


@dataclass(kw_only=True)
class InfoNCEConfig:
    temperature: float = 0.05
    """What similarities are divided by. The initial value, if it is learned and the model has none."""

    learn_temperature: bool = False
    """If ``True``, the temperature is a parameter of the model."""

    directions: Sequence[Direction] = ("query_to_document",)
    """What is to find its partner among what; ``query_to_document`` is always one of them."""

    partition: Literal["per_direction", "joint"] = "per_direction"
    """Whether each direction has its own softmax (the loss is their mean), or all have one."""

    similarity: SimilarityName = "cosine"
    """How embeddings are compared. ``maxsim`` is for multi-vector models; it sums over the vectors of a query."""

    negatives: Negatives = "global"
    """Whether negatives come from all ranks or from the own rank only."""

    mask_same: bool = True
    """If ``True``, rows with the same label, query or document are not each other's negatives."""

    hardest: int | None = None
    """Only the given number of most similar negatives of each query count; ``None`` for all."""

    false_negatives: Literal["keep", "filter", "filter_by_teacher"] = "keep"
    """Whether pairs that are as similar as the positive are left out, by the own similarity or by a teacher's."""

    false_negative_margin: float = 0.0
    """How much less similar than the positive a negative must be."""

    false_negative_margin_type: Literal["absolute", "relative"] = "absolute"
    """Whether the margin is subtracted, or is a fraction of the positive's similarity."""

    hardness: Literal["none", "in_batch", "explicit", "all"] = "none"
    """Which negatives of a query weigh more the more similar they are."""

    hardness_strength: float = 0.0
    """A negative weighs ``exp(hardness_strength * similarity)`` times as much."""

    def errors(self) -> list[str]:
        """What is wrong with the values."""
        errors = positive_errors(self, ["temperature"])
        errors += choice_errors(
            self,
            ["partition", "similarity", "negatives", "false_negatives", "false_negative_margin_type", "hardness"],
        )
        errors += self._direction_errors()
        if self.hardest is not None and self.hardest < 1:
            errors.append(f"`hardest` must be greater than or equal to 1, but is {self.hardest}.")
        if self.hardness_strength < 0.0:
            errors.append(f"`hardness_strength` must not be negative, but is {self.hardness_strength}.")
        if (self.hardness == "none") != (self.hardness_strength == 0.0):
            errors.append("`hardness` and `hardness_strength` must be given together.")
        return errors

    def _direction_errors(self) -> list[str]:
        known = get_args(Direction)
        names = self.directions
        if isinstance(names, str):
            return [f"`directions` must be a list, but is {names!r}."]
        errors = [f"`directions` must hold {', '.join(known)}, but holds {n!r}." for n in names if n not in known]
        if "query_to_document" not in names or len(set(names)) != len(names):
            errors.append("`directions` must hold 'query_to_document', and each direction once.")
        alone = {"query_to_query", "document_to_document"} & set(names)
        if alone and self.partition == "per_direction":
            errors.append(f"`partition` must be 'joint' with {', '.join(sorted(alone))}: it holds no positive itself.")
        return errors


class InfoNCE(Objective):
    r"""Cross-entropy of each query's positive among all documents.

    .. math:: \ell_i = -\log \frac{e^{s(q_i, d_i)/\tau}}{\sum_{j \in C_i} e^{s(q_i, d_j)/\tau}}

    :math:`C_i` holds the positive of :math:`i`, the positives of all other rows
    and the explicit negatives of all rows, without those that are known to be
    no negatives: documents of rows with the same label or query, copies of the
    positive, copies of the query. With several directions, the loss of a row is
    the mean of theirs, or one softmax over all of them (``partition``).

    Options: only the hardest negatives; false negatives filtered by margin (as
    in de Souza et al., "NV-Retriever", 2024, https://arxiv.org/abs/2407.15831)
    or by a teacher (Solatorio, "GISTEmbed", 2024,
    https://arxiv.org/abs/2402.16829); hard negatives weighted more (Lan et al.,
    "LLaVE", 2025, https://arxiv.org/abs/2503.04812).
    """

    def __init__(self, config: InfoNCEConfig | None = None, gather: RowGather | None = None) -> None:
        """
        :param gather: appends the rows of all ranks; ``None`` for one process.
        :raises ValueError: ``config`` is not valid.
        """
        self._config = config or InfoNCEConfig()
        if errors := self._config.errors():
            raise ValueError(" ".join(errors))
        self._gather = scope(gather, self._config.negatives)

    @property
    def initial_logit_scale(self) -> float | None:
        return -math.log(self._config.temperature) if self._config.learn_temperature else None

    @property
    def needs_teacher(self) -> bool:
        return self._config.false_negatives == "filter_by_teacher"

    def compute(self, inputs: LossInput) -> LossOutput:
        config = self._config
        rows = gather_all(inputs, self._gather)
        scale = self._scale(inputs)
        scalars = [scale] if isinstance(scale, Tensor) else []
        groups = [list(config.directions)] if config.partition == "joint" else [[d] for d in config.directions]
        total = torch.zeros((), device=inputs.query.device)
        metrics: dict[str, Tensor] = {}
        for directions in groups:
            tile = _Softmax(rows, config, directions, scale)
            loss = sum_over_tiles([_block(rows, d, config.similarity) for d in directions], tile, scalars)
            total = total + loss / len(groups)
            metrics = tile.metrics or metrics
        metrics["temperature"] = inputs.num_queries / torch.as_tensor(scale, device=total.device).detach().squeeze()
        return LossOutput(total, metrics)

    def _scale(self, inputs: LossInput) -> Tensor | float:
        if not self._config.learn_temperature:
            return 1.0 / self._config.temperature
        if inputs.logit_scale is None:
            raise ValueError("`learn_temperature` is set, but the model gives no `logit_scale`.")
        return inputs.logit_scale.float().clamp(max=MAX_LOGIT_SCALE).exp()


def _block(rows: GlobalRows, direction: str, similarity: SimilarityName) -> Block:
    anchors, _, columns = direction.partition("_to_")
    return rows.block(anchors, columns, similarity)  # type: ignore[arg-type]


class _Softmax:
    """One softmax over the scores of one or several directions."""

    def __init__(
        self, rows: GlobalRows, config: InfoNCEConfig, directions: Sequence[str], scale: Tensor | float
    ) -> None:
        self._rows = rows
        self._hardest = config.hardest
        self._learned = isinstance(scale, Tensor)
        self._scale = 1.0 if isinstance(scale, Tensor) else scale
        self._directions = directions
        self._excluded = [_EXCLUSIONS[d](rows, mask_same=config.mask_same) for d in directions]
        # Where the positive of each row stands in each direction; nowhere in some.
        own = {"query_to_document": rows.target, "document_to_query": rows.row}
        self._own = [own.get(d) for d in directions]
        self._filter = None
        if config.false_negatives != "keep":
            by_teacher = config.false_negatives == "filter_by_teacher"
            relative = config.false_negative_margin_type == "relative"
            self._filter = FalseNegativeFilter(
                rows, directions, config.false_negative_margin, relative=relative, by_teacher=by_teacher
            )
        self._hardness = None
        if config.hardness != "none":
            self._hardness = Hardness(rows, config.hardness, config.hardness_strength)
        self.metrics: dict[str, Tensor] = {}

    def __call__(self, scores: list[Tensor], rows: slice, scalars: list[Tensor]) -> TileGrads:
        scale = scalars[0] if self._learned else self._scale
        positive = self._positive(scores, rows)
        for idx, (direction, z) in enumerate(zip(self._directions, scores)):
            excluded = self._excluded[idx].mask(rows)
            if self._filter is not None:
                excluded = self._filter(idx, z, positive, rows, excluded)
            if excluded is not None:
                z.masked_fill_(excluded, -torch.inf)
            if self._hardest is not None and direction == "query_to_document":
                _keep_hardest(z, self._own[idx][rows], self._hardest)  # type: ignore[index]
            if direction == "query_to_document":
                self._add_metrics(z, positive, scale)
        raw = [z.clone() for z in scores] if self._learned else []
        for direction, z in zip(self._directions, scores):
            extra = None
            if self._hardness is not None and direction == "query_to_document":
                extra = self._hardness(z, rows)
            z.mul_(scale)
            if extra is not None:
                z.add_(extra)
        log_sum = softmax_(scores)
        loss = (log_sum - positive * scale).sum()
        scale_grad: Tensor | None = None
        if self._learned:
            # An excluded score is -inf where its probability is 0.
            parts = [(p * z.nan_to_num_(neginf=0.0)).sum() for p, z in zip(scores, raw)]
            scale_grad = torch.stack(parts).sum() - positive.sum()
        for own, p in zip(self._own, scores):
            if own is not None:
                # The loss has the positive's score once, whichever direction it is taken from.
                p.scatter_add_(1, own[rows].unsqueeze(1), p.new_full((p.size(0), 1), -1.0))
                break
        for p in scores:
            p.mul_(scale)
        return TileGrads(loss, scores, [scale_grad] if self._learned else [])

    def _positive(self, scores: list[Tensor], rows: slice) -> Tensor:
        """The score of each row's positive. *Returns:* ``[t]``."""
        for own, s in zip(self._own, scores):
            if own is not None:
                return s.gather(1, own[rows].unsqueeze(1)).squeeze(1)
        raise AssertionError("No direction holds the positives.")

    def _add_metrics(self, scores_tC: Tensor, positive_t: Tensor, scale: Tensor | float) -> None:
        candidates = (scores_tC != -torch.inf).sum(1)
        # A tie with the positive does not count as found.
        found = (scores_tC >= positive_t.unsqueeze(1)).sum(1) == 1
        masked = scores_tC.size(1) - candidates
        values = {
            "accuracy": found.sum(),
            "num_negatives": (candidates - 1).sum(),
            "masked_fraction": masked.sum() / max(scores_tC.size(1) - 1, 1),
        }
        self.metrics = {k: v + self.metrics.get(k, 0) for k, v in values.items()}


def softmax_(tiles: Sequence[Tensor]) -> Tensor:
    """Replace scores by their probabilities under one softmax over all tiles; return the log of the sum. ``[t]``."""
    top = torch.stack([z.amax(1) for z in tiles]).amax(0).unsqueeze(1)
    total = torch.zeros_like(top)
    for z in tiles:
        total += z.sub_(top).exp_().sum(1, keepdim=True)
    for z in tiles:
        z.div_(total)
    return (top + total.log()).squeeze(1)


def _keep_hardest(scores_tC: Tensor, own_t: Tensor, count: int) -> None:
    """Leave out all but the most similar negatives, in place."""
    if scores_tC.size(1) <= count + 1:
        return
    own = own_t.unsqueeze(1)
    positive = scores_tC.gather(1, own)
    scores_tC.scatter_(1, own, -torch.inf)
    top, index = scores_tC.topk(count, dim=1)
    scores_tC.fill_(-torch.inf).scatter_(1, index, top).scatter_(1, own, positive)
