"""The named architectures of the Vision Transformer family."""

from __future__ import annotations

from fairseq2.runtime.dependency import DependencyContainer

from vembed_fs2.embedding.head import ImageHeadConfig
from vembed_fs2.models.archs import ArchRegistrar
from vembed_fs2.models.vit.config import VitConfig


def register_vit_archs(container: DependencyContainer) -> None:
    """Register the architectures: of each model the base first; the others say how they differ from it."""
    _register_vit(container)
    _register_mae(container)
    _register_dinov2(container)
    _register_dinov3(container)
    _register_tiny(container)


def _register_vit(container: DependencyContainer) -> None:
    arch = ArchRegistrar(container, VitConfig)

    @arch("vit_base_patch16")
    def vit_base_patch16() -> VitConfig:
        """The base: Google's ViT-B/16, 224 pixels, with its pooler."""
        return _vit_base()

    @arch("vit_large_patch16")
    def vit_large_patch16() -> VitConfig:
        """ViT-L/16: 24 layers of 1024."""
        return _as_large(_vit_base())


def _register_mae(container: DependencyContainer) -> None:
    arch = ArchRegistrar(container, VitConfig)

    @arch("mae_base_patch16")
    def mae_base_patch16() -> VitConfig:
        """The encoder of a masked autoencoder: ViT-B/16 with fixed positions, without pooler; the mean of patches."""
        return _mae_base()

    @arch("mae_large_patch16")
    def mae_large_patch16() -> VitConfig:
        """``mae_base_patch16`` with 24 layers of 1024."""
        return _as_large(_mae_base())

    @arch("mae_huge_patch14")
    def mae_huge_patch14() -> VitConfig:
        """``mae_base_patch16`` with 32 layers of 1280, and patches of 14 pixels."""
        config = _mae_base()
        config.model_dim = 1280
        config.num_layers = 32
        config.num_attn_heads = 16
        config.ffn_inner_dim = 5120
        config.patch_size = 14

        return config


def _register_dinov2(container: DependencyContainer) -> None:
    arch = ArchRegistrar(container, VitConfig)

    @arch("dinov2_small_patch14")
    def dinov2_small_patch14() -> VitConfig:
        """DINOv2 S/14: 12 layers of 384."""
        return _as_small(_dinov2_base())

    @arch("dinov2_base_patch14")
    def dinov2_base_patch14() -> VitConfig:
        """DINOv2 B/14: 12 layers of 768, LayerScale, positions for 518 pixels."""
        return _dinov2_base()

    @arch("dinov2_large_patch14")
    def dinov2_large_patch14() -> VitConfig:
        """DINOv2 L/14: 24 layers of 1024."""
        return _as_large(_dinov2_base())

    @arch("dinov2_giant_patch14")
    def dinov2_giant_patch14() -> VitConfig:
        """DINOv2 g/14: 40 layers of 1536 with gated feed-forward networks."""
        return _as_giant(_dinov2_base())

    @arch("dinov2_reg4_small_patch14")
    def dinov2_reg4_small_patch14() -> VitConfig:
        """``dinov2_small_patch14`` with 4 registers."""
        return _with_registers(_as_small(_dinov2_base()))

    @arch("dinov2_reg4_base_patch14")
    def dinov2_reg4_base_patch14() -> VitConfig:
        """``dinov2_base_patch14`` with 4 registers."""
        return _with_registers(_dinov2_base())

    @arch("dinov2_reg4_large_patch14")
    def dinov2_reg4_large_patch14() -> VitConfig:
        """``dinov2_large_patch14`` with 4 registers."""
        return _with_registers(_as_large(_dinov2_base()))

    @arch("dinov2_reg4_giant_patch14")
    def dinov2_reg4_giant_patch14() -> VitConfig:
        """``dinov2_giant_patch14`` with 4 registers."""
        return _with_registers(_as_giant(_dinov2_base()))


def _register_dinov3(container: DependencyContainer) -> None:
    arch = ArchRegistrar(container, VitConfig)

    @arch("dinov3_small_patch16")
    def dinov3_small_patch16() -> VitConfig:
        """DINOv3 S/16: 12 layers of 384."""
        return _as_small(_dinov3_base())

    @arch("dinov3_small_plus_patch16")
    def dinov3_small_plus_patch16() -> VitConfig:
        """DINOv3 S+/16: ``dinov3_small_patch16`` with gated feed-forward networks."""
        return _with_gates(_as_small(_dinov3_base()))

    @arch("dinov3_base_patch16")
    def dinov3_base_patch16() -> VitConfig:
        """DINOv3 B/16: 12 layers of 768, 4 registers, rotary positions."""
        return _dinov3_base()

    @arch("dinov3_large_patch16")
    def dinov3_large_patch16() -> VitConfig:
        """DINOv3 L/16: 24 layers of 1024."""
        return _as_large(_dinov3_base())

    @arch("dinov3_huge_plus_patch16")
    def dinov3_huge_plus_patch16() -> VitConfig:
        """DINOv3 H+/16: 32 layers of 1280 with gated feed-forward networks."""
        config = _with_gates(_dinov3_base())
        config.model_dim = 1280
        config.num_layers = 32
        config.num_attn_heads = 20
        config.ffn_inner_dim = 5120

        return config

    @arch("dinov3_7b_patch16")
    def dinov3_7b_patch16() -> VitConfig:
        """DINOv3 7B/16: 40 layers of 4096 with gated feed-forward networks, and no biases of queries and values."""
        config = _with_gates(_dinov3_base())
        config.model_dim = 4096
        config.num_layers = 40
        config.num_attn_heads = 32
        config.ffn_inner_dim = 8192
        config.query_bias = False
        config.value_bias = False

        return config


def _register_tiny(container: DependencyContainer) -> None:
    arch = ArchRegistrar(container, VitConfig)

    @arch("tiny")
    def tiny() -> VitConfig:
        """A ViT of 0.07 million parameters for demos and tests: 16 pixels, patches of 4."""
        return _as_tiny(VitConfig())

    @arch("dinov2_tiny")
    def dinov2_tiny() -> VitConfig:
        """DINOv2 of the size of ``tiny``."""
        config = _as_tiny(_dinov2_base())
        config.mlp_ratio = 2.0
        return config

    @arch("dinov3_tiny")
    def dinov3_tiny() -> VitConfig:
        """DINOv3 of the size of ``tiny``."""
        return _as_tiny(_dinov3_base())


def _vit_base() -> VitConfig:
    return VitConfig(pooler=True)


def _mae_base() -> VitConfig:
    # No objective ever looked at its class token.
    return VitConfig(model_type="vit_mae", head=ImageHeadConfig(pooling="mean"))


def _dinov2_base() -> VitConfig:
    return VitConfig(
        model_type="dinov2",
        mlp_ratio=4.0,
        layer_scale_init=1.0,
        layer_norm_eps=1e-6,
        image_size=518,
        patch_size=14,
        mask_token=True,
    )


def _dinov3_base() -> VitConfig:
    return VitConfig(
        model_type="dinov3_vit",
        layer_scale_init=1.0,
        layer_norm_eps=1e-5,
        key_bias=False,
        num_registers=4,
        mask_token=True,
        rope_theta=100.0,
        rope_rescale=2.0,
    )


def _as_small(config: VitConfig) -> VitConfig:
    config.model_dim = 384
    config.num_attn_heads = 6
    config.ffn_inner_dim = 1536
    return config


def _as_large(config: VitConfig) -> VitConfig:
    config.model_dim = 1024
    config.num_layers = 24
    config.num_attn_heads = 16
    config.ffn_inner_dim = 4096
    return config


def _as_giant(config: VitConfig) -> VitConfig:
    config.model_dim = 1536
    config.num_layers = 40
    config.num_attn_heads = 24
    config.gated_ffn = True
    return config


def _with_registers(config: VitConfig) -> VitConfig:
    config.model_type = "dinov2_with_registers"
    config.num_registers = 4
    return config


def _with_gates(config: VitConfig) -> VitConfig:
    config.gated_ffn = True
    config.activation = "silu"
    return config


def _as_tiny(config: VitConfig) -> VitConfig:
    config.model_dim = 64
    config.num_layers = 2
    config.num_attn_heads = 4
    config.ffn_inner_dim = 128
    config.image_size = 16
    config.patch_size = 4

    return config
