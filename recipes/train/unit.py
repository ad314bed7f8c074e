"""The training step."""

from __future__ import annotations

from collections.abc import MutableMapping
from time import perf_counter
from typing import final

import torch
from fairseq2.metrics import MetricBag
from fairseq2.metrics.aggregation import Mean, Sum
from fairseq2.trainer import TrainUnit
from torch import Tensor
from torch.nn import Module
from typing_extensions import override

from vembed_fs2.gradcache import GradCache
from vembed_fs2.losses import ContrastiveLoss, LossOutput, RowInfo
from vembed_fs2.models.embedding import Embeddings
from vembed_fs2.recipes.stop import StopRequest
from vembed_fs2.recipes.train.config import GradCacheSection
from vembed_fs2.recipes.train.dataset import ContrastiveBatch


@final
class ContrastiveTrainUnit(TrainUnit[ContrastiveBatch]):
    """One optimizer update: encode queries and documents, compare them over all ranks, carry the gradient back."""

    def __init__(
        self, dp_model: Module, loss: ContrastiveLoss, grad_cache: GradCacheSection, stop: StopRequest
    ) -> None:
        self._loss = loss
        self._step = GradCache(
            dp_model,
            self._compute_loss,
            chunk_tokens=grad_cache.chunk_tokens,
            activation_budget=grad_cache.activation_budget,
        )
        self._stop = stop
        self._output: LossOutput | None = None
        self._temperature = 0.0
        self._published_at = perf_counter()

    @override
    def prepare_metric_bag(self, metric_bag: MetricBag) -> None:
        for name in ("loss", "accuracy", "num_negatives", "masked_fraction", "temperature", "padding_fraction"):
            metric_bag.add(name, Mean())
        for name in ("num_chunks", "kept_fraction"):
            metric_bag.add(name, Mean())
        for name in ("num_queries", "num_tokens", "total_num_queries"):
            metric_bag.add(name, Sum())

    @override
    def set_step_nr(self, step_nr: int) -> None:
        self._stop.poll()

    @override
    def process_batch(self, batch: ContrastiveBatch, metric_bag: MetricBag) -> tuple[Tensor, int]:
        """Return the sum of the loss over this rank's queries, and their number.

        The trainer divides by the number of queries of all ranks and undoes the
        averaging of DDP and FSDP2, so the gradient is that of the global mean.
        """
        loss = self._step(batch.query, batch.document, rows=batch.rows)
        self._update_metrics(batch, loss.detach(), metric_bag)
        return loss, batch.num_queries

    def _compute_loss(self, query: Embeddings, document: Embeddings, rows: RowInfo) -> Tensor:
        output = self._loss(query.values, document.values, rows, query.logit_scale)
        self._output = output
        return output.loss

    @torch.inference_mode()
    def _update_metrics(self, batch: ContrastiveBatch, loss: Tensor, metric_bag: MetricBag) -> None:
        assert self._output is not None
        num_queries = batch.num_queries
        metric_bag.get("loss", Mean).update(loss / num_queries, weight=num_queries)
        for name, value in self._output.metrics.items():
            metric_bag.get(name, Mean).update(value / num_queries, weight=num_queries)
        stats = self._step.stats
        metric_bag.get("num_chunks", Mean).update(float(stats.num_chunks))
        metric_bag.get("kept_fraction", Mean).update(stats.kept_fraction)
        metric_bag.get("padding_fraction", Mean).update(stats.padding_fraction)
        metric_bag.get("num_queries", Sum).update(num_queries)
        metric_bag.get("total_num_queries", Sum).update(num_queries)
        metric_bag.get("num_tokens", Sum).update(stats.num_tokens)

    @override
    def process_metric_values(self, values: MutableMapping[str, object]) -> None:
        now = perf_counter()
        elapsed, self._published_at = now - self._published_at, now
        for source, rate in (("num_queries", "queries_per_second"), ("num_tokens", "tokens_per_second")):
            values[rate] = float(values.pop(source)) / max(elapsed, 1e-9)  # type: ignore[arg-type]
