"""The configuration of SigLIP models."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from fairseq2.utils.validation import ValidationResult
from typing_extensions import override

from vembed_fs2.embedding.model import EmbeddingModelConfig, HeadConfig
from vembed_fs2.models.common.checks import check_head, to_result
from vembed_fs2.models.common.dual import DualTowerConfig

SIGLIP_FAMILY: Final = "vembed_siglip"


@dataclass(kw_only=True)
class SiglipTowerConfig(DualTowerConfig):
    """What the text and the image Transformer have in common."""

    activation: str = "gelu_pytorch_tanh"
    """The activation function of feed-forward networks, by transformers' name."""

    layer_norm_eps: float = 1e-6
    """The value added to the denominator of Layer Normalization."""


@dataclass(kw_only=True)
class SiglipTextConfig(SiglipTowerConfig):
    """The text Transformer."""

    vocab_size: int = 32_000
    """The size of the vocabulary."""

    max_seq_len: int = 64
    """The number of tokens of a text, padding included: texts are padded to it, and its last state is the text."""

    projection_dim: int = 768
    """The dimensionality of embeddings of texts."""

    pad_idx: int | None = 1
    """The index of the padding token; texts with a mask are padded with it."""

    bos_idx: int | None = 49_406
    """The index of a token that no tokenizer of SigLIP writes. The model does not use it; kept for export."""

    eos_idx: int | None = 49_407
    """The same; SigLIP's end token is 1."""

    @override
    def _positive_fields(self) -> tuple[str, ...]:
        return (*super()._positive_fields(), "vocab_size", "max_seq_len", "projection_dim")


@dataclass(kw_only=True)
class SiglipVisionConfig(SiglipTowerConfig):
    """The image Transformer."""

    num_channels: int = 3
    """The number of image channels."""

    image_size: int = 224
    """
    The height and width of images in pixels; other sizes interpolate the
    positions. Not used with ``naflex`` of :class:`SiglipConfig`.
    """

    patch_size: int = 16
    """The height and width of patches in pixels."""

    num_patches: int = 256
    """
    The number of positions that are learned, a square; an image's positions are
    interpolated. Used with ``naflex`` only.
    """

    @override
    def validate(self) -> ValidationResult:
        result = super().validate()

        if self.image_size < self.patch_size:
            result.add_error(
                f"`image_size` must be at least `patch_size` ({self.patch_size}), but is {self.image_size} instead."
            )

        if self.num_patches >= 1 and math.isqrt(self.num_patches) ** 2 != self.num_patches:
            result.add_error(f"`num_patches` must be a square, but is {self.num_patches} instead.")

        return result

    @override
    def _positive_fields(self) -> tuple[str, ...]:
        return (*super()._positive_fields(), "num_channels", "image_size", "patch_size", "num_patches")


@dataclass(kw_only=True)
class SiglipConfig(EmbeddingModelConfig):
    """The configuration of a SigLIP model. The defaults describe SigLIP base, 224 pixels."""

    text: SiglipTextConfig | None = field(default_factory=SiglipTextConfig)
    """The text Transformer; ``None`` for a model of images only."""

    vision: SiglipVisionConfig | None = field(default_factory=SiglipVisionConfig)
    """The image Transformer; ``None`` for a model of texts only."""

    naflex: bool = False
    """
    If ``True``, images are of any aspect ratio and number of patches, as in the
    NaFlex models of SigLIP 2 (transformers' ``siglip2``; the SigLIP 2 models of
    one image size are ``siglip`` there).
    """

    head: HeadConfig | None = None
    """
    What follows the projected states of texts and of images, if not the pooling
    of each Transformer itself (``pooler`` means that one).
    """

    logit_scale_init: float | None = math.log(10.0)
    """The initial log inverse temperature, as in the paper; transformers starts from 0."""

    logit_bias_init: float | None = -10.0
    """The initial bias of the logits, as in the paper; transformers starts from 0."""

    def validate(self) -> ValidationResult:
        dim = self.text.projection_dim if self.text is not None else self.vision.model_dim if self.vision else 0

        result = to_result(check_head(self.head, dim, has_class_token=self.vision is None))

        if self.text is None and self.vision is None:
            result.add_error("`text` and `vision` must not both be `None`.")

        if self.text is not None and self.vision is not None:
            if self.text.projection_dim != self.vision.model_dim:
                result.add_error(
                    f"`text.projection_dim` must be `vision.model_dim` ({self.vision.model_dim}), "
                    f"but is {self.text.projection_dim} instead."
                )

            for name in ("logit_scale_init", "logit_bias_init"):
                if getattr(self, name) is None:
                    result.add_error(f"`{name}` must not be `None` in a model of texts and images.")

        return result
