"""Builds composed models from other models: which encoders a configuration names, and their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final, cast

from fairseq2.gang import Gangs
from fairseq2.model_checkpoint import CorruptModelCheckpointError
from fairseq2.models import ModelFamily
from fairseq2.models.utils.checkpoint import ModelCheckpointMismatchError, set_model_state
from fairseq2.utils.config import StandardConfigMerger
from fairseq2.utils.progress import NOOP_PROGRESS_REPORTER
from fairseq2.utils.structured import StandardValueConverter
from torch import Tensor

from vembed_fs2.embedding.learned import LOGIT_BIAS, LOGIT_SCALE
from vembed_fs2.embedding.model import EmbeddingModelConfig
from vembed_fs2.errors import ConfigError, ModelLoadError, VembedError, did_you_mean
from vembed_fs2.formats.checkpoint import NeedsCodeError
from vembed_fs2.hub.find import ModelSource, find_model
from vembed_fs2.models.composed.config import NO_CODE, ComposedConfig, maybe_get_family, unknown_family
from vembed_fs2.models.composed.model import MODALITIES, ComposedModel, Tower
from vembed_fs2.resolver import get_resolver

_SOURCES: Final = ("path", "name")


def resolve_towers(config: ComposedConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Lay ``overrides`` over ``config``. They may name the folder, card or family of an encoder.

    Such an encoder starts from its own configuration, not from the configuration of the one
    that it replaces.

    :returns: all fields of a :class:`ComposedConfig`, not checked yet.
    :raises ConfigError: lists the encoders that cannot be found.
    """
    values = cast(dict[str, Any], StandardValueConverter().unstructure(config))
    errors = []
    for modality in MODALITIES:
        own = overrides.get(modality)
        if isinstance(own, Mapping):
            own = _name_repository(own)
            overrides = {**overrides, modality: own}
            try:
                values[modality] = {**values[modality], **_find_encoder(values[modality]["family"], own)}
            except ConfigError as ex:
                errors += [f"`{modality}`: {error}" for error in ex.errors]
            except VembedError as ex:
                errors.append(f"`{modality}`: {ex}")

    if errors:
        raise ConfigError(errors, where="`model.config_overrides`")

    merged = cast(dict[str, Any], StandardConfigMerger().merge(values, overrides))
    for modality in MODALITIES:
        tower = merged[modality]
        if isinstance(tower, dict) and isinstance(tower.get("path"), (str, Path)):
            # The run can be resumed from another working folder.
            tower["path"] = str(Path(tower["path"]).expanduser().resolve())

    return merged


def _name_repository(own: Mapping[str, Any]) -> Mapping[str, Any]:
    """Let `name` name what `path` names, if that is no folder but a card or a repository of the hub."""
    path = own.get("path")
    if not isinstance(path, (str, Path)) or own.get("name") or Path(path).expanduser().exists():
        return own
    return {**own, "path": None, "name": str(path)}


def refuse_sources(config: ComposedConfig, overrides: Mapping[str, Any]) -> None:
    """Check that ``overrides`` do not name other encoders than ``config``, whose model has its weights already.

    :raises ConfigError: they do.
    """
    errors = []
    for modality in MODALITIES:
        own, tower = overrides.get(modality), getattr(config, modality)
        if not isinstance(own, Mapping):
            continue
        for name in (*_SOURCES, "family", "arch"):
            if own.get(name) and own[name] != getattr(tower, name):
                errors.append(f"`{modality}.{name}` is for new models, but `model` names one that has its weights.")

    if errors:
        raise ConfigError(errors, where="`model.config_overrides`")


def _find_encoder(family: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """The family and the configuration that the keys of a tower name, if they name any."""
    given = {name: own[name] for name in (*_SOURCES, "family", "arch") if own.get(name)}
    sources = [name for name in _SOURCES if name in given]
    if not all(isinstance(value, (str, Path)) for value in given.values()) or len(sources) > 1:
        return {}  # An error, which validation says.

    if sources:
        if "arch" in given:
            raise ConfigError(f"`arch` is for random weights, but `{sources[0]}` names a checkpoint.")

        try:
            source = find_model(Path(given["path"]) if "path" in given else given["name"])
        except NeedsCodeError:
            name = given[sources[0]]
            raise ConfigError(f"`{sources[0]}`: {name} needs Python code of its own. {NO_CODE}") from None

        if given.get("family", source.family) != source.family:
            raise ConfigError(f"`family` is '{given['family']}', but {source.name} is of family {source.family}.")

        return {"family": source.family, "config": _unstructure(source.config)}

    if not given or (given.get("family") == family and "arch" not in given):
        return {}

    found = maybe_get_family(given.get("family", family))
    if found is None:
        raise ConfigError(unknown_family("family", given.get("family", family)))

    config = found.maybe_get_arch_config(given["arch"]) if "arch" in given else found.config_kls()
    if config is None:
        archs = sorted(found.get_archs())
        hint = did_you_mean(given["arch"], archs) or f" Known: {', '.join(archs)}."
        raise ConfigError(f"`arch` '{given['arch']}' is not known.{hint}")

    return {"family": found.name, "config": _unstructure(config)}


def _unstructure(config: object) -> object:
    if isinstance(config, EmbeddingModelConfig):
        # What another objective learned has no part in this model; what only a training needs stays untrained.
        learned = {f.name for f in fields(EmbeddingModelConfig)} - {"learned", "extra_fields"}
        defaults: dict[str, Any] = {f.name: f.default for f in fields(config) if f.name in learned}
        config = replace(config, **defaults)
    return StandardValueConverter().unstructure(config)


def load_towers(model: ComposedModel, gangs: Gangs) -> None:
    """Load the encoders that come from a checkpoint into a new model.

    It does nothing on ranks that get the weights from the first one.

    :raises ModelLoadError: a checkpoint is missing, broken, or does not fit.
    """
    for tower in (model.text, model.image):
        if tower.source is not None and not next(tower.parameters()).is_meta:
            _load_tower(tower, find_model(tower.source), gangs)


def _load_tower(tower: Tower, source: ModelSource, gangs: Gangs) -> None:
    family = get_resolver().resolve(ModelFamily, key=source.family)
    try:
        tensors = family.iter_checkpoint(source.weights_path(), tower.config, gangs, False, None)
        set_model_state(tower.backbone, _select(tower, tensors), NOOP_PROGRESS_REPORTER)
    except CorruptModelCheckpointError as ex:
        raise ModelLoadError(f"{source.name}: the checkpoint does not fit the model. {ex.__cause__ or ex}") from ex
    except ModelCheckpointMismatchError as ex:
        raise ModelLoadError(f"{source.name}: the checkpoint does not fit the model. {ex}") from ex


def _select(tower: Tower, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Leave out what encodes the other modality, and what an objective learned."""
    left_out = tuple(f"{name}." for name in tower.left_out)
    known = tower.backbone.state_dict().keys()
    for name, tensor in tensors:
        if not name.startswith(left_out) and (name in known or name not in (LOGIT_SCALE, LOGIT_BIAS)):
            yield name, tensor
