"""Registers an embedding family with fairseq2, and finds the family of a Hugging Face folder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from fairseq2.assets import AssetCard, AssetConfigLoader, AssetDownloadManager
from fairseq2.error import NotSupportedError
from fairseq2.model_checkpoint import ModelCheckpointLoader
from fairseq2.models import ModelFamily, StandardModelFamily
from fairseq2.models.hg import HuggingFaceConfig, HuggingFaceConverter
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
from torch.nn import Module
from typing_extensions import override

from vembed_fs2.errors import ModelLoadError
from vembed_fs2.models.download import FolderDownloadManager
from vembed_fs2.models.embedding import EmbeddingModel, EmbeddingModelConfig, HeadConfig
from vembed_fs2.models.folder import FolderCheckpointLoader, ModelFolder, is_model_folder

ConfigT = TypeVar("ConfigT")


class CheckpointFormat(HuggingFaceConverter):
    """How a family's checkpoints look in Hugging Face transformers, read both ways.

    Subclasses :class:`fairseq2.models.hg.HuggingFaceConverter`, so fairseq2's
    own export works too.
    """

    model_types: Sequence[str] = ()
    """The ``model_type`` values of ``config.json`` that the family reads."""

    @abstractmethod
    def from_hf_config(
        self, hf_config: Mapping[str, Any], *, head: HeadConfig | None = None, keys: frozenset[str] = frozenset()
    ) -> Any:
        """Convert ``config.json`` to the family's configuration.

        :param head: what follows the backbone, where the folder says it.
        :param keys: the names of the tensors in the checkpoint.
        :raises ModelLoadError: an option is not supported; the message names the field.
        """

    @abstractmethod
    def from_hf_state_dict(self, state_dict: dict[str, object], config: Any) -> dict[str, object]:
        """Convert tensors to the family's names. A state dict that has them already is returned as it is."""

    @override
    @abstractmethod
    def to_hg_config(self, config: object) -> HuggingFaceConfig:
        """Convert the family's configuration to transformers' (the reverse of :meth:`from_hf_config`)."""

    @override
    @abstractmethod
    def to_hg_state_dict(self, state_dict: dict[str, object], config: object) -> dict[str, object]:
        """Convert the family's tensors to transformers' (the reverse of :meth:`from_hf_state_dict`)."""


def register_family(
    container: DependencyContainer,
    name: str,
    *,
    kls: type[EmbeddingModel],
    config_kls: type[ConfigT],
    factory: Callable[[ConfigT], EmbeddingModel],
    checkpoint_format: CheckpointFormat | None = None,
    supports_meta: bool = True,
) -> None:
    """Register a family of embedding models with fairseq2.

    The model can then be loaded from asset cards, trained with the recipes and
    sharded with FSDP2 layer by layer (see :meth:`EmbeddingModel.layer_stacks`).
    Architectures are registered with :class:`fairseq2.runtime.config_registry.ConfigRegistrar`.

    :param checkpoint_format: reads and writes Hugging Face folders; without it
        the family loads fairseq2 checkpoints only.
    :param supports_meta: whether the factory works on the meta device.
    """

    def convert(state_dict: dict[str, object], config: ConfigT) -> dict[str, object]:
        if checkpoint_format is not None:
            state_dict = checkpoint_format.from_hf_state_dict(state_dict, config)
        # A temperature that is to be learned, but that the checkpoint does not have yet.
        if (init := logit_scale_init_of(config)) is not None:
            state_dict.setdefault("logit_scale", torch.tensor([init]))
        return state_dict

    def create(config: ConfigT) -> EmbeddingModel:
        model = factory(config)
        if (init := logit_scale_init_of(config)) is not None:
            model.add_logit_scale(init)
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
            compiler=_compile,
            fsdp_applier=_apply_fsdp,
            layerwise_ac_applier=_apply_layerwise_ac,
        )

    container.register(ModelFamily, create_family, key=name)
    if checkpoint_format is not None:
        container.register_instance(HuggingFaceConverter, checkpoint_format, key=name)


@final
class _FolderConfigLoader(AssetConfigLoader):
    """Takes the configuration of a card from its local folder's ``config.json``, if it names no architecture."""

    def __init__(self, loader: AssetConfigLoader, checkpoint_format: CheckpointFormat | None) -> None:
        self._loader = loader
        self._format = checkpoint_format

    @override
    def load(self, card: AssetCard, base_config: object, config_key: str) -> object:
        field = card.maybe_get_field("checkpoint")
        if self._format is not None and field is not None and not card.has_field("model_arch"):
            uri = field.as_uri()
            if uri.scheme == "file" and is_model_folder(uri.to_path()):
                base_config = read_folder_config(uri.to_path(), self._format)
        return self._loader.load(card, base_config, config_key)


def read_folder_config(path: Path, checkpoint_format: CheckpointFormat) -> Any:
    """Read the model configuration of a Hugging Face or sentence-transformers folder."""
    folder = ModelFolder.open(path)
    head = folder.modules.head if folder.modules is not None else None
    return checkpoint_format.from_hf_config(folder.config, head=head, keys=folder.keys())


def logit_scale_init_of(config: object) -> float | None:
    """The log inverse temperature that a model of ``config`` starts from, if it learns one."""
    return config.logit_scale_init if isinstance(config, EmbeddingModelConfig) else None


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
            layer.compile(*args, **kwargs)


def get_checkpoint_format(family: str, resolver: DependencyResolver | None = None) -> CheckpointFormat | None:
    """Return how the checkpoints of ``family`` look, or ``None`` if it has no Hugging Face format."""
    resolver = resolver or get_dependency_resolver()
    converter = resolver.maybe_resolve(HuggingFaceConverter, key=family)
    return converter if isinstance(converter, CheckpointFormat) else None


def find_family(model_type: str, resolver: DependencyResolver | None = None) -> str:
    """Return the family that reads Hugging Face models of ``model_type``.

    :raises ModelLoadError: there is none.
    """
    resolver = resolver or get_dependency_resolver()
    known: dict[str, str] = {}
    for family in DependencyLookup(resolver, HuggingFaceConverter).iter_keys():
        converter = get_checkpoint_format(str(family), resolver)
        if converter is not None:
            known.update({t: str(family) for t in converter.model_types})
    if model_type in known:
        return known[model_type]
    nearest = get_close_matches(model_type, known, 1)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    raise ModelLoadError(
        f"model_type '{model_type}' is not supported.{hint} Supported are: {', '.join(sorted(known))}."
    )


def head_of(config: object) -> HeadConfig | None:
    """Return the head of a model configuration, if the family has one."""
    head = getattr(config, "head", None)
    return head if isinstance(head, HeadConfig) else None
