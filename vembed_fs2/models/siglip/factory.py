"""How the modules of SigLIP models are put together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch.nn as nn
from fairseq2.models.transformer import StandardMultiheadAttention
from fairseq2.nn import Linear, StandardEmbedding
from torch.nn import Conv2d

from vembed_fs2.models.common.attention import create_sdpa
from vembed_fs2.models.common.checks import require_valid
from vembed_fs2.models.common.dual import TowerBuilder, create_text_frontend
from vembed_fs2.models.common.factory import ModelFactory, create_embedding
from vembed_fs2.models.common.vision import PatchProjection
from vembed_fs2.models.siglip.config import SiglipConfig, SiglipTextConfig, SiglipTowerConfig, SiglipVisionConfig
from vembed_fs2.models.siglip.model import (
    SiglipAttentionPool,
    SiglipImageFrontend,
    SiglipModel,
    SiglipPatchFrontend,
    SiglipTextTower,
    SiglipVisionTower,
)

# The standard deviation of a normal distribution of variance 1 that is cut off at -2 and 2.
_TRUNCATED_STD: Final = 0.87962566103423978


class SiglipFactory(ModelFactory[SiglipConfig]):
    """Creates the modules of a SigLIP model."""

    def create_model(self) -> SiglipModel:
        config = self._config
        text = None if config.text is None else self.create_text_tower(config.text)
        vision = None if config.vision is None else self.create_vision_tower(config.vision)

        model = SiglipModel(text, vision, config.logit_scale_init, config.logit_bias_init, config.head)
        if config.vision is not None:
            model.tokens_per_image = self.num_positions(config.vision)
            model.image_shape = (config.vision.num_channels, config.vision.image_size, config.vision.image_size)

        return model

    def create_text_tower(self, config: SiglipTextConfig) -> SiglipTextTower:
        frontend = create_text_frontend(
            config.vocab_size, config.max_seq_len, config.model_dim, std=config.model_dim**-0.5
        )
        proj = Linear(config.model_dim, config.projection_dim, bias=True, init_fn=_init_lecun)
        encoder = _create_builder(config).create_encoder(norm=True)

        return SiglipTextTower(frontend, encoder, proj, config.pad_idx or 0)

    def create_vision_tower(self, config: SiglipVisionConfig) -> SiglipVisionTower:
        frontend = self.create_patch_frontend(config) if self._config.naflex else self.create_image_frontend(config)
        builder = _create_builder(config)

        return SiglipVisionTower(
            frontend, builder.create_encoder(norm=True), self.create_attention_pool(config, builder)
        )

    def create_image_frontend(self, config: SiglipVisionConfig) -> SiglipImageFrontend:
        proj = PatchProjection(config.num_channels, config.model_dim, config.patch_size, bias=True, init_fn=_init_lecun)

        return SiglipImageFrontend(proj, self.create_patch_positions(config))

    def create_patch_frontend(self, config: SiglipVisionConfig) -> SiglipPatchFrontend:
        patch_dim = config.num_channels * config.patch_size**2
        proj = Linear(patch_dim, config.model_dim, bias=True, init_fn=_init_lecun)

        return SiglipPatchFrontend(proj, self.create_patch_positions(config))

    def create_patch_positions(self, config: SiglipVisionConfig) -> StandardEmbedding:
        return create_embedding(self.num_positions(config), config.model_dim, config.model_dim**-0.5)

    def num_positions(self, config: SiglipVisionConfig) -> int:
        """The number of positions that are learned."""
        side = math.isqrt(config.num_patches) if self._config.naflex else config.image_size // config.patch_size

        return side * side

    def create_attention_pool(self, config: SiglipVisionConfig, builder: TowerBuilder) -> SiglipAttentionPool:
        attention = StandardMultiheadAttention(
            config.model_dim,
            config.num_attn_heads,
            create_sdpa(),
            # transformers draws the three as one matrix of three times the height.
            qkv_proj_init_fn=_xavier(math.sqrt(0.5)),
            output_proj_init_fn=_init_lecun,
        )

        pool = SiglipAttentionPool(config.model_dim, attention, builder.create_layer_norm(), builder.create_ffn())

        # A parameter without a gradient is an error under DDP.
        return pool.requires_grad_(self._config.head is None or self._config.head.reads_pooler)


def create_siglip_model(config: SiglipConfig) -> SiglipModel:
    """Create a SigLIP model with initial weights as transformers draws them.

    :raises ConfigError: ``config`` is not valid.
    """
    require_valid(config, "SigLIP")

    return SiglipFactory(config).create_model()


def _create_builder(config: SiglipTowerConfig) -> TowerBuilder:
    return TowerBuilder(config, init_qkv=_xavier(), init_output=_xavier(), init_ffn=_xavier(bias_std=1e-6))


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
