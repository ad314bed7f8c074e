"""How the metrics of the recipes are named and shown."""

from __future__ import annotations

from fairseq2.metrics.formatters import format_as_float, format_as_int, format_as_percentage
from fairseq2.metrics.recorders import MetricDescriptor
from fairseq2.runtime.dependency import DependencyContainer

_DESCRIPTORS = (
    MetricDescriptor("num_negatives", "Negatives per Query", 205, format_as_float),
    MetricDescriptor("masked_fraction", "Masked Candidates (%)", 206, format_as_percentage),
    MetricDescriptor("queries_per_second", "Queries per Second", 810, format_as_float),
    MetricDescriptor("tokens_per_second", "Tokens per Second", 811, format_as_int),
    MetricDescriptor("num_chunks", "Chunks per Step", 812, format_as_float),
    MetricDescriptor("kept_fraction", "Kept Chunks (%)", 813, format_as_percentage),
    MetricDescriptor("padding_fraction", "Padding (%)", 814, format_as_percentage),
    MetricDescriptor("total_num_queries", "Total Number of Queries", 840, format_as_int),
    MetricDescriptor("recall@1", "Recall@1", 200, format_as_float, higher_better=True),
    MetricDescriptor("recall@5", "Recall@5", 201, format_as_float, higher_better=True),
    MetricDescriptor("recall@10", "Recall@10", 202, format_as_float, higher_better=True),
    MetricDescriptor("mrr", "MRR", 203, format_as_float, higher_better=True),
    MetricDescriptor("ndcg@10", "nDCG@10", 204, format_as_float, higher_better=True),
)


def register_metrics(container: DependencyContainer) -> None:
    """Register the metrics, so that logs show them and ``regime.score_metric`` accepts them."""
    for descriptor in _DESCRIPTORS:
        container.collection.register_instance(MetricDescriptor, descriptor)
