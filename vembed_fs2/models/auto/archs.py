"""The named architectures of wrapped models: small ones, for tests. All others come from a folder."""

from __future__ import annotations

from fairseq2.runtime.dependency import DependencyContainer

from vembed_fs2.embedding.head import ImageHeadConfig
from vembed_fs2.embedding.model import HeadConfig
from vembed_fs2.models.archs import ArchRegistrar
from vembed_fs2.models.auto.config import AutoModelConfig


def register_auto_archs(container: DependencyContainer) -> None:
    """Register the architectures."""
    arch = ArchRegistrar(container, AutoModelConfig)

    @arch("tiny")
    def tiny() -> AutoModelConfig:
        """A small ELECTRA, for texts: a vocabulary of 128."""
        hf_config: dict[str, object] = {
            "model_type": "electra",
            "vocab_size": 128,
            "embedding_size": 32,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "max_position_embeddings": 32,
        }
        return AutoModelConfig(hf_config=hf_config, head=HeadConfig())

    @arch("tiny_image")
    def tiny_image() -> AutoModelConfig:
        """A small Swin Transformer, for images of 16 pixels."""
        hf_config: dict[str, object] = {
            "model_type": "swin",
            "image_size": 16,
            "patch_size": 2,
            "num_channels": 3,
            "embed_dim": 32,
            "depths": [1, 1],
            "num_heads": [2, 4],
            "window_size": 4,
        }
        return AutoModelConfig(hf_config=hf_config, image_head=ImageHeadConfig(pooling="pooler"))
