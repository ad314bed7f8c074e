"""The named architectures of the EVA-CLIP family."""

from __future__ import annotations

from fairseq2.runtime.dependency import DependencyContainer

from vembed_fs2.models.archs import ArchRegistrar
from vembed_fs2.models.eva.config import EvaConfig


def register_eva_archs(container: DependencyContainer) -> None:
    """Register the architectures, the base first; the others say how they differ from it."""
    arch = ArchRegistrar(container, EvaConfig)

    @arch("eva02_base_patch16")
    def eva02_base_patch16() -> EvaConfig:
        """The base: EVA02-CLIP-B/16, 224 pixels: rotations, gated feed-forward networks, norms inside layers."""
        return EvaConfig()

    @arch("eva02_large_patch14")
    def eva02_large_patch14() -> EvaConfig:
        """EVA02-CLIP-L/14: both Transformers wider, 24 image layers, embeddings of 768."""
        config = eva02_base_patch16()
        config.projection_dim = 768
        _set_text_size(config, 768, 12, 12)
        config.vision.model_dim = 1024
        config.vision.num_layers = 24
        config.vision.num_attn_heads = 16
        config.vision.ffn_inner_dim = 2730
        config.vision.patch_size = 14

        return config

    @arch("eva02_large_patch14_336")
    def eva02_large_patch14_336() -> EvaConfig:
        """``eva02_large_patch14`` on images of 336 pixels."""
        config = eva02_large_patch14()
        config.vision.image_size = 336
        return config

    @arch("eva01_giant_patch14")
    def eva01_giant_patch14() -> EvaConfig:
        """EVA01-CLIP-g/14: a plain Vision Transformer of 40 layers of 1408, embeddings of 1024."""
        config = eva02_base_patch16()
        config.projection_dim = 1024
        _set_text_size(config, 768, 12, 12)
        config.vision.model_dim = 1408
        config.vision.num_layers = 40
        config.vision.num_attn_heads = 16
        config.vision.ffn_inner_dim = 6144
        config.vision.patch_size = 14
        config.vision.fused_qkv = True
        config.vision.gated_ffn = False
        config.vision.attn_norm = False
        config.vision.ffn_norm = False
        config.vision.rope = False
        config.vision.rope_ref_size = None

        return config

    @arch("eva01_giant_patch14_plus")
    def eva01_giant_patch14_plus() -> EvaConfig:
        """``eva01_giant_patch14`` with 24 text layers of 1024."""
        config = eva01_giant_patch14()
        _set_text_size(config, 1024, 24, 16)
        return config

    @arch("eva02_enormous_patch14")
    def eva02_enormous_patch14() -> EvaConfig:
        """EVA02-CLIP-E/14: 64 plain layers of 1792 that normalise what they add, 24 text layers of 1024."""
        config = eva01_giant_patch14_plus()
        config.vision.model_dim = 1792
        config.vision.num_layers = 64
        config.vision.ffn_inner_dim = 15360
        config.vision.post_norm = True

        return config

    @arch("eva02_enormous_patch14_plus")
    def eva02_enormous_patch14_plus() -> EvaConfig:
        """``eva02_enormous_patch14`` with 32 text layers of 1280."""
        config = eva02_enormous_patch14()
        _set_text_size(config, 1280, 32, 20)
        return config

    @arch("tiny")
    def tiny() -> EvaConfig:
        """A model of 0.2 million parameters for demos and tests: 16 pixels, a vocabulary of 128."""
        config = eva02_base_patch16()
        config.projection_dim = 64
        _set_text_size(config, 64, 2, 4)
        config.text.vocab_size = 128
        config.text.max_seq_len = 32
        config.vision.model_dim = 64
        config.vision.num_layers = 2
        config.vision.num_attn_heads = 4
        config.vision.ffn_inner_dim = 170
        config.vision.image_size = 16
        config.vision.patch_size = 4
        config.vision.rope_ref_size = 4

        return config


def _set_text_size(config: EvaConfig, model_dim: int, num_layers: int, num_attn_heads: int) -> None:
    config.text.model_dim = model_dim
    config.text.num_layers = num_layers
    config.text.num_attn_heads = num_attn_heads
    config.text.ffn_inner_dim = 4 * model_dim
    config.text.single_tower_dim = config.projection_dim
