"""The contract between data, models, engine and losses.

Shapes: N rows, T texts, P images, L tokens, D embedding size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.functional import normalize
from typing_extensions import Self, override

from vembed_fs2.embedding.batch import EncoderBatch as EncoderBatch
from vembed_fs2.embedding.inputs import ImageInputs, Kind, TextInputs
from vembed_fs2.embedding.learned import LOGIT_BIAS, LOGIT_SCALE, LearnedPart
from vembed_fs2.embedding.learned import EmbeddingModelConfig as EmbeddingModelConfig

Modality: TypeAlias = Literal["text", "image"]

SingleSimilarity: TypeAlias = Literal["cosine", "dot"]
"""How two vectors are compared."""

Similarity: TypeAlias = Literal["cosine", "dot", "maxsim"]
"""How two rows are compared, of one vector or of several."""

TextPadding: TypeAlias = Literal["longest", "max_length"]


class Embeddings(NamedTuple):
    """What a model returns. A named tuple, because DDP and FSDP2 look into tuples and dicts for tensors."""

    values: Tensor
    """*Shape:* ``[N, D]``, or ``[N, L, D]`` for multi-vector models. Not normalised."""

    mask: Tensor | None = None
    """True for the vectors that count, of multi-vector models. *Shape:* ``[N, L]``."""

    parts: Mapping[str, Tensor] = {}
    """What objectives learn besides the encoder, by name; see :class:`LearnedPart`."""

    @property
    def logit_scale(self) -> Tensor | None:
        """Log of the inverse temperature, if the model has it. *Shape:* ``[1]``."""
        return self.parts.get(LOGIT_SCALE)

    @property
    def logit_bias(self) -> Tensor | None:
        """Bias of the logits, if the model has it. *Shape:* ``[1]``."""
        return self.parts.get(LOGIT_BIAS)


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

    def __init__(self) -> None:
        super().__init__()
        self.learned: dict[str, LearnedPart] = {}
        """What the model holds for objectives. Each part is a parameter of that name of this very module."""
        self.register_parameter(LOGIT_SCALE, None)
        self.register_parameter(LOGIT_BIAS, None)

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
        return Embeddings(values, mask, {name: getattr(self, name).clone() for name in self.learned})

    if TYPE_CHECKING:
        __call__ = forward

    @override
    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As of any module; but what is never trained stays frozen. fairseq2 asks for all gradients after loading."""
        super().requires_grad_(requires_grad)
        for name in self.frozen_parameters:
            self.get_parameter(name).requires_grad_(False)
        return self

    def add_learned_parts(self, parts: Iterable[LearnedPart]) -> None:
        """Give the model what it does not hold yet for objectives.

        :raises ValueError: the model has something else of that name.
        """
        like = next(self.parameters())
        for part in parts:
            if part.name in self.learned:
                continue
            if getattr(self, part.name, None) is not None:
                raise ValueError(f"`{part.name}` is a part of the model; the objective must learn another name.")
            initial = part.initial().to(device=like.device, dtype=like.dtype)
            if part.is_trained:
                self.register_parameter(part.name, Parameter(initial))
            else:
                # A buffer, which no recipe can train by accident.
                self._parameters.pop(part.name, None)
                self.register_buffer(part.name, initial)
            self.learned[part.name] = part

    def train_learned_parts(self, parts: Iterable[LearnedPart]) -> None:
        """Train the parts that an objective learns, and no others that the model holds for objectives."""
        declared = {part.name: part for part in parts}
        for name, held in self.learned.items():
            part = declared.get(name)
            getattr(self, name).requires_grad_(held.is_trained and part is not None)
            self.learned[name] = replace(held, max=None if part is None else part.max)

    @torch.no_grad()
    def clamp_learned_parts(self) -> None:
        """Cut parts to their greatest value: above it, a temperature would have no gradient, and stay there."""
        for name, part in self.learned.items():
            if part.max is not None and part.is_trained:
                getattr(self, name).clamp_(max=part.max)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set what the model holds for objectives to its initial values."""
        for name, part in self.learned.items():
            getattr(self, name).copy_(part.initial())

    @abstractmethod
    def layer_stacks(self) -> list[torch.nn.ModuleList]:
        """The stacks of Transformer layers: what FSDP2 shards and activation checkpointing wraps one by one."""
