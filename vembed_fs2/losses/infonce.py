"""InfoNCE.

van den Oord et al., "Representation Learning with Contrastive Predictive
Coding", 2018, https://arxiv.org/abs/1807.03748; in two directions, Radford et
al., "Learning Transferable Visual Models From Natural Language Supervision",
2021, https://arxiv.org/abs/2103.00020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from vembed_fs2.distributed import RowGather
from vembed_fs2.losses.common import MAX_LOGIT_SCALE, ContrastiveLoss, LossOutput, RowInfo, gather_rows


@dataclass(kw_only=True)
class InfoNCEConfig:
    temperature: float = 0.05
    """What similarities are divided by. The initial value, if it is learned and the model has none."""

    learn_temperature: bool = False
    """If ``True``, the temperature is a parameter of the model."""

    directions: Literal["query_to_document", "both"] = "query_to_document"
    """Whether documents are to find their queries, too."""

    similarity: Literal["cosine", "dot"] = "cosine"
    """How embeddings are compared."""

    negatives: Literal["global", "local"] = "global"
    """Whether negatives come from all ranks or from the own rank only."""

    mask_same: bool = True
    """If ``True``, rows with the same label, query or document are not each other's negatives."""

    def errors(self) -> list[str]:
        """What is wrong with the values."""
        errors = [] if self.temperature > 0.0 else [f"`temperature` must be positive, but is {self.temperature}."]
        hints = get_type_hints(InfoNCEConfig)
        for name in ("directions", "similarity", "negatives"):
            value, known = getattr(self, name), get_args(hints[name])
            if value not in known:
                errors.append(f"`{name}` must be one of {', '.join(known)}, but is {value!r}.")
        return errors


class InfoNCE(ContrastiveLoss):
    r"""Cross-entropy of each query's positive among all documents.

    .. math:: \ell_i = -\log \frac{e^{s(q_i, d_i)/\tau}}{\sum_{j \in C_i} e^{s(q_i, d_j)/\tau}}

    :math:`C_i` holds the positive of :math:`i`, the positives of all other rows
    and the explicit negatives of all rows, without those that are known to be
    no negatives: documents of rows with the same label or query, copies of the
    positive, copies of the query. With both directions, the loss of a row is
    the mean of :math:`\ell_i` and of its document's loss over all queries.
    """

    def __init__(self, config: InfoNCEConfig | None = None, gather: RowGather | None = None) -> None:
        """
        :param gather: appends the rows of all ranks; ``None`` for one process.
        :raises ValueError: ``config`` is not valid.
        """
        self._config = config or InfoNCEConfig()
        if errors := self._config.errors():
            raise ValueError(" ".join(errors))
        self._gather = gather if gather is not None and self._config.negatives == "global" else RowGather()

    @property
    def initial_logit_scale(self) -> float | None:
        return -math.log(self._config.temperature) if self._config.learn_temperature else None

    def __call__(
        self, query_bD: Tensor, document_mD: Tensor, rows: RowInfo, logit_scale: Tensor | None = None
    ) -> LossOutput:
        rows.check(query_bD.size(0), document_mD.size(0))
        # Autocast would round similarities to 8 bits before the temperature enlarges them.
        with torch.autocast(query_bD.device.type, enabled=False):
            return self._compute(query_bD.float(), document_mD.float(), rows, logit_scale)

    def _compute(self, query_bD: Tensor, document_mD: Tensor, rows: RowInfo, logit_scale: Tensor | None) -> LossOutput:
        num_queries = query_bD.size(0)
        if self._config.similarity == "cosine":
            query_bD, document_mD = normalize(query_bD, dim=-1), normalize(document_mD, dim=-1)
        scale = self._scale(logit_scale)
        query_bD = query_bD * scale

        gather = self._gather
        counts_b, counts_m = gather.counts(num_queries), gather.counts(document_mD.size(0))
        everyone = gather_rows(rows, gather, counts_b, counts_m)
        document_MD = gather(document_mD, counts_m)
        positive_B = _positives(counts_b, counts_m, rows.labels.device)
        start = sum(counts_b[: gather.rank])
        target_b = positive_B[start : start + num_queries]

        logits_bM = query_bD @ document_MD.T
        if self._config.mask_same:
            logits_bM = logits_bM.masked_fill(_same_documents(rows, everyone, positive_B, target_b), -torch.inf)
        loss = cross_entropy(logits_bM, target_b, reduction="sum")
        metrics = _metrics(logits_bM.detach(), target_b)
        metrics["temperature"] = num_queries / torch.as_tensor(scale, device=query_bD.device).detach().squeeze()
        if self._config.directions == "both":
            query_BD = gather(query_bD, counts_b)
            target_b = torch.arange(start, start + num_queries, device=query_bD.device)
            logits_bB = document_mD[:num_queries] @ query_BD.T
            if self._config.mask_same:
                logits_bB = logits_bB.masked_fill(_same_queries(rows, everyone, positive_B, target_b), -torch.inf)
            loss = (loss + cross_entropy(logits_bB, target_b, reduction="sum")) / 2
        return LossOutput(loss, metrics)

    def _scale(self, logit_scale: Tensor | None) -> Tensor | float:
        if not self._config.learn_temperature:
            return 1.0 / self._config.temperature
        if logit_scale is None:
            raise ValueError("`learn_temperature` is set, but the model gives no `logit_scale`.")
        return logit_scale.float().clamp(max=MAX_LOGIT_SCALE).exp()


def _positives(counts_b: list[int], counts_m: list[int], device: torch.device) -> Tensor:
    """The column of each query's positive, for the queries of all ranks. *Returns:* ``[B]``."""
    parts, start = [], 0
    for num_queries, num_documents in zip(counts_b, counts_m):
        parts.append(torch.arange(start, start + num_queries, device=device))
        start += num_documents
    return torch.cat(parts)


def _same_documents(rows: RowInfo, everyone: RowInfo, positive_B: Tensor, target_b: Tensor) -> Tensor:
    """Which documents are no negatives of this rank's queries. *Returns:* ``[b, M]``, bool."""
    num_documents = everyone.document_ids.size(0)
    # An explicit negative belongs to no class and answers no query.
    column_label = everyone.labels.new_zeros(num_documents)
    column_label[positive_B] = everyone.labels
    column_query = everyone.query_ids.new_full((num_documents,), -1)
    column_query[positive_B] = everyone.query_ids
    document_ids = everyone.document_ids
    same = _equal(document_ids[target_b], document_ids) | _equal(rows.query_ids, document_ids)
    same |= _equal(rows.query_ids, column_query)
    same |= _equal(rows.labels, column_label) & (rows.labels != 0).unsqueeze(1)
    same[torch.arange(target_b.size(0), device=same.device), target_b] = False
    return same


def _same_queries(rows: RowInfo, everyone: RowInfo, positive_B: Tensor, target_b: Tensor) -> Tensor:
    """Which queries are no negatives of this rank's positives. *Returns:* ``[b, B]``, bool."""
    document_b = everyone.document_ids[positive_B][target_b]
    same = _equal(document_b, everyone.document_ids[positive_B]) | _equal(document_b, everyone.query_ids)
    same |= _equal(rows.query_ids, everyone.query_ids)
    same |= _equal(rows.labels, everyone.labels) & (rows.labels != 0).unsqueeze(1)
    same[torch.arange(target_b.size(0), device=same.device), target_b] = False
    return same


def _equal(row: Tensor, column: Tensor) -> Tensor:
    return row.unsqueeze(1) == column.unsqueeze(0)


def _metrics(logits_bM: Tensor, target_b: Tensor) -> dict[str, Tensor]:
    candidates = (logits_bM != -torch.inf).sum(1)
    positive = logits_bM.gather(1, target_b.unsqueeze(1))
    # A tie with the positive does not count as found.
    found = (logits_bM >= positive).sum(1) == 1
    masked = logits_bM.size(1) - candidates
    return {
        "accuracy": found.sum(),
        "num_negatives": (candidates - 1).sum(),
        "masked_fraction": masked.sum() / max(logits_bM.size(1) - 1, 1),
    }
