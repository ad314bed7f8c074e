"""The training step."""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping
from typing import Final, final

import torch
from fairseq2.metrics import MetricBag
from fairseq2.metrics.aggregation import Sum
from fairseq2.trainer import TrainUnit
from torch import Tensor
from torch.nn import Module
from typing_extensions import override

from vembed_fs2.embedding.model import EmbeddingModel, Embeddings
from vembed_fs2.errors import VembedError
from vembed_fs2.gradcache import GradCache
from vembed_fs2.losses import LossOutput, Objective, RowInfo
from vembed_fs2.recipes.metrics import SumsByName
from vembed_fs2.recipes.stop import StopRequest
from vembed_fs2.recipes.train.config import GradCacheSection
from vembed_fs2.recipes.train.dataset import ContrastiveBatch
from vembed_fs2.recipes.train.finite import FiniteGuard
from vembed_fs2.recipes.train.sides import complete_queries
from vembed_fs2.recipes.train.teacher import Teacher

# Sums over batches; divided when they are published.
_PER_BATCH: Final = ("num_chunks", "kept_fraction", "padding_fraction", "bytes_per_token")


@final
class ContrastiveTrainUnit(TrainUnit[ContrastiveBatch]):
    """One optimizer update: encode queries and documents, compare them over all ranks, carry the gradient back."""

    def __init__(
        self,
        dp_model: Module,
        model: EmbeddingModel,
        loss: Objective,
        grad_cache: GradCacheSection,
        stop: StopRequest,
        teacher: Teacher | None = None,
    ) -> None:
        self.finite = FiniteGuard(dp_model)
        self._model = model
        self._loss = loss
        self._teacher = teacher
        self._step = GradCache(
            dp_model,
            self._compute_loss,
            chunk_tokens=grad_cache.chunk_tokens,
            chunk_patches=grad_cache.chunk_patches,
            activation_budget=grad_cache.activation_budget,
            grad_sync=grad_cache.grad_sync,
        )
        self._stop = stop
        self._output: LossOutput | None = None
        self.seconds_since_report: Callable[[], float] | None = None
        """The seconds of training since the last report, without validations. It is the trainer that counts them."""

        self.on_step: Callable[[int], None] | None = None
        """Called at the start of each step, with its number."""

    @override
    def prepare_metric_bag(self, metric_bag: MetricBag) -> None:
        self.finite.bag = metric_bag
        metric_bag.add("objective", SumsByName())
        for name in ("loss", *_PER_BATCH, "num_queries", "num_batches", "num_tokens", "total_num_queries"):
            metric_bag.add(name, Sum())

    @override
    def set_step_nr(self, step_nr: int) -> None:
        self._stop.poll()
        if self.on_step is not None:
            self.on_step(step_nr)

    @override
    def process_batch(self, batch: ContrastiveBatch, metric_bag: MetricBag) -> tuple[Tensor, int]:
        """Return the sum of the loss over this rank's queries, and their number.

        The trainer divides by the number of queries of all ranks and undoes the
        averaging of DDP and FSDP2, so the gradient is the global mean's.
        """
        self._model.clamp_learned_parts()

        if self._teacher is not None:
            assert batch.teacher_document is not None
            query = None if batch.teacher_query is None else Embeddings(self._teacher.encode(batch.teacher_query))
            document = Embeddings(self._teacher.encode(batch.teacher_document))
            batch.rows.teacher_query = complete_queries(query, document, batch.rows).values
            batch.rows.teacher_document = document.values

        roles = [batch.document] if batch.query is None else [batch.query, batch.document]
        loss = self._step(*roles, rows=batch.rows)
        self.finite.see(loss.detach())
        self._update_metrics(batch, loss.detach(), metric_bag)

        return loss, batch.num_queries

    def _compute_loss(self, *roles: Embeddings, rows: RowInfo) -> Tensor:
        *queries, document = roles
        query = complete_queries(queries[0] if queries else None, document, rows)
        output = self._loss(
            query.values,
            document.values,
            rows,
            query_mask=query.mask,
            document_mask=document.mask,
            **query.parts,
        )
        self._output = output
        return output.loss

    @torch.inference_mode()
    def _update_metrics(self, batch: ContrastiveBatch, loss: Tensor, metric_bag: MetricBag) -> None:
        assert self._output is not None
        stats = self._step.stats
        metric_bag.get("objective", SumsByName).update(self._output.metrics)

        sums: dict[str, Tensor | float] = {
            "loss": loss,
            "num_queries": batch.num_queries,
            "total_num_queries": batch.num_queries,
            "num_batches": 1,
            "num_tokens": stats.num_tokens,
            "num_chunks": stats.num_chunks,
            "kept_fraction": stats.kept_fraction,
            "padding_fraction": stats.padding_fraction,
            "bytes_per_token": stats.bytes_per_token,
        }
        for name, value in sums.items():
            metric_bag.get(name, Sum).update(value)

    @override
    def process_metric_values(self, values: MutableMapping[str, object]) -> None:
        sums = {name: float(values.pop(name)) for name in ("num_queries", "num_batches", "num_tokens")}  # type: ignore[arg-type]
        of_objective: dict[str, Tensor] = values.pop("objective")  # type: ignore[assignment]
        for name, value in (*of_objective.items(), ("loss", values["loss"])):
            values[name] = float(value) / max(sums["num_queries"], 1.0)  # type: ignore[arg-type]

        # As ever, where all rows have a positive of their own.
        for name in of_objective:
            if name.rpartition("/")[2] == "without_positive" and values[name] == 0.0:
                del values[name]

        _check_loss(float(values["loss"]))  # type: ignore[arg-type]

        for name in _PER_BATCH:
            values[name] = float(values[name]) / max(sums["num_batches"], 1.0)  # type: ignore[arg-type]

        values["total_num_queries"] = int(float(values["total_num_queries"]))  # type: ignore[arg-type]
        if self.seconds_since_report is not None:
            seconds = max(self.seconds_since_report(), 1e-9)
            values["queries_per_second"] = sums["num_queries"] / seconds
            values["tokens_per_second"] = sums["num_tokens"] / seconds


def _check_loss(loss: float) -> None:
    """Raise :class:`VembedError` if training has diverged, rather than to train on for nothing."""
    if not math.isfinite(loss):
        raise VembedError(
            f"The loss is {loss}: the training has diverged. Lower `optimizer.config.lr`, set `trainer.max_grad_norm`, "
            "or look for numbers that are not finite in the model's weights."
        )
