"""Vision Transformers: ViT, MAE, DINOv2 (with and without registers) and DINOv3."""

from __future__ import annotations

from fairseq2.runtime.dependency import DependencyContainer

from vembed_fs2.models.family import register_family
from vembed_fs2.models.vit.archs import register_vit_archs
from vembed_fs2.models.vit.config import VIT_FAMILY, VitConfig
from vembed_fs2.models.vit.factory import VitFactory, create_vit_model
from vembed_fs2.models.vit.interop import VitCheckpointFormat, get_vit_model_hub
from vembed_fs2.models.vit.model import VitModel

__all__ = [
    "VIT_FAMILY",
    "VitCheckpointFormat",
    "VitConfig",
    "VitFactory",
    "VitModel",
    "create_vit_model",
    "get_vit_model_hub",
    "register_vit",
]


def register_vit(container: DependencyContainer) -> None:
    """Register the family, its architectures and its format."""
    register_family(
        container,
        VIT_FAMILY,
        kls=VitModel,
        config_kls=VitConfig,
        factory=create_vit_model,
        checkpoint_format=VitCheckpointFormat(),
        supports_tensor_parallel=True,
    )
    register_vit_archs(container)
