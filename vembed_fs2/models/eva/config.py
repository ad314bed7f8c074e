"""The configuration of EVA-CLIP models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import log
from typing import Final, Literal, TypeAlias, get_args

from fairseq2.utils.validation import ValidationResult
from typing_extensions import override

from vembed_fs2.embedding.model import EmbeddingModelConfig, HeadConfig
from vembed_fs2.models.clip.config import ClipTextConfig
from vembed_fs2.models.common.checks import (
    check_choice,
    check_head,
    check_heads,
    check_not_negative,
    check_positive,
    check_probabilities,
    to_result,
)
from vembed_fs2.models.common.config import TransformerSizes
from vembed_fs2.models.eva.model import EvaPooling

EVA_FAMILY: Final = "vembed_eva"

EvaProjection: TypeAlias = Literal["classifier", "linear", "mlp", "none"]


@dataclass(kw_only=True)
class EvaVisionConfig(TransformerSizes):
    """The image Transformer. The defaults describe EVA02-CLIP-B/16."""

    ffn_inner_dim: int = 2048
    """The dimensionality of inner projection layers in feed-forward networks."""

    num_channels: int = 3
    """The number of image channels."""

    image_size: int = 224
    """The height and width of images in pixels; other sizes interpolate the positions."""

    patch_size: int = 16
    """The height and width of patches in pixels."""

    qkv_bias: bool = True
    """If ``True``, the projections of queries and values have a bias. The projection of keys has none."""

    fused_qkv: bool = False
    """If ``True``, timm holds the projections of queries, keys and values in one tensor. Kept for export."""

    gated_ffn: bool = True
    """If ``True``, feed-forward networks are gated (SwiGLU); else they have GELU."""

    attn_norm: bool = True
    """If ``True``, what attention gathers is normalised before its output projection."""

    ffn_norm: bool = True
    """If ``True``, the inputs of the output projections of feed-forward networks are normalised."""

    post_norm: bool = False
    """If ``True``, layers normalise what they add to their inputs; else their inputs."""

    layer_scale_init: float | None = None
    """The initial factors of what layers add to their inputs; without factors if ``None``."""

    learned_positions: bool = True
    """If ``True``, each place has a learned position, which is added to its patch."""

    rope: bool = True
    """If ``True``, queries and keys are rotated by the row and the column of their patch."""

    rope_ref_size: int | None = 16
    """
    The rows and columns of patches that rotations were trained with: an image
    of any number spreads over as many. If ``None``, they are not scaled.
    """

    input_norm: bool = False
    """If ``True``, the inputs of the Transformer are normalised, and patches have no bias."""

    pooling: EvaPooling = "cls"
    """
    How the final states become one: the class token's (``cls``), the mean of the
    patches' (``mean``), their maximum (``max``), or the mean of both (``mean_max``).
    """

    norm_after_pooling: bool = False
    """If ``True``, the pooled state is normalised, and not those that are pooled."""

    projection: EvaProjection = "classifier"
    """
    How the pooled state becomes an embedding: by a linear layer (``classifier``,
    timm's own; ``linear``, open_clip's), by two (``mlp``) or as it is (``none``).
    """

    projection_bias: bool = True
    """If ``True``, the last layer of the projection has a bias."""

    layer_norm_eps: float = 1e-6
    """The value added to the denominator of Layer Normalization."""

    attn_dropout_p: float = 0.0
    """The dropout probability on attention weights."""

    drop_path_p: float = 0.0
    """The probability that an image skips a part of the last layer; it grows from 0 over the layers before."""

    head_dropout_p: float = 0.0
    """The dropout probability on the inputs of the projection; with ``mlp``, on the inputs of its last layer."""

    @property
    def num_patches(self) -> int:
        """The number of patches of an image of ``image_size``."""
        return (self.image_size // self.patch_size) ** 2

    def validate(self) -> ValidationResult:
        return to_result(self._size_errors(), self._value_errors(), self._layout_errors())

    @override
    def _positive_fields(self) -> tuple[str, ...]:
        return (*super()._positive_fields(), "num_channels", "patch_size", "rope_ref_size")

    def _size_errors(self) -> Iterator[str]:
        yield from check_positive(self, *self._positive_fields())

        if self.image_size < self.patch_size:
            yield f"`image_size` must be at least `patch_size` ({self.patch_size}), but is {self.image_size} instead."

        # A head is rotated in pairs of elements, half of them by rows and half by columns.
        yield from check_heads(self, multiple=4 if self.rope else 1)

    def _value_errors(self) -> Iterator[str]:
        yield from check_probabilities(self, "attn_dropout_p", "drop_path_p", "head_dropout_p")
        yield from check_not_negative(self, "layer_norm_eps")

    def _layout_errors(self) -> Iterator[str]:
        yield from check_choice(self, "pooling", get_args(EvaPooling))
        yield from check_choice(self, "projection", get_args(EvaProjection))

        if self.post_norm and self.layer_scale_init is not None:
            yield "`layer_scale_init` must not be set with `post_norm`: the norms scale already."

        if self.projection == "classifier" and not self.projection_bias:
            yield "`projection_bias` must be set for the projection 'classifier'."


def _default_text() -> ClipTextConfig:
    # open_clip takes the highest index of a text for its end (2), and pads with 0.
    return ClipTextConfig(activation="gelu", eos_idx=2, pad_idx=0, bos_idx=None)


@dataclass(kw_only=True)
class EvaConfig(EmbeddingModelConfig):
    """The configuration of an EVA-CLIP model. The defaults describe EVA02-CLIP-B/16."""

    text: ClipTextConfig = field(default_factory=_default_text)
    """The text Transformer."""

    vision: EvaVisionConfig = field(default_factory=EvaVisionConfig)
    """The image Transformer."""

    projection_dim: int = 512
    """The dimensionality of embeddings."""

    head: HeadConfig | None = None
    """
    What follows the projected states of texts and of images, if not the pooling
    of each Transformer itself (``pooler`` means that one).
    """

    logit_scale_init: float = log(1 / 0.07)
    """The initial log inverse temperature."""

    train_logit_scale: bool = True
    """If ``False``, the temperature keeps its value in training."""

    def validate(self) -> ValidationResult:
        result = to_result(
            check_positive(self, "projection_dim"),
            check_head(self.head, self.projection_dim, is_causal=self.text.causal),
        )

        if self.vision.projection == "none" and self.projection_dim != self.vision.model_dim:
            result.add_error(
                f"`projection_dim` must be `vision.model_dim` ({self.vision.model_dim}) where `vision.projection` is "
                f"'none', but is {self.projection_dim} instead."
            )

        return result
