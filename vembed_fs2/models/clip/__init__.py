"""CLIP: a text and an image Transformer that share an embedding space."""

from __future__ import annotations

from fairseq2.runtime.dependency import DependencyContainer

from vembed_fs2.models.clip.archs import register_clip_archs
from vembed_fs2.models.clip.config import CLIP_FAMILY, ClipConfig, ClipTextConfig, ClipVisionConfig
from vembed_fs2.models.clip.factory import ClipFactory, create_clip_model
from vembed_fs2.models.clip.interop import ClipCheckpointFormat, get_clip_model_hub
from vembed_fs2.models.clip.model import ClipModel
from vembed_fs2.models.clip.open_clip import OPEN_CLIP
from vembed_fs2.models.family import register_family

__all__ = [
    "CLIP_FAMILY",
    "ClipCheckpointFormat",
    "ClipConfig",
    "ClipFactory",
    "ClipModel",
    "ClipTextConfig",
    "ClipVisionConfig",
    "create_clip_model",
    "get_clip_model_hub",
    "register_clip",
]


def register_clip(container: DependencyContainer) -> None:
    """Register the family, its architectures and its formats."""
    register_family(
        container,
        CLIP_FAMILY,
        kls=ClipModel,
        config_kls=ClipConfig,
        factory=create_clip_model,
        checkpoint_format=ClipCheckpointFormat(),
        dialects={"open_clip": OPEN_CLIP},
        supports_tensor_parallel=True,
    )
    register_clip_archs(container)
