from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

import torch
from fairseq2.models.transformer import (
    SDPA,
    StandardMultiheadAttention,
    StandardTransformerEncoder,
    StandardTransformerEncoderLayer,
    TransformerNormOrder,
)
from fairseq2.nn import LayerNorm, Linear, StandardEmbedding, StandardLayerNorm
from fairseq2.utils.validation import ValidationResult
from torch.nn import Module

from vembed_fs2.errors import ConfigError, ModelLoadError
from vembed_fs2.models.activations import create_activation
from vembed_fs2.models.attention import create_sdpa
from vembed_fs2.models.bert.model import BertFrontend, BertModel, UnusedPooler
from vembed_fs2.models.bert.relative import NUM_BUCKETS, RelativePositions, RelativeSDPA
from vembed_fs2.models.bert.variants import VARIANTS, BertVariant
from vembed_fs2.models.dropout import Dropout
from vembed_fs2.models.embedding import EmbeddingModelConfig, HeadConfig
from vembed_fs2.models.feed_forward import FusedFeedForwardNetwork
from vembed_fs2.models.head import validate_head

BERT_FAMILY: Final = "vembed_bert"

BertType: TypeAlias = Literal["bert", "roberta", "xlm-roberta", "camembert", "distilbert", "mpnet"]


@dataclass(kw_only=True)
class BertConfig(EmbeddingModelConfig):
    """Holds the configuration of a BERT model. The default values are those of BERT base."""

    model_type: BertType = "bert"
    """Which of transformers' models it is: BERT, or one that is built like it."""

    model_dim: int = 768
    """The dimensionality of the model."""

    max_seq_len: int = 512
    """The size of the position table; RoBERTa and its kind use it from ``pad_idx + 1`` on."""

    vocab_size: int = 30_522
    """The size of the vocabulary."""

    pad_idx: int | None = 0
    """The index of the padding token, whose embedding is not trained."""

    type_vocab_size: int = 2
    """The number of segments (token types); 0 for DistilBERT and MPNet, which have none."""

    sinusoidal_positions: bool = False
    """If ``True``, the position table starts as sines and cosines and is not trained (DistilBERT)."""

    num_relative_buckets: int = 0
    """The size of the table of attention biases (MPNet, of which it uses the first 32)."""

    num_layers: int = 12
    """The number of encoder layers."""

    num_attn_heads: int = 12
    """The number of attention heads in encoder layers."""

    ffn_inner_dim: int = 3072
    """The dimensionality of inner projection layers in feed-forward networks."""

    activation: str = "gelu"
    """The activation function of feed-forward networks, by the name that transformers has for it."""

    dropout_p: float = 0.1
    """The dropout probability on embeddings and on outputs of attention and feed-forward networks."""

    attn_dropout_p: float = 0.1
    """The dropout probability on attention weights."""

    layer_norm_eps: float = 1e-12
    """The value to add to the denominator of Layer Normalization."""

    init_std: float = 0.02
    """The standard deviation of the initial weights."""

    pooler: bool = True
    """If ``True``, the checkpoint has the pooler of next sentence prediction."""

    head: HeadConfig = field(default_factory=HeadConfig)
    """What follows the encoder."""

    def validate(self) -> ValidationResult:
        result = ValidationResult()
        if self.model_type not in VARIANTS:
            known = ", ".join(VARIANTS)
            result.add_error(f"`model_type` must be one of {known}, but is '{self.model_type}' instead.")
            return result
        head_errors = validate_head(self.head, self.model_dim, multi_vector=True)
        for error in (*self._dim_errors(), *self._value_errors(), *self._type_errors(), *head_errors):
            result.add_error(error)
        return result

    def _dim_errors(self) -> list[str]:
        errors = []
        for name in ("model_dim", "max_seq_len", "vocab_size", "num_attn_heads", "ffn_inner_dim"):
            if getattr(self, name) < 1:
                errors.append(f"`{name}` must be positive, but is {getattr(self, name)} instead.")
        if self.num_layers < 0:
            errors.append(f"`num_layers` must not be negative, but is {self.num_layers} instead.")
        if self.num_attn_heads >= 1 and self.model_dim % self.num_attn_heads != 0:
            errors.append(
                f"`model_dim` must be a multiple of `num_attn_heads` ({self.num_attn_heads}), "
                f"but is {self.model_dim} instead."
            )
        if self.pad_idx is not None and not -self.vocab_size <= self.pad_idx < self.vocab_size:
            errors.append(
                f"`pad_idx` must be less than `vocab_size` ({self.vocab_size}), but is {self.pad_idx} instead."
            )
        return errors

    def _value_errors(self) -> list[str]:
        errors = []
        for name in ("dropout_p", "attn_dropout_p"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                errors.append(f"`{name}` must be between 0 and 1, but is {getattr(self, name)} instead.")
        if self.layer_norm_eps < 0.0:
            errors.append(f"`layer_norm_eps` must not be negative, but is {self.layer_norm_eps} instead.")
        if self.init_std < 0.0:
            errors.append(f"`init_std` must not be negative, but is {self.init_std} instead.")
        try:
            create_activation(self.activation, field="activation")
        except ModelLoadError as ex:
            errors.append(str(ex))
        if self.head.pooling == "pooler" and not self.pooler:
            errors.append("`head.pooling` is 'pooler', but `pooler` is not set: the model has none.")
        return errors

    def _type_errors(self) -> list[str]:
        """What transformers' model of this type does not have or needs, and so could not be written."""
        variant, errors = self.variant, []
        if variant.has_segments and self.type_vocab_size < 1:
            errors.append(f"`type_vocab_size` must be positive, but is {self.type_vocab_size} instead.")
        if not variant.has_segments and self.type_vocab_size != 0:
            errors.append(f"`type_vocab_size` must be 0 for {variant.name}, but is {self.type_vocab_size} instead.")
        if variant.counts_positions and (self.pad_idx is None or not 0 <= self.pad_idx < self.max_seq_len - 1):
            errors.append(
                f"`pad_idx` must be less than `max_seq_len` ({self.max_seq_len}) minus 1 for {variant.name}, "
                f"which counts positions from it, but is {self.pad_idx} instead."
            )
        if not variant.has_pooler and self.pooler:
            errors.append(f"`pooler` must not be set for {variant.name}.")
        if self.model_type == "mpnet":
            if self.pad_idx != 1:
                errors.append(f"`pad_idx` must be 1 for {variant.name}, whatever its tokenizer, but is {self.pad_idx}.")
            if self.num_relative_buckets < NUM_BUCKETS:
                errors.append(
                    f"`num_relative_buckets` must be at least {NUM_BUCKETS}, which {variant.name} uses in any case, "
                    f"but is {self.num_relative_buckets} instead."
                )
        elif self.num_relative_buckets != 0:
            errors.append(f"`num_relative_buckets` must be 0 for {variant.name}.")
        if self.model_type == "distilbert":
            if self.layer_norm_eps != 1e-12:
                errors.append(f"`layer_norm_eps` must be 1e-12 for {variant.name}.")
        elif self.sinusoidal_positions:
            errors.append(f"`sinusoidal_positions` must not be set for {variant.name}.")
        return errors

    @property
    def variant(self) -> BertVariant:
        """What is special about ``model_type``."""
        return VARIANTS[self.model_type]


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
        if config.head.pooling != "pooler":
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
