"""The modules that decoders have in common.

Shapes: T texts, L tokens, M model size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, final

from fairseq2.models.transformer import (
    SDPA,
    GLUFeedForwardNetwork,
    StandardMultiheadAttention,
    StandardTransformerEncoderLayer,
)
from fairseq2.nn import Embedding, LayerNorm, RMSNorm
from torch import Tensor
from torch.nn import Module
from typing_extensions import override

from vembed_fs2.embedding.activations import create_activation
from vembed_fs2.models.common.attention import create_sdpa
from vembed_fs2.models.common.decoder_config import DecoderConfig
from vembed_fs2.models.common.factory import ModelFactory, create_embedding, normal_init
from vembed_fs2.models.common.head_norm import HeadRMSNorm
from vembed_fs2.models.common.layers import create_layer
from vembed_fs2.models.common.rotary import RotaryPositions

DecoderConfigT = TypeVar("DecoderConfigT", bound=DecoderConfig)


@final
class DecoderFrontend(Module):
    """Looks token embeddings up; positions come in with the attention."""

    def __init__(self, embed: Embedding) -> None:
        super().__init__()
        self.embed = embed

    @override
    def forward(self, input_ids: Tensor) -> Tensor:
        """
        :param input_ids: *Shape:* ``[T, L]``.
        :returns: *Shape:* ``[T, L, M]``.
        """
        states: Tensor = self.embed(input_ids)
        return states

    if TYPE_CHECKING:
        __call__ = forward


class DecoderFactory(ModelFactory[DecoderConfigT]):
    """Creates the modules of a decoder."""

    def create_frontend(self) -> DecoderFrontend:
        config = self._config
        return DecoderFrontend(create_embedding(config.vocab_size, config.model_dim, config.init_std, config.pad_idx))

    def create_decoder_layer(self, idx: int) -> StandardTransformerEncoderLayer:
        return create_layer(
            self.create_self_attention(idx),
            self.create_ffn(),
            self.create_layer_norm,
        )

    def create_self_attention(self, idx: int) -> StandardMultiheadAttention:
        config = self._config
        return StandardMultiheadAttention(
            config.model_dim,
            config.num_attn_heads,
            self.create_sdpa(idx),
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

    def create_sdpa(self, idx: int) -> SDPA:
        """
        :param idx: of the layer.
        """
        return create_sdpa(dropout_p=self._config.attn_dropout_p, causal=self._config.is_causal)

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
