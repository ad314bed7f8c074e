"""Any text or image model of transformers that has no family of its own, wrapped."""

from __future__ import annotations

from fairseq2.runtime.dependency import DependencyContainer

from vembed_fs2.models.auto.archs import register_auto_archs
from vembed_fs2.models.auto.config import AUTO_FAMILY, AutoModelConfig
from vembed_fs2.models.auto.factory import create_auto_model
from vembed_fs2.models.auto.interop import AutoCheckpointFormat, get_auto_model_hub
from vembed_fs2.models.auto.model import AutoEmbeddingModel
from vembed_fs2.models.family import register_family

__all__ = [
    "AUTO_FAMILY",
    "AutoCheckpointFormat",
    "AutoEmbeddingModel",
    "AutoModelConfig",
    "create_auto_model",
    "get_auto_model_hub",
    "register_auto",
]


def register_auto(container: DependencyContainer) -> None:
    """Register the family, its architectures and its format."""
    register_family(
        container,
        AUTO_FAMILY,
        kls=AutoEmbeddingModel,
        config_kls=AutoModelConfig,
        factory=create_auto_model,
        checkpoint_format=AutoCheckpointFormat(),
        supports_reset=False,
    )
    register_auto_archs(container)
