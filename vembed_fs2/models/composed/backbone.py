"""An encoder inside another model: one tower of it, if it has two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from fairseq2.nn.utils.module import to_device
from torch import Tensor
from torch.nn import Module

from vembed_fs2.embedding.model import EmbeddingModel, Modality
from vembed_fs2.errors import ConfigError
from vembed_fs2.models.family import FamilyFactory
from vembed_fs2.resolver import get_resolver


@dataclass(frozen=True)
class TowerEncoder:
    """An encoder of one modality."""

    model: EmbeddingModel

    family: str
    config: object

    stacks: Sequence[str]
    """The names of its stacks of layers, first to last."""

    left_out: Sequence[str]
    """The names of the modules that encode another modality, which it has no more."""

    constants: Mapping[str, Tensor]
    """The values of non-persistent buffers, by name, if the model itself cannot set them again."""


def create_backbone(family: str, config: object, modality: Modality) -> TowerEncoder:
    """Create an encoder of ``modality``.

    Of a model of texts and images, only the tower that is asked for gets memory.

    :param config: of the family's class, and valid.
    :raises ConfigError: the model has no such encoder, or it cannot be taken out.
    """
    factory = get_resolver().resolve(FamilyFactory, key=family)
    device = torch.get_default_device()

    # A family that does not work on the meta device makes its values when it creates a model.
    with torch.device("meta" if factory.supports_meta else "cpu"):
        model = factory.create(config)

    _check(model, family, modality)
    stacks = _stack_names(model)

    left_out = _drop_other_tower(model, family, modality) if len(model.modalities) > 1 else []
    constants: dict[str, Tensor] = {}
    if not factory.supports_meta:
        constants = _copy_constants(model)
        model.to(device)
    elif device.type != "meta" and left_out:
        to_device(model, device)
    elif device.type != "meta":
        model = factory.create(config)

    for name in model.learned:
        # They belong to the objective that the model was trained with.
        getattr(model, name).requires_grad_(False)

    stacks = [name for name in stacks if not name.startswith(tuple(f"{part}." for part in left_out))]
    return TowerEncoder(model, family, config, stacks, left_out, constants)


def _check(model: EmbeddingModel, family: str, modality: Modality) -> None:
    if modality not in model.modalities:
        raise ConfigError(f"`family` must encode {modality}s, but {family} models do not.")


def _stack_names(model: EmbeddingModel) -> list[str]:
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(stack)] for stack in model.layer_stacks()]


def _copy_constants(model: Module) -> dict[str, Tensor]:
    persistent = model.state_dict().keys()
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name not in persistent}


def _drop_other_tower(model: EmbeddingModel, family: str, modality: Modality) -> list[str]:
    """Delete the modules that encode the other modality alone; return their names.

    :raises ConfigError: the family does not say which these are.
    """
    if model.towers is None or modality not in model.towers:
        raise ConfigError(
            f"The {modality} encoder of {family} models cannot be used alone: they are joint encoders, or the family "
            f"does not say which modules encode {modality}s. If they have towers, declare their modules as `towers` of "
            f"{type(model).__name__}."
        )

    own = model.towers[modality]

    dropped = [name for names in model.towers.values() for name in names if name not in own]
    for name in dropped:
        parent, _, child = name.rpartition(".")
        delattr(model.get_submodule(parent), child)

    return dropped
