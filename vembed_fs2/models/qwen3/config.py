"""The configuration of decoders of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from fairseq2.utils.validation import ValidationResult

from vembed_fs2.embedding.model import HeadConfig
from vembed_fs2.models.common.checks import (
    check_choice,
    check_not_negative,
    check_positive,
    check_probabilities,
    to_result,
)
from vembed_fs2.models.common.config import TextBackboneConfig

QWEN3_FAMILY: Final = "vembed_qwen3"

Variant: TypeAlias = Literal["qwen3", "qwen2", "mistral", "llama"]

VARIANTS: Final[tuple[Variant, ...]] = ("qwen3", "qwen2", "mistral", "llama")


@dataclass(kw_only=True)
class RopeScaling:
    """How rotary positions are stretched for texts that are longer than those of the pretraining."""

    rope_type: str = "linear"
    """The way: ``linear``, ``yarn`` (https://arxiv.org/abs/2309.00071) or ``llama3``."""

    factor: float = 1.0
    """How many times longer texts may be."""

    original_max_position_embeddings: int | None = None
    """``yarn``, ``llama3``: the longest text of the pretraining, in tokens."""

    attention_factor: float | None = None
    """``yarn``: what cosines and sines are multiplied by; worked out of ``factor``, if ``None``."""

    beta_fast: float | None = None
    """``yarn``: the number of turns from which on frequencies are kept; 32, if ``None``."""

    beta_slow: float | None = None
    """``yarn``: the number of turns up to which frequencies are divided by ``factor``; 1, if ``None``."""

    mscale: float | None = None
    """``yarn``: with ``mscale_all_dim`` another way to work ``attention_factor`` out."""

    mscale_all_dim: float | None = None
    """``yarn``: see ``mscale``."""

    truncate: bool | None = None
    """``yarn``: whether the bounds between the frequencies are whole numbers; they are, if ``None``."""

    low_freq_factor: float | None = None
    """``llama3``: wavelengths longer than the pretraining's texts by this factor are divided by ``factor``."""

    high_freq_factor: float | None = None
    """``llama3``: wavelengths shorter than the pretraining's texts by this factor are kept."""


@dataclass(kw_only=True)
class Qwen3Config(TextBackboneConfig):
    """The configuration of a decoder. The defaults describe Qwen3-Embedding-0.6B."""

    variant: Variant = "qwen3"
    """The model of transformers that checkpoints are written for. The fields below say what is computed."""

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

    attn_window: int | None = None
    """The tokens that a token attends to in ``windowed_layers``, itself included."""

    windowed_layers: Sequence[int] = ()
    """The layers in which a token attends to the last ``attn_window`` tokens only."""

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

    rope_scaling: RopeScaling | None = None
    """How positions are stretched, if they are."""

    attn_dropout_p: float = 0.0
    """The dropout probability on attention weights."""

    head: HeadConfig = field(default_factory=lambda: HeadConfig(pooling="last"))
    """What follows the decoder."""

    @property
    def attn_head_dim(self) -> int:
        """The size of an attention head."""
        return self.model_dim // max(self.num_attn_heads, 1) if self.head_dim is None else self.head_dim

    def validate(self) -> ValidationResult:
        return to_result(self._backbone_errors(), self._value_errors(), self._window_errors())

    def _value_errors(self) -> Iterator[str]:
        yield from check_choice(self, "variant", VARIANTS)
        yield from check_positive(self, "num_key_value_heads", "head_dim", "rope_theta", "attn_window")
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

        if self.rope_scaling is not None and self.rope_scaling.rope_type not in ("linear", "yarn", "llama3"):
            yield f"`rope_scaling.rope_type` must be linear, yarn or llama3, but is '{self.rope_scaling.rope_type}'."

        if self.is_causal and (set(self.head.poolings) == {"cls"} or self.head.top_k is not None):
            yield (
                "`head` looks at the first token, which sees no other in a causal decoder: all texts would be alike."
                " Pool by 'last' or 'mean'."
            )

    def _window_errors(self) -> Iterator[str]:
        if self.windowed_layers and self.attn_window is None:
            yield "`windowed_layers` needs `attn_window`."
        if self.windowed_layers and not self.is_causal:
            yield "`windowed_layers` is supported for causal decoders only."
        if any(not 0 <= idx < self.num_layers for idx in self.windowed_layers):
            yield f"`windowed_layers` must be between 0 and {self.num_layers - 1}, but is {list(self.windowed_layers)}."
