"""The training recipe: model, data and objective put together."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import cast, final

from fairseq2.gang import Gangs
from fairseq2.models import ModelFamily
from fairseq2.recipe.base import Recipe, RecipeContext
from fairseq2.runtime.dependency import DependencyContainer, DependencyLookup
from fairseq2.task import Task
from fairseq2.utils.config import StandardConfigMerger
from fairseq2.utils.structured import StandardValueConverter
from torch.nn import Module
from typing_extensions import override

from vembed_fs2.data.dataset import ExampleDataset
from vembed_fs2.data.reader import EmbeddingDataReader
from vembed_fs2.distributed import RowGather
from vembed_fs2.embedder import load_processor
from vembed_fs2.errors import ConfigError
from vembed_fs2.evaluation.datasets import RetrievalTask, task_from_examples
from vembed_fs2.models.embedding import EmbeddingModel
from vembed_fs2.models.hub import ModelSource, find_model, get_resolver
from vembed_fs2.processing.processor import Processor
from vembed_fs2.recipes.layers import structure
from vembed_fs2.recipes.optim import register_optim
from vembed_fs2.recipes.stop import StopRequest
from vembed_fs2.recipes.train.config import DataSection, EmbeddingModelSection, TrainConfig
from vembed_fs2.recipes.train.dataset import Collator, ContrastiveBatch
from vembed_fs2.recipes.train.objective import check_row, check_rows, create_objective, embedding_dim_of, learned_parts
from vembed_fs2.recipes.train.teacher import find_teacher, load_teacher
from vembed_fs2.recipes.train.unit import ContrastiveTrainUnit
from vembed_fs2.recipes.train.valid import RetrievalEvalUnit, ValidReader

log = logging.getLogger("vembed_fs2")


def create_recipe() -> TrainRecipe:
    """Create the recipe that the command line runs."""
    return TrainRecipe()


@final
class TrainRecipe(Recipe):
    """Trains an embedding model on rows of queries and documents."""

    def __init__(self) -> None:
        self.stop = StopRequest()
        self._teacher: ModelSource | None = None
        self._dataset: ExampleDataset | None = None
        self._valid_task: RetrievalTask | None = None

    @property
    @override
    def config_kls(self) -> type[object]:
        return TrainConfig

    def prepare_config(self, config: TrainConfig) -> None:
        """Find the model and open the data, so that what is wrong with them is an error before anything is written.

        A folder's family and configuration become part of the run's own
        configuration: the run can be resumed without the folder.
        """
        section = config.model
        overrides = section.config_overrides or {}
        if not isinstance(overrides, Mapping):
            raise ConfigError(f"`model.config_overrides` must hold keys and values, but is {overrides!r}.")
        if section.path is None and section.name is None:
            model_config, family = new_model_config(section), str(section.family)
        else:
            source = find_model(section.path or section.name or "")
            model_config, family = source.config, source.family
            section.family, section.arch = None, None
            if isinstance(source.weights, Path):
                section.family, section.path = source.family, source.weights
                values = StandardValueConverter().unstructure(model_config)
                overrides = cast(Mapping[str, object], StandardConfigMerger().merge(values, overrides))
                config.processor.path = config.processor.path or source.folder
        loss = create_objective(config.loss)
        teacher_dim = None
        if loss.needs_teacher:
            self._teacher = find_teacher(config.teacher)
            teacher_dim = embedding_dim_of(self._teacher.family, self._teacher.config)
        model_config = override_config(model_config, overrides)
        parts = learned_parts(loss, model_config, embedding_dim_of(family, model_config), teacher_dim)
        override_config(model_config, parts)
        section.config_overrides = {**overrides, **parts} or None
        self._dataset = open_dataset(config.dataset)
        check_rows(self._dataset, loss, config.dataset.on_error)
        if config.valid.paths:
            self._valid_task = load_valid_task(config)

    def exit_status(self) -> int:
        """0, or 128 plus the number of the signal that stopped the run."""
        return 128 + self.stop.signum if self.stop.signum else 0

    @override
    def register(self, container: DependencyContainer) -> None:
        register_optim(container)

    @override
    def has_static_autograd_graph(self, context: RecipeContext) -> bool:
        return True  # Gradients are reduced by the gradient cache, not by DDP's graph search.

    @override
    def setup_model(self, context: RecipeContext, model: Module, newly_initialized: bool) -> Module:
        loss = create_objective(context.get_config_as(TrainConfig).loss)
        assert isinstance(model, EmbeddingModel)
        if model.logit_scale is not None:
            model.logit_scale.requires_grad_(loss.initial_logit_scale is not None)
        if model.logit_bias is not None:
            model.logit_bias.requires_grad_(loss.initial_logit_bias is not None)
        return model

    @override
    def create_task(self, context: RecipeContext) -> Task:
        config = context.get_config_as(TrainConfig)
        gangs = context.gangs
        log_to_files()
        dataset = self._dataset or open_dataset(config.dataset)
        if dataset.num_skipped:  # Said in full when it was opened, but before there was a log file.
            log.warning("%s rows that cannot be used are left out.", f"{dataset.num_skipped:,}")
        model = context.get_model_as(EmbeddingModel)
        processor = create_processor(config, model, gangs)
        if gangs.root.rank == 0:
            processor.save(context.output_dir / "processor")

        gather = RowGather(gangs.dp.as_process_group() if gangs.dp.size > 1 else None)
        loss = create_objective(config.loss, gather)
        teacher = None
        if loss.needs_teacher:
            source = self._teacher or find_teacher(config.teacher)
            teacher = load_teacher(source, config.teacher, config.grad_cache, gangs)
            teacher.processor.allow_urls = config.dataset.allow_urls

        teacher_processor = None if teacher is None else teacher.processor
        train_processor = processor
        if (max_length := config.dataset.max_length) is not None:
            train_processor = create_processor(
                config, model, gangs, max_length=min(max_length, processor.settings.max_length or max_length)
            )
        collator = Collator(train_processor, teacher_processor, partial(check_row, loss=loss))
        reader = create_reader(config, dataset, collator, gangs)
        set_num_steps(config, reader.steps_per_epoch)
        unit = ContrastiveTrainUnit(context.get_data_parallel_model(), loss, config.grad_cache, self.stop, teacher)

        valid_units, valid_readers = [], []
        if config.valid.paths:
            task = self._valid_task or load_valid_task(config)
            valid_units.append(RetrievalEvalUnit(model, task, gangs.dp))
            valid_readers.append(
                ValidReader(
                    task,
                    processor,
                    batch_size=config.valid.batch_size,
                    chunk_tokens=config.grad_cache.chunk_tokens,
                    gather=gather,
                )
            )
        # fairseq2 says that units of training and of validation take the same batches, and does not need it.
        trainer = context.create_trainer(unit, reader, valid_units or None, valid_readers or None)  # type: ignore[misc]
        self.stop.install(trainer)
        return trainer


def log_to_files() -> None:
    """Write our log lines to the run's log files as well: those of other ranks than the first are nowhere else."""
    for handler in logging.getLogger("fairseq2").handlers:
        if handler not in log.handlers:
            log.addHandler(handler)


def override_config(model_config: object, overrides: Mapping[str, object]) -> object:
    """Return the configuration that `model.config_overrides` makes of one.

    :raises ConfigError: lists unknown keys and values of a wrong type.
    """
    values = StandardValueConverter().unstructure(model_config)
    merged = cast(Mapping[str, object], StandardConfigMerger().merge(values, overrides))
    return structure(type(model_config), merged, lambda *_: None, "model.config_overrides.")


def new_model_config(section: EmbeddingModelSection) -> object:
    """Return the configuration of an architecture.

    :raises ConfigError: there is no such family or architecture.
    """
    resolver = get_resolver()
    family = resolver.maybe_resolve(ModelFamily, key=section.family)
    if family is None:
        known = [str(k) for k in DependencyLookup(resolver, ModelFamily).iter_keys()]
        raise ConfigError(_not_known("model.family", str(section.family), known))
    if section.arch is None:
        return family.config_kls()
    config = family.maybe_get_arch_config(section.arch)
    if config is None:
        raise ConfigError(_not_known("model.arch", section.arch, family.get_archs()))
    return config


def _not_known(key: str, name: str, known: Iterable[str]) -> str:
    nearest = get_close_matches(name, list(known), 1)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else f" Known: {', '.join(sorted(known))}."
    return f"`{key}` '{name}' is not known.{hint}"


def open_dataset(section: DataSection) -> ExampleDataset:
    """Open the files of a section."""
    return ExampleDataset(
        list(section.paths),
        columns=section.columns,
        mode=section.mode,
        image_root=section.image_root,
        allow_urls=section.allow_urls,
        on_error=section.on_error,
        max_rows=section.max_rows,
    )


def create_processor(
    config: TrainConfig, model: EmbeddingModel, gangs: Gangs, *, max_length: int | None = None
) -> Processor:
    """Load the processor of the model, changed as the configuration says.

    :param max_length: the longest text, if it is not the configuration's.
    """
    section = config.processor
    folder = section.path
    if folder is None:
        if config.model.name is None:
            raise ConfigError("`processor.path` must name a folder with a tokenizer or image processor.")
        source = find_model(config.model.name)
        if gangs.root.rank == 0:
            source.processor_folder()  # One process downloads, the others find the files.
        gangs.root.barrier()
        folder = source.processor_folder()
    processor = load_processor(model, folder, max_length=max_length or section.max_length)
    settings = processor.settings
    for name, prompt in (("query", section.query_prompt), ("document", section.document_prompt)):
        if prompt is not None:
            settings.prompts[name] = prompt
    if section.instruction_template is not None:
        settings.instruction_template = section.instruction_template
    processor.image_root = None  # The rows' paths were checked against the section's root when they were read.
    processor.allow_urls = config.dataset.allow_urls
    return processor


def create_reader(
    config: TrainConfig, dataset: ExampleDataset, collator: Collator, gangs: Gangs
) -> EmbeddingDataReader[ContrastiveBatch]:
    """Create the reader of this rank's batches."""
    section = config.dataset
    return EmbeddingDataReader(
        dataset,
        collator,
        batch_size=section.batch_size,
        rank=gangs.dp.rank,
        world_size=gangs.dp.size,
        seed=config.common.seed,
        shuffle=section.shuffle,
        drop_last=section.drop_last,
        num_accumulate=config.trainer.grad_accumulation.num_batches,
        num_workers=section.num_workers,
        prefetch=section.prefetch,
        on_error=section.on_error,
        load=collator.load,
    )


def set_num_steps(config: TrainConfig, steps_per_epoch: int) -> None:
    """Express the length of the training in steps; one epoch, if the configuration names none.

    Schedules need the number of steps, and fairseq2 0.8 stops at once when it
    resumes in the last of ``num_data_epochs``.
    """
    regime = config.regime
    if regime.num_steps is None or regime.num_data_epochs is not None:
        num_steps = (regime.num_data_epochs or 1) * steps_per_epoch
        regime.num_steps = min(num_steps, regime.num_steps or num_steps)
        regime.num_data_epochs = None
    log.info("Training for %s steps; an epoch has %s.", f"{regime.num_steps:,}", f"{steps_per_epoch:,}")


def load_valid_task(config: TrainConfig) -> RetrievalTask:
    """Make a retrieval task of the held-out rows."""
    return task_from_examples(list(open_dataset(config.valid)))
