"""The configuration of CLIP models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, get_args

from fairseq2.utils.validation import ValidationResult
from typing_extensions import override

from vembed_fs2.embedding.model import EmbeddingModelConfig, HeadConfig
from vembed_fs2.models.clip.model import TextPooling, VisionPooling
from vembed_fs2.models.common.checks import check_choice, check_head, check_positive, check_probabilities, to_result
from vembed_fs2.models.common.dual import DualTowerConfig
from vembed_fs2.models.common.vision import as_pair

CLIP_FAMILY: Final = "vembed_clip"


@dataclass(kw_only=True)
class ClipTowerConfig(DualTowerConfig):
    """What the text and the image Transformer have in common."""

    activation: str = "quick_gelu"
    """The activation function of feed-forward networks, by transformers' name."""

    layer_scale_init: float | None = None
    """The initial factor of what each layer adds to its input (LayerScale); none if ``None``."""

    init_range: float = 0.02
    """The standard deviation of the initial patch projection and image positions."""

    init_factor: float = 1.0
    """The factor of all initial standard deviations of this Transformer."""

    single_tower_dim: int = 512
    """
    The embedding size of the model that transformers makes of this Transformer
    alone. CLIP itself uses ``projection_dim`` of :class:`ClipConfig`.
    """

    @override
    def _not_negative_fields(self) -> tuple[str, ...]:
        return (*super()._not_negative_fields(), "init_range", "init_factor")


@dataclass(kw_only=True)
class ClipTextConfig(ClipTowerConfig):
    """The text Transformer."""

    model_dim: int = 512
    """The dimensionality of the Transformer."""

    num_attn_heads: int = 8
    """The number of attention heads in Transformer layers."""

    ffn_inner_dim: int = 2048
    """The dimensionality of inner projection layers in feed-forward networks."""

    vocab_size: int = 49_408
    """The size of the vocabulary."""

    max_seq_len: int = 77
    """The maximum number of tokens of a text, special tokens included."""

    pad_idx: int | None = 1
    """The index of the padding token. The model uses it only if it sees padding (:attr:`sees_padding`)."""

    bos_idx: int | None = 49_406
    """The index of the token that starts a text. The model does not use it; kept for export."""

    eos_idx: int = 49_407
    """
    The index of the token that ends a text, whose state becomes the embedding.
    2 stands for the highest index in the text, as in old configurations, if
    ``pooling`` is ``clip``.
    """

    pooling: TextPooling = "clip"
    """
    Whose state becomes the embedding: as in transformers' CLIP (``clip``), that
    of the first token ``eos_idx`` (``eos``), or of the ``first`` or ``last``
    position.
    """

    causal: bool = True
    """If ``True``, no token sees the ones after it."""

    proj_bias: bool = False
    """If ``True``, the projection to the embedding has a bias."""

    @property
    def sees_padding(self) -> bool:
        """Whether padding changes embeddings, so that each text is padded to ``max_seq_len``."""
        return not self.causal or self.pooling == "last"

    @override
    def validate(self) -> ValidationResult:
        result = super().validate()

        for error in check_choice(self, "pooling", get_args(TextPooling)):
            result.add_error(error)

        if self.sees_padding and self.pad_idx is None:
            result.add_error("`pad_idx` must be set: the model sees padding.")

        return result

    @override
    def _positive_fields(self) -> tuple[str, ...]:
        return (*super()._positive_fields(), "vocab_size", "max_seq_len")


@dataclass(kw_only=True)
class ClipVisionConfig(ClipTowerConfig):
    """The image Transformer."""

    num_channels: int = 3
    """The number of image channels."""

    image_size: int | tuple[int, int] = 224
    """The height and width of images in pixels, if one number, both; other sizes interpolate the positions."""

    patch_size: int | tuple[int, int] = 32
    """The height and width of patches in pixels, if one number, both."""

    pre_norm: bool = True
    """If ``True``, the inputs of the Transformer are normalised."""

    pooling: VisionPooling = "cls"
    """Whose state becomes the embedding: the class token's, or the mean of the patches'."""

    norm_after_pooling: bool = True
    """If ``True``, the mean is normalised; else the states that it is taken of."""

    patch_dropout_p: float = 0.0
    """The part of the patches that each image does without in training."""

    @override
    def validate(self) -> ValidationResult:
        result = super().validate()

        for side, image, patch in zip(("height", "width"), as_pair(self.image_size), as_pair(self.patch_size)):
            if min(image, patch) < 1:
                result.add_error(f"The {side} of `image_size` and `patch_size` must be positive.")
            elif image < patch:
                result.add_error(
                    f"The {side} of `image_size` must be at least the patch's ({patch}), but is {image} instead."
                )

        for error in (
            *check_choice(self, "pooling", get_args(VisionPooling)),
            *check_probabilities(self, "patch_dropout_p"),
        ):
            result.add_error(error)

        return result

    @override
    def _positive_fields(self) -> tuple[str, ...]:
        return (*super()._positive_fields(), "num_channels")

    @property
    def grid(self) -> tuple[int, int]:
        """The rows and columns of patches in an image of ``image_size``."""
        (height, width), (patch_height, patch_width) = as_pair(self.image_size), as_pair(self.patch_size)

        return height // patch_height, width // patch_width

    @property
    def num_patches(self) -> int:
        """The number of patches of an image of ``image_size``."""
        rows, columns = self.grid

        return rows * columns


@dataclass(kw_only=True)
class ClipConfig(EmbeddingModelConfig):
    """The configuration of a CLIP model. The defaults describe ViT-B/32."""

    text: ClipTextConfig = field(default_factory=ClipTextConfig)
    """The text Transformer."""

    vision: ClipVisionConfig = field(default_factory=ClipVisionConfig)
    """The image Transformer."""

    projection_dim: int = 512
    """The dimensionality of embeddings."""

    head: HeadConfig | None = None
    """
    What follows the projected states of texts and of images, if not the pooling
    of each Transformer itself (``pooler`` means that one).
    """

    logit_scale_init: float = 2.6592
    """The initial log inverse temperature."""

    train_logit_scale: bool = True
    """If ``False``, the temperature keeps its value in training."""

    def validate(self) -> ValidationResult:
        return to_result(
            check_positive(self, "projection_dim"),
            check_head(self.head, self.projection_dim, is_causal=self.text.causal),
        )
