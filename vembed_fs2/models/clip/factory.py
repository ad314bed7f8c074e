"""CLIP: its configuration, and how its modules are put together."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn as nn
from fairseq2.models.transformer import (
    StandardMultiheadAttention,
    StandardTransformerEncoder,
    StandardTransformerEncoderLayer,
    TransformerNormOrder,
)
from fairseq2.nn import Linear, ResidualConnect, StandardEmbedding, StandardLayerNorm
from torch.nn import Conv2d

from vembed_fs2.embedding.activations import create_activation
from vembed_fs2.models.clip.config import ClipConfig, ClipTowerConfig
from vembed_fs2.models.clip.model import (
    ClipModel,
    ClipTextFrontend,
    ClipTextTower,
    ClipVisionFrontend,
    ClipVisionTower,
)
from vembed_fs2.models.common.attention import create_sdpa
from vembed_fs2.models.common.feed_forward import FusedFeedForwardNetwork
from vembed_fs2.models.common.vision import BranchResidual, LayerScale, PatchProjection


def create_clip_model(config: ClipConfig) -> ClipModel:
    """Create a CLIP model with initial weights as transformers draws them."""
    return ClipFactory(config).create_model()


class ClipFactory:
    """Creates the modules of a CLIP model."""

    def __init__(self, config: ClipConfig) -> None:
        self._config = config

    def create_model(self) -> ClipModel:
        config = self._config
        model = ClipModel(
            self.create_text_tower(), self.create_vision_tower(), config.logit_scale_init, config.train_logit_scale
        )
        model.tokens_per_image = config.vision.num_patches + 1
        return model

    def create_text_tower(self) -> ClipTextTower:
        config = self._config.text
        std = 0.02 * config.init_factor
        frontend = ClipTextFrontend(
            self.create_embedding(config.vocab_size, config.model_dim, std),
            self.create_embedding(config.max_seq_len, config.model_dim, std),
        )
        encoder = self.create_encoder(config, self.create_layer_norm(config), causal=config.causal)
        return ClipTextTower(
            frontend,
            encoder,
            self.create_projection(config.model_dim, bias=config.proj_bias),
            config.eos_idx,
            pooling=config.pooling,
            pad_id=config.pad_idx if config.sees_padding else None,
        )

    def create_vision_tower(self) -> ClipVisionTower:
        config = self._config.vision
        encoder = self.create_encoder(config, None, causal=False)
        return ClipVisionTower(
            self.create_vision_frontend(),
            encoder,
            self.create_layer_norm(config),
            self.create_projection(config.model_dim),
            pooling=config.pooling,
            norm_after_pooling=config.norm_after_pooling,
        )

    def create_vision_frontend(self) -> ClipVisionFrontend:
        config = self._config.vision
        std = config.init_range * config.init_factor
        # fairseq2's patch extractor always has a bias, and CLIP's has none.
        patch_proj = PatchProjection(
            config.num_channels, config.model_dim, config.patch_size, bias=False, init_fn=_normal(std)
        )
        pos_embed = self.create_embedding(config.num_patches + 1, config.model_dim, std)
        class_std = config.model_dim**-0.5 * config.init_factor
        return ClipVisionFrontend(
            patch_proj,
            pos_embed,
            self.create_layer_norm(config) if config.pre_norm else None,
            class_std,
            grid=config.grid,
            patch_dropout_p=config.patch_dropout_p,
        )

    def create_encoder(
        self, config: ClipTowerConfig, layer_norm: StandardLayerNorm | None, *, causal: bool
    ) -> StandardTransformerEncoder:
        layers = [self.create_layer(config, causal) for _ in range(config.num_layers)]
        return StandardTransformerEncoder(layers, layer_norm)

    def create_layer(self, config: ClipTowerConfig, causal: bool) -> StandardTransformerEncoderLayer:
        return StandardTransformerEncoderLayer(
            self.create_self_attention(config, causal),
            self.create_layer_norm(config),
            self.create_ffn(config),
            self.create_layer_norm(config),
            norm_order=TransformerNormOrder.PRE,
            self_attn_residual=self.create_residual(config),
            ffn_residual=self.create_residual(config),
        )

    def create_residual(self, config: ClipTowerConfig) -> ResidualConnect | None:
        if config.layer_scale_init is None:
            return None
        return BranchResidual(LayerScale(config.model_dim, config.layer_scale_init))

    def create_self_attention(self, config: ClipTowerConfig, causal: bool) -> StandardMultiheadAttention:
        std = config.model_dim**-0.5 * config.init_factor
        return StandardMultiheadAttention(
            config.model_dim,
            config.num_attn_heads,
            create_sdpa(dropout_p=config.attn_dropout_p, causal=causal),
            qkv_proj_init_fn=_normal(std * _depth_scale(config)),
            output_proj_init_fn=_normal(std),
        )

    def create_ffn(self, config: ClipTowerConfig) -> FusedFeedForwardNetwork:
        inner_std = (2 * config.model_dim) ** -0.5 * config.init_factor
        output_std = config.model_dim**-0.5 * config.init_factor * _depth_scale(config)

        def init_projection(proj: Linear) -> None:
            # One function initialises both; the input size tells them apart.
            _normal(inner_std if proj.input_dim == config.model_dim else output_std)(proj)

        activation = create_activation(config.activation, field="activation")
        return FusedFeedForwardNetwork(
            config.model_dim,
            config.ffn_inner_dim,
            bias=True,
            inner_activation=activation,
            proj_init_fn=init_projection,
        )

    def create_projection(self, model_dim: int, *, bias: bool = False) -> Linear:
        return Linear(model_dim, self._config.projection_dim, bias=bias, init_fn=_normal(model_dim**-0.5))

    def create_layer_norm(self, config: ClipTowerConfig) -> StandardLayerNorm:
        return StandardLayerNorm(config.model_dim, bias=True, eps=config.layer_norm_eps)

    def create_embedding(self, num_embeddings: int, embed_dim: int, std: float) -> StandardEmbedding:
        def init_embed(embed: StandardEmbedding) -> None:
            nn.init.normal_(embed.weight, std=std)

        return StandardEmbedding(num_embeddings, embed_dim, init_fn=init_embed)


def _depth_scale(config: ClipTowerConfig) -> float:
    scale: float = (2 * config.num_layers) ** -0.5
    return scale


def _normal(std: float) -> Callable[[Linear | Conv2d], None]:
    def init_projection(proj: Linear | Conv2d) -> None:
        nn.init.normal_(proj.weight, std=std)
        if proj.bias is not None:
            nn.init.zeros_(proj.bias)

    return init_projection
