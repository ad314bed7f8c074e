"""The configuration that decoders have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from vembed_fs2.embedding.model import HeadConfig
from vembed_fs2.models.common.checks import check_not_negative, check_positive, check_probabilities
from vembed_fs2.models.common.config import TextBackboneConfig


@dataclass(kw_only=True)
class DecoderConfig(TextBackboneConfig):
    """What the configurations of decoders have in common. The defaults describe Qwen3-Embedding-0.6B."""

    model_dim: int = 1024
    """The dimensionality of the model."""

    num_layers: int = 28
    """The number of layers."""

    num_attn_heads: int = 16
    """The number of attention heads."""

    num_key_value_heads: int = 8
    """The number of heads of keys and values, each of which several heads of queries share."""

    head_dim: int | None = 128
    """The size of an attention head; ``model_dim / num_attn_heads`` if ``None``."""

    ffn_inner_dim: int = 3072
    """The dimensionality of the two inner projections of feed-forward networks."""

    max_seq_len: int = 32_768
    """The longest text that the model was made for; there is no position table that ends there."""

    vocab_size: int = 151_669
    """The size of the vocabulary."""

    pad_idx: int | None = None
    """The index of the padding token, whose embedding is not trained."""

    activation: str = "silu"
    """The activation function of the gates, by transformers' name."""

    is_causal: bool = True
    """If ``True``, a token attends to those before it; if ``False``, to all of its text."""

    qk_norm: bool = True
    """If ``True``, queries and keys are normalised, each head by itself."""

    qkv_bias: bool = False
    """If ``True``, the projections of queries, keys and values have biases."""

    output_bias: bool = False
    """If ``True``, the projections of attention's outputs have biases."""

    ffn_bias: bool = False
    """If ``True``, the projections of feed-forward networks have biases."""

    norm_eps: float = 1e-6
    """The value added to the denominator of normalisation."""

    rope_theta: float = 1_000_000.0
    """The base of rotary positions."""

    attn_dropout_p: float = 0.0
    """The dropout probability on attention weights."""

    head: HeadConfig = field(default_factory=lambda: HeadConfig(pooling="last"))
    """What follows the decoder."""

    @property
    def attn_head_dim(self) -> int:
        """The size of an attention head."""
        return self.model_dim // max(self.num_attn_heads, 1) if self.head_dim is None else self.head_dim

    def _decoder_errors(self) -> Iterator[str]:
        """Return what is wrong with the fields of this class and of its base, one sentence each."""
        yield from self._backbone_errors()
        yield from check_positive(self, "num_key_value_heads", "head_dim", "rope_theta")
        yield from check_not_negative(self, "norm_eps")
        yield from check_probabilities(self, "attn_dropout_p")

        if self.num_key_value_heads > 0 and self.num_attn_heads % self.num_key_value_heads != 0:
            yield (
                f"`num_attn_heads` must be a multiple of `num_key_value_heads` ({self.num_key_value_heads}), but is"
                f" {self.num_attn_heads} instead."
            )

        # The halves of a head are rotated.
        if self.attn_head_dim % 2 != 0 or self.attn_head_dim < 2:
            yield f"`head_dim` must be even, but is {self.attn_head_dim} instead."

        if self.is_causal and (set(self.head.poolings) == {"cls"} or self.head.top_k is not None):
            yield (
                "`head` looks at the first token, which sees no other in a causal decoder: all texts would be alike."
                " Pool by 'last' or 'mean'."
            )
