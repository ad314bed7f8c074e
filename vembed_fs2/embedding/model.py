"""The contract between data, models, engine and losses.

Shapes: N rows, T texts, P images, L tokens, D embedding size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.functional import normalize
from typing_extensions import Self, override

from vembed_fs2.embedding.batch import EncoderBatch as EncoderBatch
from vembed_fs2.embedding.inputs import ImageInputs, Kind, TextInputs

Modality: TypeAlias = Literal["text", "image"]

SingleSimilarity: TypeAlias = Literal["cosine", "dot"]
"""How two vectors are compared."""

Similarity: TypeAlias = Literal["cosine", "dot", "maxsim"]
"""How two rows are compared, of one vector or of several."""

TextPadding: TypeAlias = Literal["longest", "max_length"]


class Embeddings(NamedTuple):
    """What a model returns. A named tuple, because DDP and FSDP2 look into tuples for tensors."""

    values: Tensor
    """*Shape:* ``[N, D]``, or ``[N, L, D]`` for multi-vector models. Not normalised."""

    mask: Tensor | None = None
    """True for the vectors that count, of multi-vector models. *Shape:* ``[N, L]``."""

    logit_scale: Tensor | None = None
    """Log of the inverse temperature, where the model learns it. *Shape:* ``[1]``."""

    logit_bias: Tensor | None = None
    """Bias of the logits, where the model learns it. *Shape:* ``[1]``."""

    teacher_projection: Tensor | None = None
    """Takes embeddings to the size of a teacher's, where the model learns it. *Shape:* ``[T, D]``."""


@dataclass(kw_only=True)
class DenseConfig:
    """A dense layer after the pooling (sentence-transformers' ``Dense`` module)."""

    input_dim: int
    """The size of its inputs."""

    output_dim: int
    """The size of its outputs."""

    bias: bool = True
    """If ``True``, adds a bias."""

    activation: Literal["identity", "tanh", "relu", "gelu", "sigmoid"] = "identity"
    """The activation function that follows."""


Pooling: TypeAlias = Literal["cls", "mean", "pooler", "last", "max", "none"]


@dataclass(kw_only=True)
class HeadConfig:
    """What follows a text backbone: pooling, dense layers, normalisation."""

    pooling: Pooling = "mean"
    """How token states become one embedding; with ``none``, each becomes a vector of its own."""

    include_prompt: bool = True
    """If ``False``, the tokens of a prompt take no part in mean pooling, and have no vectors of their own."""

    dense: Sequence[DenseConfig] = field(default_factory=list)
    """Dense layers after the pooling."""

    normalize: bool = True
    """If ``True``, the model's own embeddings are of unit length (applied by ``Embedder``, not by the model)."""

    similarity: SingleSimilarity = "cosine"
    """How two embeddings are compared. Several vectors per text are always compared by MaxSim."""


@dataclass(kw_only=True)
class EmbeddingModelConfig:
    """Base of the configurations of families whose models can hold what an objective learns."""

    logit_scale_init: float | None = None
    """The log inverse temperature to start from; the model has none if ``None``."""

    logit_bias_init: float | None = None
    """The bias of the logits to start from; the model has none if ``None``."""

    teacher_dim: int | None = None
    """The size of a teacher's embeddings that the model's are projected to; it has no projection if ``None``."""


class EmbeddingModel(Module, ABC):
    """Base of all embedding models.

    Subclasses implement :meth:`encode_text` and/or :meth:`encode_image`. Joint
    encoders, which read a row's texts and images together, override
    :meth:`encode_rows`.
    """

    embedding_dim: int
    """The size of an embedding."""

    modalities: frozenset[Modality]
    """What a row may hold."""

    normalize: bool = True
    """If ``True``, the model's embeddings are meant to be of unit length."""

    similarity: Similarity = "cosine"
    """How two embeddings are compared; ``maxsim`` if there are several vectors per row."""

    towers: Mapping[Modality, Sequence[str]] | None = None
    """
    The names of the modules that encode each modality alone, such as
    ``{"text": ["text"], "image": ["vision"]}``: a composed model can have one tower without the other. ``None`` for
    joint encoders, which have no towers, and for models of one modality, which need no names.
    """

    max_text_length: int | None = None
    """The longest text in tokens, special tokens included."""

    text_padding: TextPadding = "longest"
    """Whether texts are padded to the longest of a batch, or to ``max_text_length``: where the padding counts."""

    tokens_per_image: int = 1
    """What an image costs to encode, in tokens."""

    image_shape: tuple[int, int, int] | None = None
    """An image shape that the model takes: channels, height, width in pixels."""

    frozen_parameters: frozenset[str] = frozenset()
    """The names of the parameters that are never trained: those that the factory of the family freezes."""

    logit_scale: Tensor | None
    logit_bias: Tensor | None
    teacher_projection: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("logit_scale", None)
        self.register_parameter("logit_bias", None)
        self.register_parameter("teacher_projection", None)

    def encode_text(self, batch: EncoderBatch) -> Tensor:
        """Encode the texts of ``batch``. *Returns:* ``[T, D]``, or ``[T, L, D]`` for multi-vector models."""
        raise TypeError(f"{type(self).__name__} has no text encoder.")

    def encode_image(self, batch: EncoderBatch) -> Tensor:
        """Encode the images of ``batch``. *Returns:* ``[P, D]``."""
        raise TypeError(f"{type(self).__name__} has no image encoder.")

    def encode_rows(self, batch: EncoderBatch) -> tuple[Tensor, Tensor | None]:
        """Encode rows; return embeddings ``[N, D]`` (or ``[N, L, D]``) and a mask ``[N, L]`` or ``None``.

        A row of one part has that part's embedding. A row of several parts has
        the sum of their unit embeddings (late fusion; "CLIP-SF" in Wei et al.,
        UniIR, 2023, https://arxiv.org/abs/2311.17136).
        """
        if batch.features is not None:
            raise TypeError(f"{type(self).__name__} has no encoder of features.")

        if batch.images is None and batch.num_texts == batch.num_rows:
            return self.encode_text(batch), None
        if batch.text is None and batch.num_images == batch.num_rows:
            return self.encode_image(batch), None
        return self._fuse(batch), None

    def _fuse(self, batch: EncoderBatch) -> Tensor:
        parts, rows = [], []
        if batch.text is not None:
            parts.append(self.encode_text(batch))
            rows.append(batch.text.rows)
        if batch.images is not None:
            parts.append(self.encode_image(batch))
            rows.append(batch.images.rows)
        part, row = torch.cat(parts), torch.cat(rows)
        count = torch.bincount(row, minlength=batch.num_rows)
        single = (count[row] == 1).unsqueeze(1)
        part = torch.where(single, part, normalize(part.float(), dim=-1).to(part.dtype))
        return part.new_zeros(batch.num_rows, part.size(1)).index_add(0, row, part)

    def blank(self, kind: Kind) -> EncoderBatch:
        """Return one row that means nothing, for a rank that has no row of a kind that other ranks have.

        All ranks must run the same parts of a sharded model; the embedding of this row is not used.
        """
        row = torch.zeros(1, dtype=torch.int64)
        text = images = None
        if Kind.TEXT in kind:
            width = (self.max_text_length if self.text_padding == "max_length" else None) or 1
            text = TextInputs(torch.zeros(1, width, dtype=torch.int64), row)
        if Kind.IMAGE in kind:
            images = self.blank_image()
        return EncoderBatch(1, text, images)

    def blank_image(self) -> ImageInputs:
        """Return one black image. Models whose images are patches override it."""
        if self.image_shape is None:
            raise TypeError(f"{type(self).__name__} has no `image_shape`, which says how large a blank image is.")
        return ImageInputs(torch.zeros(1, *self.image_shape), torch.zeros(1, dtype=torch.int64))

    def forward(self, batch: EncoderBatch) -> Embeddings:
        """Encode ``batch``. Everything that training needs passes through here, the temperature too."""
        values, mask = self.encode_rows(batch)
        # Copies, because FSDP2 frees the parameter itself after the forward pass.
        learned = (self.logit_scale, self.logit_bias, self.teacher_projection)
        return Embeddings(values, mask, *(None if x is None else x.clone() for x in learned))

    if TYPE_CHECKING:
        __call__ = forward

    @override
    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As of any module; but what is never trained stays frozen. fairseq2 asks for all gradients after loading."""
        super().requires_grad_(requires_grad)
        for name in self.frozen_parameters:
            self.get_parameter(name).requires_grad_(False)
        return self

    def add_logit_scale(self, init: float) -> None:
        """Give the model a learnable log inverse temperature, if it has none."""
        # Shape [1], not a scalar: FSDP2 cannot shard scalars.
        self._add_parameter("logit_scale", torch.full((1,), init))

    def add_logit_bias(self, init: float) -> None:
        """Give the model a learnable bias of the logits, if it has none."""
        self._add_parameter("logit_bias", torch.full((1,), init))

    def add_teacher_projection(self, teacher_dim: int) -> None:
        """Give the model a learnable projection to a teacher's embeddings, if it has none."""
        self._add_parameter("teacher_projection", initial_projection(teacher_dim, self.embedding_dim))

    def _add_parameter(self, name: str, initial: Tensor) -> None:
        if getattr(self, name) is None:
            like = next(self.parameters())
            setattr(self, name, Parameter(initial.to(device=like.device, dtype=like.dtype)))

    @abstractmethod
    def layer_stacks(self) -> list[torch.nn.ModuleList]:
        """The stacks of Transformer layers: what FSDP2 shards and activation checkpointing wraps one by one."""


def initial_projection(teacher_dim: int, embedding_dim: int) -> Tensor:
    """A random projection that keeps lengths on average, the same one each time. *Returns:* ``[T, D]``."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(teacher_dim, embedding_dim, generator=generator, device="cpu") / math.sqrt(teacher_dim)
