"""Registers an embedding family with fairseq2, and finds the family of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, TypeVar, final

import torch
from fairseq2.assets import AssetCard, AssetConfigLoader, AssetDownloadManager
from fairseq2.error import NotSupportedError
from fairseq2.model_checkpoint import ModelCheckpointLoader
from fairseq2.models import ModelFamily, StandardModelFamily
from fairseq2.models.hg import HuggingFaceConverter
from fairseq2.models.utils.ac import apply_layerwise_ac
from fairseq2.models.utils.fsdp import apply_layerwise_fsdp
from fairseq2.nn.fsdp import FSDPWrapper
from fairseq2.runtime.dependency import (
    DependencyContainer,
    DependencyLookup,
    DependencyResolver,
    get_dependency_resolver,
    wire_object,
)
from torch import Tensor
from torch.nn import Module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from typing_extensions import override

from vembed_fs2.embedding.image_head import set_image_head
from vembed_fs2.embedding.model import EmbeddingModel, EmbeddingModelConfig, initial_projection
from vembed_fs2.errors import ConfigError, ModelLoadError
from vembed_fs2.formats.checkpoint import LEARNED_PARTS as LEARNED_PARTS
from vembed_fs2.formats.checkpoint import CheckpointFormat as CheckpointFormat
from vembed_fs2.formats.checkpoint import PlainCheckpointFormat as PlainCheckpointFormat
from vembed_fs2.formats.checkpoint import config_errors as config_errors
from vembed_fs2.formats.checkpoint import head_of as head_of
from vembed_fs2.formats.download import FolderDownloadManager, download_repository
from vembed_fs2.formats.folder import FolderCheckpointLoader, ModelFolder, is_model_folder
from vembed_fs2.formats.open_clip import get_open_clip_format, is_open_clip_state, read_open_clip_config
from vembed_fs2.models.support import FamilySupport

ConfigT = TypeVar("ConfigT")

FALLBACK_FAMILY: Final = "vembed_auto"
"""The family that wraps the models of transformers that no other reads."""


@dataclass(frozen=True)
class FamilyFactory:
    """Creates models of a family inside other models. Unlike fairseq2's ``ModelFamily``, it waits for no rank."""

    create: Callable[[Any], EmbeddingModel]
    """Creates the model of a configuration, on the current device.

    :raises ConfigError: the configuration is not valid.
    """

    supports_meta: bool
    """Whether it works on the meta device, and its modules draw their initial weights when they leave it."""


def register_family(
    container: DependencyContainer,
    name: str,
    *,
    kls: type[EmbeddingModel],
    config_kls: type[ConfigT],
    factory: Callable[[ConfigT], EmbeddingModel],
    checkpoint_format: CheckpointFormat | None = None,
    supports_meta: bool = True,
    supports_reset: bool = True,
    supports_compile: bool = True,
    supports_packed: bool = False,
    supports_tensor_parallel: bool | Callable[[ConfigT], bool] = False,
) -> None:
    """Register a family of embedding models with fairseq2.

    The model can then be loaded from asset cards, trained with the recipes and
    sharded with FSDP2 layer by layer (see :meth:`EmbeddingModel.layer_stacks`).
    Architectures are registered with :class:`fairseq2.runtime.config_registry.ConfigRegistrar`.

    :param factory: creates the model, of a configuration that is valid: what
        ``config_kls`` has as ``validate() -> ValidationResult`` is checked before.
    :param checkpoint_format: reads and writes Hugging Face folders, for example
        :class:`PlainCheckpointFormat`; without it the family loads fairseq2
        checkpoints only.
    :param supports_meta: whether the factory works on the meta device.
    :param supports_reset: whether all modules have ``reset_parameters``, so that they draw their initial weights when
        they leave the meta device.
    :param supports_compile: whether the layers can be compiled, one at a time.
    :param supports_packed: whether texts are encoded one after the other, without padding.
    :param supports_tensor_parallel: whether the model is built of fairseq2's sharded layers; or which
        configurations' models are. Others are refused where there are several tensor parallel ranks.
    """
    facts = FamilySupport(supports_tensor_parallel, supports_packed)

    def convert(state_dict: dict[str, object], config: ConfigT) -> dict[str, object]:
        if is_open_clip_state(name, state_dict):
            state_dict = get_open_clip_format(name).state_dict_from_open_clip(state_dict, config)
        elif checkpoint_format is not None:
            state_dict = checkpoint_format.from_hf_state_dict(state_dict, config)
        blank = _create_blank(factory, config) if supports_meta else None
        if blank is not None:
            _drop_repetitions(state_dict, blank)
        _add_learned_parts(state_dict, config, lambda: (factory(config) if blank is None else blank).embedding_dim)
        return state_dict

    def create(config: ConfigT) -> EmbeddingModel:
        if errors := config_errors(config):
            raise ConfigError(errors, where=f"The {name} configuration")
        facts.check_gangs(name, config)
        model = factory(config)
        model.frozen_parameters = frozenset(name for name, p in model.named_parameters() if not p.requires_grad)
        if isinstance(config, EmbeddingModelConfig):
            if config.logit_scale_init is not None:
                model.add_logit_scale(config.logit_scale_init)
            if config.logit_bias_init is not None:
                model.add_logit_bias(config.logit_bias_init)
            if config.teacher_dim is not None:
                model.add_teacher_projection(config.teacher_dim)
        return model

    def create_family(resolver: DependencyResolver) -> ModelFamily:
        return wire_object(
            resolver,
            StandardModelFamily,
            name=name,
            kls=kls,
            configs=DependencyLookup(resolver, config_kls),
            factory=create,
            asset_download_manager=FolderDownloadManager(resolver.resolve(AssetDownloadManager)),
            asset_config_loader=_FolderConfigLoader(resolver.resolve(AssetConfigLoader), checkpoint_format),
            checkpoint_loader=FolderCheckpointLoader(resolver.resolve(ModelCheckpointLoader)),
            supports_meta=supports_meta,
            restrict=True,
            state_dict_converter=convert,
            shard_specs=None,
            compiler=_compile if supports_compile else None,
            fsdp_applier=_apply_fsdp,
            layerwise_ac_applier=_apply_layerwise_ac,
        )

    container.register(ModelFamily, create_family, key=name)
    container.register_instance(FamilySupport, facts, key=name)
    container.register_instance(FamilyFactory, FamilyFactory(create, supports_meta and supports_reset), key=name)
    if checkpoint_format is not None:
        container.register_instance(HuggingFaceConverter, checkpoint_format, key=name)


@final
class _FolderConfigLoader(AssetConfigLoader):
    """Takes the configuration of a card from its folder's ``config.json``, if it names no architecture.

    A folder that is on a hub is downloaded for it, whole: some configurations
    depend on which tensors there are.
    """

    def __init__(self, loader: AssetConfigLoader, checkpoint_format: CheckpointFormat | None) -> None:
        self._loader = loader
        self._format = checkpoint_format

    @override
    def load(self, card: AssetCard, base_config: object, config_key: str) -> object:
        field = card.maybe_get_field("checkpoint")
        if self._format is not None and field is not None and not card.has_field("model_arch"):
            uri = field.as_uri()
            path = download_repository(uri) if uri.scheme == "hg" else uri.to_path() if uri.scheme == "file" else None
            if path is not None and is_model_folder(path):
                base_config = read_folder_config(path, self._format, trust_remote_code=_is_trusted(card))
        return self._loader.load(card, base_config, config_key)


def _is_trusted(card: AssetCard) -> bool:
    field = card.maybe_get_field("model_config_overrides")
    return field is not None and isinstance(field.value, Mapping) and field.value.get("trust_remote_code") is True


def read_folder_config(path: Path, checkpoint_format: CheckpointFormat, *, trust_remote_code: bool = False) -> Any:
    """Read the model configuration of a Hugging Face, sentence-transformers or open_clip folder.

    :param trust_remote_code: whether Python code in the folder may be run.
    :raises ModelLoadError: the folder is broken, or an option is not supported.
    """
    folder = ModelFolder.open(path)
    if folder.is_open_clip:
        return read_open_clip_config(path)[1]
    config = checkpoint_format.from_folder(folder, trust_remote_code=trust_remote_code)
    image_head = folder.image_head()
    if image_head is not None:
        set_image_head(config, image_head)
    return config


def _create_blank(factory: Callable[[ConfigT], EmbeddingModel], config: ConfigT) -> EmbeddingModel:
    """Create a model without memory for its weights."""
    with torch.device("meta"):
        return factory(config)


def _drop_repetitions(state_dict: dict[str, object], model: EmbeddingModel) -> None:
    """Keep the buffers of one rank. FSDP2 leaves them whole on each, and fairseq2 appends what the ranks hold."""
    for name, buffer in model.named_buffers():
        tensor = state_dict.get(name)
        if isinstance(tensor, Tensor) and tensor.ndim > 0 and tensor.size(0) > buffer.size(0):
            state_dict[name] = tensor[: buffer.size(0)]


def _add_learned_parts(state_dict: dict[str, object], config: object, embedding_dim: Callable[[], int]) -> None:
    """Add what is to be learned besides the encoder, and what the checkpoint does not have yet."""
    if not isinstance(config, EmbeddingModelConfig):
        return
    if config.logit_scale_init is not None:
        state_dict.setdefault("logit_scale", torch.tensor([config.logit_scale_init]))
    if config.logit_bias_init is not None:
        state_dict.setdefault("logit_bias", torch.tensor([config.logit_bias_init]))
    projection = state_dict.pop("teacher_projection", None)
    if config.teacher_dim is not None:
        # Another teacher's is of no use.
        if not isinstance(projection, Tensor) or projection.size(0) != config.teacher_dim:
            projection = initial_projection(config.teacher_dim, embedding_dim())
        state_dict["teacher_projection"] = projection


def _apply_fsdp(model: EmbeddingModel, granularity: str, wrapper: FSDPWrapper) -> Module:
    if granularity != "layer":
        raise NotSupportedError(f"`fsdp.granularity` must be 'layer' or 'model', but is '{granularity}' instead.")
    for stack in model.layer_stacks():
        apply_layerwise_fsdp(stack, wrapper)
    # The remaining parameters (embeddings, heads, temperature) form the root group.
    return wrapper(model, reshard_after_forward=False)


def _apply_layerwise_ac(model: EmbeddingModel, every_nth_layer: int) -> Module:
    for stack in model.layer_stacks():
        apply_layerwise_ac(stack, every_nth_layer)
    return model


def _compile(model: EmbeddingModel, *args: Any, **kwargs: Any) -> None:
    for stack in model.layer_stacks():
        for layer in stack:
            layer.compile(*args, **kwargs)  # type: ignore[no-untyped-call]


def get_checkpoint_format(family: str, resolver: DependencyResolver | None = None) -> CheckpointFormat | None:
    """Return how the checkpoints of ``family`` look, or ``None`` if it has no Hugging Face format."""
    resolver = resolver or get_dependency_resolver()
    converter = resolver.maybe_resolve(HuggingFaceConverter, key=family)
    return converter if isinstance(converter, CheckpointFormat) else None


def find_family(model_type: str, resolver: DependencyResolver | None = None, *, has_code: bool = False) -> str:
    """Return the family that reads Hugging Face models of ``model_type``: one of its own, else the one for all others.

    :param has_code: whether the model comes with Python code of its own.
    :raises ModelLoadError: there is none.
    """
    resolver = resolver or get_dependency_resolver()
    known: dict[str, list[str]] = {}
    for family in DependencyLookup(resolver, HuggingFaceConverter).iter_keys():
        converter = get_checkpoint_format(str(family), resolver)
        for known_type in converter.model_types if converter is not None else ():
            known.setdefault(known_type, []).append(str(family))
    match known.get(model_type, []):
        case [name]:
            return name
        case [*names] if names:
            text = f"model_type '{model_type}' is read by several families: {', '.join(sorted(names))}."
            raise ModelLoadError(f"{text} Uninstall the package of all but one.")
    if (has_code or model_type in CONFIG_MAPPING_NAMES) and get_checkpoint_format(FALLBACK_FAMILY, resolver):
        return FALLBACK_FAMILY
    nearest = get_close_matches(model_type, known, 1) or get_close_matches(model_type, CONFIG_MAPPING_NAMES, 1)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    raise ModelLoadError(
        f"model_type '{model_type}' is not supported.{hint} Supported are: {', '.join(sorted(known))}, and what else "
        "transformers has for texts or images."
    )
