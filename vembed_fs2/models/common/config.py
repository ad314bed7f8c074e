"""What the configurations of several families have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from vembed_fs2.embedding.head import validate_head
from vembed_fs2.embedding.model import EmbeddingModelConfig, HeadConfig
from vembed_fs2.models.common.checks import check_activation, check_not_negative, check_padding, check_positive


@dataclass(kw_only=True)
class TransformerSizes:
    """The sizes of a Transformer."""

    model_dim: int = 768
    """The dimensionality of the Transformer."""

    num_layers: int = 12
    """The number of Transformer layers."""

    num_attn_heads: int = 12
    """The number of attention heads in Transformer layers."""

    ffn_inner_dim: int = 3072
    """The dimensionality of inner projection layers in feed-forward networks."""

    def _positive_fields(self) -> tuple[str, ...]:
        return ("model_dim", "num_layers", "num_attn_heads", "ffn_inner_dim")


@dataclass(kw_only=True)
class TextBackboneConfig(TransformerSizes, EmbeddingModelConfig):
    """What text Transformers with a head on top have in common."""

    max_seq_len: int = 512
    """The longest text in tokens, special tokens included."""

    vocab_size: int = 30_522
    """The size of the vocabulary."""

    pad_idx: int | None = 0
    """The index of the padding token, whose embedding is not trained."""

    activation: str = "gelu"
    """The activation function of feed-forward networks, by transformers' name."""

    init_std: float = 0.02
    """The standard deviation of the initial weights."""

    head: HeadConfig = field(default_factory=HeadConfig)
    """What follows the encoder."""

    @property
    def has_pooler(self) -> bool:
        """Whether the backbone has a pooler of its own."""
        return False

    def _backbone_errors(self) -> Iterator[str]:
        """Return what is wrong with the fields of this class, one sentence each."""
        sizes = (*self._positive_fields(), "max_seq_len", "vocab_size")

        # A backbone without layers is allowed.
        yield from check_positive(self, *(name for name in sizes if name != "num_layers"))
        yield from check_not_negative(self, "num_layers", "init_std")
        yield from check_padding(self)
        yield from check_activation(self)
        yield from validate_head(self.head, self.model_dim, multi_vector=True, has_pooler=self.has_pooler)
