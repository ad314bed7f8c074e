from __future__ import annotations

import torch
from fairseq2.models.transformer import (
    SDPA,
    StandardMultiheadAttention,
    StandardTransformerEncoder,
    StandardTransformerEncoderLayer,
    TransformerNormOrder,
)
from fairseq2.nn import LayerNorm, Linear, StandardEmbedding, StandardLayerNorm
from torch.nn import Module

from vembed_fs2.embedding.activations import create_activation
from vembed_fs2.errors import ConfigError
from vembed_fs2.models.bert.config import BertConfig
from vembed_fs2.models.bert.model import BertFrontend, BertModel, UnusedPooler
from vembed_fs2.models.bert.relative import RelativePositions, RelativeSDPA
from vembed_fs2.models.common.attention import create_sdpa
from vembed_fs2.models.common.dropout import Dropout
from vembed_fs2.models.common.feed_forward import FusedFeedForwardNetwork


def create_bert_model(config: BertConfig) -> BertModel:
    """Create a BERT model.

    :raises ConfigError: ``config`` is not valid.
    """
    result = config.validate()
    if result.has_error():
        raise ConfigError(list(result.errors), where="The BERT configuration")
    return BertFactory(config).create_model()


class BertFactory:
    """Creates the modules of a BERT model."""

    def __init__(self, config: BertConfig) -> None:
        self._config = config

    def create_model(self) -> BertModel:
        config = self._config
        frontend = self.create_frontend()
        model = BertModel(frontend, self.create_encoder(), self.create_pooler(), self.create_relative_positions())
        model.set_head(config.head, config.model_dim)
        model.max_text_length = frontend.max_length
        return model

    def create_frontend(self) -> BertFrontend:
        config = self._config
        return BertFrontend(
            self.create_embedding(config.vocab_size, config.pad_idx),
            self.create_embedding(config.type_vocab_size) if config.variant.has_segments else None,
            self.create_position_embedding(),
            self.create_layer_norm(),
            config.dropout_p,
        )

    def create_embedding(self, num_embeddings: int, pad_idx: int | None = None) -> StandardEmbedding:
        return StandardEmbedding(num_embeddings, self._config.model_dim, pad_idx, init_fn=self.init_embedding)

    def create_position_embedding(self) -> StandardEmbedding:
        config = self._config
        if config.sinusoidal_positions:
            embed = StandardEmbedding(config.max_seq_len, config.model_dim, init_fn=init_sinusoidal)
            embed.weight.requires_grad_(False)
            return embed
        return self.create_embedding(config.max_seq_len, config.pad_idx if config.variant.counts_positions else None)

    def create_relative_positions(self) -> RelativePositions | None:
        config = self._config
        if config.num_relative_buckets == 0:
            return None
        return RelativePositions(config.num_relative_buckets, config.num_attn_heads, self.init_embedding)

    def create_encoder(self) -> StandardTransformerEncoder:
        return StandardTransformerEncoder([self.create_encoder_layer() for _ in range(self._config.num_layers)])

    def create_encoder_layer(self) -> StandardTransformerEncoderLayer:
        config = self._config
        layer = StandardTransformerEncoderLayer(
            self.create_self_attention(),
            self.create_layer_norm(),
            self.create_ffn(),
            self.create_layer_norm(),
            norm_order=TransformerNormOrder.POST,
        )
        if config.dropout_p > 0.0:
            layer.ffn_dropout = Dropout(config.dropout_p)
            if config.variant.drops_attention:
                layer.self_attn_dropout = Dropout(config.dropout_p)
        return layer

    def create_self_attention(self) -> StandardMultiheadAttention:
        config = self._config
        return StandardMultiheadAttention(
            config.model_dim,
            config.num_attn_heads,
            self.create_sdpa(),
            qkv_proj_init_fn=self.init_projection,
            output_proj_init_fn=self.init_projection,
        )

    def create_sdpa(self) -> SDPA:
        dropout_p = self._config.attn_dropout_p
        if self._config.num_relative_buckets > 0:
            return RelativeSDPA(dropout_p=dropout_p)
        return create_sdpa(dropout_p=dropout_p)

    def create_ffn(self) -> FusedFeedForwardNetwork:
        config = self._config
        return FusedFeedForwardNetwork(
            config.model_dim,
            config.ffn_inner_dim,
            bias=True,
            inner_activation=create_activation(config.activation, field="activation"),
            proj_init_fn=self.init_projection,
        )

    def create_layer_norm(self) -> LayerNorm:
        return StandardLayerNorm(self._config.model_dim, bias=True, eps=self._config.layer_norm_eps)

    def create_pooler(self) -> Module | None:
        config = self._config
        if not config.pooler:
            return None
        if not config.head.reads_pooler:
            return UnusedPooler(config.model_dim)
        return Linear(config.model_dim, config.model_dim, bias=True, init_fn=self.init_projection)

    def init_embedding(self, embed: StandardEmbedding) -> None:
        torch.nn.init.normal_(embed.weight, std=self._config.init_std)

    def init_projection(self, proj: Linear) -> None:
        torch.nn.init.normal_(proj.weight, std=self._config.init_std)
        if proj.bias is not None:
            torch.nn.init.zeros_(proj.bias)


def init_sinusoidal(embed: StandardEmbedding) -> None:
    """Initialize ``embed`` with the sines and cosines of Vaswani et al., 2017 (https://arxiv.org/abs/1706.03762)."""
    device = embed.weight.device
    steps = torch.arange(embed.num_embeddings, dtype=torch.float64, device=device).unsqueeze(1)
    dims = torch.arange(embed.embed_dim, dtype=torch.float64, device=device)
    angles = steps / 10_000 ** (2 * (dims // 2) / embed.embed_dim)
    with torch.no_grad():
        embed.weight.copy_(torch.where(dims % 2 == 0, angles.sin(), angles.cos()))
