"""How the metrics of the recipes are named and shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import torch
from fairseq2.metrics.formatters import format_as_float, format_as_int, format_as_percentage
from fairseq2.metrics.recorders import MetricDescriptor
from fairseq2.runtime.dependency import DependencyContainer
from torch import Tensor
from torcheval.metrics import Metric
from typing_extensions import Self, override

_RETRIEVAL: Final = (
    MetricDescriptor("recall@1", "Recall@1", 200, format_as_float, higher_better=True),
    MetricDescriptor("recall@5", "Recall@5", 201, format_as_float, higher_better=True),
    MetricDescriptor("recall@10", "Recall@10", 202, format_as_float, higher_better=True),
    MetricDescriptor("mrr", "MRR", 203, format_as_float, higher_better=True),
    MetricDescriptor("ndcg@10", "nDCG@10", 204, format_as_float, higher_better=True),
    MetricDescriptor("hit@1", "Hit@1", 199, format_as_float, higher_better=True),
)

VALID_METRICS: Final = tuple(descriptor.name for descriptor in _RETRIEVAL)
"""What a validation measures."""

METRIC_NAMES: Final = {descriptor.name: descriptor.display_name for descriptor in _RETRIEVAL}
"""How these are shown, and written to files."""

_DESCRIPTORS: Final = (
    *_RETRIEVAL,
    MetricDescriptor("num_negatives", "Negatives per Query", 205, format_as_float),
    MetricDescriptor("masked_fraction", "Masked Candidates (%)", 206, format_as_percentage),
    MetricDescriptor("without_positive", "Queries without Positive (%)", 207, format_as_percentage),
    MetricDescriptor("queries_per_second", "Queries per Second", 810, format_as_float),
    MetricDescriptor("tokens_per_second", "Tokens per Second", 811, format_as_int),
    MetricDescriptor("num_chunks", "Chunks per Step", 812, format_as_float),
    MetricDescriptor("kept_fraction", "Kept Chunks (%)", 813, format_as_percentage),
    MetricDescriptor("padding_fraction", "Padding (%)", 814, format_as_percentage),
    MetricDescriptor("bytes_per_token", "Bytes per Token", 815, format_as_int),
    MetricDescriptor("total_num_queries", "Total Number of Queries", 840, format_as_int),
)


class SumsByName(Metric[dict[str, Tensor]]):
    """Sums of which the names are not known before the first update; they are the same on all ranks."""

    sums: dict[str, Tensor]

    def __init__(self) -> None:
        super().__init__()
        self._add_state("sums", {})

    @override
    @torch.inference_mode()
    def update(self, values: Mapping[str, Tensor]) -> Self:
        for name, value in values.items():
            value = value.to(device=self.device, dtype=torch.float64)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        return self

    @override
    @torch.inference_mode()
    def compute(self) -> dict[str, Tensor]:
        return dict(self.sums)

    @override
    @torch.inference_mode()
    def merge_state(self, metrics: Iterable[Self]) -> Self:
        for metric in metrics:
            self.update(metric.sums)
        return self


def register_metrics(container: DependencyContainer) -> None:
    """Register the metrics, so that logs show them and ``regime.score_metric`` accepts them."""
    for descriptor in _DESCRIPTORS:
        container.collection.register_instance(MetricDescriptor, descriptor)
