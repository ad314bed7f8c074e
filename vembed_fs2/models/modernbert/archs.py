"""The named architectures of ModernBERT models."""

from __future__ import annotations

from fairseq2.runtime.dependency import DependencyContainer

from vembed_fs2.models.archs import ArchRegistrar
from vembed_fs2.models.modernbert.config import ModernBertConfig


def register_modernbert_archs(container: DependencyContainer) -> None:
    """Register the architectures, the base first; the others say how they differ from it."""
    arch = ArchRegistrar(container, ModernBertConfig)

    @arch("modernbert_base")
    def modernbert_base() -> ModernBertConfig:
        """The base: 22 layers, 768 dimensions, the first token's state, unit length."""
        return ModernBertConfig()

    @arch("modernbert_large")
    def modernbert_large() -> ModernBertConfig:
        """28 layers, 1024 dimensions."""
        config = modernbert_base()
        config.model_dim = 1024
        config.num_layers = 28
        config.num_attn_heads = 16
        config.ffn_inner_dim = 2624

        return config

    @arch("modernbert_base_mean")
    def modernbert_base_mean() -> ModernBertConfig:
        """The base with mean pooling."""
        config = modernbert_base()
        config.classifier_pooling = "mean"
        config.head.pooling = "mean"
        return config

    @arch("modernbert_large_mean")
    def modernbert_large_mean() -> ModernBertConfig:
        """The large model with mean pooling."""
        config = modernbert_large()
        config.classifier_pooling = "mean"
        config.head.pooling = "mean"
        return config

    @arch("tiny")
    def tiny() -> ModernBertConfig:
        """Two layers of 32 dimensions, for tests."""
        config = modernbert_base()
        config.model_dim = 32
        config.max_seq_len = 64
        config.vocab_size = 100
        config.pad_idx = 0
        config.num_layers = 2
        config.num_attn_heads = 2
        config.ffn_inner_dim = 48
        config.local_attn_window = 8

        return config
