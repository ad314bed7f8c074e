"""SigLIP: its configuration, and how its modules are put together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import torch.nn as nn
from fairseq2.models.transformer import (
    StandardMultiheadAttention,
    StandardTransformerEncoder,
    StandardTransformerEncoderLayer,
    TransformerNormOrder,
)
from fairseq2.nn import Linear, StandardEmbedding, StandardLayerNorm
from fairseq2.utils.validation import ValidationResult
from torch.nn import Conv2d

from vembed_fs2.errors import ModelLoadError
from vembed_fs2.models.activations import create_activation
from vembed_fs2.models.attention import create_sdpa
from vembed_fs2.models.embedding import EmbeddingModelConfig
from vembed_fs2.models.feed_forward import FusedFeedForwardNetwork
from vembed_fs2.models.siglip.model import (
    SiglipAttentionPool,
    SiglipImageFrontend,
    SiglipModel,
    SiglipPatchFrontend,
    SiglipTextFrontend,
    SiglipTextTower,
    SiglipVisionTower,
)
from vembed_fs2.models.vision import PatchProjection

SIGLIP_FAMILY: Final = "vembed_siglip"

# The standard deviation of a normal distribution of variance 1 that is cut off at -2 and 2.
_TRUNCATED_STD: Final = 0.87962566103423978


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


def create_siglip_model(config: SiglipConfig) -> SiglipModel:
    """Create a SigLIP model with initial weights as transformers draws them."""
    return SiglipFactory(config).create_model()


class SiglipFactory:
    """Creates the modules of a SigLIP model."""

    def __init__(self, config: SiglipConfig) -> None:
        self._config = config

    def create_model(self) -> SiglipModel:
        config = self._config
        text = None if config.text is None else self.create_text_tower(config.text)
        vision = None if config.vision is None else self.create_vision_tower(config.vision)
        model = SiglipModel(text, vision, config.logit_scale_init, config.logit_bias_init)
        if config.vision is not None:
            model.tokens_per_image = self.num_positions(config.vision)
        return model

    def create_text_tower(self, config: SiglipTextConfig) -> SiglipTextTower:
        std = config.model_dim**-0.5
        frontend = SiglipTextFrontend(
            self.create_embedding(config.vocab_size, config.model_dim, std),
            self.create_embedding(config.max_seq_len, config.model_dim, std),
        )
        proj = Linear(config.model_dim, config.projection_dim, bias=True, init_fn=_init_lecun)
        return SiglipTextTower(frontend, self.create_encoder(config), proj, config.pad_idx or 0)

    def create_vision_tower(self, config: SiglipVisionConfig) -> SiglipVisionTower:
        frontend = self.create_patch_frontend(config) if self._config.naflex else self.create_image_frontend(config)
        return SiglipVisionTower(frontend, self.create_encoder(config), self.create_attention_pool(config))

    def create_image_frontend(self, config: SiglipVisionConfig) -> SiglipImageFrontend:
        proj = PatchProjection(config.num_channels, config.model_dim, config.patch_size, bias=True, init_fn=_init_lecun)
        return SiglipImageFrontend(proj, self.create_patch_positions(config))

    def create_patch_frontend(self, config: SiglipVisionConfig) -> SiglipPatchFrontend:
        patch_dim = config.num_channels * config.patch_size**2
        proj = Linear(patch_dim, config.model_dim, bias=True, init_fn=_init_lecun)
        return SiglipPatchFrontend(proj, self.create_patch_positions(config))

    def create_patch_positions(self, config: SiglipVisionConfig) -> StandardEmbedding:
        return self.create_embedding(self.num_positions(config), config.model_dim, config.model_dim**-0.5)

    def num_positions(self, config: SiglipVisionConfig) -> int:
        """The number of positions that are learned."""
        side = math.isqrt(config.num_patches) if self._config.naflex else config.image_size // config.patch_size
        return side * side

    def create_attention_pool(self, config: SiglipVisionConfig) -> SiglipAttentionPool:
        attention = StandardMultiheadAttention(
            config.model_dim,
            config.num_attn_heads,
            create_sdpa(),
            # transformers draws the three as one matrix of three times the height.
            qkv_proj_init_fn=_xavier(math.sqrt(0.5)),
            output_proj_init_fn=_init_lecun,
        )
        return SiglipAttentionPool(config.model_dim, attention, self.create_layer_norm(config), self.create_ffn(config))

    def create_encoder(self, config: SiglipTowerConfig) -> StandardTransformerEncoder:
        layers = [self.create_layer(config) for _ in range(config.num_layers)]
        return StandardTransformerEncoder(layers, self.create_layer_norm(config))

    def create_layer(self, config: SiglipTowerConfig) -> StandardTransformerEncoderLayer:
        return StandardTransformerEncoderLayer(
            self.create_self_attention(config),
            self.create_layer_norm(config),
            self.create_ffn(config),
            self.create_layer_norm(config),
            norm_order=TransformerNormOrder.PRE,
        )

    def create_self_attention(self, config: SiglipTowerConfig) -> StandardMultiheadAttention:
        return StandardMultiheadAttention(
            config.model_dim,
            config.num_attn_heads,
            create_sdpa(dropout_p=config.attn_dropout_p),
            qkv_proj_init_fn=_xavier(),
            output_proj_init_fn=_xavier(),
        )

    def create_ffn(self, config: SiglipTowerConfig) -> FusedFeedForwardNetwork:
        return FusedFeedForwardNetwork(
            config.model_dim,
            config.ffn_inner_dim,
            bias=True,
            inner_activation=create_activation(config.activation, field="activation"),
            proj_init_fn=_xavier(bias_std=1e-6),
        )

    def create_layer_norm(self, config: SiglipTowerConfig) -> StandardLayerNorm:
        return StandardLayerNorm(config.model_dim, bias=True, eps=config.layer_norm_eps)

    def create_embedding(self, num_embeddings: int, embed_dim: int, std: float) -> StandardEmbedding:
        def init_embed(embed: StandardEmbedding) -> None:
            nn.init.normal_(embed.weight, std=std)

        return StandardEmbedding(num_embeddings, embed_dim, init_fn=init_embed)


def _xavier(gain: float = 1.0, *, bias_std: float = 0.0) -> Callable[[Linear], None]:
    def init_projection(proj: Linear) -> None:
        nn.init.xavier_uniform_(proj.weight, gain)
        if proj.bias is not None:
            nn.init.normal_(proj.bias, std=bias_std)

    return init_projection


def _init_lecun(proj: Linear | Conv2d) -> None:
    std = (proj.weight.numel() / proj.weight.size(0)) ** -0.5 / _TRUNCATED_STD
    nn.init.trunc_normal_(proj.weight, std=std, a=-2.0 * std, b=2.0 * std)
    if proj.bias is not None:
        nn.init.zeros_(proj.bias)
