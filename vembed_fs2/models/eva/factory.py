"""How the modules of EVA-CLIP models are put together."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn as nn
from fairseq2.models.transformer import (
    FeedForwardNetwork,
    GLUFeedForwardNetwork,
    StandardMultiheadAttention,
    StandardTransformerEncoder,
    TransformerEncoderLayer,
)
from fairseq2.nn import (
    ColumnShardedLinear,
    LayerNorm,
    Linear,
    Projection,
    RowShardedLinear,
    StandardEmbedding,
    StandardLayerNorm,
)
from torch.nn import Conv2d

from vembed_fs2.models.clip.factory import create_text_tower
from vembed_fs2.models.common.attention import create_sdpa
from vembed_fs2.models.common.checks import require_valid
from vembed_fs2.models.common.factory import ModelFactory
from vembed_fs2.models.common.layers import create_ffn, create_layer
from vembed_fs2.models.common.vision import BranchResidual, LayerScale, PatchProjection
from vembed_fs2.models.eva.config import EvaConfig, EvaVisionConfig
from vembed_fs2.models.eva.model import (
    INIT_STD,
    EvaFrontend,
    EvaHead,
    EvaModel,
    EvaVisionTower,
    GridRotaryEncoder,
    GridRotations,
    MlpProjection,
    NormalizedProjection,
    PostNormLayer,
)


class EvaFactory(ModelFactory[EvaConfig]):
    """Creates the modules of an EVA-CLIP model."""

    def create_model(self) -> EvaModel:
        config = self._config
        text = create_text_tower(config.text, config.projection_dim)
        vision = EvaVisionFactory(config.vision, config.projection_dim).create_tower()

        model = EvaModel(text, vision, config.logit_scale_init, config.train_logit_scale, config.head)
        model.tokens_per_image = config.vision.num_patches + 1
        model.image_shape = (config.vision.num_channels, config.vision.image_size, config.vision.image_size)

        return model


class EvaVisionFactory(ModelFactory[EvaVisionConfig]):
    """Creates the modules of the image Transformer."""

    def __init__(self, config: EvaVisionConfig, projection_dim: int) -> None:
        super().__init__(config)
        self._projection_dim = projection_dim
        self._head_dim = config.model_dim // config.num_attn_heads

    def create_tower(self) -> EvaVisionTower:
        encoder = StandardTransformerEncoder([self.create_layer(i) for i in range(self._config.num_layers)])
        return EvaVisionTower(self.create_frontend(), encoder, self.create_head())

    def create_frontend(self) -> EvaFrontend:
        config = self._config
        patch_proj = PatchProjection(
            config.num_channels,
            config.model_dim,
            config.patch_size,
            bias=not config.input_norm,
            init_fn=Conv2d.reset_parameters,
        )

        pos_embed = rotations = None
        if config.learned_positions:
            pos_embed = StandardEmbedding(config.num_patches + 1, config.model_dim, init_fn=_init_positions)
        if config.rope:
            rotations = GridRotations(self._head_dim, config.rope_ref_size)

        layer_norm = self.create_layer_norm(config.model_dim) if config.input_norm else None
        return EvaFrontend(patch_proj, pos_embed, layer_norm, rotations)

    def create_layer(self, idx: int) -> TransformerEncoderLayer:
        config = self._config
        drop_p = config.drop_path_p * idx / max(config.num_layers - 1, 1)
        self_attn, ffn = self.create_self_attention(idx), self.create_ffn(idx)

        def create_layer_norm() -> LayerNorm:
            return self.create_layer_norm(config.model_dim)

        def create_residual() -> BranchResidual:
            return BranchResidual(self.create_scale(), drop_p)

        if not config.post_norm:
            return create_layer(self_attn, ffn, create_layer_norm, create_residual=create_residual)

        return PostNormLayer(
            self_attn,
            create_layer_norm(),
            ffn,
            create_layer_norm(),
            self_attn_residual=create_residual(),
            ffn_residual=create_residual(),
        )

    def create_scale(self) -> LayerScale | None:
        init = self._config.layer_scale_init
        return None if init is None else LayerScale(self._config.model_dim, init)

    def create_self_attention(self, idx: int) -> StandardMultiheadAttention:
        config = self._config
        attn = StandardMultiheadAttention(
            config.model_dim,
            config.num_attn_heads,
            create_sdpa(dropout_p=config.attn_dropout_p),
            qkv_proj_init_fn=_init_linear(INIT_STD),
            pos_encoder=GridRotaryEncoder(self._head_dim) if config.rope else None,
            bias=config.qkv_bias,
            output_proj_bias=True,
        )
        attn.k_proj = ColumnShardedLinear(
            config.model_dim, config.model_dim, bias=False, gather_output=False, init_fn=_init_linear(INIT_STD)
        )
        attn.output_proj = self.create_output_proj(config.model_dim, idx, normalized=config.attn_norm)

        return attn

    def create_ffn(self, idx: int) -> FeedForwardNetwork:
        config = self._config
        init_fn = _init_linear(INIT_STD)
        ffn: FeedForwardNetwork
        if config.gated_ffn:
            ffn = GLUFeedForwardNetwork(
                config.model_dim, config.ffn_inner_dim, bias=True, inner_dim_scale=1.0, proj_init_fn=init_fn
            )
        else:
            ffn = create_ffn(config.model_dim, config.ffn_inner_dim, "gelu", init_fn)

        ffn.register_module(
            "output_proj", self.create_output_proj(config.ffn_inner_dim, idx, normalized=config.ffn_norm)
        )
        return ffn

    def create_output_proj(self, input_dim: int, idx: int, *, normalized: bool) -> Projection:
        # Smaller the more layers precede, so that states do not grow with them.
        std = INIT_STD / (2 * (idx + 1)) ** 0.5
        proj = RowShardedLinear(
            input_dim, self._config.model_dim, bias=True, scatter_input=normalized, init_fn=_init_linear(std)
        )
        return NormalizedProjection(self.create_layer_norm(input_dim), proj) if normalized else proj

    def create_head(self) -> EvaHead:
        config = self._config

        return EvaHead(
            self.create_layer_norm(config.model_dim),
            config.pooling,
            self.create_projection(),
            norm_after_pooling=config.norm_after_pooling,
            dropout_p=0.0 if config.projection == "mlp" else config.head_dropout_p,
        )

    def create_projection(self) -> Projection | None:
        config = self._config
        input_dim, output_dim, bias = config.model_dim, self._projection_dim, config.projection_bias
        match config.projection:
            case "none":
                return None
            case "classifier":
                # timm's classifiers start from almost nothing.
                return Linear(input_dim, output_dim, bias=True, init_fn=_init_linear(INIT_STD * 0.001))
            case "linear":
                return Linear(input_dim, output_dim, bias=bias)
            case "mlp":
                return MlpProjection(input_dim, output_dim, bias, config.head_dropout_p)

    def create_layer_norm(self, dim: int) -> LayerNorm:
        return StandardLayerNorm(dim, bias=True, eps=self._config.layer_norm_eps)


def create_eva_model(config: EvaConfig) -> EvaModel:
    """Create an EVA-CLIP model with initial weights as timm draws them, and CLIP's for texts.

    :raises ConfigError: ``config`` is not valid.
    """
    require_valid(config, "EVA-CLIP")

    return EvaFactory(config).create_model()


def _init_positions(embed: StandardEmbedding) -> None:
    nn.init.trunc_normal_(embed.weight, std=INIT_STD)


def _init_linear(std: float) -> Callable[[Linear], None]:
    def init_projection(proj: Linear) -> None:
        nn.init.trunc_normal_(proj.weight, std=std)
        if proj.bias is not None:
            nn.init.zeros_(proj.bias)

    return init_projection
