"""Evaluation: retrieval metrics, exact search, tasks and reports.

The names are imported on first use: :mod:`~vembed_fs2.evaluation.metrics`,
:mod:`~vembed_fs2.evaluation.search` and
:mod:`~vembed_fs2.evaluation.retrieval` work where only torch is installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vembed_fs2.evaluation.datasets import task_from_examples as task_from_examples
    from vembed_fs2.evaluation.datasets import task_from_files as task_from_files
    from vembed_fs2.evaluation.datasets import task_from_folder as task_from_folder
    from vembed_fs2.evaluation.metrics import average_precision as average_precision
    from vembed_fs2.evaluation.metrics import hit_at_k as hit_at_k
    from vembed_fs2.evaluation.metrics import ndcg_at_k as ndcg_at_k
    from vembed_fs2.evaluation.metrics import ranks_in_lists as ranks_in_lists
    from vembed_fs2.evaluation.metrics import recall_at_k as recall_at_k
    from vembed_fs2.evaluation.metrics import reciprocal_rank as reciprocal_rank
    from vembed_fs2.evaluation.report import format_results as format_results
    from vembed_fs2.evaluation.report import print_results as print_results
    from vembed_fs2.evaluation.report import results_table as results_table
    from vembed_fs2.evaluation.report import write_results as write_results
    from vembed_fs2.evaluation.retrieval import evaluate_embedder as evaluate_embedder
    from vembed_fs2.evaluation.retrieval import evaluate_retrieval as evaluate_retrieval
    from vembed_fs2.evaluation.retrieval import metrics_of_ranks as metrics_of_ranks
    from vembed_fs2.evaluation.search import EmbeddingValueError as EmbeddingValueError
    from vembed_fs2.evaluation.search import SearchResult as SearchResult
    from vembed_fs2.evaluation.search import exact_search as exact_search
    from vembed_fs2.evaluation.search import relevant_ranks as relevant_ranks
    from vembed_fs2.evaluation.task import RetrievalTask as RetrievalTask

_EXPORTS = {
    "datasets": ("RetrievalTask", "task_from_examples", "task_from_files", "task_from_folder"),
    "metrics": (
        "average_precision",
        "hit_at_k",
        "ndcg_at_k",
        "ranks_in_lists",
        "recall_at_k",
        "reciprocal_rank",
    ),
    "report": ("format_results", "print_results", "results_table", "write_results"),
    "retrieval": ("evaluate_embedder", "evaluate_retrieval", "metrics_of_ranks"),
    "search": ("EmbeddingValueError", "SearchResult", "exact_search", "relevant_ranks"),
}

_MODULES = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
