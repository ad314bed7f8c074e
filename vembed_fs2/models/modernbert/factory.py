"""How the modules of ModernBERT models are put together."""

from __future__ import annotations

import math

import torch
from fairseq2.models.transformer import (
    GLUFeedForwardNetwork,
    StandardMultiheadAttention,
    StandardTransformerEncoder,
    StandardTransformerEncoderLayer,
    TransformerNormOrder,
)
from fairseq2.nn import LayerNorm, Linear, RowShardedLinear, StandardEmbedding, StandardLayerNorm

from vembed_fs2.embedding.activations import create_activation
from vembed_fs2.models.common.attention import create_sdpa
from vembed_fs2.models.common.checks import require_valid
from vembed_fs2.models.common.dropout import Dropout
from vembed_fs2.models.common.factory import ModelFactory
from vembed_fs2.models.common.rotary import RotaryPositions
from vembed_fs2.models.modernbert.attention import create_local_sdpa
from vembed_fs2.models.modernbert.config import ModernBertConfig
from vembed_fs2.models.modernbert.model import ModernBertFrontend, ModernBertModel, NoNorm


class ModernBertFactory(ModelFactory[ModernBertConfig]):
    """Creates the modules of a ModernBERT model."""

    def create_model(self) -> ModernBertModel:
        config = self._config
        local_theta = config.global_rope_theta if config.local_rope_theta is None else config.local_rope_theta

        model = ModernBertModel(
            self.create_frontend(),
            self.create_encoder(),
            head_dim=config.model_dim // config.num_attn_heads,
            global_theta=config.global_rope_theta,
            local_theta=local_theta,
        )
        model.set_head(config.head, config.model_dim)
        model.max_text_length = config.max_seq_len
        model.vocab_size = config.vocab_size

        return model

    def create_frontend(self) -> ModernBertFrontend:
        config = self._config
        embed = StandardEmbedding(config.vocab_size, config.model_dim, config.pad_idx, init_fn=self.init_weight)
        return ModernBertFrontend(embed, self.create_layer_norm(), config.embed_dropout_p)

    def create_encoder(self) -> StandardTransformerEncoder:
        layers = [self.create_encoder_layer(idx) for idx in range(self._config.num_layers)]
        return StandardTransformerEncoder(layers, self.create_layer_norm())

    def create_encoder_layer(self, idx: int) -> StandardTransformerEncoderLayer:
        config = self._config
        layer = StandardTransformerEncoderLayer(
            self.create_self_attention(local=idx % config.global_attn_interval != 0),
            NoNorm() if idx == 0 else self.create_layer_norm(),
            self.create_ffn(),
            self.create_layer_norm(),
            norm_order=TransformerNormOrder.PRE,
        )
        if config.attn_dropout_p > 0.0:
            layer.self_attn_dropout = Dropout(config.attn_dropout_p)

        return layer

    def create_self_attention(self, *, local: bool) -> StandardMultiheadAttention:
        config = self._config
        if local:
            sdpa = create_local_sdpa(config.local_attn_window // 2, dropout_p=config.attn_dropout_p)
        else:
            sdpa = create_sdpa(dropout_p=config.attn_dropout_p)

        return StandardMultiheadAttention(
            config.model_dim,
            config.num_attn_heads,
            sdpa,
            qkv_proj_init_fn=self.init_projection,
            pos_encoder=RotaryPositions(config.model_dim // config.num_attn_heads, kind=int(local)),
            output_proj_init_fn=self.init_output_projection,
            bias=config.attn_bias,
        )

    def create_ffn(self) -> GLUFeedForwardNetwork:
        config = self._config
        ffn = GLUFeedForwardNetwork(
            config.model_dim,
            config.ffn_inner_dim,
            config.ffn_bias,
            gate_activation=create_activation(config.activation, field="activation"),
            inner_dim_scale=1.0,
            proj_init_fn=self.init_projection,
        )
        assert isinstance(ffn.output_proj, RowShardedLinear)
        ffn.output_proj.init_fn = self.init_output_projection
        ffn.output_proj.reset_parameters()

        if config.ffn_dropout_p > 0.0:
            ffn.inner_dropout = Dropout(config.ffn_dropout_p)

        return ffn

    def create_layer_norm(self) -> LayerNorm:
        return StandardLayerNorm(self._config.model_dim, self._config.norm_bias, eps=self._config.norm_eps)

    def init_weight(self, module: StandardEmbedding | Linear, scale: float = 1.0) -> None:
        """Draw the weights of ``module`` from a normal distribution that is cut off."""
        std = self._config.init_std * scale
        cutoff = 3.0 if self._config.init_cutoff is None else self._config.init_cutoff
        torch.nn.init.trunc_normal_(module.weight, std=std, a=-cutoff * std, b=cutoff * std)

    def init_projection(self, proj: Linear, scale: float = 1.0) -> None:
        self.init_weight(proj, scale)
        if proj.bias is not None:
            torch.nn.init.zeros_(proj.bias)

    def init_output_projection(self, proj: Linear) -> None:
        # What all layers add to a state together stays as large as what one would.
        self.init_projection(proj, 1.0 / math.sqrt(2.0 * self._config.num_layers))


def create_modernbert_model(config: ModernBertConfig) -> ModernBertModel:
    """Create a ModernBERT model with initial weights as transformers draws them.

    :raises ConfigError: ``config`` is not valid.
    """
    require_valid(config, "ModernBERT")

    return ModernBertFactory(config).create_model()
