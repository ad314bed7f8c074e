"""SigLIP: its configuration, and how its modules are put together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch.nn as nn
from fairseq2.models.transformer import (
    StandardMultiheadAttention,
    StandardTransformerEncoder,
    StandardTransformerEncoderLayer,
    TransformerNormOrder,
)
from fairseq2.nn import Linear, StandardEmbedding, StandardLayerNorm
from torch.nn import Conv2d

from vembed_fs2.embedding.activations import create_activation
from vembed_fs2.models.common.attention import create_sdpa
from vembed_fs2.models.common.feed_forward import FusedFeedForwardNetwork
from vembed_fs2.models.common.vision import PatchProjection
from vembed_fs2.models.siglip.config import SiglipConfig, SiglipTextConfig, SiglipTowerConfig, SiglipVisionConfig
from vembed_fs2.models.siglip.model import (
    SiglipAttentionPool,
    SiglipImageFrontend,
    SiglipModel,
    SiglipPatchFrontend,
    SiglipTextFrontend,
    SiglipTextTower,
    SiglipVisionTower,
)

# The standard deviation of a normal distribution of variance 1 that is cut off at -2 and 2.
_TRUNCATED_STD: Final = 0.87962566103423978


def create_siglip_model(config: SiglipConfig) -> SiglipModel:
    """Create a SigLIP model with initial weights as transformers draws them."""
    return SiglipFactory(config).create_model()


class SiglipFactory:
    """Creates the modules of a SigLIP model."""

    def __init__(self, config: SiglipConfig) -> None:
        self._config = config

    def create_model(self) -> SiglipModel:
        config = self._config
        text = None if config.text is None else self.create_text_tower(config.text)
        vision = None if config.vision is None else self.create_vision_tower(config.vision)
        model = SiglipModel(text, vision, config.logit_scale_init, config.logit_bias_init)
        if config.vision is not None:
            model.tokens_per_image = self.num_positions(config.vision)
        return model

    def create_text_tower(self, config: SiglipTextConfig) -> SiglipTextTower:
        std = config.model_dim**-0.5
        frontend = SiglipTextFrontend(
            self.create_embedding(config.vocab_size, config.model_dim, std),
            self.create_embedding(config.max_seq_len, config.model_dim, std),
        )
        proj = Linear(config.model_dim, config.projection_dim, bias=True, init_fn=_init_lecun)
        return SiglipTextTower(frontend, self.create_encoder(config), proj, config.pad_idx or 0)

    def create_vision_tower(self, config: SiglipVisionConfig) -> SiglipVisionTower:
        frontend = self.create_patch_frontend(config) if self._config.naflex else self.create_image_frontend(config)
        return SiglipVisionTower(frontend, self.create_encoder(config), self.create_attention_pool(config))

    def create_image_frontend(self, config: SiglipVisionConfig) -> SiglipImageFrontend:
        proj = PatchProjection(config.num_channels, config.model_dim, config.patch_size, bias=True, init_fn=_init_lecun)
        return SiglipImageFrontend(proj, self.create_patch_positions(config))

    def create_patch_frontend(self, config: SiglipVisionConfig) -> SiglipPatchFrontend:
        patch_dim = config.num_channels * config.patch_size**2
        proj = Linear(patch_dim, config.model_dim, bias=True, init_fn=_init_lecun)
        return SiglipPatchFrontend(proj, self.create_patch_positions(config))

    def create_patch_positions(self, config: SiglipVisionConfig) -> StandardEmbedding:
        return self.create_embedding(self.num_positions(config), config.model_dim, config.model_dim**-0.5)

    def num_positions(self, config: SiglipVisionConfig) -> int:
        """The number of positions that are learned."""
        side = math.isqrt(config.num_patches) if self._config.naflex else config.image_size // config.patch_size
        return side * side

    def create_attention_pool(self, config: SiglipVisionConfig) -> SiglipAttentionPool:
        attention = StandardMultiheadAttention(
            config.model_dim,
            config.num_attn_heads,
            create_sdpa(),
            # transformers draws the three as one matrix of three times the height.
            qkv_proj_init_fn=_xavier(math.sqrt(0.5)),
            output_proj_init_fn=_init_lecun,
        )
        return SiglipAttentionPool(config.model_dim, attention, self.create_layer_norm(config), self.create_ffn(config))

    def create_encoder(self, config: SiglipTowerConfig) -> StandardTransformerEncoder:
        layers = [self.create_layer(config) for _ in range(config.num_layers)]
        return StandardTransformerEncoder(layers, self.create_layer_norm(config))

    def create_layer(self, config: SiglipTowerConfig) -> StandardTransformerEncoderLayer:
        return StandardTransformerEncoderLayer(
            self.create_self_attention(config),
            self.create_layer_norm(config),
            self.create_ffn(config),
            self.create_layer_norm(config),
            norm_order=TransformerNormOrder.PRE,
        )

    def create_self_attention(self, config: SiglipTowerConfig) -> StandardMultiheadAttention:
        return StandardMultiheadAttention(
            config.model_dim,
            config.num_attn_heads,
            create_sdpa(dropout_p=config.attn_dropout_p),
            qkv_proj_init_fn=_xavier(),
            output_proj_init_fn=_xavier(),
        )

    def create_ffn(self, config: SiglipTowerConfig) -> FusedFeedForwardNetwork:
        return FusedFeedForwardNetwork(
            config.model_dim,
            config.ffn_inner_dim,
            bias=True,
            inner_activation=create_activation(config.activation, field="activation"),
            proj_init_fn=_xavier(bias_std=1e-6),
        )

    def create_layer_norm(self, config: SiglipTowerConfig) -> StandardLayerNorm:
        return StandardLayerNorm(config.model_dim, bias=True, eps=config.layer_norm_eps)

    def create_embedding(self, num_embeddings: int, embed_dim: int, std: float) -> StandardEmbedding:
        def init_embed(embed: StandardEmbedding) -> None:
            nn.init.normal_(embed.weight, std=std)

        return StandardEmbedding(num_embeddings, embed_dim, init_fn=init_embed)


def _xavier(gain: float = 1.0, *, bias_std: float = 0.0) -> Callable[[Linear], None]:
    def init_projection(proj: Linear) -> None:
        nn.init.xavier_uniform_(proj.weight, gain)
        if proj.bias is not None:
            nn.init.normal_(proj.bias, std=bias_std)

    return init_projection


def _init_lecun(proj: Linear | Conv2d) -> None:
    std = (proj.weight.numel() / proj.weight.size(0)) ** -0.5 / _TRUNCATED_STD
    nn.init.trunc_normal_(proj.weight, std=std, a=-2.0 * std, b=2.0 * std)
    if proj.bias is not None:
        nn.init.zeros_(proj.bias)
