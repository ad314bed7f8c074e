"""The contract between data, models, engine and losses.

Shapes: N rows, T texts, P images, L tokens, D embedding size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.functional import normalize, pad
from typing_extensions import Self, override

from vembed_fs2.embedding.batch import EncoderBatch as EncoderBatch
from vembed_fs2.embedding.freezing import stop_dropout
from vembed_fs2.embedding.head import DenseConfig as DenseConfig
from vembed_fs2.embedding.head import Head as Head
from vembed_fs2.embedding.head import HeadConfig as HeadConfig
from vembed_fs2.embedding.head import Pooling as Pooling
from vembed_fs2.embedding.head import Similarity as Similarity
from vembed_fs2.embedding.head import SingleSimilarity as SingleSimilarity
from vembed_fs2.embedding.head import States as States
from vembed_fs2.embedding.head import is_late_interaction
from vembed_fs2.embedding.inputs import ImageInputs, Kind, TextInputs
from vembed_fs2.embedding.learned import LOGIT_BIAS, LOGIT_SCALE, LearnedPart, learned_dtype
from vembed_fs2.embedding.learned import EmbeddingModelConfig as EmbeddingModelConfig
from vembed_fs2.errors import DataError

Modality: TypeAlias = Literal["text", "image"]

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


T = TypeVar("T")


class _FromHead(Generic[T]):
    """What the head of a model says about its embeddings. A model without a :class:`Head` assigns it instead."""

    def __init__(self, read: Callable[[Head], T], default: T | None = None) -> None:
        self._read = read
        self._default = default

    def __set_name__(self, owner: type[EmbeddingModel], name: str) -> None:
        self._name = name

    def __set__(self, model: EmbeddingModel, value: T | None) -> None:
        model.__dict__[self._name] = value

    def __get__(self, model: EmbeddingModel | None, owner: type[EmbeddingModel]) -> T:
        # Nobody says anything by `None`, such as that of `HeadConfig.normalize`.
        if model is not None and (assigned := model.__dict__.get(self._name)) is not None:
            value: T = assigned
            return value

        head = None if model is None else model._modules.get("head")
        if isinstance(head, Head):
            return self._read(head)
        if self._default is None:
            raise TypeError(f"{owner.__name__} has no `head`, which would say what its embeddings are.")
        return self._default


class EmbeddingModel(Module, ABC):
    """Base of all embedding models.

    Subclasses have a :class:`~vembed_fs2.embedding.head.Head` and implement
    :meth:`encode_text_states` and/or :meth:`encode_image_states`; the head turns
    states into embeddings. Joint encoders, which read a row's texts and images
    together, override :meth:`encode_rows`.
    """

    head: Head
    """The head after the backbone. It says what the embeddings are."""

    embedding_dim = _FromHead[int](lambda head: head.output_dim)
    """The size of an embedding."""

    normalize = _FromHead[bool](lambda head: head.normalize, True)
    """If ``True``, the model's embeddings are meant to be of unit length."""

    has_normalization = _FromHead[bool](lambda head: head.has_normalization, False)
    """If ``True``, the model ends with a normalisation of its own, which comes before all that a caller asks for."""

    similarity = _FromHead[Similarity](lambda head: head.similarity, "cosine")
    """How two embeddings are compared; ``maxsim`` if there are several vectors per row."""

    family: str = ""
    """The name of the family that created the model."""

    modalities: frozenset[Modality]
    """What a row may hold."""

    is_interleaved: bool = False
    """Whether the model reads a row's texts and images in their order. Others take one text beside images."""

    towers: Mapping[Modality, Sequence[str]] | None = None
    """
    The names of the modules that encode each modality alone, such as
    ``{"text": ["text"], "image": ["vision"]}``: a composed model can have one tower without the other. ``None`` for
    joint encoders, which have no towers, and for models of one modality, which need no names.
    """

    max_text_length: int | None = None
    """The longest text in tokens, special tokens included."""

    vocab_size: int | None = None
    """The number of rows of the token embedding table: ids of tokens must be less. ``None`` is not checked."""

    text_padding: TextPadding = "longest"
    """Whether texts are padded to the longest of a batch, or to ``max_text_length``: where the padding counts."""

    tokens_per_image: int = 1
    """What an image costs to encode, in tokens."""

    image_shape: tuple[int, int, int] | None = None
    """An image shape that the model takes: channels, height, width in pixels."""

    frozen_parameters: frozenset[str] = frozenset()
    """The names of the parameters that are never trained: those that the factory of the family freezes, and more."""

    _has_frozen_parts = False

    logit_scale: Tensor | None
    logit_bias: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.learned: dict[str, LearnedPart] = {}
        """What the model holds for objectives. Each part is a parameter of that name of this very module."""
        self.register_parameter(LOGIT_SCALE, None)
        self.register_parameter(LOGIT_BIAS, None)

    @property
    def is_multi_vector(self) -> bool:
        """Whether a row has several vectors, compared by MaxSim."""
        return is_late_interaction(self.similarity)

    def encode_text_states(self, batch: EncoderBatch) -> States:
        """Return what the backbone makes of the texts of ``batch``: what :attr:`head` reads, at least.

        :raises DataError: a text is longer than the model can take.
        """
        raise TypeError(f"{type(self).__name__} has no text encoder.")

    def encode_image_states(self, batch: EncoderBatch) -> States:
        """Return what the backbone makes of the images of ``batch``: what :attr:`head` reads, at least.

        :raises DataError: the images are not of a shape that the model takes.
        """
        raise TypeError(f"{type(self).__name__} has no image encoder.")

    def encode_text(self, batch: EncoderBatch) -> Tensor:
        """Encode the texts of ``batch``. *Returns:* ``[T, D]``, or ``[T, L, D]`` for multi-vector models."""
        return self.head(self.encode_text_states(batch))[0]

    def encode_image(self, batch: EncoderBatch) -> Tensor:
        """Encode the images of ``batch``. *Returns:* ``[P, D]``, or ``[P, L, D]`` for multi-vector models."""
        return self.head(self.encode_image_states(batch))[0]

    def encode_rows(self, batch: EncoderBatch) -> tuple[Tensor, Tensor | None]:
        """Encode rows; return embeddings ``[N, D]`` (or ``[N, L, D]``) and ``None`` (or a mask ``[N, L]``).

        A row of one part has that part's embedding. A row of several parts has
        the sum of their unit embeddings (late fusion; "CLIP-SF" in Wei et al.,
        UniIR, 2023, https://arxiv.org/abs/2311.17136).

        :raises DataError: a row of a multi-vector model has several parts, or one that the model does not read.
        """
        if batch.features is not None:
            raise TypeError(f"{type(self).__name__} has no encoder of features.")

        if self.is_multi_vector:
            return self._encode_vectors(batch)
        if batch.images is None and batch.num_texts == batch.num_rows:
            return self.encode_text(batch), None
        if batch.text is None and batch.num_images == batch.num_rows:
            return self.encode_image(batch), None

        return self._fuse(batch), None

    def _encode_vectors(self, batch: EncoderBatch) -> tuple[Tensor, Tensor | None]:
        """Encode rows of one text or one image. *Returns:* ``[N, L, D]`` and a mask ``[N, L]``."""
        counts = {"text": batch.num_texts, "image": batch.num_images}
        if sum(counts.values()) != batch.num_rows or any(counts[m] for m in counts.keys() - self.modalities):
            allowed = "one text or one image"
            if len(self.modalities) == 1:
                allowed = "one text, and no image" if "text" in self.modalities else "one image, and no text"
            raise DataError(f"Each row of a model with several vectors per row must be {allowed}.")

        found = []
        if batch.text is not None:
            found.append((batch.text.rows, *self.head(self.encode_text_states(batch))))
        if batch.images is not None:
            found.append((batch.images.rows, *self.head(self.encode_image_states(batch))))
        if len(found) == 1:
            return found[0][1], found[0][2]

        width = max(values.size(1) for _, values, _ in found)
        order = torch.cat([rows for rows, _, _ in found]).argsort()
        values = torch.cat([pad(values, (0, 0, 0, width - values.size(1))) for _, values, _ in found])
        mask = torch.cat([pad(mask, (0, width - mask.size(1))) for _, _, mask in found if mask is not None])

        return values[order], mask[order]

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
        if Kind.FEATURES in kind:
            raise TypeError(f"{type(self).__name__} has no encoder of features.")

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

    def freeze(self, names: Iterable[str]) -> None:
        """Keep these parameters as they are in training. A part of which all are frozen has no dropout either."""
        self.frozen_parameters |= frozenset(names)
        self._has_frozen_parts = True
        for name in self.frozen_parameters:
            self.get_parameter(name).requires_grad_(False)

    @override
    def train(self, mode: bool = True) -> Self:
        """As of any module; but what :meth:`freeze` froze only computes features."""
        super().train(mode)
        if self._has_frozen_parts:
            stop_dropout(self, self.frozen_parameters)
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

            initial = part.initial().to(device=like.device, dtype=learned_dtype(like.dtype))
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
