"""Registers an embedding family with fairseq2, and finds the family of a Hugging Face folder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, Generic, TypeVar, final

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
from fairseq2.utils.structured import StandardValueConverter, StructureError
from fairseq2.utils.validation import StandardObjectValidator, ValidationError, ValidationResult
from torch import Tensor
from torch.nn import Module
from typing_extensions import override

from vembed_fs2.errors import ConfigError, ModelLoadError
from vembed_fs2.models.download import FolderDownloadManager
from vembed_fs2.models.embedding import EmbeddingModel, EmbeddingModelConfig, HeadConfig, initial_projection
from vembed_fs2.models.folder import FolderCheckpointLoader, ModelFolder, is_model_folder

ConfigT = TypeVar("ConfigT")

LEARNED_PARTS: Final = ("logit_scale", "logit_bias", "teacher_projection")
"""The parameters that any model can have besides its encoder, for its objective."""


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


@final
class PlainCheckpointFormat(CheckpointFormat, Generic[ConfigT]):
    """The format of a family that transformers does not have.

    ``config.json`` holds the family's own configuration under ``model_config``,
    and tensors keep their names. If the configuration has a field ``head`` of
    type :class:`HeadConfig`, it must call the size of token states
    ``model_dim``; sentence-transformers' modules are then read and written, too.
    """

    def __init__(self, model_type: str, config_kls: type[ConfigT]) -> None:
        """
        :param model_type: the ``model_type`` of ``config.json``: letters, digits and ``_``, and nobody else's.
        :param config_kls: a dataclass.
        """
        self.model_types = (model_type,)
        self._model_type = model_type
        self._config_kls = config_kls

    @override
    def from_hf_config(
        self, hf_config: Mapping[str, Any], *, head: HeadConfig | None = None, keys: frozenset[str] = frozenset()
    ) -> ConfigT:
        values = hf_config.get("model_config")
        if not isinstance(values, Mapping):
            raise ModelLoadError("config.json: `model_config` must hold the fields of the model's configuration.")
        try:
            config: ConfigT = StandardValueConverter().structure(values, self._config_kls)
        except StructureError as ex:
            raise ModelLoadError(f"config.json: `model_config` is not valid. {_reason_of(ex)}") from None
        if head is not None and head_of(config) is not None:
            setattr(config, "head", head)  # noqa: B010  (mypy does not know the field)
        elif head is not None and head.dense:
            raise ModelLoadError(f"Dense modules after a {self._model_type} model are not supported.")
        if errors := config_errors(config):
            raise ModelLoadError(f"config.json: `model_config` is not valid. {' '.join(errors)}")
        return config

    @override
    def from_hf_state_dict(self, state_dict: dict[str, object], config: Any) -> dict[str, object]:
        return state_dict

    @override
    def to_hg_config(self, config: object) -> HuggingFaceConfig:
        values: Any = StandardValueConverter().unstructure(config)
        # Of no use without the teacher.
        data: dict[str, object] = {"model_config": {k: v for k, v in values.items() if k != "teacher_dim"}}
        if head_of(config) is not None:
            # Where sentence-transformers' pooling looks for the size of its inputs.
            data["hidden_size"] = getattr(config, "model_dim")  # noqa: B009  (mypy does not know the field)
        return HuggingFaceConfig(data, kls_name=self._declare_hf_config(), arch=self._model_type)

    @override
    def to_hg_state_dict(self, state_dict: dict[str, object], config: object) -> dict[str, object]:
        return {key: value for key, value in state_dict.items() if key != "teacher_projection"}

    def _declare_hf_config(self) -> str:
        """Make the class of ``config.json``; fairseq2 writes only what it finds by name in transformers."""
        import transformers

        name = f"Vembed_{self._model_type}_Config"
        if not hasattr(transformers, name):
            fields = {"model_type": self._model_type, "model_config": None, "hidden_size": None}
            setattr(transformers, name, type(name, (transformers.PretrainedConfig,), fields))
        return name


def _reason_of(error: StructureError) -> str:
    """The messages from the outermost field down to its value."""
    reasons = []
    cause: BaseException | None = error
    while isinstance(cause, StructureError):
        # The chain also names each class on the way.
        if not str(cause).startswith("Value cannot be structured to"):
            reasons.append(str(cause))
        cause = cause.__cause__
    return " ".join(reasons)


def config_errors(config: object) -> list[str]:
    """Return all that ``validate`` of a configuration and of the configurations inside it finds wrong."""
    try:
        StandardObjectValidator().validate(config)
    except ValidationError as ex:
        return _list_errors(ex.result, "")
    return []


def _list_errors(result: ValidationResult, path: str) -> list[str]:
    errors = [f"`{path.rstrip('.')}`: {e}" if path else str(e) for e in result.errors]
    for name, sub_result in result.sub_results.items():
        errors += _list_errors(sub_result, f"{path}{name}.")
    return errors


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

    :param factory: creates the model, of a configuration that is valid: what
        ``config_kls`` has as ``validate() -> ValidationResult`` is checked before.
    :param checkpoint_format: reads and writes Hugging Face folders, for example
        :class:`PlainCheckpointFormat`; without it the family loads fairseq2
        checkpoints only.
    :param supports_meta: whether the factory works on the meta device.
    """

    def convert(state_dict: dict[str, object], config: ConfigT) -> dict[str, object]:
        if checkpoint_format is not None:
            state_dict = checkpoint_format.from_hf_state_dict(state_dict, config)
        blank = _create_blank(factory, config) if supports_meta else None
        if blank is not None:
            _drop_repetitions(state_dict, blank)
        _add_learned_parts(state_dict, config, lambda: (factory(config) if blank is None else blank).embedding_dim)
        return state_dict

    def create(config: ConfigT) -> EmbeddingModel:
        if errors := config_errors(config):
            raise ConfigError(errors, where=f"The {name} configuration")
        model = factory(config)
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
    return checkpoint_format.from_hf_config(folder.config, head=folder.head(), keys=folder.keys())


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


def find_family(model_type: str, resolver: DependencyResolver | None = None) -> str:
    """Return the family that reads Hugging Face models of ``model_type``.

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
    nearest = get_close_matches(model_type, known, 1)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    raise ModelLoadError(
        f"model_type '{model_type}' is not supported.{hint} Supported are: {', '.join(sorted(known))}."
    )


def head_of(config: object) -> HeadConfig | None:
    """Return the head of a model configuration, if the family has one."""
    head = getattr(config, "head", None)
    return head if isinstance(head, HeadConfig) else None
