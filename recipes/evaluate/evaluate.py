"""Evaluates models on a retrieval task, in one process or in each of a gang."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vembed_fs2.console import Screen
from vembed_fs2.data.dataset import ExampleDataset
from vembed_fs2.distributed import RowGather
from vembed_fs2.dtypes import dtype_name, find_dtype
from vembed_fs2.errors import VembedError
from vembed_fs2.evaluation.datasets import find_task, task_from_examples
from vembed_fs2.evaluation.report import Results, print_results, write_results
from vembed_fs2.evaluation.retrieval import DEFAULT_KS, LABEL_KS, Compress, evaluate_embedder
from vembed_fs2.evaluation.task import RetrievalTask
from vembed_fs2.inference.embedder import Embedder
from vembed_fs2.inference.quantize import check_precision, dequantize, measure_ranges, quantize
from vembed_fs2.inference.vectors import VectorOptions
from vembed_fs2.recipes.evaluate.settings import EvaluateDataSection, EvaluateSettings


def load_task(data: EvaluateDataSection) -> RetrievalTask:
    """Read what to evaluate on.

    :raises VembedError: nothing is named, or it cannot be read.
    """
    paths = list(data.paths)
    task = find_task(
        paths,
        (data.queries, data.corpus, data.qrels),
        data.split,
        image_root=data.image_root,
        quoting=data.quoting,
        ties=data.ties,
    )
    if task is not None:
        return task

    dataset = ExampleDataset(
        paths, columns=data.columns, mode=data.mode, image_root=data.image_root, quoting=data.quoting
    )
    return task_from_examples(list(dataset))


def evaluate_models(
    settings: EvaluateSettings,
    task: RetrievalTask,
    load: Callable[[str], Embedder],
    screen: Screen,
    gather: RowGather | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluate the models one after the other.

    :param load: returns a model by its name.
    :param screen: shows how far it is.
    :param gather: the gang, as :func:`~vembed_fs2.evaluation.retrieval.evaluate_embedder` takes it.
    :returns: the results by the name of the model, in the order in which they are shown.
    """
    results = {}
    for name in settings.models:
        with screen.working(f"Loading {name}"):
            embedder = load(name)
        results[name] = evaluate_embedder(
            embedder,
            task,
            batch_size=settings.batch_size,
            ks=settings.ks or (LABEL_KS if task.exclude_self else DEFAULT_KS),
            similarity=embedder.model.similarity,
            gather=gather,
            truncate_dim=settings.truncate_dim,
            compress=compression(embedder, settings),
            show_progress_bar=screen,
        )

    return results


def compression(embedder: Embedder, settings: EvaluateSettings) -> Compress | None:
    """Return what embeddings lose by the precision that is asked for; ``None`` if they lose nothing.

    Bytes lie between the model's own ranges, or else between the documents' smallest and largest values.

    :raises VembedError: the model cannot be quantized.
    """
    options = VectorOptions.of(embedder.model, truncate_dim=settings.truncate_dim or embedder.embedding_dim)
    precision = check_precision(settings.precision)
    if precision == "float32":
        return None
    if options.is_multi_vector:
        raise VembedError(f"`precision` of a multi-vector model must be float32, but is {precision!r}.")

    def compress(queries: Tensor, corpus: Tensor) -> tuple[Tensor, Tensor]:
        kept = embedder.ranges
        ranges = None if kept is None else kept.fit(options.scaling, options.dim)
        if ranges is None and len(corpus):
            ranges = measure_ranges([corpus])

        arrays = (quantize(x.numpy(), precision, ranges) for x in (queries, corpus))
        restored = [torch.from_numpy(dequantize(x, precision, ranges, options.dim)) for x in arrays]
        return restored[0], restored[1]

    return compress


def load_embedder(name: str, settings: EvaluateSettings, device: torch.device | str | None = None) -> Embedder:
    """Load a model to evaluate."""
    embedder = Embedder.load(
        name,
        device=device,
        dtype=settings.dtype,
        max_length=settings.max_length,
        trust_remote_code=settings.trust_remote_code,
    )
    embedder.autocast_dtype = torch.bfloat16 if settings.bf16 else None
    return embedder


def show_results(settings: EvaluateSettings, results: Mapping[str, Results]) -> None:
    """Print the results as a table."""
    counts = results[settings.model]
    num_queries = int(counts["num_queries"] + counts["num_queries_without_relevant"])
    print_results(results, title=f"{num_queries:,} queries, {int(counts['num_documents']):,} documents")


def write_report(file: Path, settings: EvaluateSettings, results: Mapping[str, Results]) -> None:
    """Write the results as JSON, with what they are of."""
    paths = [str(path) for path in settings.data.paths]

    about: dict[str, Any] = {
        "data": paths,
        "max_length": settings.max_length,
        "dtype": dtype_name(find_dtype(settings.dtype)),
        "bf16": settings.bf16,
    }
    if settings.truncate_dim is not None:
        about["truncate_dim"] = settings.truncate_dim
    if settings.precision != "float32":
        about["precision"] = settings.precision
    if settings.data.ties != "corpus":
        about["ties"] = settings.data.ties
    if settings.baseline is not None:
        about |= {"baseline": settings.baseline, "baseline_metrics": results[settings.baseline]}
    write_results(file, results[settings.model], model=settings.model, **about)
