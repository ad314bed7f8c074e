"""The named architectures of the CLIP family."""

from __future__ import annotations

from fairseq2.runtime.dependency import DependencyContainer

from vembed_fs2.models.archs import ArchRegistrar
from vembed_fs2.models.clip.config import ClipConfig


def register_clip_archs(container: DependencyContainer) -> None:
    """Register the architectures, the base first; the others say how they differ from it."""
    arch = ArchRegistrar(container, ClipConfig)

    @arch("vit_base_patch32")
    def vit_base_patch32() -> ClipConfig:
        """The base: OpenAI's ViT-B/32, 224 pixels, with their approximation of GELU."""
        return ClipConfig()

    @arch("vit_base_patch16")
    def vit_base_patch16() -> ClipConfig:
        """Patches of 16 pixels: four times as many."""
        config = vit_base_patch32()
        config.vision.patch_size = 16
        return config

    @arch("vit_large_patch14")
    def vit_large_patch14() -> ClipConfig:
        """OpenAI's ViT-L/14: both Transformers wider, 24 image layers, embeddings of 768."""
        config = vit_base_patch32()
        config.projection_dim = 768
        config.text.model_dim = 768
        config.text.num_attn_heads = 12
        config.text.ffn_inner_dim = 3072
        config.text.single_tower_dim = 768
        config.vision.model_dim = 1024
        config.vision.num_layers = 24
        config.vision.num_attn_heads = 16
        config.vision.ffn_inner_dim = 4096
        config.vision.patch_size = 14
        config.vision.single_tower_dim = 768

        return config

    @arch("vit_large_patch14_336")
    def vit_large_patch14_336() -> ClipConfig:
        """``vit_large_patch14`` on images of 336 pixels."""
        config = vit_large_patch14()
        config.vision.image_size = 336
        return config

    @arch("laion_vit_base_patch32")
    def laion_vit_base_patch32() -> ClipConfig:
        """ViT-B/32 as OpenCLIP trains it: with exact GELU."""
        return _with_exact_gelu(vit_base_patch32())

    @arch("laion_vit_base_patch32_256")
    def laion_vit_base_patch32_256() -> ClipConfig:
        """``laion_vit_base_patch32`` on images of 256 pixels."""
        config = laion_vit_base_patch32()
        config.vision.image_size = 256
        return config

    @arch("laion_vit_base_patch16")
    def laion_vit_base_patch16() -> ClipConfig:
        """``laion_vit_base_patch32`` with patches of 16 pixels."""
        config = laion_vit_base_patch32()
        config.vision.patch_size = 16
        return config

    @arch("laion_vit_large_patch14")
    def laion_vit_large_patch14() -> ClipConfig:
        """``vit_large_patch14`` with exact GELU."""
        return _with_exact_gelu(vit_large_patch14())

    @arch("laion_vit_huge_patch14")
    def laion_vit_huge_patch14() -> ClipConfig:
        """OpenCLIP's ViT-H/14: 24 text layers of 1024, 32 image layers of 1280, embeddings of 1024, exact GELU."""
        config = laion_vit_base_patch32()
        config.projection_dim = 1024
        config.text.model_dim = 1024
        config.text.num_layers = 24
        config.text.num_attn_heads = 16
        config.text.ffn_inner_dim = 4096
        config.text.single_tower_dim = 1024
        config.vision.model_dim = 1280
        config.vision.num_layers = 32
        config.vision.num_attn_heads = 16
        config.vision.ffn_inner_dim = 5120
        config.vision.patch_size = 14
        config.vision.single_tower_dim = 1024

        return config

    @arch("vit_huge_patch14")
    def vit_huge_patch14() -> ClipConfig:
        """``laion_vit_huge_patch14`` with OpenAI's approximation of GELU."""
        config = laion_vit_huge_patch14()
        for tower in (config.text, config.vision):
            tower.activation = "quick_gelu"
        return config

    @arch("vit_huge_patch14_378")
    def vit_huge_patch14_378() -> ClipConfig:
        """``vit_huge_patch14`` on images of 378 pixels."""
        config = vit_huge_patch14()
        config.vision.image_size = 378
        return config

    @arch("clipa_vit_large_patch14")
    def clipa_vit_large_patch14() -> ClipConfig:
        """``laion_vit_large_patch14`` as CLIPA changes it: BERT's tokens, no causal mask, mean of patches."""
        return _as_clipa(laion_vit_large_patch14())

    @arch("clipa_vit_huge_patch14")
    def clipa_vit_huge_patch14() -> ClipConfig:
        """``laion_vit_huge_patch14`` as CLIPA changes it."""
        return _as_clipa(laion_vit_huge_patch14())

    @arch("tiny")
    def tiny() -> ClipConfig:
        """A model of 0.2 million parameters for demos and tests: 16 pixels, a vocabulary of 128.

        The last index of the vocabulary ends a text; with another
        ``text.vocab_size``, set ``text.eos_idx`` too.
        """
        config = vit_base_patch32()
        config.projection_dim = 64
        for tower in (config.text, config.vision):
            tower.model_dim = 64
            tower.num_layers = 2
            tower.num_attn_heads = 4
            tower.ffn_inner_dim = 128
            tower.single_tower_dim = 64

        config.text.vocab_size = 128
        config.text.max_seq_len = 32
        config.text.pad_idx = 0
        config.text.bos_idx = 126
        config.text.eos_idx = 127
        config.vision.image_size = 16
        config.vision.patch_size = 4

        return config


def _with_exact_gelu(config: ClipConfig) -> ClipConfig:
    for tower in (config.text, config.vision):
        tower.activation = "gelu"
    return config


def _as_clipa(config: ClipConfig) -> ClipConfig:
    """Change a model as CLIPA does (Li et al., 2023, https://arxiv.org/abs/2305.07017)."""
    config.text.vocab_size = 32_000
    config.text.max_seq_len = 32
    config.text.pad_idx = 0
    config.text.bos_idx = None
    config.text.eos_idx = 2
    config.text.pooling = "last"
    config.text.causal = False
    config.vision.pre_norm = False
    config.vision.pooling = "mean"

    return config
