"""The configuration of siglip models."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from fairseq2.utils.validation import ValidationResult

from vembed_fs2.embedding.activations import create_activation
from vembed_fs2.embedding.model import EmbeddingModelConfig
from vembed_fs2.errors import ModelLoadError

SIGLIP_FAMILY: Final = "vembed_siglip"


@dataclass(kw_only=True)
class SiglipTowerConfig:
    """What the text and the image Transformer have in common."""

    model_dim: int = 768
    """The dimensionality of the Transformer."""

    num_layers: int = 12
    """The number of Transformer layers."""

    num_attn_heads: int = 12
    """The number of attention heads in Transformer layers."""

    ffn_inner_dim: int = 3072
    """The dimensionality of inner projection layers in feed-forward networks."""

    activation: str = "gelu_pytorch_tanh"
    """The activation function of feed-forward networks, by transformers' name."""

    layer_norm_eps: float = 1e-6
    """The value added to the denominator of Layer Normalization."""

    attn_dropout_p: float = 0.0
    """The dropout probability on attention weights."""

    def validate(self) -> ValidationResult:
        result = ValidationResult()
        for name in self._positive_fields():
            if getattr(self, name) < 1:
                result.add_error(f"`{name}` must be at least 1, but is {getattr(self, name)} instead.")
        if self.num_attn_heads > 0 and self.model_dim % self.num_attn_heads:
            result.add_error(
                f"`model_dim` must be a multiple of `num_attn_heads` ({self.num_attn_heads}), "
                f"but is {self.model_dim} instead."
            )
        if not 0.0 <= self.attn_dropout_p < 1.0:
            result.add_error(f"`attn_dropout_p` must be in [0, 1), but is {self.attn_dropout_p} instead.")
        if self.layer_norm_eps < 0.0:
            result.add_error(f"`layer_norm_eps` must not be negative, but is {self.layer_norm_eps} instead.")
        try:
            create_activation(self.activation, field="activation")
        except ModelLoadError as ex:
            result.add_error(str(ex))
        return result

    def _positive_fields(self) -> tuple[str, ...]:
        return ("model_dim", "num_layers", "num_attn_heads", "ffn_inner_dim")


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
    The number of positions that are learned, a square; those of an image are
    interpolated. Used with ``naflex`` only.
    """

    def validate(self) -> ValidationResult:
        result = super().validate()
        if self.image_size < self.patch_size:
            result.add_error(
                f"`image_size` must be at least `patch_size` ({self.patch_size}), but is {self.image_size} instead."
            )
        if self.num_patches >= 1 and math.isqrt(self.num_patches) ** 2 != self.num_patches:
            result.add_error(f"`num_patches` must be a square, but is {self.num_patches} instead.")
        return result

    def _positive_fields(self) -> tuple[str, ...]:
        return (*super()._positive_fields(), "num_channels", "image_size", "patch_size", "num_patches")


@dataclass(kw_only=True)
class SiglipConfig(EmbeddingModelConfig):
    """The configuration of a SigLIP model. The defaults are those of SigLIP base, 224 pixels."""

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

    logit_scale_init: float | None = math.log(10.0)
    """The initial log inverse temperature, as in the paper; transformers starts from 0."""

    logit_bias_init: float | None = -10.0
    """The initial bias of the logits, as in the paper; transformers starts from 0."""

    def validate(self) -> ValidationResult:
        result = ValidationResult()
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
