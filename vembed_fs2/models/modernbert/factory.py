from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final, Literal

import torch
from fairseq2.models.transformer import (
    GLUFeedForwardNetwork,
    StandardMultiheadAttention,
    StandardTransformerEncoder,
    StandardTransformerEncoderLayer,
    TransformerNormOrder,
)
from fairseq2.nn import LayerNorm, Linear, RowShardedLinear, StandardEmbedding, StandardLayerNorm
from fairseq2.utils.validation import ValidationResult

from vembed_fs2.errors import ConfigError, ModelLoadError
from vembed_fs2.models.activations import create_activation
from vembed_fs2.models.attention import create_sdpa
from vembed_fs2.models.dropout import Dropout
from vembed_fs2.models.embedding import EmbeddingModelConfig, HeadConfig
from vembed_fs2.models.head import validate_head
from vembed_fs2.models.modernbert.attention import RotaryPositions, create_local_sdpa
from vembed_fs2.models.modernbert.model import ModernBertFrontend, ModernBertModel, NoNorm

MODERNBERT_FAMILY: Final = "vembed_modernbert"


@dataclass(kw_only=True)
class ModernBertConfig(EmbeddingModelConfig):
    """Holds the configuration of a ModernBERT model. The default values are those of ModernBERT base."""

    model_dim: int = 768
    """The dimensionality of the model."""

    max_seq_len: int = 8192
    """The longest text that the model was made for; there is no position table that ends there."""

    vocab_size: int = 50_368
    """The size of the vocabulary."""

    pad_idx: int | None = 50_283
    """The index of the padding token, whose embedding is not trained."""

    num_layers: int = 22
    """The number of encoder layers."""

    num_attn_heads: int = 12
    """The number of attention heads in encoder layers."""

    ffn_inner_dim: int = 1152
    """The dimensionality of the two inner projections of feed-forward networks."""

    activation: str = "gelu"
    """The activation function of feed-forward networks, by the name that transformers has for it."""

    global_attn_interval: int = 3
    """The first layer and every ``global_attn_interval``-th after it attend to all tokens, the others to near ones."""

    local_attn_window: int = 128
    """The tokens that a token attends to in other layers: half of them on each side of it."""

    global_rope_theta: float = 160_000.0
    """The base of rotary positions in layers that attend to all tokens."""

    local_rope_theta: float | None = 10_000.0
    """The same in other layers; ``global_rope_theta`` if ``None``."""

    attn_bias: bool = False
    """If ``True``, the projections of attention have biases."""

    ffn_bias: bool = False
    """If ``True``, the projections of feed-forward networks have biases."""

    norm_bias: bool = False
    """If ``True``, Layer Normalization has biases."""

    norm_eps: float = 1e-5
    """The value to add to the denominator of Layer Normalization."""

    embed_dropout_p: float = 0.0
    """The dropout probability on embeddings."""

    attn_dropout_p: float = 0.0
    """The dropout probability on attention weights and on outputs of attention."""

    ffn_dropout_p: float = 0.0
    """The dropout probability inside feed-forward networks."""

    init_std: float = 0.02
    """The standard deviation of the initial weights."""

    init_cutoff: float | None = 2.0
    """How many standard deviations away initial weights are cut off; 3 if ``None``."""

    classifier_pooling: Literal["cls", "mean"] = "cls"
    """What transformers' classifiers pool: the pooling of a checkpoint that does not say its own."""

    head: HeadConfig = field(default_factory=lambda: HeadConfig(pooling="cls"))
    """What follows the encoder."""

    def validate(self) -> ValidationResult:
        result = ValidationResult()
        head_errors = validate_head(self.head, self.model_dim, multi_vector=True)
        for error in (*self._dim_errors(), *self._value_errors(), *head_errors):
            result.add_error(error)
        return result

    def _dim_errors(self) -> list[str]:
        errors = []
        sizes = ("model_dim", "max_seq_len", "vocab_size", "num_attn_heads", "ffn_inner_dim", "global_attn_interval")
        for name in sizes:
            if getattr(self, name) < 1:
                errors.append(f"`{name}` must be positive, but is {getattr(self, name)} instead.")
        for name in ("num_layers", "local_attn_window"):
            if getattr(self, name) < 0:
                errors.append(f"`{name}` must not be negative, but is {getattr(self, name)} instead.")
        if self.num_attn_heads >= 1 and self.model_dim % (2 * self.num_attn_heads) != 0:
            errors.append(
                f"`model_dim` must be an even multiple of `num_attn_heads` ({self.num_attn_heads}), "
                f"but is {self.model_dim} instead."
            )
        if self.pad_idx is not None and not -self.vocab_size <= self.pad_idx < self.vocab_size:
            errors.append(
                f"`pad_idx` must be less than `vocab_size` ({self.vocab_size}), but is {self.pad_idx} instead."
            )
        return errors

    def _value_errors(self) -> list[str]:
        errors = []
        for name in ("embed_dropout_p", "attn_dropout_p", "ffn_dropout_p"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                errors.append(f"`{name}` must be between 0 and 1, but is {getattr(self, name)} instead.")
        for name in ("global_rope_theta", "local_rope_theta", "init_cutoff"):
            value = getattr(self, name)
            if value is not None and not value > 0.0:
                errors.append(f"`{name}` must be positive, but is {value} instead.")
        for name in ("norm_eps", "init_std"):
            if getattr(self, name) < 0.0:
                errors.append(f"`{name}` must not be negative, but is {getattr(self, name)} instead.")
        if self.classifier_pooling not in ("cls", "mean"):
            errors.append(f"`classifier_pooling` must be 'cls' or 'mean', but is '{self.classifier_pooling}' instead.")
        if self.head.pooling == "pooler":
            errors.append("`head.pooling` must not be 'pooler': the model has none.")
        try:
            create_activation(self.activation, field="activation")
        except ModelLoadError as ex:
            errors.append(str(ex))
        return errors


def create_modernbert_model(config: ModernBertConfig) -> ModernBertModel:
    """Create a ModernBERT model.

    :raises ConfigError: ``config`` is not valid.
    """
    result = config.validate()
    if result.has_error():
        raise ConfigError(list(result.errors), where="The ModernBERT configuration")
    return ModernBertFactory(config).create_model()


class ModernBertFactory:
    """Creates the modules of a ModernBERT model."""

    def __init__(self, config: ModernBertConfig) -> None:
        self._config = config

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
            pos_encoder=RotaryPositions(config.model_dim // config.num_attn_heads, local=local),
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
