"""The contract between data, models, engine and losses.

Shapes: N rows, T texts, P images, L tokens, D embedding size, C x H x W pixels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.functional import normalize

Modality: TypeAlias = Literal["text", "image"]

Similarity: TypeAlias = Literal["cosine", "dot", "maxsim"]


@dataclass
class EncoderBatch:
    """The inputs of ``num_rows`` rows for one encoder.

    A row holds any number of texts and images (at least one of either);
    ``text_rows`` and ``image_rows`` say which row each one belongs to.
    """

    num_rows: int

    input_ids: Tensor | None = None
    """Token ids, padded on the right. *Shape:* ``[T, L]``, int64."""

    attention_mask: Tensor | None = None
    """True for tokens, False for padding; ``None`` if nothing is masked. *Shape:* ``[T, L]``, bool."""

    token_type_ids: Tensor | None = None
    """Segment ids. *Shape:* ``[T, L]``, int64."""

    pooling_mask: Tensor | None = None
    """True for tokens that pooling looks at, where that differs from ``attention_mask``. *Shape:* ``[T, L]``."""

    text_rows: Tensor | None = None
    """The row of each text. *Shape:* ``[T]``, int64."""

    pixel_values: Tensor | None = None
    """Preprocessed images. *Shape:* ``[P, C, H, W]``, float."""

    image_rows: Tensor | None = None
    """The row of each image. *Shape:* ``[P]``, int64."""

    tokens_per_image: int = 0
    """The cost of an image in tokens (its number of patches), for planning chunks."""

    @staticmethod
    def of_text(
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pooling_mask: Tensor | None = None,
    ) -> EncoderBatch:
        """Make a batch of one text per row. Padding on the left is moved to the right."""
        masks = (attention_mask, token_type_ids, pooling_mask)
        input_ids, mask, types, pooling = _pad_right(input_ids, *masks)
        rows = torch.arange(input_ids.size(0), device=input_ids.device)
        return EncoderBatch(input_ids.size(0), input_ids, mask, types, pooling, rows)

    @staticmethod
    def of_images(pixel_values: Tensor, tokens_per_image: int = 0) -> EncoderBatch:
        """Make a batch of one image per row."""
        rows = torch.arange(pixel_values.size(0), device=pixel_values.device)
        return EncoderBatch(
            pixel_values.size(0), pixel_values=pixel_values, image_rows=rows, tokens_per_image=tokens_per_image
        )

    @property
    def num_texts(self) -> int:
        return 0 if self.input_ids is None else self.input_ids.size(0)

    @property
    def num_images(self) -> int:
        return 0 if self.pixel_values is None else self.pixel_values.size(0)

    def text_lengths(self) -> Tensor:
        """The number of tokens of each text. *Shape:* ``[T]``."""
        assert self.input_ids is not None
        if self.attention_mask is None:
            return torch.full((self.num_texts,), self.input_ids.size(1), device=self.input_ids.device)
        return self.attention_mask.sum(1)

    def __len__(self) -> int:
        return self.num_rows

    def costs(self) -> list[int]:
        """The tokens of each row, those of its images included: what it costs to encode."""
        cost = torch.zeros(self.num_rows, dtype=torch.int64)
        if self.input_ids is not None and self.text_rows is not None:
            cost.index_add_(0, self.text_rows.cpu(), self.text_lengths().cpu())
        if self.image_rows is not None:
            patches = torch.full((self.num_images,), max(self.tokens_per_image, 1))
            cost.index_add_(0, self.image_rows.cpu(), patches)
        return [int(c) for c in cost]

    def kinds(self) -> list[int]:
        """Which encoders each row needs: 1 text, 2 image, 3 both. Rows of a kind share chunks."""
        kind = torch.zeros(self.num_rows, dtype=torch.int64)
        if self.text_rows is not None:
            kind[self.text_rows.cpu()] |= 1
        if self.image_rows is not None:
            kind[self.image_rows.cpu()] |= 2
        return [int(k) for k in kind]

    def select(self, rows: Sequence[int]) -> EncoderBatch:
        """Return the given rows, in that order, without padding that they do not need.

        :raises ValueError: a row is asked for twice.
        """
        if len(set(rows)) != len(rows):
            raise ValueError("`rows` must not name a row twice.")
        position = torch.full((self.num_rows,), -1, dtype=torch.int64)
        position[list(rows)] = torch.arange(len(rows))
        batch = EncoderBatch(len(rows), tokens_per_image=self.tokens_per_image)
        if self.input_ids is not None and self.text_rows is not None:
            batch._select_texts(self, *_members(self.text_rows, position))
        if self.pixel_values is not None and self.image_rows is not None:
            index, batch_rows = _members(self.image_rows, position)
            if index.numel():
                batch.pixel_values, batch.image_rows = self.pixel_values[index], batch_rows
        return batch

    def _select_texts(self, source: EncoderBatch, index: Tensor, rows: Tensor) -> None:
        if index.numel() == 0:
            return
        assert source.input_ids is not None
        width = source.input_ids.size(1)
        if source.attention_mask is not None:
            width = int(source.attention_mask[index].sum(1).max())
        for name in _TEXT_FIELDS:
            value = getattr(source, name)
            if value is not None:
                setattr(self, name, value[index, :width])
        self.text_rows = rows

    @staticmethod
    def concat(batches: Sequence[EncoderBatch]) -> EncoderBatch:
        """Append batches (at least one); texts are padded to the longest."""
        if len(batches) == 1:
            return batches[0]
        out = EncoderBatch(sum(b.num_rows for b in batches), tokens_per_image=max(b.tokens_per_image for b in batches))
        offsets = [sum(b.num_rows for b in batches[:i]) for i in range(len(batches))]
        for name in ("text_rows", "image_rows"):
            rows = [getattr(b, name) + o for b, o in zip(batches, offsets) if getattr(b, name) is not None]
            setattr(out, name, torch.cat(rows) if rows else None)
        pixels = [b.pixel_values for b in batches if b.pixel_values is not None]
        out.pixel_values = torch.cat(pixels) if pixels else None
        _concat_texts(out, [b for b in batches if b.input_ids is not None])
        return out

    def to(self, device: torch.device, *, non_blocking: bool = False) -> None:
        """Move all tensors in place (fairseq2's ``SupportsDeviceTransfer``)."""
        for name in (*_TEXT_FIELDS, "text_rows", "pixel_values", "image_rows"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.to(device, non_blocking=non_blocking))

    def copy(self) -> EncoderBatch:
        """A shallow copy: the same tensors."""
        return replace(self)


_TEXT_FIELDS = ("input_ids", "attention_mask", "token_type_ids", "pooling_mask")


def _pad_right(ids: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    mask = others[0]
    if mask is None:
        return ids, None, others[1], others[2]
    mask = mask.bool()
    if not (mask[:, 1:] & ~mask[:, :-1]).any():
        return ids, mask, others[1], others[2]
    order = torch.argsort(~mask, dim=1, stable=True)
    moved = [None if t is None else t.gather(1, order) for t in others[1:]]
    return ids.gather(1, order), mask.gather(1, order), moved[0], moved[1]


def _members(rows: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Which members belong to the selected rows, and their new rows, ordered by row."""
    new_rows = position.to(rows.device)[rows]
    index = torch.nonzero(new_rows >= 0).squeeze(1)
    index = index[torch.argsort(new_rows[index], stable=True)]
    return index, new_rows[index]


def _concat_texts(out: EncoderBatch, batches: Sequence[EncoderBatch]) -> None:
    if not batches:
        return
    widths = [b.input_ids.size(1) for b in batches if b.input_ids is not None]
    width = max(widths)
    for name in _TEXT_FIELDS:
        pads = name == "attention_mask" and min(widths) < width
        if all(getattr(b, name) is None for b in batches) and not pads:
            continue
        parts = []
        for b in batches:
            assert b.input_ids is not None
            value = getattr(b, name)
            if value is None:
                if name == "pooling_mask" and b.attention_mask is not None:
                    value = b.attention_mask
                elif name == "token_type_ids":
                    value = torch.zeros_like(b.input_ids)
                else:
                    value = torch.ones_like(b.input_ids, dtype=torch.bool)
            parts.append(torch.nn.functional.pad(value, (0, width - value.size(1))))
        setattr(out, name, torch.cat(parts))


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

    max_text_length: int | None = None
    """The longest text in tokens, special tokens included."""

    tokens_per_image: int = 1
    """What an image costs to encode, in tokens."""

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
        if batch.pixel_values is None and batch.num_texts == batch.num_rows:
            return self.encode_text(batch), None
        if batch.input_ids is None and batch.num_images == batch.num_rows:
            return self.encode_image(batch), None
        return self._fuse(batch), None

    def _fuse(self, batch: EncoderBatch) -> Tensor:
        parts, rows = [], []
        if batch.input_ids is not None and batch.text_rows is not None:
            parts.append(self.encode_text(batch))
            rows.append(batch.text_rows)
        if batch.pixel_values is not None and batch.image_rows is not None:
            parts.append(self.encode_image(batch))
            rows.append(batch.image_rows)
        part, row = torch.cat(parts), torch.cat(rows)
        count = torch.bincount(row, minlength=batch.num_rows)
        single = (count[row] == 1).unsqueeze(1)
        part = torch.where(single, part, normalize(part.float(), dim=-1).to(part.dtype))
        return part.new_zeros(batch.num_rows, part.size(1)).index_add(0, row, part)

    def forward(self, batch: EncoderBatch) -> Embeddings:
        """Encode ``batch``. Everything that training needs passes through here, the temperature too."""
        values, mask = self.encode_rows(batch)
        # Copies, because FSDP2 frees the parameter itself after the forward pass.
        learned = (self.logit_scale, self.logit_bias, self.teacher_projection)
        return Embeddings(values, mask, *(None if x is None else x.clone() for x in learned))

    if TYPE_CHECKING:
        __call__ = forward

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
