"""Registers an embedding family with fairseq2, and finds the family of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, cast, final

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

from vembed_fs2.embedding.learned import LOGIT_BIAS, LOGIT_SCALE, TEACHER_PROJECTION, LearnedPart
from vembed_fs2.embedding.model import EmbeddingModel, EmbeddingModelConfig
from vembed_fs2.errors import ConfigError, ModelLoadError, VembedError, did_you_mean
from vembed_fs2.formats.checkpoint import CheckpointFormat as CheckpointFormat
from vembed_fs2.formats.checkpoint import PlainCheckpointFormat as PlainCheckpointFormat
from vembed_fs2.formats.checkpoint import config_errors as config_errors
from vembed_fs2.formats.checkpoint import drop_learned as drop_learned
from vembed_fs2.formats.checkpoint import head_of as head_of
from vembed_fs2.formats.checkpoint import set_image_head
from vembed_fs2.formats.dialect import Dialect
from vembed_fs2.formats.download import FolderDownloadManager, download_repository
from vembed_fs2.formats.folder import FolderCheckpointLoader, ModelFolder, StateConverter, is_model_folder
from vembed_fs2.formats.open_clip import OpenClipFormat
from vembed_fs2.models.support import FamilySupport, ProcessorLoader
from vembed_fs2.resolver import get_resolver

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
    dialects: Mapping[str, Dialect] | None = None,
    processor: ProcessorLoader | None = None,
    supports_meta: bool = True,
    supports_reset: bool = True,
    supports_compile: bool = True,
    supports_packed: bool = False,
    supports_tensor_parallel: bool | Callable[[ConfigT], bool] = False,
) -> None:
    """Register a family of embedding models with fairseq2.

    The model can then be loaded from asset cards, trained with the recipes and
    sharded with FSDP2 layer by layer (see :meth:`EmbeddingModel.layer_stacks`).
    Architectures are registered with :class:`~vembed_fs2.models.archs.ArchRegistrar`.

    :param factory: creates the model, of a configuration that is valid: what
        ``config_kls`` has as ``validate() -> ValidationResult`` is checked before.
    :param checkpoint_format: reads and writes Hugging Face folders, for example
        :class:`PlainCheckpointFormat`; without it the family loads fairseq2
        checkpoints only.
    :param dialects: the family's checkpoints in other libraries, by the library's name: ``open_clip``.
    :param processor: loads the processor of a model, for families with rules of their own (see
        :class:`~vembed_fs2.processing.processor.Processor`); by default the one of models that encode texts and
        images apart.
    :param supports_meta: whether the factory works on the meta device.
    :param supports_reset: whether all modules have ``reset_parameters``, so that they draw their initial weights when
        they leave the meta device.
    :param supports_compile: whether the layers can be compiled, one at a time.
    :param supports_packed: whether texts are encoded one after the other, without padding.
    :param supports_tensor_parallel: whether the model is built of fairseq2's sharded layers; or which
        configurations' models are. Others are refused where there are several tensor parallel ranks.
    """
    facts = FamilySupport(supports_tensor_parallel, supports_packed, processor)

    def create(config: ConfigT) -> EmbeddingModel:
        if errors := config_errors(config):
            raise ConfigError(errors, where=f"The {name} configuration")

        facts.check_gangs(name, config)

        model = factory(config)
        model.family = name
        model.frozen_parameters = frozenset(name for name, p in model.named_parameters() if not p.requires_grad)
        if isinstance(config, EmbeddingModelConfig):
            model.add_learned_parts(config.learned_parts(model.embedding_dim))

        return model

    dialects = dialects or {}
    convert = _FamilyConverter(create, supports_meta, checkpoint_format, dialects.values())

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

    for library, dialect in dialects.items():
        container.register_instance(Dialect, dialect, key=(library, name))


@final
class _FamilyConverter(StateConverter):
    """Converts checkpoints in any of a family's formats."""

    def __init__(
        self,
        factory: Callable[[Any], EmbeddingModel],
        supports_meta: bool,
        checkpoint_format: CheckpointFormat | None,
        dialects: Iterable[Dialect],
    ) -> None:
        self._factory = factory
        self._supports_meta = supports_meta
        self._format = checkpoint_format
        self._dialects = list(dialects)

    @override
    def __call__(self, state_dict: dict[str, object], config: Any) -> dict[str, object]:
        state_dict = dict(self._read(cast(dict[str, Tensor], state_dict), config))
        if self._supports_meta:
            _drop_repetitions(state_dict, self._create_blank(config))
        return dict(self._match_learned_parts(state_dict.items(), config))

    @override
    def stream(self, tensors: Mapping[str, Tensor], config: Any) -> Iterator[tuple[str, object]]:
        yield from self._match_learned_parts(self._read(tensors, config), config)

    def _read(self, tensors: Mapping[str, Tensor], config: Any) -> Iterator[tuple[str, object]]:
        for dialect in self._dialects:
            if dialect.has_names(tensors):
                yield from dialect.key_map(config).read(tensors)
                return

        if self._format is None:
            yield from tensors.items()
        else:
            yield from self._format.read_tensors(tensors, config)

    def _match_learned_parts(self, tensors: Iterable[tuple[str, object]], config: Any) -> Iterator[tuple[str, object]]:
        """Add what the model holds for objectives and the checkpoint lacks; leave out what others learned."""
        missing: dict[str, LearnedPart] = {}
        if isinstance(config, EmbeddingModelConfig):
            # Only a projection depends on the model.
            dim = 1 if config.teacher_dim is None else self._create_blank(config).embedding_dim
            missing = {part.name: part for part in config.learned_parts(dim)}

        for name, tensor in tensors:
            can_differ = name in missing and name not in (LOGIT_SCALE, LOGIT_BIAS)
            if can_differ and (not isinstance(tensor, Tensor) or tensor.shape != missing[name].shape):
                continue  # Another teacher's is of no use.
            if name == TEACHER_PROJECTION and name not in missing:
                continue  # Without a teacher, none is.

            missing.pop(name, None)
            yield name, tensor

        yield from ((name, part.initial()) for name, part in missing.items())

    def _create_blank(self, config: Any) -> EmbeddingModel:
        """Create a model, without memory for its weights if that is possible."""
        with torch.device("meta") if self._supports_meta else nullcontext():
            return self._factory(config)


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
    if folder.dialect is not None:
        return read_dialect_config(folder)[1]

    config = checkpoint_format.from_folder(folder, trust_remote_code=trust_remote_code)
    image_head = folder.image_head()
    if image_head is not None:
        set_image_head(config, image_head)

    _keep_extra_fields(config, folder, checkpoint_format)
    return config


def _keep_extra_fields(config: Any, folder: ModelFolder, source: CheckpointFormat | Dialect) -> None:
    if isinstance(config, EmbeddingModelConfig) and (extra := source.find_extra_fields(folder.config, config)):
        config.extra_fields = {folder.config_name: extra}


def read_dialect_config(folder: ModelFolder, resolver: DependencyResolver | None = None) -> tuple[str, Any]:
    """Return the family and the configuration of a model in another library's format.

    :raises ModelLoadError: the configuration is not valid, or not supported.
    """
    assert folder.dialect is not None

    try:
        family, dialect = find_dialect(folder.dialect, folder.config, resolver)
        config = dialect.from_config(folder.root, folder.config)
        if (head := folder.image_head()) is not None:
            set_image_head(config, head)
    except ModelLoadError as ex:
        raise ModelLoadError(f"{folder.config_file}: {ex}") from None

    _keep_extra_fields(config, folder, dialect)
    return family, config


def find_dialect(
    library: str, content: Mapping[str, Any], resolver: DependencyResolver | None = None
) -> tuple[str, Dialect]:
    """Return the family that reads a configuration of ``library``, and how its checkpoints look there.

    :raises ModelLoadError: there is none, or there are several.
    """
    resolver = resolver or get_resolver()

    dialects = _list_dialects(library, resolver)
    found = {name: dialect for name, dialect in dialects.items() if dialect.reads_config(content)}
    match list(found.items()):
        case [(name, dialect)]:
            return name, dialect
        case []:
            reasons = dict.fromkeys(dialect.describe(content) for dialect in dialects.values())
            raise ModelLoadError(" ".join(reasons) or f"No family reads models of {library}.")
        case _:
            raise ModelLoadError(f"This model of {library} is read by several families: {', '.join(sorted(found))}.")


def get_dialect(library: str, family: str, resolver: DependencyResolver | None = None) -> Dialect:
    """Return how the checkpoints of ``family`` look in ``library``.

    :raises VembedError: it has no such models.
    """
    dialects = _list_dialects(library, resolver or get_resolver())
    if family not in dialects:
        raise VembedError(f"{family} models have no {library} format. These have: {', '.join(sorted(dialects))}.")
    return dialects[family]


def find_open_clip_family(model_cfg: Mapping[str, Any], resolver: DependencyResolver | None = None) -> str:
    """Return the family that reads models of open_clip's ``model_cfg``.

    :raises ModelLoadError: there is none; the message names the option.
    """
    return find_dialect("open_clip", {"model_cfg": model_cfg}, resolver)[0]


def get_open_clip_format(family: str, resolver: DependencyResolver | None = None) -> OpenClipFormat:
    """Return how the checkpoints of ``family`` look in open_clip. See :func:`get_dialect`."""
    dialect = get_dialect("open_clip", family, resolver)
    assert isinstance(dialect, OpenClipFormat)
    return dialect


def _list_dialects(library: str, resolver: DependencyResolver) -> dict[str, Dialect]:
    keys = [key for key in DependencyLookup(resolver, Dialect).iter_keys() if isinstance(key, tuple)]
    return {name: resolver.resolve(Dialect, key=(lib, name)) for lib, name in keys if lib == library}


def _drop_repetitions(state_dict: dict[str, object], model: EmbeddingModel) -> None:
    """Keep the buffers of one rank. FSDP2 leaves them whole on each, and fairseq2 appends what the ranks hold."""
    for name, buffer in model.named_buffers():
        tensor = state_dict.get(name)
        if isinstance(tensor, Tensor) and tensor.ndim > 0 and tensor.size(0) > buffer.size(0):
            state_dict[name] = tensor[: buffer.size(0)]


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

    hint = did_you_mean(model_type, known) or did_you_mean(model_type, CONFIG_MAPPING_NAMES)
    raise ModelLoadError(
        f"model_type '{model_type}' is not supported.{hint} Supported are: {', '.join(sorted(known))}, and what else "
        "transformers has for texts or images."
    )
