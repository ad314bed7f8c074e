"""How the modules of Vision Transformers are put together."""

from __future__ import annotations

import torch
import torch.nn as nn
from fairseq2.models.transformer import (
    FeedForwardNetwork,
    GLUFeedForwardNetwork,
    StandardMultiheadAttention,
    StandardTransformerEncoder,
    StandardTransformerEncoderLayer,
)
from fairseq2.nn import Linear, StandardLayerNorm
from torch import Tensor
from torch.nn import Conv2d

from vembed_fs2.embedding.activations import create_activation
from vembed_fs2.embedding.head import Head
from vembed_fs2.models.common.attention import create_sdpa
from vembed_fs2.models.common.checks import require_valid
from vembed_fs2.models.common.factory import ModelFactory
from vembed_fs2.models.common.layers import create_ffn, create_layer
from vembed_fs2.models.common.vision import BranchResidual, LayerScale, PatchProjection, as_pair
from vembed_fs2.models.vit.config import VitConfig
from vembed_fs2.models.vit.model import (
    PatchRotaryEncoder,
    PatchRotation,
    PositionTable,
    VitFrontend,
    VitModel,
    sincos_positions,
)


class VitFactory(ModelFactory[VitConfig]):
    """Creates the modules of a Vision Transformer."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__(config)
        self._is_mae = config.model_type == "vit_mae"
        self._is_dino = config.model_type.startswith("dino")

    def create_model(self) -> VitModel:
        config = self._config
        num_prefix_tokens = 1 + config.num_registers
        model = VitModel(
            self.create_frontend(),
            self.create_rotation(num_prefix_tokens),
            self.create_encoder(),
            self.create_pooler(),
            create_activation(config.pooler_activation, field="pooler_activation"),
            Head(config.head, config.model_dim, pooler_dim=config.pooler_dim),
        )
        model.tokens_per_image = config.grid.height * config.grid.width + num_prefix_tokens
        model.image_shape = (config.num_channels, *as_pair(config.image_size))

        return model

    def create_frontend(self) -> VitFrontend:
        config = self._config
        patch_proj = PatchProjection(
            config.num_channels, config.model_dim, as_pair(config.patch_size), bias=True, init_fn=self.init_patch_proj
        )

        return VitFrontend(
            patch_proj,
            self.create_positions(),
            num_registers=config.num_registers,
            mask_token=config.mask_token,
            dropout_p=0.0 if self._is_mae else config.dropout_p,
            init_fn=self.init_frontend,
        )

    def create_positions(self) -> PositionTable | None:
        config = self._config
        if config.rope_theta is not None:
            return None

        return PositionTable(
            config.grid,
            config.model_dim,
            fixed=self._is_mae,
            antialias=config.model_type == "dinov2_with_registers",
            init_fn=self.init_positions,
        )

    def create_rotation(self, num_prefix_tokens: int) -> PatchRotation | None:
        config = self._config
        if config.rope_theta is None:
            return None

        return PatchRotation(
            config.model_dim // config.num_attn_heads,
            config.rope_theta,
            num_prefix_tokens,
            shift=config.rope_shift,
            jitter=config.rope_jitter,
            rescale=config.rope_rescale,
        )

    def create_encoder(self) -> StandardTransformerEncoder:
        layers = [self.create_layer() for _ in range(self._config.num_layers)]
        return StandardTransformerEncoder(layers, self.create_layer_norm())

    def create_layer(self) -> StandardTransformerEncoderLayer:
        dropout_p = self._config.dropout_p

        return create_layer(
            self.create_self_attention(),
            self.create_ffn(),
            self.create_layer_norm,
            create_residual=self.create_residual,
            attn_dropout_p=dropout_p,
            ffn_dropout_p=0.0 if self._is_dino else dropout_p,
        )

    def create_residual(self) -> BranchResidual:
        config = self._config
        scale = None if config.layer_scale_init is None else LayerScale(config.model_dim, config.layer_scale_init)
        return BranchResidual(scale, config.drop_path_p)

    def create_self_attention(self) -> StandardMultiheadAttention:
        config = self._config
        head_dim = config.model_dim // config.num_attn_heads

        attention = StandardMultiheadAttention(
            config.model_dim,
            config.num_attn_heads,
            create_sdpa(dropout_p=config.attn_dropout_p),
            pos_encoder=None if config.rope_theta is None else PatchRotaryEncoder(head_dim),
            qkv_proj_init_fn=self.init_projection,
            output_proj_init_fn=self.init_projection,
            bias=True,
            output_proj_bias=config.proj_bias,
        )

        # fairseq2 has one switch for all three.
        biases = (config.query_bias, config.key_bias, config.value_bias)
        for proj, has_bias in zip((attention.q_proj, attention.k_proj, attention.v_proj), biases):
            if not has_bias:
                proj.register_parameter("bias", None)

        return attention

    def create_ffn(self) -> FeedForwardNetwork:
        config = self._config
        if not config.gated_ffn:
            return create_ffn(
                config.model_dim, config.inner_dim, config.activation, self.init_projection, bias=config.ffn_bias
            )

        # DINOv2's does not ask the configuration.
        activation = config.activation if config.model_type == "dinov3_vit" else "silu"

        return GLUFeedForwardNetwork(
            config.model_dim,
            config.inner_dim,
            config.ffn_bias,
            gate_activation=create_activation(activation, field="activation"),
            inner_dim_scale=1.0,
            proj_init_fn=self.init_projection,
        )

    def create_layer_norm(self) -> StandardLayerNorm:
        return StandardLayerNorm(self._config.model_dim, bias=True, eps=self._config.layer_norm_eps)

    def create_pooler(self) -> Linear | None:
        config = self._config
        if not config.pooler:
            return None

        pooler_dim = config.pooler_dim or config.model_dim
        pooler = Linear(config.model_dim, pooler_dim, bias=True, init_fn=self.init_projection)

        # A parameter without a gradient is an error under DDP.
        return pooler.requires_grad_(config.head.reads_pooler)

    def init_projection(self, proj: Linear | Conv2d) -> None:
        self.init_weight(proj.weight)
        if proj.bias is not None:
            nn.init.zeros_(proj.bias)

    def init_weight(self, weight: Tensor) -> None:
        if self._is_mae:
            nn.init.normal_(weight, std=self._config.init_std)
            return

        # Not every data type has what this needs.
        draws = nn.init.trunc_normal_(torch.empty_like(weight, dtype=torch.float32), std=self._config.init_std)
        with torch.no_grad():
            weight.copy_(draws)

    def init_patch_proj(self, proj: Conv2d) -> None:
        self.init_projection(proj)
        if self._is_mae:
            # Like a linear projection of the pixels of a patch.
            nn.init.xavier_uniform_(proj.weight.detach().flatten(1))

    def init_positions(self, positions: PositionTable) -> None:
        if not positions.fixed:
            self.init_weight(positions.weight)
            return
        with torch.no_grad():
            positions.weight[:1] = 0.0
            positions.weight[1:] = sincos_positions(positions.grid, self._config.model_dim, positions.weight.device)

    def init_frontend(self, frontend: VitFrontend) -> None:
        self.init_weight(frontend.class_embed)

        if frontend.registers is not None:
            if self._config.model_type == "dinov3_vit":
                self.init_weight(frontend.registers)
            else:
                nn.init.zeros_(frontend.registers)

        if frontend.mask_embed is not None:
            nn.init.zeros_(frontend.mask_embed)


def create_vit_model(config: VitConfig) -> VitModel:
    """Create a Vision Transformer with initial weights as transformers draws them.

    :raises ConfigError: ``config`` is not valid.
    """
    require_valid(config, "Vision Transformer")

    return VitFactory(config).create_model()
