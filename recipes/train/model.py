"""Which model to train, and its processor: found, or made new, and checked before anything is written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fairseq2.gang import Gangs
from fairseq2.models import ModelFamily
from fairseq2.utils.config import StandardConfigMerger
from fairseq2.utils.structured import StandardValueConverter
from torch.nn import Module

from vembed_fs2.embedding.freezing import find_first_parameters, find_matches, plain_name
from vembed_fs2.embedding.model import EmbeddingModel
from vembed_fs2.errors import ConfigError, ModelLoadError
from vembed_fs2.hub.find import ModelSource, find_model
from vembed_fs2.hub.load import load_processor
from vembed_fs2.hub.towers import refuse_sources, resolve_towers
from vembed_fs2.models.composed import ComposedConfig, ComposedModel
from vembed_fs2.models.composed.interop import forget_sources
from vembed_fs2.processing.processor import Processor
from vembed_fs2.recipes.layers import structure
from vembed_fs2.recipes.train.archs import find_arch_config
from vembed_fs2.recipes.train.config import (
    NO_PROCESSOR,
    PROCESSOR_FOLDERS,
    FreezeSection,
    TrainConfig,
)
from vembed_fs2.recipes.train.objective import Reads, check_vectors, create_blank
from vembed_fs2.resolver import get_resolver


@dataclass
class ModelPlan:
    """The model of a run."""

    family: str
    config: object
    overrides: Mapping[str, Any]
    """The values of ``config`` that differ from what ``model`` names."""

    base: object
    """The configuration that ``overrides`` change."""

    embedding_dim: int

    reads: Reads


def plan_model(config: TrainConfig) -> ModelPlan:
    """Find the model.

    The family and configuration of a folder, and of the folders of encoders,
    become part of the run's own configuration: the run can be resumed without them.

    :raises ConfigError: lists what is wrong with the model's configuration.
    :raises ModelLoadError: there is no such model.
    """
    section = config.model

    overrides = section.config_overrides or {}
    if not isinstance(overrides, Mapping):
        raise ConfigError(f"`model.config_overrides` must hold keys and values, but is {overrides!r}.")

    if section.path is None and section.name is None:
        family = str(section.family)
        model_config = find_arch_config(family, section.arch)
        if isinstance(model_config, ComposedConfig):
            # Not merged over the architecture's encoders: another family's encoders have other fields.
            overrides, section.arch = resolve_towers(model_config, overrides), None
            model_config = ComposedConfig()
    else:
        trusted = overrides.get("trust_remote_code") is True
        source = find_model(section.path or section.name or "", trust_remote_code=trusted)
        model_config, family = source.config, source.family
        section.family, section.arch = None, None

        if isinstance(model_config, ComposedConfig):
            model_config = forget_sources(model_config)
            refuse_sources(model_config, overrides)

        if isinstance(source.weights, Path):
            section.family, section.path, section.name = source.family, source.weights, None
            values = StandardValueConverter().unstructure(model_config)
            overrides = cast(Mapping[str, object], StandardConfigMerger().merge(values, overrides))
            config.processor.path = config.processor.path or source.folder
        else:
            section.name, section.path = source.name, None
            if os.environ.get("RANK", "0") == "0":
                source.weights_path()  # Downloaded now, before anything is written.

    base, model_config = model_config, override_config(model_config, overrides)
    model = _check(config, family, model_config)
    _check_processor(config, model)
    return ModelPlan(family, model_config, overrides, base, model.embedding_dim, Reads.of(model))


def _check(config: TrainConfig, family: str, model_config: object) -> EmbeddingModel:
    """Check that the model can be trained with the objective; return it without weights."""
    model = create_blank(family, model_config)
    freeze_parameters(model, config.freeze)
    errors = []
    if not any(parameter.requires_grad for parameter in model.parameters()):
        errors.append("all parameters are frozen: nothing is left to train.")

    has_files = config.processor.path is not None or config.model.name is not None
    if isinstance(model, ComposedModel) and not has_files and None in (model.text.source, model.image.source):
        errors.append(f"{NO_PROCESSOR}, because `text` or `image` has no `path` or `name`.{PROCESSOR_FOLDERS}")

    if errors:
        raise ConfigError(errors, where="`model`")

    check_vectors(config.loss, several=model.is_multi_vector)
    return model


def freeze_parameters(model: EmbeddingModel, section: FreezeSection) -> None:
    """Freeze what the configuration says.

    :raises ConfigError: there are fewer layers, or a pattern matches nothing.
    """
    frozen: set[str] = set()
    errors = []
    if section.embeddings or section.layers:
        encoders = list((model.towers or {}).values())
        try:
            frozen |= find_first_parameters(model, model.layer_stacks(), encoders, section.layers)
        except ConfigError as ex:
            errors += ex.errors

    try:
        names = [plain_name(name) for name, _ in model.named_parameters() if name not in model.learned]
        frozen |= find_matches(names, section.params)
    except ConfigError as ex:
        errors += [f"`params`: {error}" for error in ex.errors]

    if errors:
        raise ConfigError(errors, where="`freeze`")
    if frozen:
        model.freeze(frozen - model.learned.keys())


def count_parameters(model: Module) -> tuple[int, int]:
    """Return the number of trained parameters, and of all."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)


def _check_processor(config: TrainConfig, model: EmbeddingModel) -> None:
    """Check that the processor fits the model, unless its files are on a hub.

    :raises ModelLoadError: it does not, or a file is missing or broken.
    :raises ConfigError: the same, if the model is a new one, which has no processor of its own.
    """
    try:
        sources = _processor_sources(config, model)
        folders = [source if isinstance(source, Path) else source.folder for source in sources]
        if folders and None not in folders:
            paths = (Path(folder) for folder in folders if folder)
            load_processor(model, *paths, max_length=config.processor.max_length)
    except ModelLoadError as ex:
        if config.model.path is None and config.model.name is None and config.processor.path is not None:
            raise ConfigError(f"`processor.path`: {ex}{PROCESSOR_FOLDERS}") from None
        raise


def override_config(model_config: object, overrides: Mapping[str, object]) -> object:
    """Return the configuration that `model.config_overrides` makes of one.

    :raises ConfigError: lists unknown keys and values of a wrong type.
    """
    values = StandardValueConverter().unstructure(model_config)
    merged = cast(Mapping[str, object], StandardConfigMerger().merge(values, overrides))
    return structure(type(model_config), merged, _family_config, "model.config_overrides.")


def _family_config(section: str, name: str) -> type[object] | None:
    """The class of the configuration of an encoder in a composed model."""
    family = get_resolver().maybe_resolve(ModelFamily, key=name)
    # The model's own validation says what is wrong with the name.
    return None if family is None else family.config_kls


def create_processor(
    config: TrainConfig, model: EmbeddingModel, gangs: Gangs, *, max_length: int | None = None
) -> Processor[Any]:
    """Load the processor of the model, changed as the configuration says.

    :param max_length: the longest text, if it is not the configuration's.
    """
    section = config.processor
    folders = _processor_folders(config, model, gangs)
    processor = load_processor(model, *folders, max_length=max_length or section.max_length)

    settings = processor.settings
    for name, prompt in (("query", section.query_prompt), ("document", section.document_prompt)):
        if prompt is not None:
            settings.prompts[name] = prompt

    if section.instruction_template is not None:
        settings.instruction_template = section.instruction_template

    for name in ("min_pixels", "max_pixels"):
        value = getattr(section, name)
        if value is not None and not model.is_interleaved:
            raise ConfigError(f"`{name}` is for models that take images of any size.", where="`processor`")
        if value is not None:
            setattr(settings, name, value)

    processor.image_root = None  # The rows' paths were checked against the section's root when they were read.
    processor.allow_urls = config.dataset.allow_urls or config.valid.allow_urls  # Checked with the paths.
    return processor


def _processor_sources(config: TrainConfig, model: EmbeddingModel) -> list[Path | ModelSource]:
    """Return where the processor is, or the tokenizer and the image processor; nothing, if nothing says it."""
    if config.processor.path is not None:
        path = config.processor.path
        return [path if path.exists() else find_model(path)]

    names: list[str | Path | None] = [config.model.name]
    if isinstance(model, ComposedModel) and config.model.name is None:
        names = [model.text.source, model.image.source]

    return [] if None in names else [find_model(name) for name in names if name is not None]


def _processor_folders(config: TrainConfig, model: EmbeddingModel, gangs: Gangs) -> list[Path]:
    """Return the folder of the processor, or the folders of the tokenizer and of the image processor."""
    sources = _processor_sources(config, model)
    if not sources:
        raise ConfigError(f"{NO_PROCESSOR}.{PROCESSOR_FOLDERS}")

    def fetch() -> list[Path]:
        return [source if isinstance(source, Path) else source.processor_folder() for source in sources]

    if gangs.root.rank == 0:
        fetch()  # One process downloads, the others find the files.

    gangs.root.barrier()
    return fetch()
