"""The named architectures of Qwen3-VL models."""

from __future__ import annotations

from fairseq2.runtime.dependency import DependencyContainer

from vembed_fs2.models.archs import ArchRegistrar
from vembed_fs2.models.qwen3_vl.config import Qwen3VLConfig, VisionConfig


def register_qwen3_vl_archs(container: DependencyContainer) -> None:
    """Register the architectures, the base first; the others say how they differ from it."""
    arch = ArchRegistrar(container, Qwen3VLConfig)

    @arch("qwen3_vl_embedding_2b")
    def qwen3_vl_embedding_2b() -> Qwen3VLConfig:
        """The base: 28 layers, 2048 dimensions, vision tower of 24 layers, the last token's state."""
        return Qwen3VLConfig()

    @arch("qwen3_vl_embedding_8b")
    def qwen3_vl_embedding_8b() -> Qwen3VLConfig:
        """36 layers, 4096 dimensions, vision tower of 27 layers."""
        config = qwen3_vl_embedding_2b()
        config.model_dim = 4096
        config.num_layers = 36
        config.num_attn_heads = 32
        config.ffn_inner_dim = 12_288
        config.vision = VisionConfig(model_dim=1152, num_layers=27, ffn_inner_dim=4304, deepstack_layers=[8, 16, 24])

        return config

    @arch("tiny")
    def tiny() -> Qwen3VLConfig:
        """Two layers of 32 dimensions, for tests."""
        config = qwen3_vl_embedding_2b()
        config.model_dim = 32
        config.num_layers = 2
        config.num_attn_heads = 4
        config.num_key_value_heads = 2
        config.head_dim = 8
        config.ffn_inner_dim = 48
        config.vocab_size = 100
        config.max_seq_len = 256
        config.mrope_section = [2, 1, 1]
        config.image_idx, config.video_idx, config.vision_start_idx, config.vision_end_idx = 10, 11, 12, 13
        config.vision = VisionConfig(
            model_dim=16, num_layers=2, num_attn_heads=2, ffn_inner_dim=24, patch_size=4, num_positions=16,
            deepstack_layers=[0],
        )  # fmt: skip

        return config
