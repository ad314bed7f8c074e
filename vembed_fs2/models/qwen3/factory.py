"""How the modules of decoders are put together."""

from __future__ import annotations

from dataclasses import asdict

from fairseq2.models.transformer import (
    GLUFeedForwardNetwork,
    StandardMultiheadAttention,
    StandardTransformerEncoder,
    StandardTransformerEncoderLayer,
)
from fairseq2.nn import LayerNorm, RMSNorm
from transformers import PretrainedConfig

from vembed_fs2.embedding.activations import create_activation
from vembed_fs2.models.common.attention import create_sdpa
from vembed_fs2.models.common.checks import require_valid
from vembed_fs2.models.common.factory import ModelFactory, create_embedding, normal_init
from vembed_fs2.models.common.head_norm import HeadRMSNorm
from vembed_fs2.models.common.layers import create_layer
from vembed_fs2.models.common.rotary import RotaryPositions
from vembed_fs2.models.qwen3.config import Qwen3Config
from vembed_fs2.models.qwen3.model import DecoderFrontend, Qwen3Model


class Qwen3Factory(ModelFactory[Qwen3Config]):
    """Creates the modules of a decoder."""

    def create_model(self) -> Qwen3Model:
        config = self._config

        model = Qwen3Model(
            self.create_frontend(),
            self.create_decoder(),
            head_dim=config.attn_head_dim,
            rope_theta=config.rope_theta,
            rope_scaling=self.create_rope_scaling(),
        )
        model.set_head(config.head, config.model_dim)
        model.max_text_length = config.max_seq_len

        return model

    def create_frontend(self) -> DecoderFrontend:
        config = self._config
        return DecoderFrontend(create_embedding(config.vocab_size, config.model_dim, config.init_std, config.pad_idx))

    def create_decoder(self) -> StandardTransformerEncoder:
        layers = [self.create_decoder_layer(idx) for idx in range(self._config.num_layers)]
        return StandardTransformerEncoder(layers, self.create_layer_norm())

    def create_decoder_layer(self, idx: int) -> StandardTransformerEncoderLayer:
        return create_layer(
            self.create_self_attention(idx),
            self.create_ffn(),
            self.create_layer_norm,
        )

    def create_self_attention(self, idx: int) -> StandardMultiheadAttention:
        config = self._config
        window = config.attn_window if idx in config.windowed_layers else None
        sdpa = create_sdpa(dropout_p=config.attn_dropout_p, causal=config.is_causal, window=window)

        return StandardMultiheadAttention(
            config.model_dim,
            config.num_attn_heads,
            sdpa,
            head_dim=config.attn_head_dim,
            num_key_value_heads=config.num_key_value_heads,
            qkv_proj_init_fn=normal_init(config.init_std),
            q_norm=HeadRMSNorm(config.attn_head_dim, eps=config.norm_eps) if config.qk_norm else None,
            k_norm=HeadRMSNorm(config.attn_head_dim, eps=config.norm_eps) if config.qk_norm else None,
            pos_encoder=RotaryPositions(config.attn_head_dim),
            output_proj_init_fn=normal_init(config.init_std),
            bias=config.qkv_bias,
            output_proj_bias=config.output_bias,
        )

    def create_ffn(self) -> GLUFeedForwardNetwork:
        config = self._config
        return GLUFeedForwardNetwork(
            config.model_dim,
            config.ffn_inner_dim,
            config.ffn_bias,
            gate_activation=create_activation(config.activation, field="activation"),
            inner_dim_scale=1.0,
            proj_init_fn=normal_init(config.init_std),
        )

    def create_layer_norm(self) -> LayerNorm:
        return RMSNorm(self._config.model_dim, bias=False, eps=self._config.norm_eps)

    def create_rope_scaling(self) -> PretrainedConfig | None:
        """What transformers' functions of stretched positions read; ``None`` if positions are not stretched."""
        config = self._config
        if config.rope_scaling is None:
            return None

        scaling = {key: value for key, value in asdict(config.rope_scaling).items() if value is not None}
        return PretrainedConfig(
            hidden_size=config.model_dim,
            num_attention_heads=config.num_attn_heads,
            head_dim=config.attn_head_dim,
            rope_theta=config.rope_theta,
            rope_scaling=scaling,
            max_position_embeddings=config.max_seq_len,
        )


def create_qwen3_model(config: Qwen3Config) -> Qwen3Model:
    """Create a decoder with initial weights as transformers draws them.

    :raises ConfigError: ``config`` is not valid.
    """
    require_valid(config, "Qwen3")

    return Qwen3Factory(config).create_model()
