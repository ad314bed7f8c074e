"""The named architectures of decoders."""

from __future__ import annotations

from fairseq2.runtime.dependency import DependencyContainer

from vembed_fs2.models.archs import ArchRegistrar
from vembed_fs2.models.qwen3.config import Qwen3Config


def register_qwen3_archs(container: DependencyContainer) -> None:
    """Register the architectures, the base first; the others say how they differ from it."""
    arch = ArchRegistrar(container, Qwen3Config)

    @arch("qwen3_embedding_0_6b")
    def qwen3_embedding_0_6b() -> Qwen3Config:
        """The base: 28 layers, 1024 dimensions, the last token's state, unit length."""
        return Qwen3Config()

    @arch("qwen3_embedding_4b")
    def qwen3_embedding_4b() -> Qwen3Config:
        """36 layers, 2560 dimensions."""
        config = qwen3_embedding_0_6b()
        config.model_dim = 2560
        config.num_layers = 36
        config.num_attn_heads = 32
        config.ffn_inner_dim = 9728
        config.vocab_size = 151_665
        config.max_seq_len = 40_960

        return config

    @arch("qwen3_embedding_8b")
    def qwen3_embedding_8b() -> Qwen3Config:
        """36 layers, 4096 dimensions."""
        config = qwen3_embedding_4b()
        config.model_dim = 4096
        config.ffn_inner_dim = 12_288

        return config

    @arch("gte_qwen2_1_5b")
    def gte_qwen2_1_5b() -> Qwen3Config:
        """Qwen2 of 28 layers and 1536 dimensions, attention in both directions."""
        config = qwen3_embedding_0_6b()
        config.variant = "qwen2"
        config.model_dim = 1536
        config.num_attn_heads = 12
        config.num_key_value_heads = 2
        config.head_dim = None
        config.ffn_inner_dim = 8960
        config.vocab_size = 151_646
        config.max_seq_len = 131_072
        config.qk_norm = False
        config.qkv_bias = True
        config.is_causal = False

        return config

    @arch("gte_qwen2_7b")
    def gte_qwen2_7b() -> Qwen3Config:
        """Qwen2 of 28 layers and 3584 dimensions, attention in both directions."""
        config = gte_qwen2_1_5b()
        config.model_dim = 3584
        config.num_attn_heads = 28
        config.num_key_value_heads = 4
        config.ffn_inner_dim = 18_944

        return config

    @arch("e5_mistral_7b")
    def e5_mistral_7b() -> Qwen3Config:
        """Mistral of 32 layers and 4096 dimensions, the last token's state."""
        config = qwen3_embedding_0_6b()
        config.variant = "mistral"
        config.model_dim = 4096
        config.num_layers = 32
        config.num_attn_heads = 32
        config.num_key_value_heads = 8
        config.head_dim = None
        config.ffn_inner_dim = 14_336
        config.vocab_size = 32_000
        config.max_seq_len = 32_768
        config.attn_window = 4096
        config.windowed_layers = list(range(32))
        config.qk_norm = False
        config.norm_eps = 1e-5
        config.rope_theta = 10_000.0
        config.pad_idx = 2

        return config

    @arch("tiny")
    def tiny() -> Qwen3Config:
        """Two layers of 32 dimensions, for tests."""
        config = qwen3_embedding_0_6b()
        config.model_dim = 32
        config.num_layers = 2
        config.num_attn_heads = 4
        config.num_key_value_heads = 2
        config.head_dim = 8
        config.ffn_inner_dim = 48
        config.vocab_size = 100
        config.max_seq_len = 64

        return config
