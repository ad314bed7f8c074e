"""Objectives by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from vembed_fs2.distributed import RowGather
from vembed_fs2.losses.common import Objective
from vembed_fs2.losses.infonce import InfoNCE, InfoNCEConfig


@dataclass(frozen=True)
class LossEntry:
    """A registered objective."""

    config_kls: type[Any]
    """Its configuration; must have a method ``errors() -> list[str]``."""

    factory: Callable[[Any, RowGather], Objective]


LOSSES: Final[dict[str, LossEntry]] = {
    "infonce": LossEntry(InfoNCEConfig, InfoNCE),
}
"""The objectives that ``loss.name`` accepts. Add to it to register one."""


def create_loss(name: str, config: object, gather: RowGather | None = None) -> Objective:
    """Create the objective ``name``.

    :raises KeyError: there is no objective of that name.
    """
    return LOSSES[name].factory(config, gather or RowGather())
