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
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn.functional import softplus

from vembed_fs2.distributed import RowGather
from vembed_fs2.embedding.head import Similarity
from vembed_fs2.embedding.learned import LearnedPart
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
from vembed_fs2.losses.filters import Hardness, highest_negative, teacher_block
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
    """The directions in which a row must find its partner; ``query_to_document`` is always one of them."""

    partition: Literal["per_direction", "joint"] = "per_direction"
    """Whether each direction has its own softmax (the loss is their mean), or all have one."""

    similarity: Similarity = "cosine"
    """How embeddings are compared. ``maxsim`` is for multi-vector models; it sums over the vectors of a query."""

    negatives: Negatives = "global"
    """Whether negatives come from all ranks or from this rank only."""

    mask_same: bool = True
    """If ``True``, rows with the same label, query or document are not each other's negatives."""

    hardest: int | None = None
    """Only the given number of most similar negatives of each query count; ``None`` for all."""

    false_negatives: Literal["keep", "filter", "filter_by_teacher"] = "keep"
    """Whether pairs that are as similar as the positive are left out, by the model's similarity or a teacher's."""

    false_negative_margin: float = 0.0
    """How much less similar than the positive a negative must be."""

    false_negative_margin_type: Literal["absolute", "relative"] = "absolute"
    """Whether the margin is subtracted, or is a fraction of the positive's similarity."""

    hardness: Literal["none", "in_batch", "explicit", "all"] = "none"
    """Which negatives of a query weigh more the more similar they are."""

    hardness_strength: float = 0.0
    """A negative weighs ``exp(hardness_strength * similarity)`` times as much."""

    def errors(self) -> list[str]:
        """Return what is wrong with the values, one sentence each."""
        errors = positive_errors(self, ["temperature"])
        errors += choice_errors(
            self,
            ["partition", "similarity", "negatives", "false_negatives", "false_negative_margin_type", "hardness"],
        )
        errors += self._direction_errors()
        if self.hardest is not None and self.hardest < 1:
            errors.append(f"`hardest` must be greater than or equal to 1, but is {self.hardest}.")
        if not 0.0 <= self.hardness_strength < math.inf:
            errors.append(f"`hardness_strength` must be finite and not negative, but is {self.hardness_strength}.")
        if not math.isfinite(self.false_negative_margin):
            errors.append(f"`false_negative_margin` must be finite, but is {self.false_negative_margin}.")
        if self.false_negatives == "keep" and self.false_negative_margin != 0.0:
            errors.append("`false_negative_margin` is for a `false_negatives` other than 'keep'.")
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

    A row with a label but without a positive of its own has the other rows of its
    label as positives, without copies of itself (``mask_same``). Its loss is the mean
    over them, each against the negatives alone, as if the row were written once for
    each; zero if there are none. (In :class:`.MultiPositive` the positives compete
    with each other as well.) A negative is a false one if it is as similar as the most
    similar positive.

    Options: only the hardest negatives; false negatives filtered by margin (as
    in de Souza et al., "NV-Retriever", 2024, https://arxiv.org/abs/2407.15831)
    or by a teacher (Solatorio, "GISTEmbed", 2024,
    https://arxiv.org/abs/2402.16829); hard negatives weighted more (Lan et al.,
    "LLaVE", 2025, https://arxiv.org/abs/2503.04812).

    GISTEmbed's loss has all directions but ``document_to_query``, in one
    partition. It differs where rows have explicit negatives: there positives
    are compared with positives, here ``document_to_document`` means all. And
    here nothing is ever compared with itself.
    """

    def __init__(self, config: InfoNCEConfig | None = None, gather: RowGather | None = None) -> None:
        """
        :param gather: appends the rows of all ranks; ``None`` for one process.
        :raises ValueError: ``config`` is not valid.
        """
        self._config = checked(config or InfoNCEConfig())
        self._gather = scope(gather, self._config.negatives)

    def learned_parts(self, embedding_dim: int, teacher_dim: int | None = None) -> Sequence[LearnedPart]:
        return scale_parts(self._config)

    @property
    def uses_labels(self) -> bool:
        return True

    @property
    def needs_teacher(self) -> bool:
        return self._config.false_negatives == "filter_by_teacher"

    def compute(self, inputs: LossInput) -> LossOutput:
        """
        :raises ValueError: the temperature is to be learned, but the model does not give it; or an option needs a
            teacher's embeddings, or the rows that explicit negatives belong to, but ``rows`` does not have them.
        """
        rows = gather_all(inputs, self._gather)
        scale = self._scale(inputs)
        tile = (_Softmax if rows.one_sided is None else _SeveralPositives)(rows, self._config, scale)
        loss = sum_over_tiles(tile.blocks, tile, [scale] if isinstance(scale, Tensor) else [])
        metrics = tile.metrics() | without_positive(inputs, tile.num_without)
        metrics["temperature"] = inputs.num_queries / torch.as_tensor(scale, device=loss.device).detach().squeeze()

        return LossOutput(loss, metrics)

    def _scale(self, inputs: LossInput) -> Tensor | float:
        if not self._config.learn_temperature:
            return 1.0 / self._config.temperature
        return learned_scale(inputs)


class _Softmax:
    """The loss of some rows: one softmax over the scores of all directions, or the mean of one for each."""

    def __init__(self, rows: GlobalRows, config: InfoNCEConfig, scale: Tensor | float) -> None:
        # Queries to documents come first.
        directions = [d for d in _EXCLUSIONS if d in config.directions]
        numbers = list(range(len(directions)))
        self._groups = [numbers] if config.partition == "joint" else [[n] for n in numbers]
        self._config = config
        self._scale = float(scale.detach()) if isinstance(scale, Tensor) else scale
        self._is_learned = isinstance(scale, Tensor)
        self._target = rows.target

        # The column of each row's positive in each direction; some directions have none.
        self._own = [{"query_to_document": self._target, "document_to_query": rows.row}.get(d) for d in directions]
        self._excluded = [_EXCLUSIONS[d](rows, mask_same=config.mask_same) for d in directions]
        self._hardness: Hardness | None = None
        if config.hardness != "none":
            self._hardness = Hardness(rows, config.hardness, config.hardness_strength)

        self._num_found, self._num_masked, self.num_without = torch.zeros(
            3, dtype=torch.int64, device=rows.positive.device
        )
        self._num_queries, self._num_others = rows.inputs.num_queries, rows.document.size(0) - 1
        self.blocks = _blocks(rows, directions, config)

    def __call__(self, scores: list[Tensor], rows: slice, scalars: list[Tensor]) -> TileGrads:
        scores, by_teacher = scores[: len(self._own)], scores[len(self._own) :]
        positive = scores[0].gather(1, self._own_columns(0, rows))
        self._leave_out(scores, by_teacher or scores, rows)
        top = self._count_found(scores[0], positive, rows)
        raw = [s.clone() for s in scores] if self._is_learned else []

        if self._hardness is not None:
            scores[0].add_(self._hardness(scores[0], rows), alpha=1.0 / self._scale)
            top = scores[0].amax(1, keepdim=True)

        weight = 1.0 / len(self._groups)
        factor = weight * self._scale
        loss_s = -self._scale * positive.squeeze(1)
        for group in self._groups:
            tops = [top if i == 0 else scores[i].amax(1, keepdim=True) for i in group]
            loss_s += weight * softmax_([scores[i] for i in group], tops, scale=self._scale, factor=factor)

            # The first of each group holds the positives.
            own = self._own_columns(group[0], rows)
            scores[group[0]].scatter_add_(1, own, torch.full_like(positive, -factor))

        return TileGrads(loss_s.sum(), [*scores, *(None for _ in by_teacher)], self._scale_grads(scores, raw))

    def metrics(self) -> dict[str, Tensor]:
        return {
            "accuracy": self._num_found,
            "num_negatives": self._num_queries * self._num_others - self._num_masked,
            "masked_fraction": self._num_masked / max(self._num_others, 1),
        }

    def _own_columns(self, direction: int, rows: slice) -> Tensor:
        own = self._own[direction]
        assert own is not None
        return own[rows].unsqueeze(1)

    def _leave_out(self, scores: list[Tensor], judged: list[Tensor], rows: slice) -> None:
        """Give pairs that do not count a score of minus infinity.

        :param judged: the scores that say which negatives are false.
        """
        config, highest = self._config, None
        if config.false_negatives != "keep":
            positive = judged[0].gather(1, self._own_columns(0, rows))
            relative = config.false_negative_margin_type == "relative"
            highest = highest_negative(positive, config.false_negative_margin, relative=relative)

        for idx, s_sC in enumerate(scores):
            excluded = self._excluded[idx].mask(rows)
            if highest is not None:
                false = judged[idx] > highest
                if self._own[idx] is not None:
                    false.scatter_(1, self._own_columns(idx, rows), False)
                excluded = false if excluded is None else excluded.logical_or_(false)

            if excluded is not None:
                s_sC.masked_fill_(excluded, -torch.inf)
                if idx == 0 and config.hardest is None:
                    self._num_masked += torch.count_nonzero(excluded)

        if config.hardest is not None:
            num_kept = _keep_hardest(scores[0], self._own_columns(0, rows), config.hardest)
            self._num_masked += scores[0].size(0) * self._num_others - num_kept

    def _count_found(self, scores_sC: Tensor, positive: Tensor, rows: slice) -> Tensor:
        """Compare positives with what is left, and put them back. *Returns:* the greatest score of each row."""
        own = self._own_columns(0, rows)
        best = scores_sC.scatter_(1, own, -torch.inf).amax(1, keepdim=True)
        scores_sC.scatter_(1, own, positive)

        # A tie with the positive does not count as found.
        self._num_found += torch.count_nonzero(best < positive)

        return torch.maximum(best, positive)

    def _scale_grads(self, grads: list[Tensor], raw: list[Tensor]) -> list[Tensor]:
        """The gradient with respect to the scale, from those with respect to the scores, which have it as a factor."""
        # A pair that is left out has a score of -inf and a gradient of 0.
        parts = [z.nan_to_num_(neginf=0.0).mul_(grad).sum() for grad, z in zip(grads, raw)]
        return [torch.stack(parts).sum() / self._scale] if parts else []


class _SeveralPositives(_Softmax):
    r"""The same for rows of which some have several positives, or none.

    With :math:`Z` the sum of the exponentials of the negatives, the loss of a row is
    the mean of :math:`\log(1 + Z e^{-z_p})` over its positives.
    """

    def __init__(self, rows: GlobalRows, config: InfoNCEConfig, scale: Tensor | float) -> None:
        super().__init__(rows, config, scale)
        assert rows.one_sided is not None
        self._one_sided = rows.one_sided.long()
        self._num_negatives = torch.zeros_like(self._num_masked)

    def __call__(self, scores: list[Tensor], rows: slice, scalars: list[Tensor]) -> TileGrads:
        scores, by_teacher = scores[: len(self._own)], scores[len(self._own) :]
        positives = {group[0]: self._excluded[group[0]].positives(rows) for group in self._groups}
        highest = self._highest_negatives((by_teacher or scores)[0], positives[0])
        raw = [s.clone() for s in scores] if self._is_learned else []

        negatives = [
            self._negatives(i, s, judged, positives.get(i), highest, rows)
            for i, (s, judged) in enumerate(zip(scores, by_teacher or scores))
        ]
        self._count(scores[0], negatives[0], positives[0], rows)
        if self._hardness is not None:
            negatives[0].add_(self._hardness(negatives[0], rows), alpha=1.0 / self._scale)

        weight, factor = 1.0 / len(self._groups), self._scale / len(self._groups)
        loss = torch.zeros((), dtype=scores[0].dtype, device=scores[0].device)
        for group in self._groups:
            positive = positives[group[0]]
            log_total = _log_softmax_total([negatives[i] for i in group], scale=self._scale)

            # Each pair of a row and a positive, and how much it counts.
            x_sC = torch.add(log_total, scores[group[0]], alpha=-self._scale).masked_fill_(~positive, -torch.inf)
            share = 1.0 / positive.sum(1, keepdim=True).clamp_(min=1)
            loss += weight * (softplus(x_sC) * share).sum()

            pull = x_sC.sigmoid_().mul_(share)
            push = pull.sum(1, keepdim=True) * factor
            for i in group:
                negatives[i].mul_(push)
            negatives[group[0]].sub_(pull, alpha=factor)

        return TileGrads(loss, [*negatives, *(None for _ in by_teacher)], self._scale_grads(negatives, raw))

    def metrics(self) -> dict[str, Tensor]:
        return super().metrics() | {"num_negatives": self._num_negatives}

    def _highest_negatives(self, judged: Tensor, positive: Tensor) -> Tensor | None:
        """The greatest similarity that a negative of each row may have. *Returns:* ``[s, 1]``."""
        config = self._config
        if config.false_negatives == "keep":
            return None

        best = judged.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
        relative = config.false_negative_margin_type == "relative"
        highest = highest_negative(best, config.false_negative_margin, relative=relative)
        return highest.masked_fill_(best == -torch.inf, torch.inf)

    def _negatives(
        self, number: int, s_sC: Tensor, judged: Tensor, positive: Tensor | None, highest: Tensor | None, rows: slice
    ) -> Tensor:
        """The scores of the negatives in a direction; all others are -inf."""
        excluded = self._excluded[number].mask(rows)
        if highest is not None:
            false = judged > highest
            if positive is None and self._own[number] is not None:
                false.scatter_(1, self._own_columns(number, rows), False)
            excluded = false if excluded is None else excluded.logical_or_(false)

        negatives = s_sC.clone() if excluded is None else s_sC.masked_fill(excluded, -torch.inf)
        if positive is not None:
            negatives.masked_fill_(positive, -torch.inf)
        if number == 0 and self._config.hardest is not None:
            _keep_hardest(negatives, self._own_columns(0, rows), self._config.hardest)

        return negatives

    def _count(self, scores_sC: Tensor, negatives_sC: Tensor, positive: Tensor, rows: slice) -> None:
        count = positive.sum(1)
        num_negatives = torch.count_nonzero(negatives_sC > -torch.inf)
        self._num_negatives += num_negatives

        # What is left is neither a positive, nor a negative, nor the row itself.
        self._num_masked += (scores_sC.size(1) - self._one_sided[rows] - count).sum() - num_negatives

        best = scores_sC.masked_fill(~positive, -torch.inf).amax(1)
        self._num_found += torch.count_nonzero(best > negatives_sC.amax(1))
        self.num_without += torch.count_nonzero(count == 0)


def _log_softmax_total(tiles: Sequence[Tensor], *, scale: float) -> Tensor:
    """Replace scores by their probabilities under one softmax over all tiles; by 0 if all of a row are -inf.

    :returns: the log of the sum of the exponentials of the scaled scores. *Shape:* ``[s, 1]``.
    """
    top = torch.stack([z.amax(1, keepdim=True) for z in tiles]).amax(0).mul_(scale)
    top.masked_fill_(top == -torch.inf, 0.0)

    total = torch.zeros_like(top)
    for z in tiles:
        total += torch.add(-top, z, alpha=scale, out=z).exp_().sum(1, keepdim=True)
    for z in tiles:
        z.div_(total.clamp_min(torch.finfo(z.dtype).tiny))

    return total.log_().add_(top)


def _blocks(rows: GlobalRows, directions: Sequence[str], config: InfoNCEConfig) -> list[Block]:
    """List the comparisons: of embeddings in each direction; then a teacher's, if it finds false negatives."""
    num_queries = rows.inputs.num_queries
    starts = {"query": rows.start, "document": int(rows.target[0]) if num_queries else 0}

    # This rank's queries and positives among all ranks'.
    places = {side: slice(start, start + num_queries) for side, start in starts.items()}
    sides = [d.split("_to_") for d in directions]
    blocks = []
    for anchors, columns in sides:
        block = rows.block(anchors, columns, config.similarity)  # type: ignore[arg-type]
        if any(anchors == c for _, c in sides):
            # They are columns as well, so that they need only one gradient.
            x, mask = (rows.query, rows.query_mask) if anchors == "query" else (rows.document, rows.document_mask)
            block = replace(block, anchor=x, anchor_mask=mask, anchor_rows=places[anchors])
        blocks.append(block)

    if config.false_negatives == "filter_by_teacher":
        blocks += [teacher_block(rows, anchors, columns, places[anchors]) for anchors, columns in sides]

    return blocks


def softmax_(
    tiles: Sequence[Tensor], tops: Sequence[Tensor] | None = None, *, scale: float = 1.0, factor: float = 1.0
) -> Tensor:
    """Replace scores by their probabilities under one softmax over all tiles.

    :param tops: the greatest score of each row of each tile, if they are known. *Shape:* ``[t, 1]``.
    :param scale: what scores are multiplied by before. Positive.
    :param factor: what probabilities are multiplied by.
    :returns: the log of the sum of the exponentials of the scaled scores. *Shape:* ``[t]``.
    """
    if tops is None:
        tops = [z.amax(1, keepdim=True) for z in tiles]

    top = torch.stack(list(tops)).amax(0).mul_(scale)
    total = torch.zeros_like(top)
    for z in tiles:
        # In one pass, `scale * z - top`.
        total += torch.add(-top, z, alpha=scale, out=z).exp_().sum(1, keepdim=True)

    for z in tiles:
        z.mul_(factor / total)

    return (top + total.log()).squeeze(1)


def _keep_hardest(scores_sC: Tensor, own: Tensor, count: int) -> Tensor:
    """Leave out all but the most similar negatives, and the positives. *Returns:* how many are left."""
    scores_sC.scatter_(1, own, -torch.inf)
    top, index = scores_sC.topk(min(count, scores_sC.size(1)), dim=1)
    scores_sC.fill_(-torch.inf).scatter_(1, index, top)
    return torch.count_nonzero(top > -torch.inf)
