"""The configuration of ModernBERT models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Literal

from fairseq2.utils.validation import ValidationResult

from vembed_fs2.embedding.model import HeadConfig
from vembed_fs2.models.common.checks import (
    check_choice,
    check_heads,
    check_not_negative,
    check_positive,
    check_probabilities,
    to_result,
)
from vembed_fs2.models.common.config import TextBackboneConfig

MODERNBERT_FAMILY: Final = "vembed_modernbert"


@dataclass(kw_only=True)
class ModernBertConfig(TextBackboneConfig):
    """The configuration of a ModernBERT model. The defaults describe ModernBERT base."""

    max_seq_len: int = 8192
    """The longest text that the model was made for; there is no position table that ends there."""

    vocab_size: int = 50_368
    """The size of the vocabulary."""

    pad_idx: int | None = 50_283
    """The index of the padding token, whose embedding is not trained."""

    num_layers: int = 22
    """The number of Transformer layers."""

    ffn_inner_dim: int = 1152
    """The dimensionality of the two inner projections of feed-forward networks."""

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
    """The value added to the denominator of Layer Normalization."""

    embed_dropout_p: float = 0.0
    """The dropout probability on embeddings."""

    attn_dropout_p: float = 0.0
    """The dropout probability on attention weights and on outputs of attention."""

    ffn_dropout_p: float = 0.0
    """The dropout probability inside feed-forward networks."""

    init_cutoff: float | None = 2.0
    """How many standard deviations away initial weights are cut off; 3 if ``None``."""

    classifier_pooling: Literal["cls", "mean"] = "cls"
    """What transformers' classifiers pool: the pooling of a checkpoint that does not say its own."""

    head: HeadConfig = field(default_factory=lambda: HeadConfig(pooling="cls"))
    """What follows the encoder."""

    def validate(self) -> ValidationResult:
        return to_result(self._backbone_errors(), self._value_errors())

    def _value_errors(self) -> Iterator[str]:
        # The halves of a head are rotated.
        yield from check_heads(self, multiple=2)
        yield from check_positive(self, "global_attn_interval", "global_rope_theta", "local_rope_theta", "init_cutoff")
        yield from check_not_negative(self, "local_attn_window", "norm_eps")
        yield from check_probabilities(self, "embed_dropout_p", "attn_dropout_p", "ffn_dropout_p", closed=True)
        yield from check_choice(self, "classifier_pooling", ("cls", "mean"))
