"""Evaluates models on a retrieval task, in one process or in each of a gang."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vembed_fs2.data.dataset import ExampleDataset
from vembed_fs2.distributed import RowGather
from vembed_fs2.errors import VembedError
from vembed_fs2.evaluation.datasets import task_from_examples, task_from_files, task_from_folder
from vembed_fs2.evaluation.report import Results, write_results
from vembed_fs2.evaluation.retrieval import DEFAULT_KS, LABEL_KS, evaluate_embedder
from vembed_fs2.evaluation.task import RetrievalTask
from vembed_fs2.inference.embedder import Embedder
from vembed_fs2.recipes.evaluate.settings import EvaluateDataSection, EvaluateSettings


def load_task(data: EvaluateDataSection) -> RetrievalTask:
    """Read what to evaluate on.

    :raises VembedError: nothing is named, or it cannot be read.
    """
    paths = list(data.paths)
    triple = (data.queries, data.corpus, data.qrels)
    if any(triple):
        if paths or data.queries is None or data.corpus is None or data.qrels is None:
            raise VembedError("The data must be files of rows, or all of `queries`, `corpus` and `qrels`.")
        return task_from_files(data.queries, data.corpus, data.qrels, image_root=data.image_root)

    if not paths:
        raise VembedError("The data must be files of rows, or a folder with queries, corpus and qrels.")
    if len(paths) == 1 and paths[0].is_dir() and any(paths[0].glob("qrels*")):
        return task_from_folder(paths[0], data.split, image_root=data.image_root)

    dataset = ExampleDataset(paths, columns=data.columns, mode=data.mode, image_root=data.image_root)
    return task_from_examples(list(dataset))


def evaluate_models(
    settings: EvaluateSettings, task: RetrievalTask, load: Callable[[str], Embedder], gather: RowGather | None = None
) -> dict[str, dict[str, float]]:
    """Evaluate the models one after the other.

    :param load: returns a model by its name.
    :param gather: the gang, as :func:`~vembed_fs2.evaluation.retrieval.evaluate_embedder` takes it.
    :returns: the results by the name of the model, in the order in which they are shown.
    """
    results = {}
    for name in settings.models:
        embedder = load(name)
        results[name] = evaluate_embedder(
            embedder,
            task,
            batch_size=settings.batch_size,
            ks=settings.ks or (LABEL_KS if task.exclude_self else DEFAULT_KS),
            similarity=embedder.model.similarity,
            gather=gather,
        )

    return results


def load_embedder(name: str, settings: EvaluateSettings, device: torch.device | str | None = None) -> Embedder:
    """Load a model to evaluate."""
    embedder = Embedder.load(
        name, device=device, max_length=settings.max_length, trust_remote_code=settings.trust_remote_code
    )
    embedder.autocast_dtype = torch.bfloat16 if settings.bf16 else None
    return embedder


def write_report(file: Path, settings: EvaluateSettings, results: Mapping[str, Results]) -> None:
    """Write the results as JSON, with what they are of."""
    paths = [str(path) for path in settings.data.paths]

    about: dict[str, Any] = {"data": paths, "max_length": settings.max_length, "bf16": settings.bf16}
    if settings.baseline is not None:
        about |= {"baseline": settings.baseline, "baseline_metrics": results[settings.baseline]}
    write_results(file, results[settings.model], model=settings.model, **about)
