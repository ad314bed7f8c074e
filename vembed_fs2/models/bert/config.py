"""The configuration of bert models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from fairseq2.utils.validation import ValidationResult

from vembed_fs2.embedding.activations import create_activation
from vembed_fs2.embedding.head import validate_head
from vembed_fs2.embedding.model import EmbeddingModelConfig, HeadConfig
from vembed_fs2.errors import ModelLoadError
from vembed_fs2.models.bert.relative import NUM_BUCKETS
from vembed_fs2.models.bert.variants import VARIANTS, BertVariant

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
        head_errors = validate_head(self.head, self.model_dim, multi_vector=True, has_pooler=self.pooler)
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
