"""Objectives by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from vembed_fs2.distributed import RowGather
from vembed_fs2.losses.combined import Combined, CombinedConfig
from vembed_fs2.losses.common import Objective
from vembed_fs2.losses.cosent import AnglE, AnglEConfig, CoSENT, CoSENTConfig
from vembed_fs2.losses.distillation import Distillation, DistillationConfig
from vembed_fs2.losses.embedding_distillation import EmbeddingDistillation, EmbeddingDistillationConfig
from vembed_fs2.losses.infonce import InfoNCE, InfoNCEConfig
from vembed_fs2.losses.matryoshka import Matryoshka, MatryoshkaConfig
from vembed_fs2.losses.multi_positive import MultiPositive, MultiPositiveConfig
from vembed_fs2.losses.nested import LossSpec
from vembed_fs2.losses.sigmoid import Sigmoid, SigmoidConfig
from vembed_fs2.losses.spread import Spread, SpreadConfig
from vembed_fs2.losses.triplet import Triplet, TripletConfig


@dataclass(frozen=True)
class LossEntry:
    """A registered objective."""

    config_kls: type[Any]
    """Its configuration, a dataclass with defaults for all fields and a method ``errors() -> list[str]``. A field of
    type :class:`LossSpec`, or a sequence of these, is an objective within it."""

    factory: Callable[[Any, RowGather], Objective]
    """Makes it of a configuration and of what gathers the rows of all ranks."""


def create_loss(name: str, config: object = None, gather: RowGather | None = None) -> Objective:
    """Create the objective ``name``.

    :param config: of the type that it is registered with; ``None`` for all defaults.
    :param gather: appends the rows of all ranks; ``None`` for one process.
    :raises KeyError: no objective has that name.
    :raises ValueError: ``config`` is not valid.
    """
    entry = LOSSES[name]
    return entry.factory(entry.config_kls() if config is None else config, gather or RowGather())


def _create_matryoshka(config: MatryoshkaConfig, gather: RowGather) -> Objective:
    return Matryoshka(_create(config.loss, gather), config.dims, config.weights)


def _create_combined(config: CombinedConfig, gather: RowGather) -> Objective:
    losses: dict[str, Objective] = {}
    weights: dict[str, float] = {}
    for spec in config.losses:
        same = sum(other.name == spec.name for other in config.losses[: len(losses)])
        name = f"{spec.name}_{same + 1}" if same else spec.name
        losses[name], weights[name] = _create(spec, gather), spec.weight

    return Combined(losses, weights)


def _create(spec: LossSpec, gather: RowGather) -> Objective:
    return create_loss(spec.name, spec.config, gather)


LOSSES: Final[dict[str, LossEntry]] = {
    "angle": LossEntry(AnglEConfig, AnglE),
    "combined": LossEntry(CombinedConfig, _create_combined),
    "cosent": LossEntry(CoSENTConfig, CoSENT),
    "distillation": LossEntry(DistillationConfig, Distillation),
    "embedding_distillation": LossEntry(EmbeddingDistillationConfig, EmbeddingDistillation),
    "infonce": LossEntry(InfoNCEConfig, InfoNCE),
    "matryoshka": LossEntry(MatryoshkaConfig, _create_matryoshka),
    "multi_positive": LossEntry(MultiPositiveConfig, MultiPositive),
    "sigmoid": LossEntry(SigmoidConfig, Sigmoid),
    "spread": LossEntry(SpreadConfig, Spread),
    "triplet": LossEntry(TripletConfig, Triplet),
}
"""The objectives that ``loss.name`` accepts. Add to it to register one."""


def register_loss(name: str, entry: LossEntry) -> None:
    """Register an objective, which ``loss.name`` can then name.

    To register the same objective again changes nothing: a package's setup runs once per container.

    :raises ValueError: another objective has this name.
    """
    known = LOSSES.get(name, entry)
    if known.config_kls is not entry.config_kls:
        raise ValueError(f"There is an objective '{name}' already.")

    LOSSES[name] = entry
