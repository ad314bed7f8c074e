"""The configuration of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

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

from vembed_fs2.gradcache import parse_budget
from vembed_fs2.losses import LOSSES, InfoNCEConfig, create_loss
from vembed_fs2.losses.nested import prefix_keys
from vembed_fs2.recipes.metrics import VALID_METRICS
from vembed_fs2.recipes.optim import ADAMW, WARMUP_DECAY, EmbeddingAdamWConfig, WarmupDecayConfig


@dataclass(kw_only=True)
class EmbeddingModelSection(ModelSection):
    """Which model to train.

    ``name`` (a card), ``path`` (a folder or a run), or ``family`` and ``arch`` (random weights).
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
        if self.instruction_template is not None and "{instruction}" not in self.instruction_template:
            result.add_error("`instruction_template` must contain '{instruction}'.")
        return result


@dataclass(kw_only=True)
class DataSection:
    """Files of rows, and how to read them."""

    paths: Sequence[Path] = field(default_factory=list)
    """JSONL, CSV, TSV or Parquet files, or folders of them; or folders of classes of images."""

    columns: dict[str, str | list[str] | None] = field(default_factory=dict)
    """Our field -> the file's column, or columns of several negatives; ``None`` leaves the field out."""

    mode: Literal["auto", "t2t", "t2i", "i2t", "i2i", "m2i", "m2t"] = "auto"
    """What queries and documents consist of: t text, i image, m both."""

    image_root: Path | None = None
    """The folder that images must lie in; the folder of the data file by default."""

    allow_urls: bool = False
    """If ``True``, images may be fetched from URLs."""

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
    """The held-out data; without ``paths`` there is no validation."""

    batch_size: int = 64
    """The number of inputs per rank and batch."""

    def validate(self) -> ValidationResult:
        result = ValidationResult()
        if self.batch_size < 1:
            result.add_error(f"`batch_size` must be greater than or equal to 1, but is {self.batch_size} instead.")
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
    """The model that a distillation learns from: a card or a folder. It has its own processor and prompts."""

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


def _default_trainer() -> TrainerSection:
    mode: Literal["static", "off"] = "static" if has_fast_bf16() else "off"
    return TrainerSection(mixed_precision=MixedPrecisionConfig(mode=mode), max_grad_norm=1.0)


def has_fast_bf16() -> bool:
    """Whether the hardware multiplies bfloat16 matrices natively."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@dataclass(kw_only=True)
class TrainConfig:
    """The configuration of ``fairseq2 vembed train``."""

    model: EmbeddingModelSection = field(default_factory=lambda: EmbeddingModelSection())
    processor: ProcessorSection = field(default_factory=lambda: ProcessorSection())
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
    regime: RegimeSection = field(
        default_factory=lambda: RegimeSection(
            checkpoint_every_n_data_epochs=1,
            validate_every_n_data_epochs=1,
            publish_metrics_every_n_steps=10,
            keep_last_n_checkpoints=2,
        )
    )
    common: CommonSection = field(default_factory=lambda: CommonSection(no_sweep_dir=True))

    def validate(self) -> ValidationResult:
        result = ValidationResult()
        has_valid = bool(self.valid.paths)
        if not has_valid and self.regime.validate_at_start:
            result.add_error("`regime.validate_at_start` needs held-out data in `valid.paths`.")
        if not has_valid and self.regime.score_metric is not None:
            result.add_error("`regime.score_metric` needs held-out data in `valid.paths`.")

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
