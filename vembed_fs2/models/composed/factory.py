"""How the modules of composed models are put together, of two encoders of any families."""

from __future__ import annotations

from torch.nn import Identity, Module

from vembed_fs2.embedding.activations import create_activation
from vembed_fs2.embedding.head import Head, HeadConfig
from vembed_fs2.embedding.model import Modality
from vembed_fs2.errors import ConfigError
from vembed_fs2.models.composed.backbone import create_backbone
from vembed_fs2.models.composed.config import ComposedConfig, ProjectionConfig, TowerConfig
from vembed_fs2.models.composed.freezing import find_frozen
from vembed_fs2.models.composed.model import MODALITIES, ComposedModel, Projection, Tower


def create_composed_model(config: ComposedConfig) -> ComposedModel:
    """Create a composed model with random weights.

    :raises ConfigError: lists what does not fit together, of both encoders.
    """
    towers: dict[str, Tower] = {}
    errors = []
    for modality in MODALITIES:
        try:
            towers[modality] = create_tower(getattr(config, modality), modality, config.embedding_dim)
        except ConfigError as ex:
            errors += [f"`{modality}`: {error}" for error in ex.errors]

    several = [modality for modality, tower in towers.items() if tower.backbone.is_multi_vector]
    if len(towers) == 2 and len(several) == 1:
        errors.append(
            f"`{several[0]}`: `config` must give one vector per {several[0]}, but gives several: change its pooling."
        )

    if errors:
        raise ConfigError(errors, where="The composed model")

    head = HeadConfig(pooling="none" if several else "pooler", normalize=config.normalize)
    return ComposedModel(towers["text"], towers["image"], Head(head, config.embedding_dim))


def create_tower(config: TowerConfig, modality: Modality, embedding_dim: int) -> Tower:
    """Create an encoder and its projection.

    :raises ConfigError: they do not fit together, or what is to be frozen does not exist.
    """
    backbone = create_backbone(config.family, config.config, modality)

    errors = []
    size = backbone.model.embedding_dim
    if config.projection.kind == "none" and size != embedding_dim:
        errors.append(
            f"`embedding_dim` must be {size}, the size of the encoder's own embeddings, where "
            f"`projection.kind` is 'none', but is {embedding_dim} instead."
        )

    try:
        frozen = find_frozen(
            backbone.model, backbone.stacks, config.freeze, config.trained_layers, config.frozen_params
        )
    except ConfigError as ex:
        errors += ex.errors

    if errors:
        raise ConfigError(errors)

    return Tower(backbone, create_projection(config.projection, size, embedding_dim), frozen, config.source)


def create_projection(config: ProjectionConfig, input_dim: int, output_dim: int) -> Module:
    """Create the projection of embeddings of ``input_dim``."""
    if config.kind == "none":
        return Identity()

    hidden_dim = None if config.kind == "linear" else config.hidden_dim or input_dim
    activation = create_activation(config.activation, field="activation")

    return Projection(
        input_dim, output_dim, hidden_dim, activation=activation, bias=config.bias, dropout_p=config.dropout_p
    )
