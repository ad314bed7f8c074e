"""The configuration of BERT models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from fairseq2.utils.validation import ValidationResult
from typing_extensions import override

from vembed_fs2.models.bert.relative import NUM_BUCKETS
from vembed_fs2.models.bert.variants import VARIANTS, BertVariant
from vembed_fs2.models.common.checks import (
    check_choice,
    check_heads,
    check_not_negative,
    check_probabilities,
    to_result,
)
from vembed_fs2.models.common.config import TextBackboneConfig

BERT_FAMILY: Final = "vembed_bert"

BertType: TypeAlias = Literal["bert", "roberta", "xlm-roberta", "camembert", "distilbert", "mpnet"]


@dataclass(kw_only=True)
class BertConfig(TextBackboneConfig):
    """The configuration of a BERT model. The defaults describe BERT base."""

    model_type: BertType = "bert"
    """Which of transformers' models it is: BERT, or one that is built like it."""

    max_seq_len: int = 512
    """The size of the position table; RoBERTa and its kind use it from ``pad_idx + 1`` on."""

    type_vocab_size: int = 2
    """The number of segments (token types); 0 for DistilBERT and MPNet, which have none."""

    sinusoidal_positions: bool = False
    """If ``True``, the position table starts as sines and cosines and is not trained (DistilBERT)."""

    num_relative_buckets: int = 0
    """The size of the table of attention biases (MPNet, of which it uses the first 32)."""

    dropout_p: float = 0.1
    """The dropout probability on embeddings and on outputs of attention and feed-forward networks."""

    attn_dropout_p: float = 0.1
    """The dropout probability on attention weights."""

    layer_norm_eps: float = 1e-12
    """The value added to the denominator of Layer Normalization."""

    pooler: bool = True
    """If ``True``, the checkpoint has the pooler of next sentence prediction."""

    @property
    @override
    def has_pooler(self) -> bool:
        return self.pooler

    def validate(self) -> ValidationResult:
        errors = list(check_choice(self, "model_type", VARIANTS))
        if errors:
            return to_result(errors)

        return to_result(self._backbone_errors(), self._value_errors(), self._type_errors())

    def _value_errors(self) -> Iterator[str]:
        yield from check_heads(self)
        yield from check_probabilities(self, "dropout_p", "attn_dropout_p", closed=True)
        yield from check_not_negative(self, "layer_norm_eps")

    def _type_errors(self) -> Iterator[str]:
        """What transformers' model of this type does not have or needs, and so could not be written."""
        variant = self.variant

        if variant.has_segments and self.type_vocab_size < 1:
            yield f"`type_vocab_size` must be positive, but is {self.type_vocab_size} instead."
        if not variant.has_segments and self.type_vocab_size != 0:
            yield f"`type_vocab_size` must be 0 for {variant.name}, but is {self.type_vocab_size} instead."

        if variant.counts_positions and (self.pad_idx is None or not 0 <= self.pad_idx < self.max_seq_len - 1):
            yield (
                f"`pad_idx` must be less than `max_seq_len` ({self.max_seq_len}) minus 1 for {variant.name}, "
                f"which counts positions from it, but is {self.pad_idx} instead."
            )

        if not variant.has_pooler and self.pooler:
            yield f"`pooler` must not be set for {variant.name}."

        if self.model_type == "mpnet":
            if self.pad_idx != 1:
                yield f"`pad_idx` must be 1 for {variant.name}, whatever its tokenizer, but is {self.pad_idx}."

            if self.num_relative_buckets < NUM_BUCKETS:
                yield (
                    f"`num_relative_buckets` must be at least {NUM_BUCKETS}, which {variant.name} uses in any case, "
                    f"but is {self.num_relative_buckets} instead."
                )
        elif self.num_relative_buckets != 0:
            yield f"`num_relative_buckets` must be 0 for {variant.name}."

        if self.model_type == "distilbert":
            if self.layer_norm_eps != 1e-12:
                yield f"`layer_norm_eps` must be 1e-12 for {variant.name}."
        elif self.sinusoidal_positions:
            yield f"`sinusoidal_positions` must not be set for {variant.name}."

    @property
    def variant(self) -> BertVariant:
        """The peculiarities of ``model_type``."""
        return VARIANTS[self.model_type]
