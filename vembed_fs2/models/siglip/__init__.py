"""SigLIP and SigLIP 2: a text and an image Transformer that share an embedding space, for the sigmoid loss."""

from __future__ import annotations

from fairseq2.runtime.dependency import DependencyContainer

from vembed_fs2.models.family import register_family
from vembed_fs2.models.siglip.archs import register_siglip_archs
from vembed_fs2.models.siglip.config import SIGLIP_FAMILY, SiglipConfig, SiglipTextConfig, SiglipVisionConfig
from vembed_fs2.models.siglip.factory import SiglipFactory, create_siglip_model
from vembed_fs2.models.siglip.interop import SiglipCheckpointFormat, get_siglip_model_hub
from vembed_fs2.models.siglip.model import SiglipModel
from vembed_fs2.models.siglip.open_clip import OPEN_CLIP

__all__ = [
    "SIGLIP_FAMILY",
    "SiglipCheckpointFormat",
    "SiglipConfig",
    "SiglipFactory",
    "SiglipModel",
    "SiglipTextConfig",
    "SiglipVisionConfig",
    "create_siglip_model",
    "get_siglip_model_hub",
    "register_siglip",
]


def register_siglip(container: DependencyContainer) -> None:
    """Register the family, its architectures and its formats."""
    register_family(
        container,
        SIGLIP_FAMILY,
        kls=SiglipModel,
        config_kls=SiglipConfig,
        factory=create_siglip_model,
        checkpoint_format=SiglipCheckpointFormat(),
        dialects={"open_clip": OPEN_CLIP},
        supports_tensor_parallel=True,
    )
    register_siglip_archs(container)
