"""A package that adds a pooling, an objective that learns something, and a layout of folders."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fairseq2.runtime.dependency import DependencyContainer


def setup_parts(container: DependencyContainer) -> None:
    from vembed_fs2.embedding.head import register_pooling
    from vembed_fs2.formats.registry import register_layout
    from vembed_fs2.losses import LossEntry, register_loss
    from vembed_parts_plugin.layout import NUMPY_LAYOUT
    from vembed_parts_plugin.objective import Weighted, WeightedConfig
    from vembed_parts_plugin.pooling import midrange

    register_pooling("midrange", midrange)
    register_loss("weighted", LossEntry(WeightedConfig, Weighted))
    register_layout(container, NUMPY_LAYOUT)
