"""The named architectures of composed models."""

from __future__ import annotations

from fairseq2.runtime.dependency import DependencyContainer

from vembed_fs2.models.archs import ArchRegistrar
from vembed_fs2.models.bert import BERT_FAMILY
from vembed_fs2.models.clip import CLIP_FAMILY
from vembed_fs2.models.composed.config import ComposedConfig, TowerConfig
from vembed_fs2.models.vit import VIT_FAMILY


def register_composed_archs(container: DependencyContainer) -> None:
    """Register the architectures, the base first; the others say how they differ from it."""
    arch = ArchRegistrar(container, ComposedConfig)

    @arch("bert_base_dinov2_base")
    def bert_base_dinov2_base() -> ComposedConfig:
        """The base: BERT base and DINOv2 B/14, both projected to 512 dimensions."""
        return ComposedConfig(
            text=TowerConfig(family=BERT_FAMILY, arch="bert_base"),
            image=TowerConfig(family=VIT_FAMILY, arch="dinov2_base_patch14"),
        )

    @arch("bert_base_clip_vit_base_patch16")
    def bert_base_clip_vit_base_patch16() -> ComposedConfig:
        """The image tower of CLIP ViT-B/16 instead of DINOv2."""
        config = bert_base_dinov2_base()
        config.image = TowerConfig(family=CLIP_FAMILY, arch="vit_base_patch16")
        return config

    @arch("tiny")
    def tiny() -> ComposedConfig:
        """The smallest BERT and DINOv2, projected to 32 dimensions, for tests."""
        return ComposedConfig(
            text=TowerConfig(family=BERT_FAMILY, arch="tiny"),
            image=TowerConfig(family=VIT_FAMILY, arch="dinov2_tiny"),
            embedding_dim=32,
        )
