"""The configuration of a training run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from fairseq2.recipe.config import (
    CommonSection,
    GangSection,
    LRSchedulerSection,
    MixedPrecisionConfig,
    ModelSection,
    OptimizerSection,
    RegimeSection,
    TrainerSection,
)
from fairseq2.utils.validation import ValidationResult
from typing_extensions import override

from vembed_fs2.dtypes import has_fast_bf16 as has_fast_bf16
from vembed_fs2.errors import ConfigError
from vembed_fs2.gradcache import parse_budget
from vembed_fs2.losses import LOSSES, InfoNCEConfig, create_loss
from vembed_fs2.losses.nested import prefix_keys
from vembed_fs2.models.composed import COMPOSED_FAMILY
from vembed_fs2.recipes.metrics import VALID_METRICS
from vembed_fs2.recipes.optim import ADAMW, WARMUP_DECAY, EmbeddingAdamWConfig, WarmupDecayConfig
from vembed_fs2.recipes.train.archs import find_arch_config

NO_PROCESSOR: Final = "`processor.path` must name a folder with a tokenizer or image processor"

PROCESSOR_FOLDERS: Final = (
    " Any folder of such a model that transformers loads is one; of a card, `fairseq2 vembed export CARD FOLDER "
    "--format hf` writes one."
)
"""Where a folder for ``processor.path`` comes from."""


@dataclass(kw_only=True)
class EmbeddingModelSection(ModelSection):
    """Which model to train.

    ``path`` (a folder, a run or a repository of the hub), ``name`` (a card), or ``family`` and ``arch`` (random
    weights).
    """

    @override
    def validate(self) -> ValidationResult:
        # Unlike its base: the family of a folder is found from the folder.
        result = ValidationResult()
        if self.name is None and self.path is None and self.family is None:
            result.add_error("`name`, `path` or `family` must be specified.")
        if self.name is not None and self.path is not None:
            result.add_error("`name` and `path` must not be specified at the same time.")
        return result


@dataclass(kw_only=True)
class ProcessorSection:
    """How inputs are prepared. Values that are not given come from the model."""

    path: Path | None = None
    """The folder with the tokenizer and the image processor, if it is not the model's own."""

    max_length: int | None = None
    """The longest text in tokens."""

    min_pixels: int | None = None
    """Smaller images are enlarged to so many pixels, by models that take images of any size."""

    max_pixels: int | None = None
    """Larger images are made smaller, to so many pixels, by models that take images of any size."""

    query_prompt: str | None = None
    """A text put before queries. It becomes part of the model."""

    document_prompt: str | None = None
    """A text put before documents. It becomes part of the model."""

    instruction_template: str | None = None
    """How a row's instruction is put before its text, for example ``"Instruct: {instruction}\\nQuery: "``."""

    def validate(self) -> ValidationResult:
        result = ValidationResult()
        if self.max_length is not None and self.max_length < 3:
            result.add_error(f"`max_length` must be greater than or equal to 3, but is {self.max_length} instead.")
        for name in ("min_pixels", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                result.add_error(f"`{name}` must be positive, but is {value} instead.")
        if self.instruction_template is not None and "{instruction}" not in self.instruction_template:
            result.add_error("`instruction_template` must contain '{instruction}'.")
        return result


@dataclass(kw_only=True)
class DataSection:
    """Files of rows, and how to read them."""

    paths: Sequence[Path] = field(default_factory=list)
    """JSONL, CSV, TSV or Parquet files, patterns such as ``data/*.jsonl``, folders of files, or folders of classes."""

    columns: dict[str, str | list[str] | None] = field(default_factory=dict)
    """Our field -> the file's column, or columns of several negatives; ``None`` leaves the field out."""

    mode: Literal["auto", "t2t", "t2i", "i2t", "i2i", "m2i", "m2t"] = "auto"
    """What queries and documents consist of: t text, i image, m both."""

    image_root: Path | None = None
    """The folder that images must lie in; the folder of the data file by default."""

    allow_urls: bool = False
    """If ``True``, images may be fetched from URLs."""

    quoting: Literal["rfc4180", "none"] = "rfc4180"
    """How CSV and TSV files are quoted; ``none`` if a quote is a character like any other."""

    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a row that cannot be used."""

    max_rows: int | None = None
    """Use the first rows only."""


@dataclass(kw_only=True)
class DatasetSection(DataSection):
    batch_size: int = 64
    """The number of rows per rank and batch."""

    max_length: int | None = None
    """The longest text in tokens while training; longer ones are cut. The model's own limit stays what it is."""

    shuffle: bool = True
    """If ``True``, each epoch has an order of its own, given by ``common.seed``."""

    rows_per_label: int | None = None
    """How many rows of a label stand together in a batch; 0 for an order that knows no labels. By default 4 (2 in
    batches of fewer than 16 rows) if there are rows with a label but without a positive, and 0 otherwise."""

    drop_last: bool = True
    """If ``True``, leaves out the rows at the end of an epoch that do not fill a batch."""

    num_workers: int = 2
    """Threads that read, decode and tokenize ahead; 0 for none."""

    prefetch: int = 4
    """The number of batches to prepare ahead."""

    def validate(self) -> ValidationResult:
        result = ValidationResult()
        if not self.paths:
            result.add_error("`paths` must name at least one file or folder.")

        for name, low in (("batch_size", 1), ("max_length", 3), ("num_workers", 0), ("prefetch", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                result.add_error(f"`{name}` must be greater than or equal to {low}, but is {value} instead.")

        if (count := self.rows_per_label) is not None and (count < 0 or count == 1):
            result.add_error(f"`rows_per_label` must be 0, or greater than or equal to 2, but is {count} instead.")
        if self.rows_per_label and not self.shuffle:
            result.add_error("`rows_per_label` needs `shuffle`.")

        return result


@dataclass(kw_only=True)
class ValidSection(DataSection):
    """The held-out data: files of rows, or queries, corpus and qrels. Without any there is no validation.

    ``paths`` may be a folder in the layout of BEIR.
    """

    queries: Path | None = None
    """A file of queries: ``_id``, and ``text`` or ``image``."""

    corpus: Path | None = None
    """A file of documents: ``_id``, and ``text`` or ``image``."""

    qrels: Path | None = None
    """A file of judgements: query, document, grade; or TREC's four columns."""

    split: str = "test"
    """Which judgements of a folder."""

    batch_size: int = 64
    """The number of inputs per rank and batch."""

    @property
    def is_given(self) -> bool:
        return bool(self.paths) or None not in (self.queries, self.corpus, self.qrels)

    def validate(self) -> ValidationResult:
        result = ValidationResult()
        if self.batch_size < 1:
            result.add_error(f"`batch_size` must be greater than or equal to 1, but is {self.batch_size} instead.")

        given = [file is not None for file in (self.queries, self.corpus, self.qrels)]
        if any(given) and not all(given):
            result.add_error("`queries`, `corpus` and `qrels` must be specified together.")
        if any(given) and self.paths:
            result.add_error("`paths` must not be specified together with `queries`, `corpus` and `qrels`.")

        return result


@dataclass(kw_only=True)
class LossSection:
    name: str = "infonce"
    """The objective."""

    config: object = field(default_factory=lambda: InfoNCEConfig())
    """The configuration of the objective."""

    @property
    def needs_teacher(self) -> bool | None:
        """Whether the objective needs a teacher; ``None`` while its configuration is not valid."""
        entry = LOSSES.get(self.name)
        if entry is None or not isinstance(self.config, entry.config_kls):
            return None

        try:
            return create_loss(self.name, self.config).needs_teacher
        except ValueError:
            return None

    def validate(self) -> ValidationResult:
        result = ValidationResult()
        entry = LOSSES.get(self.name)
        if entry is not None and isinstance(self.config, entry.config_kls):
            for error in prefix_keys(self.config.errors(), "config."):
                result.add_error(error)
        return result


@dataclass(kw_only=True)
class TeacherSection:
    """The model that a distillation learns from, named as other models are. It has its own processor and prompts."""

    name: str | None = None
    """The name of a card."""

    path: Path | None = None
    """A Hugging Face, sentence-transformers or run folder."""

    max_length: int | None = None
    """The longest text in tokens, if it is not the teacher's own."""

    dtype: torch.dtype = torch.float32
    """The type of its weights; it computes as ``trainer.mixed_precision`` says."""

    @property
    def is_given(self) -> bool:
        return self.name is not None or self.path is not None

    def validate(self) -> ValidationResult:
        result = ValidationResult()
        if self.name is not None and self.path is not None:
            result.add_error("`name` and `path` must not be specified at the same time.")
        if self.max_length is not None and self.max_length < 3:
            result.add_error(f"`max_length` must be greater than or equal to 3, but is {self.max_length} instead.")
        if not self.dtype.is_floating_point:
            result.add_error(f"`dtype` must be a floating point type, but is {self.dtype} instead.")

        return result


@dataclass(kw_only=True)
class GradCacheSection:
    chunk_tokens: int = 2048 if not torch.cuda.is_available() else 65536
    """The cost of a chunk in tokens, padding included; an image costs its number of patches."""

    chunk_patches: int | None = None
    """The cost of a chunk of rows with images; ``chunk_tokens`` if it is not given."""

    activation_budget: int | str = "auto"
    """The memory for graphs that are kept instead of recomputed: 'auto', 'all', 0 or a size such as '4GiB'."""

    grad_sync: Literal["last", "every_chunk"] = "last"
    """When FSDP reduces gradients: after the last chunk, or after every one, which takes the least memory."""

    def validate(self) -> ValidationResult:
        result = ValidationResult()
        for name in ("chunk_tokens", "chunk_patches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                result.add_error(f"`{name}` must be greater than or equal to 1, but is {value} instead.")

        try:
            parse_budget(self.activation_budget, torch.device("cpu"))
        except ValueError as ex:
            result.add_error(str(ex))

        return result


@dataclass(kw_only=True)
class FreezeSection:
    """The parameters that keep their values, besides those that the model's own configuration freezes."""

    embeddings: bool = False
    """If ``True``, what comes before the layers is frozen: embeddings of tokens, patches and positions."""

    layers: int = 0
    """The number of first layers that are frozen, of each encoder, with what comes before them."""

    params: Sequence[str] = field(default_factory=list)
    """Regular expressions: parameters that are frozen, by the beginnings of their names."""

    def validate(self) -> ValidationResult:
        result = ValidationResult()
        if self.layers < 0:
            result.add_error(f"`layers` must be greater than or equal to 0, but is {self.layers} instead.")

        for pattern in self.params:
            try:
                re.compile(pattern)
            except re.error as ex:
                result.add_error(f"`params`: '{pattern}' is not a valid regular expression: {ex}.")

        return result


@dataclass(kw_only=True)
class TrainRegimeSection(RegimeSection):
    """fairseq2's, with what it overlooks."""

    @override
    def validate(self) -> ValidationResult:
        # fairseq2 divides by these.
        zeros = [name for name, value in vars(self).items() if "_every_n_" in name and value == 0]
        others: dict[str, Any] = dict.fromkeys(zeros)

        result = super(TrainRegimeSection, replace(self, **others)).validate()
        for name in zeros:
            result.add_error(f"`{name}` must be greater than or equal to 1.")

        if self.export_hugging_face:
            result.add_error(
                "`export_hugging_face` is not supported: the folders that fairseq2 writes lack the tokenizer and "
                "the image processor. `fairseq2 vembed export OUTPUT_DIR FOLDER` writes the model of a run."
            )
        return result


def _default_trainer() -> TrainerSection:
    mode: Literal["static", "off"] = "static" if has_fast_bf16() else "off"
    return TrainerSection(mixed_precision=MixedPrecisionConfig(mode=mode), max_grad_norm=1.0)


@dataclass(kw_only=True)
class TrainConfig:
    """The configuration of ``fairseq2 vembed train``."""

    model: EmbeddingModelSection = field(default_factory=lambda: EmbeddingModelSection())
    processor: ProcessorSection = field(default_factory=lambda: ProcessorSection())
    freeze: FreezeSection = field(default_factory=lambda: FreezeSection())
    dataset: DatasetSection = field(default_factory=lambda: DatasetSection())
    valid: ValidSection = field(default_factory=lambda: ValidSection())
    loss: LossSection = field(default_factory=lambda: LossSection())
    teacher: TeacherSection = field(default_factory=lambda: TeacherSection())
    grad_cache: GradCacheSection = field(default_factory=lambda: GradCacheSection())
    gang: GangSection = field(default_factory=lambda: GangSection())
    trainer: TrainerSection = field(default_factory=_default_trainer)
    optimizer: OptimizerSection = field(
        default_factory=lambda: OptimizerSection(name=ADAMW, config=EmbeddingAdamWConfig())
    )
    lr_scheduler: LRSchedulerSection = field(
        default_factory=lambda: LRSchedulerSection(name=WARMUP_DECAY, config=WarmupDecayConfig())
    )
    regime: TrainRegimeSection = field(
        default_factory=lambda: TrainRegimeSection(
            checkpoint_every_n_data_epochs=1,
            validate_every_n_data_epochs=1,
            publish_metrics_every_n_steps=10,
            keep_last_n_checkpoints=2,
        )
    )
    common: CommonSection = field(default_factory=lambda: CommonSection(no_sweep_dir=True))

    def _new_model_errors(self, family: str) -> Sequence[str]:
        """What is wrong with a model that has new weights."""
        try:
            find_arch_config(family, self.model.arch)
        except ConfigError as ex:
            return ex.errors

        # The encoders of a composed model may have files of their own.
        if self.processor.path is None and family != COMPOSED_FAMILY:
            return [f"{NO_PROCESSOR}, because new weights come without.{PROCESSOR_FOLDERS}"]
        return []

    def validate(self) -> ValidationResult:
        result = ValidationResult()
        has_valid = self.valid.is_given
        if not has_valid and self.regime.validate_at_start:
            result.add_error("`regime.validate_at_start` needs held-out data, such as `valid.paths`.")
        if not has_valid and self.regime.score_metric is not None:
            result.add_error("`regime.score_metric` needs held-out data, such as `valid.paths`.")

        if (score_metric := self.regime.score_metric) not in (None, *VALID_METRICS):
            result.add_error(
                f"`regime.score_metric` must be one of {', '.join(VALID_METRICS)}, but is {score_metric!r} instead."
            )

        if not 0 <= self.common.seed < 2**32:
            result.add_error(f"`common.seed` must be between 0 and 2**32 - 1, but is {self.common.seed} instead.")

        if (needs_teacher := self.loss.needs_teacher) is not None and needs_teacher != self.teacher.is_given:
            result.add_error(
                "`loss` needs a teacher: name a card as `teacher.name`, or a folder as `teacher.path`."
                if needs_teacher
                else "`teacher` is given, but `loss` needs none."
            )

        if self.model.name is None and self.model.path is None and self.model.family is not None:
            for error in self._new_model_errors(self.model.family):
                result.add_error(error)

        trainer = self.trainer
        if trainer.max_grad_norm is not None and not trainer.max_grad_norm > 0.0:
            result.add_error(f"`trainer.max_grad_norm` must be positive, but is {trainer.max_grad_norm} instead.")
        if (dtype := trainer.mixed_precision.dtype) not in (torch.float16, torch.bfloat16):
            result.add_error(f"`trainer.mixed_precision.dtype` must be float16 or bfloat16, but is {dtype} instead.")
        if trainer.data_parallelism == "fsdp" and trainer.fsdp.version == "v1":
            result.add_error("`trainer.fsdp.version` must be 'v2': FSDP1 has no gradient accumulation over chunks.")
        if trainer.data_parallelism == "fsdp" and trainer.grad_accumulation.no_sync:
            result.add_error("`trainer.grad_accumulation.no_sync` works with DDP only.")
        if self.grad_cache.grad_sync == "every_chunk" and trainer.data_parallelism != "fsdp":
            result.add_error("`grad_cache.grad_sync` can be 'every_chunk' with `trainer.data_parallelism=fsdp` only.")

        return result
