"""The recipe: each rank encodes its share, and ranks the documents for its share of the queries."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import final

import torch.distributed as dist
from fairseq2.gang import Gangs
from fairseq2.recipe.base import RecipeContext
from fairseq2.task import Task
from typing_extensions import override

from vembed_fs2.console import Screen
from vembed_fs2.distributed import RowGather
from vembed_fs2.evaluation.report import format_results
from vembed_fs2.evaluation.task import RetrievalTask
from vembed_fs2.hub.find import find_model
from vembed_fs2.inference.embedder import Embedder
from vembed_fs2.recipes.base import VembedRecipe
from vembed_fs2.recipes.evaluate.config import EvaluateConfig
from vembed_fs2.recipes.evaluate.evaluate import (
    evaluate_models,
    load_embedder,
    load_task,
    show_results,
    write_report,
)
from vembed_fs2.recipes.evaluate.settings import RESULTS_FILE

log = logging.getLogger("vembed_fs2")


def create_recipe() -> EvaluateRecipe:
    """Create the recipe that the command line runs."""
    return EvaluateRecipe()


@final
class EvaluateRecipe(VembedRecipe[EvaluateConfig, RetrievalTask]):
    """Measures retrieval with a model; writes ``results.json``."""

    _task: EvaluateTask | None = None

    @property
    @override
    def config_kls(self) -> type[object]:
        return EvaluateConfig

    @override
    def prepare(self, config: EvaluateConfig) -> RetrievalTask:
        for name in config.models:
            find_model(name, trust_remote_code=config.trust_remote_code)
        return load_task(config.data)

    @override
    def create_prepared_task(self, context: RecipeContext, prepared: RetrievalTask) -> Task:
        config = context.get_config_as(EvaluateConfig)
        self._task = EvaluateTask(config, prepared, context.gangs, context.output_dir / RESULTS_FILE, self.screen)
        return self._task

    @override
    def show_end(self, output_dir: Path) -> None:
        if self.screen.shown and self._task is not None:
            show_results(self._task.config, self._task.results)


@final
class EvaluateTask(Task):
    """Evaluates the models on the gang. The first rank writes the results."""

    def __init__(self, config: EvaluateConfig, task: RetrievalTask, gangs: Gangs, file: Path, screen: Screen) -> None:
        self.config = config
        self.results: dict[str, dict[str, float]] = {}
        """The results by the name of the model, when the task has run."""

        self._task = task
        self._gangs = gangs
        self._file = file
        self._screen = screen

    @override
    def run(self) -> None:
        config, root = self.config, self._gangs.root

        # Embeddings are compared on the CPU, so they are gathered there: a GPU need not hold all ranks' embeddings.
        gather = RowGather(dist.new_group(backend="gloo") if root.size > 1 else None)

        self.results = results = evaluate_models(config, self._task, self._load, self._screen, gather)
        if root.rank == 0:
            log.info("%s", format_results(results))
            write_report(self._file, config, results)

        self._gangs.close()

    def _load(self, name: str) -> Embedder:
        root = self._gangs.root
        load = partial(load_embedder, name, self.config, root.device)

        # One process downloads, the others find the files.
        embedder = load() if root.rank == 0 else None
        root.barrier()

        return embedder or load()

    @override
    def request_stop(self) -> None:
        raise KeyboardInterrupt  # There is nothing to save.

    @override
    def close(self) -> None:
        pass

    @property
    @override
    def step_nr(self) -> int:
        return 0
