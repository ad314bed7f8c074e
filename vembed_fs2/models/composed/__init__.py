"""Composed models: a text and an image encoder of any families, in one embedding space."""

from __future__ import annotations

from fairseq2.runtime.dependency import DependencyContainer

from vembed_fs2.models.composed.archs import register_composed_archs
from vembed_fs2.models.composed.config import COMPOSED_FAMILY, ComposedConfig, ProjectionConfig, TowerConfig
from vembed_fs2.models.composed.factory import create_composed_model
from vembed_fs2.models.composed.interop import ComposedCheckpointFormat, get_composed_model_hub
from vembed_fs2.models.composed.model import ComposedModel
from vembed_fs2.models.family import register_family
from vembed_fs2.models.support import get_family_support
from vembed_fs2.resolver import get_resolver

__all__ = [
    "COMPOSED_FAMILY",
    "ComposedCheckpointFormat",
    "ComposedConfig",
    "ComposedModel",
    "ProjectionConfig",
    "TowerConfig",
    "create_composed_model",
    "get_composed_model_hub",
    "register_composed",
]


def register_composed(container: DependencyContainer) -> None:
    """Register the family, its architectures and its format."""
    register_family(
        container,
        COMPOSED_FAMILY,
        kls=ComposedModel,
        config_kls=ComposedConfig,
        factory=create_composed_model,
        checkpoint_format=ComposedCheckpointFormat(),
        supports_tensor_parallel=_can_shard,
    )
    register_composed_archs(container)


def _can_shard(config: ComposedConfig) -> bool:
    """Whether both encoders can be split over tensor parallel ranks."""
    towers = (config.text, config.image)
    return all(get_family_support(t.family, get_resolver()).can_shard(t.config) for t in towers)
