"""How the modules of BERT models are put together."""

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

from vembed_fs2.models.bert.config import BertConfig
from vembed_fs2.models.bert.model import BertFrontend, BertModel, UnusedPooler
from vembed_fs2.models.bert.relative import RelativePositions, RelativeSDPA
from vembed_fs2.models.common.attention import create_sdpa
from vembed_fs2.models.common.checks import require_valid
from vembed_fs2.models.common.factory import ModelFactory, create_embedding, normal_init
from vembed_fs2.models.common.feed_forward import FusedFeedForwardNetwork
from vembed_fs2.models.common.layers import create_ffn, create_layer


class BertFactory(ModelFactory[BertConfig]):
    """Creates the modules of a BERT model."""

    def create_model(self) -> BertModel:
        config = self._config
        frontend = self.create_frontend()

        model = BertModel(frontend, self.create_encoder(), self.create_pooler(), self.create_relative_positions())
        model.set_head(config.head, config.model_dim)
        model.max_text_length = frontend.max_length
        model.vocab_size = config.vocab_size

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
        return create_embedding(num_embeddings, self._config.model_dim, self._config.init_std, pad_idx)

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
        return RelativePositions(create_embedding(config.num_relative_buckets, config.num_attn_heads, config.init_std))

    def create_encoder(self) -> StandardTransformerEncoder:
        return StandardTransformerEncoder([self.create_encoder_layer() for _ in range(self._config.num_layers)])

    def create_encoder_layer(self) -> StandardTransformerEncoderLayer:
        config = self._config

        return create_layer(
            self.create_self_attention(),
            self.create_ffn(),
            self.create_layer_norm,
            norm_order=TransformerNormOrder.POST,
            attn_dropout_p=config.dropout_p if config.variant.drops_attention else 0.0,
            ffn_dropout_p=config.dropout_p,
        )

    def create_self_attention(self) -> StandardMultiheadAttention:
        config = self._config

        return StandardMultiheadAttention(
            config.model_dim,
            config.num_attn_heads,
            self.create_sdpa(),
            qkv_proj_init_fn=normal_init(config.init_std),
            output_proj_init_fn=normal_init(config.init_std),
        )

    def create_sdpa(self) -> SDPA:
        dropout_p = self._config.attn_dropout_p
        if self._config.num_relative_buckets > 0:
            return RelativeSDPA(dropout_p=dropout_p)
        return create_sdpa(dropout_p=dropout_p)

    def create_ffn(self) -> FusedFeedForwardNetwork:
        config = self._config

        return create_ffn(config.model_dim, config.ffn_inner_dim, config.activation, normal_init(config.init_std))

    def create_layer_norm(self) -> LayerNorm:
        return StandardLayerNorm(self._config.model_dim, bias=True, eps=self._config.layer_norm_eps)

    def create_pooler(self) -> Module | None:
        config = self._config
        if not config.pooler:
            return None
        if not config.head.reads_pooler:
            return UnusedPooler(config.model_dim)
        return Linear(config.model_dim, config.model_dim, bias=True, init_fn=normal_init(config.init_std))


def create_bert_model(config: BertConfig) -> BertModel:
    """Create a BERT model with initial weights as transformers draws them.

    :raises ConfigError: ``config`` is not valid.
    """
    require_valid(config, "BERT")

    return BertFactory(config).create_model()


def init_sinusoidal(embed: StandardEmbedding) -> None:
    """Initialize ``embed`` with the sines and cosines of Vaswani et al., 2017 (https://arxiv.org/abs/1706.03762)."""
    device = embed.weight.device
    steps = torch.arange(embed.num_embeddings, dtype=torch.float64, device=device).unsqueeze(1)

    dims = torch.arange(embed.embed_dim, dtype=torch.float64, device=device)
    angles = steps / 10_000 ** (2 * (dims // 2) / embed.embed_dim)
    with torch.no_grad():
        embed.weight.copy_(torch.where(dims % 2 == 0, angles.sin(), angles.cos()))
