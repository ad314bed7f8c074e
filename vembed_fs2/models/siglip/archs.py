"""The named architectures of the SigLIP family."""

from __future__ import annotations

from typing import Final

from fairseq2.runtime.dependency import DependencyContainer

from vembed_fs2.models.archs import ArchRegistrar
from vembed_fs2.models.siglip.config import SiglipConfig, SiglipTextConfig, SiglipVisionConfig

_GEMMA_VOCAB: Final = 256_000
"""The size of the vocabulary of Gemma, which SigLIP 2 uses."""


def register_siglip_archs(container: DependencyContainer) -> None:
    """Register the architectures, the base first; the others say how they differ from it."""
    _register_siglip(container)
    _register_siglip2(container)
    arch = ArchRegistrar(container, SiglipConfig)

    @arch("tiny")
    def tiny() -> SiglipConfig:
        """A model of 0.2 million parameters for demos and tests: 16 pixels, a vocabulary of 128."""
        return SiglipConfig(text=_tiny_text(), vision=_tiny_vision())

    @arch("tiny_naflex")
    def tiny_naflex() -> SiglipConfig:
        """``tiny`` on images of any aspect ratio, with 16 positions."""
        return SiglipConfig(text=_tiny_text(), vision=_tiny_vision(), naflex=True)


def _register_siglip(container: DependencyContainer) -> None:
    arch = ArchRegistrar(container, SiglipConfig)

    @arch("base_patch16_224")
    def base_patch16_224() -> SiglipConfig:
        """The base: 12 layers of 768 each, 224 pixels, texts of 64 tokens."""
        return SiglipConfig()

    @arch("base_patch16_256")
    def base_patch16_256() -> SiglipConfig:
        """256 pixels."""
        return _base(256)

    @arch("base_patch16_384")
    def base_patch16_384() -> SiglipConfig:
        """384 pixels."""
        return _base(384)

    @arch("base_patch16_512")
    def base_patch16_512() -> SiglipConfig:
        """512 pixels."""
        return _base(512)

    @arch("base_patch16_256_multilingual")
    def base_patch16_256_multilingual() -> SiglipConfig:
        """256 pixels, a vocabulary of 250,000."""
        return _base(256, vocab_size=250_000)

    @arch("large_patch16_256")
    def large_patch16_256() -> SiglipConfig:
        """24 layers of 1024 each, 256 pixels."""
        return _large(256)

    @arch("large_patch16_384")
    def large_patch16_384() -> SiglipConfig:
        """24 layers of 1024 each, 384 pixels."""
        return _large(384)

    @arch("so400m_patch14_224")
    def so400m_patch14_224() -> SiglipConfig:
        """The shape-optimised size: 27 layers of 1152 each; patches of 14 pixels, texts of 16 tokens."""
        return _so400m(224, 14, max_seq_len=16)

    @arch("so400m_patch14_384")
    def so400m_patch14_384() -> SiglipConfig:
        """``so400m_patch14_224`` with 384 pixels and texts of 64 tokens."""
        return _so400m(384, 14)


def _register_siglip2(container: DependencyContainer) -> None:
    arch = ArchRegistrar(container, SiglipConfig)

    @arch("siglip2_base_patch32_256")
    def siglip2_base_patch32_256() -> SiglipConfig:
        """``siglip2_base_patch16_256`` with patches of 32 pixels."""
        config = _base(256, vocab_size=_GEMMA_VOCAB)
        assert config.vision is not None
        config.vision.patch_size = 32
        return config

    @arch("siglip2_base_patch16_224")
    def siglip2_base_patch16_224() -> SiglipConfig:
        """``base_patch16_224`` with Gemma's vocabulary of 256,000, as are all of SigLIP 2."""
        return _base(224, vocab_size=_GEMMA_VOCAB)

    @arch("siglip2_base_patch16_256")
    def siglip2_base_patch16_256() -> SiglipConfig:
        """256 pixels."""
        return _base(256, vocab_size=_GEMMA_VOCAB)

    @arch("siglip2_base_patch16_384")
    def siglip2_base_patch16_384() -> SiglipConfig:
        """384 pixels."""
        return _base(384, vocab_size=_GEMMA_VOCAB)

    @arch("siglip2_base_patch16_512")
    def siglip2_base_patch16_512() -> SiglipConfig:
        """512 pixels."""
        return _base(512, vocab_size=_GEMMA_VOCAB)

    @arch("siglip2_large_patch16_256")
    def siglip2_large_patch16_256() -> SiglipConfig:
        """24 layers of 1024 each, 256 pixels."""
        return _large(256, vocab_size=_GEMMA_VOCAB)

    @arch("siglip2_large_patch16_384")
    def siglip2_large_patch16_384() -> SiglipConfig:
        """24 layers of 1024 each, 384 pixels."""
        return _large(384, vocab_size=_GEMMA_VOCAB)

    @arch("siglip2_large_patch16_512")
    def siglip2_large_patch16_512() -> SiglipConfig:
        """24 layers of 1024 each, 512 pixels."""
        return _large(512, vocab_size=_GEMMA_VOCAB)

    @arch("siglip2_so400m_patch14_224")
    def siglip2_so400m_patch14_224() -> SiglipConfig:
        """27 layers of 1152 each, patches of 14 pixels, 224 pixels."""
        return _so400m(224, 14, vocab_size=_GEMMA_VOCAB)

    @arch("siglip2_so400m_patch14_384")
    def siglip2_so400m_patch14_384() -> SiglipConfig:
        """27 layers of 1152 each, patches of 14 pixels, 384 pixels."""
        return _so400m(384, 14, vocab_size=_GEMMA_VOCAB)

    @arch("siglip2_so400m_patch16_256")
    def siglip2_so400m_patch16_256() -> SiglipConfig:
        """27 layers of 1152 each, 256 pixels."""
        return _so400m(256, 16, vocab_size=_GEMMA_VOCAB)

    @arch("siglip2_so400m_patch16_384")
    def siglip2_so400m_patch16_384() -> SiglipConfig:
        """27 layers of 1152 each, 384 pixels."""
        return _so400m(384, 16, vocab_size=_GEMMA_VOCAB)

    @arch("siglip2_so400m_patch16_512")
    def siglip2_so400m_patch16_512() -> SiglipConfig:
        """27 layers of 1152 each, 512 pixels."""
        return _so400m(512, 16, vocab_size=_GEMMA_VOCAB)

    @arch("siglip2_giant_opt_patch16_256")
    def siglip2_giant_opt_patch16_256() -> SiglipConfig:
        """40 layers of 1536 for images of 256 pixels, and the text Transformer of ``siglip2_so400m_patch16_256``."""
        return _giant(256)

    @arch("siglip2_giant_opt_patch16_384")
    def siglip2_giant_opt_patch16_384() -> SiglipConfig:
        """``siglip2_giant_opt_patch16_256`` with 384 pixels."""
        return _giant(384)

    @arch("siglip2_base_patch16_naflex")
    def siglip2_base_patch16_naflex() -> SiglipConfig:
        """``siglip2_base_patch16_256`` on images of any aspect ratio."""
        return _naflex(_base(256, vocab_size=_GEMMA_VOCAB))

    @arch("siglip2_so400m_patch16_naflex")
    def siglip2_so400m_patch16_naflex() -> SiglipConfig:
        """``siglip2_so400m_patch16_256`` on images of any aspect ratio."""
        return _naflex(_so400m(256, 16, vocab_size=_GEMMA_VOCAB))


def _base(image_size: int, *, vocab_size: int = 32_000) -> SiglipConfig:
    return SiglipConfig(text=SiglipTextConfig(vocab_size=vocab_size), vision=SiglipVisionConfig(image_size=image_size))


def _large(image_size: int, *, vocab_size: int = 32_000) -> SiglipConfig:
    return _sized(_base(image_size, vocab_size=vocab_size), 1024, 24, 4096)


def _so400m(image_size: int, patch_size: int, *, vocab_size: int = 32_000, max_seq_len: int = 64) -> SiglipConfig:
    config = _sized(_base(image_size, vocab_size=vocab_size), 1152, 27, 4304)
    assert config.text is not None
    assert config.vision is not None
    config.text.max_seq_len = max_seq_len
    config.vision.patch_size = patch_size

    return config


def _giant(image_size: int) -> SiglipConfig:
    config = _so400m(image_size, 16, vocab_size=_GEMMA_VOCAB)
    assert config.text is not None
    assert config.vision is not None
    config.text.projection_dim = 1536
    config.vision.model_dim = 1536
    config.vision.num_layers = 40
    config.vision.ffn_inner_dim = 6144

    return config


def _sized(config: SiglipConfig, model_dim: int, num_layers: int, ffn_inner_dim: int) -> SiglipConfig:
    """Make both Transformers larger; both have 16 heads."""
    assert config.text is not None
    assert config.vision is not None

    for tower in (config.text, config.vision):
        tower.model_dim = model_dim
        tower.num_layers = num_layers
        tower.num_attn_heads = 16
        tower.ffn_inner_dim = ffn_inner_dim

    config.text.projection_dim = model_dim
    return config


def _naflex(config: SiglipConfig) -> SiglipConfig:
    config.naflex = True
    return config


def _tiny_text() -> SiglipTextConfig:
    return SiglipTextConfig(
        model_dim=64,
        num_layers=2,
        num_attn_heads=4,
        ffn_inner_dim=128,
        vocab_size=128,
        max_seq_len=16,
        projection_dim=64,
        pad_idx=0,
    )


def _tiny_vision() -> SiglipVisionConfig:
    return SiglipVisionConfig(
        model_dim=64,
        num_layers=2,
        num_attn_heads=4,
        ffn_inner_dim=128,
        image_size=16,
        patch_size=4,
        num_patches=16,
    )
