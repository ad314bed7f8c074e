"""A family: word embeddings, layers that look at one token each, and the mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from fairseq2.nn import Linear, StandardEmbedding
from fairseq2.runtime.dependency import DependencyContainer
from fairseq2.utils.validation import ValidationResult
from torch import Tensor
from torch.nn import Dropout, Module, ModuleList
from torch.nn.functional import gelu

from vembed_fs2 import EmbeddingModel, EncoderBatch, register_family
from vembed_fs2.embedding.head import Head, States, validate_head
from vembed_fs2.embedding.model import EmbeddingModelConfig, HeadConfig
from vembed_fs2.models.archs import ArchRegistrar
from vembed_fs2.models.family import PlainCheckpointFormat

TOY_BAG_FAMILY: Final = "toy_bag"


@dataclass(kw_only=True)
class ToyBagConfig(EmbeddingModelConfig):
    vocab_size: int = 64
    """The size of the vocabulary."""

    model_dim: int = 32
    """The dimensionality of the model."""

    num_layers: int = 2
    """The number of layers."""

    max_seq_len: int = 16
    """The longest text in tokens."""

    dropout_p: float = 0.1
    """The dropout probability on outputs of layers."""

    head: HeadConfig = field(default_factory=HeadConfig)
    """Pooling, dense layers, normalisation."""

    def validate(self) -> ValidationResult:
        result = ValidationResult()
        for name in ("vocab_size", "model_dim", "num_layers", "max_seq_len"):
            if getattr(self, name) < 1:
                result.add_error(f"`{name}` must be positive, but is {getattr(self, name)} instead.")
        if not 0.0 <= self.dropout_p < 1.0:
            result.add_error(f"`dropout_p` must be in [0, 1), but is {self.dropout_p} instead.")
        for error in validate_head(self.head, self.model_dim, multi_vector=True, has_pooler=False):
            result.add_error(error)
        return result


class ToyBagModel(EmbeddingModel):
    modalities = frozenset({"text"})

    def __init__(self, config: ToyBagConfig) -> None:
        super().__init__()
        self.embed = StandardEmbedding(config.vocab_size, config.model_dim)
        self.layers = ModuleList(ToyBagLayer(config) for _ in range(config.num_layers))
        self.head = Head(config.head, config.model_dim)
        self.max_text_length = config.max_seq_len
        self.vocab_size = config.vocab_size

    def encode_text_states(self, batch: EncoderBatch) -> States:
        assert batch.text is not None
        seqs = self.embed(batch.text.input_ids)
        for layer in self.layers:
            seqs = layer(seqs)
        return States(seqs, batch.text.pooled_tokens)

    def layer_stacks(self) -> list[ModuleList]:
        return [self.layers]


class ToyBagLayer(Module):
    def __init__(self, config: ToyBagConfig) -> None:
        super().__init__()
        self.inner_proj = Linear(config.model_dim, 2 * config.model_dim, bias=True)
        self.output_proj = Linear(2 * config.model_dim, config.model_dim, bias=True)
        self.dropout = Dropout(config.dropout_p)

    def forward(self, seqs: Tensor) -> Tensor:
        return seqs + self.dropout(self.output_proj(gelu(self.inner_proj(seqs))))


TOY_BAG_FORMAT: Final = PlainCheckpointFormat("toy_bag", ToyBagConfig)


def register_toy_bag(container: DependencyContainer) -> None:
    register_family(
        container,
        TOY_BAG_FAMILY,
        kls=ToyBagModel,
        config_kls=ToyBagConfig,
        factory=ToyBagModel,
        checkpoint_format=TOY_BAG_FORMAT,
    )

    arch = ArchRegistrar(container, ToyBagConfig)

    @arch("tiny")
    def tiny() -> ToyBagConfig:
        return ToyBagConfig()

    @arch("deep")
    def deep() -> ToyBagConfig:
        """``tiny`` with twice the layers."""
        config = tiny()
        config.num_layers = 4
        return config
