"""The configuration of modernbert models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from fairseq2.utils.validation import ValidationResult

from vembed_fs2.embedding.activations import create_activation
from vembed_fs2.embedding.head import validate_head
from vembed_fs2.embedding.model import EmbeddingModelConfig, HeadConfig
from vembed_fs2.errors import ModelLoadError

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
        head_errors = validate_head(self.head, self.model_dim, multi_vector=True, has_pooler=False)
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
