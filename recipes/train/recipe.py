"""The training recipe: model, data and objective put together."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np
from fairseq2.checkpoint import CheckpointDir
from fairseq2.gang import Gangs
from fairseq2.metrics.recorders import MetricRecorder
from fairseq2.optim.lr_schedulers import LRScheduler
from fairseq2.recipe.base import RecipeContext
from fairseq2.runtime.dependency import DependencyContainer, DependencyResolver
from fairseq2.task import Task
from fairseq2.trainer import Trainer
from fairseq2.utils.structured import StandardValueConverter
from torch.nn import Module
from torch.optim import Optimizer
from typing_extensions import override

from vembed_fs2.data.dataset import ExampleDataset
from vembed_fs2.data.example import Example
from vembed_fs2.data.images import decode_images
from vembed_fs2.data.reader import EmbeddingDataReader
from vembed_fs2.distributed import RowGather
from vembed_fs2.embedding.learned import LearnedPart
from vembed_fs2.embedding.model import EmbeddingModel
from vembed_fs2.errors import ConfigError, DataError, Problems
from vembed_fs2.evaluation.datasets import find_task, task_from_examples
from vembed_fs2.evaluation.task import RetrievalTask
from vembed_fs2.fairseq2_seams import complete_checkpoint, list_components, seconds_since_report
from vembed_fs2.hub.find import ModelSource
from vembed_fs2.hub.load import load_processor
from vembed_fs2.hub.towers import load_towers
from vembed_fs2.losses import LOSSES
from vembed_fs2.models.composed import ComposedModel
from vembed_fs2.recipes.base import VembedRecipe
from vembed_fs2.recipes.folder import link_checkpoints
from vembed_fs2.recipes.optim import register_optim
from vembed_fs2.recipes.stop import StopRequest
from vembed_fs2.recipes.trackers import check_wandb
from vembed_fs2.recipes.train.config import DataSection, DatasetSection, TrainConfig, ValidSection
from vembed_fs2.recipes.train.dataset import Collator, ContrastiveBatch
from vembed_fs2.recipes.train.display import TrainDisplay, describe_data, describe_model
from vembed_fs2.recipes.train.model import (
    count_parameters,
    create_processor,
    freeze_parameters,
    override_config,
    plan_model,
)
from vembed_fs2.recipes.train.objective import (
    Reads,
    check_data,
    check_readable,
    check_row,
    create_blank,
    create_objective,
    learned_changes,
    learned_parts,
)
from vembed_fs2.recipes.train.teacher import find_teacher, load_teacher
from vembed_fs2.recipes.train.unit import ContrastiveTrainUnit
from vembed_fs2.recipes.train.valid import RetrievalEvalUnit, ValidReader

log = logging.getLogger("vembed_fs2")


def create_recipe() -> TrainRecipe:
    """Create the recipe that the command line runs."""
    return TrainRecipe()


@dataclass(frozen=True)
class PreparedTraining:
    """What a training run has opened."""

    dataset: ExampleDataset

    valid_task: RetrievalTask | None
    """The held-out rows, if there are any."""

    teacher: ModelSource | None
    """The model to learn from, if the objective needs one."""

    learned: Sequence[LearnedPart]
    """What the objective learns besides the encoder."""

    base_config: object
    """The configuration of the model that ``model.config_overrides`` changes."""

    facts: Mapping[str, str]
    """What a training shows of the model, the rows and the teacher."""


@final
class TrainRecipe(VembedRecipe[TrainConfig, PreparedTraining]):
    """Trains an embedding model on rows of queries and documents."""

    def __init__(self) -> None:
        self.stop = StopRequest()
        self._display: TrainDisplay | None = None

    @property
    @override
    def config_kls(self) -> type[object]:
        return TrainConfig

    @override
    def components(self, resolver: DependencyResolver) -> Mapping[str, Mapping[str, type[object]]]:
        return {
            "optimizer": list_components(resolver, Optimizer),
            "lr_scheduler": list_components(resolver, LRScheduler),
            "loss": {name: entry.config_kls for name, entry in LOSSES.items()},
        }

    @override
    def prepare(self, config: TrainConfig) -> PreparedTraining:
        if config.trainer.data_parallelism != "fsdp" and config.trainer.mixed_precision.mode == "static":
            config.trainer.mixed_precision.mode = "auto"  # Autocast, as fairseq2 does; but it warns.

        facts = {"model": describe_model(config.model)}  # Now, because planning puts the folder of the weights in.
        loss = create_objective(config.loss)
        teacher, teacher_dim, readers = None, None, {}

        problems = Problems()
        with problems.collect():
            check_wandb(config.common)

        if loss.needs_teacher:
            with problems.collect():
                teacher = find_teacher(config.teacher)
                blank = create_blank(teacher.family, teacher.config)
                teacher_dim, readers["the teacher"] = blank.embedding_dim, Reads.of(blank)
                if teacher.folder is not None:
                    load_processor(blank, teacher.folder, max_length=config.teacher.max_length)

        with problems.collect():
            plan = plan_model(config)
        problems.check()

        readers["the model"] = plan.reads
        learned = learned_parts(loss, plan.embedding_dim, teacher_dim)
        changes = learned_changes(learned, plan.config)
        override_config(plan.config, changes)

        config.model.config_overrides = {**plan.overrides, **changes} or None
        for section in (config.dataset, config.valid):
            make_absolute(section)

        valid_task = None
        with problems.collect():
            dataset = open_dataset(config.dataset, partial(check_row, loss=loss, readers=readers))
            check_data(dataset, loss)
        if config.valid.is_given:
            with problems.collect():
                valid_task = load_valid_task(config, {"the model": plan.reads})
        problems.check()

        facts["data"] = describe_data(config.dataset.paths, len(dataset))
        if valid_task is not None:
            num_inputs = len(valid_task.queries), len(valid_task.corpus)
            facts["validation"] = "{:,} queries over {:,} documents".format(*num_inputs)
        if teacher is not None:
            facts["teacher"] = teacher.name

        return PreparedTraining(dataset, valid_task, teacher, learned, plan.base, facts)

    @override
    def complete(self, prepared: PreparedTraining, values: Mapping[str, Any]) -> Mapping[str, Any]:
        model = values["model"]
        config = override_config(prepared.base_config, model.get("config_overrides") or {})
        return {**values, "model": {**model, "config_overrides": StandardValueConverter().unstructure(config)}}

    @override
    def exit_status(self) -> int:
        return 128 + self.stop.signum if self.stop.signum else 0

    @override
    def show_end(self, output_dir: Path) -> None:
        if self._display is not None:
            name = signal.Signals(self.stop.signum).name if self.stop.signum else ""
            self._display.show_end(output_dir, name, self.exit_status())

    @override
    def register(self, container: DependencyContainer) -> None:
        register_optim(container)
        container.collection.register(MetricRecorder, lambda resolver: self._display)

    @override
    def has_static_autograd_graph(self, context: RecipeContext) -> bool:
        return True  # Gradients are reduced by the gradient cache, not by DDP's graph search.

    @override
    def setup_model(self, context: RecipeContext, model: Module, newly_initialized: bool) -> Module:
        config = context.get_config_as(TrainConfig)
        assert isinstance(model, EmbeddingModel)

        if newly_initialized and isinstance(model, ComposedModel):
            load_towers(model, context.gangs)

        model.train_learned_parts(self.open(config).learned)
        freeze_parameters(model, config.freeze)
        return model

    @override
    def create_prepared_task(self, context: RecipeContext, prepared: PreparedTraining) -> Task:
        config = context.get_config_as(TrainConfig)
        gangs = context.gangs
        log_to_files()
        model = context.get_model_as(EmbeddingModel)
        gather = RowGather(gangs.dp.as_process_group() if gangs.dp.size > 1 else None)
        loss = create_objective(config.loss, gather)
        log.info("%s of %s parameters are trained.", *(f"{count:,}" for count in count_parameters(model)))

        dataset = prepared.dataset
        if dataset.num_skipped:  # Said in full when it was opened, but before there was a log file.
            log.warning("%s rows that cannot be used are left out.", f"{dataset.num_skipped:,}")

        processor = create_processor(config, model, gangs)
        if gangs.root.rank == 0:
            processor.save(context.output_dir / "processor")
            if (checkpoint_dir := context.resolver.resolve(CheckpointDir).path) is not None:
                processor.save(checkpoint_dir / "processor")
                link_checkpoints(context.output_dir, checkpoint_dir)

        teacher = None
        if prepared.teacher is not None:
            teacher = load_teacher(prepared.teacher, config.teacher, config.grad_cache, gangs)
            teacher.processor.allow_urls = config.dataset.allow_urls

        teacher_processor = None if teacher is None else teacher.processor

        train_processor = processor
        if (max_length := config.dataset.max_length) is not None:
            train_processor = create_processor(
                config, model, gangs, max_length=min(max_length, processor.settings.max_length or max_length)
            )

        collator = Collator(train_processor, teacher_processor)
        reader = create_reader(config, dataset, collator, gangs)
        set_num_steps(config, reader.steps_per_epoch)
        dp_model = context.get_data_parallel_model()
        unit = ContrastiveTrainUnit(dp_model, model, loss, config.grad_cache, self.stop, teacher)

        self._display = display = TrainDisplay(self.screen, config, context)
        display.start(model, prepared.facts, reader.steps_per_epoch)

        valid_units, valid_readers = [], []
        if (task := prepared.valid_task) is not None:
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
        unit.seconds_since_report = seconds_since_report(trainer)
        unit.finite.install(trainer, context.get_optimizer())
        unit.on_step = display.begin_step
        trainer.register_checkpoint_save_hook(display.show_checkpoint)

        for valid_unit in valid_units:
            valid_unit.on_start = partial(self._begin_validation, trainer, valid_unit.num_inputs)
            valid_unit.on_batch = display.advance_validation

        self.stop.install(trainer)
        return trainer

    def _begin_validation(self, trainer: Trainer, num_inputs: int) -> None:
        # An error in a validation, such as a broken image, must not cost the checkpoint that is being written.
        complete_checkpoint(trainer)
        assert self._display is not None
        self._display.begin_validation(num_inputs)


def log_to_files() -> None:
    """Write our log lines to the run's log files as well. Lines of other ranks than the first are nowhere else."""
    for handler in logging.getLogger("fairseq2").handlers:
        if handler not in log.handlers:
            log.addHandler(handler)


def make_absolute(section: DataSection) -> None:
    """Say where the files are whatever the working folder is: a run is resumed with the same ones, or refused."""
    section.paths = [_absolute(path) for path in section.paths]
    section.image_root = None if section.image_root is None else _absolute(section.image_root)
    if isinstance(section, ValidSection):
        for name in ("queries", "corpus", "qrels"):
            if (file := getattr(section, name)) is not None:
                setattr(section, name, _absolute(file))


def _absolute(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.expanduser(path)).absolute()


def open_dataset(section: DataSection, accept: Callable[[Example], None]) -> ExampleDataset:
    """Open the files of a section.

    :param accept: raises ``DataError`` for rows that cannot be used.
    """
    return ExampleDataset(
        list(section.paths),
        columns=section.columns,
        mode=section.mode,
        image_root=section.image_root,
        allow_urls=section.allow_urls,
        quoting=section.quoting,
        on_error=section.on_error,
        max_rows=section.max_rows,
        accept=accept,
    )


def create_reader(
    config: TrainConfig, dataset: ExampleDataset, collator: Collator, gangs: Gangs
) -> EmbeddingDataReader[ContrastiveBatch]:
    """Create the reader of this rank's batches."""
    section = config.dataset
    rows_per_label = choose_rows_per_label(section, dataset, section.batch_size * gangs.dp.size)

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
        labels=dataset.labels() if rows_per_label else None,
        rows_per_label=rows_per_label,
        files=dataset.fingerprints(),
    )


def choose_rows_per_label(section: DatasetSection, dataset: ExampleDataset, num_rows: int) -> int:
    """Return how many rows of a label stand together in a batch; 0 if labels do not count.

    :param num_rows: the number of rows of a batch on all ranks.
    :raises ConfigError: more are asked for than a batch has.
    """
    count, of_one_side = section.rows_per_label, dataset.has_rows_of_one_side()
    if num_rows == 1 and of_one_side:
        raise ConfigError("`batch_size` is 1: a row with a label only has no positive then.", where="`dataset`")
    if count is None:
        count = (4 if num_rows >= 16 else 2) if section.shuffle and of_one_side else 0
    if count > num_rows:
        raise ConfigError(f"`rows_per_label` is {count}, but a batch has {num_rows} rows.", where="`dataset`")

    if count:
        labels = dataset.labels()
        sizes = np.unique(labels[labels != 0], return_counts=True)[1]
        log.info(
            "Batches hold about %d rows of a label together (`dataset.rows_per_label`): %s labels, %s of one row.",
            count,
            f"{len(sizes):,}",
            f"{int((sizes == 1).sum()):,}",
        )
    return count


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


def load_valid_task(config: TrainConfig, readers: Mapping[str, Reads]) -> RetrievalTask:
    """Read the held-out queries and documents, or make a retrieval task of the held-out rows.

    :param readers: what the models that read the rows can read, by what messages call them.
    """
    section = config.valid
    task = find_task(
        section.paths,
        (section.queries, section.corpus, section.qrels),
        section.split,
        image_root=section.image_root,
        quoting=section.quoting,
        row_options={
            "valid.columns": bool(section.columns),
            "valid.mode": section.mode != "auto",
            "valid.max_rows": section.max_rows is not None,
            "valid.on_error": section.on_error != "raise",
            "valid.allow_urls": section.allow_urls,
        },
    )
    if task is not None:
        for role, items in (("query", task.queries), ("document", task.corpus)):
            for number, item in enumerate(items, 1):
                check_readable(
                    Example(item, source=item.source or f"The {role} {number} of the held-out data"), readers
                )
        return task

    rows = list(open_dataset(section, partial(check_readable, readers=readers)))

    # All now: a broken one would end the training at its first validation, and what is relevant to which query must not
    # change during the training.
    examples, broken = [], []
    for row, outcome in zip(rows, decode_images(rows, allow_urls=section.allow_urls)):
        if isinstance(outcome, DataError):
            broken.append(str(outcome))
        else:
            examples.append(row)

    if broken and section.on_error != "skip":
        raise DataError(
            f"{len(broken):,} of {len(rows):,} held-out rows have an image that cannot be used, such as: {broken[0]}"
            " `data check --images all` lists them; `valid.on_error=skip` leaves them out."
        )
    for problem in broken:
        log.warning("A held-out row is left out: %s", problem)

    return task_from_examples(examples)
