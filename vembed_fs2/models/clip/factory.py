"""CLIP: its configuration, and how its modules are put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, get_args

import torch.nn as nn
from fairseq2.models.transformer import (
    StandardMultiheadAttention,
    StandardTransformerEncoder,
    StandardTransformerEncoderLayer,
    TransformerNormOrder,
)
from fairseq2.nn import Linear, ResidualConnect, StandardEmbedding, StandardLayerNorm
from fairseq2.utils.validation import ValidationResult
from torch.nn import Conv2d
from typing_extensions import override

from vembed_fs2.errors import ModelLoadError
from vembed_fs2.models.activations import create_activation
from vembed_fs2.models.attention import create_sdpa
from vembed_fs2.models.clip.model import (
    ClipModel,
    ClipTextFrontend,
    ClipTextTower,
    ClipVisionFrontend,
    ClipVisionTower,
    TextPooling,
    VisionPooling,
)
from vembed_fs2.models.embedding import EmbeddingModelConfig
from vembed_fs2.models.feed_forward import FusedFeedForwardNetwork
from vembed_fs2.models.vision import BranchResidual, LayerScale, PatchProjection

CLIP_FAMILY: Final = "vembed_clip"


@dataclass(kw_only=True)
class ClipTowerConfig:
    """What the text and the image Transformer have in common."""

    model_dim: int = 512
    """The dimensionality of the Transformer."""

    num_layers: int = 12
    """The number of Transformer layers."""

    num_attn_heads: int = 8
    """The number of attention heads in Transformer layers."""

    ffn_inner_dim: int = 2048
    """The dimensionality of inner projection layers in feed-forward networks."""

    activation: str = "quick_gelu"
    """The activation function of feed-forward networks, by transformers' name."""

    layer_norm_eps: float = 1e-5
    """The value added to the denominator of Layer Normalization."""

    attn_dropout_p: float = 0.0
    """The dropout probability on attention weights."""

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
        for name in ("layer_norm_eps", "init_range", "init_factor"):
            if getattr(self, name) < 0.0:
                result.add_error(f"`{name}` must not be negative, but is {getattr(self, name)} instead.")
        try:
            create_activation(self.activation, field="activation")
        except ModelLoadError as ex:
            result.add_error(str(ex))
        return result

    def _positive_fields(self) -> tuple[str, ...]:
        return ("model_dim", "num_layers", "num_attn_heads", "ffn_inner_dim")


@dataclass(kw_only=True)
class ClipTextConfig(ClipTowerConfig):
    """The text Transformer."""

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
        if self.pooling not in get_args(TextPooling):
            known = ", ".join(get_args(TextPooling))
            result.add_error(f"`pooling` must be one of {known}, but is '{self.pooling}' instead.")
        if self.sees_padding and self.pad_idx is None:
            result.add_error("`pad_idx` must be set: the model sees padding.")
        return result

    @override
    def _positive_fields(self) -> tuple[str, ...]:
        return (*super()._positive_fields(), "vocab_size", "max_seq_len")


@dataclass(kw_only=True)
class ClipVisionConfig(ClipTowerConfig):
    """The image Transformer."""

    model_dim: int = 768
    """The dimensionality of the Transformer."""

    num_attn_heads: int = 12
    """The number of attention heads in Transformer layers."""

    ffn_inner_dim: int = 3072
    """The dimensionality of inner projection layers in feed-forward networks."""

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
                result.add_error(f"The {side} of `image_size` and `patch_size` must be at least 1.")
            elif image < patch:
                result.add_error(
                    f"The {side} of `image_size` must be at least that of `patch_size` ({patch}), "
                    f"but is {image} instead."
                )
        if self.pooling not in get_args(VisionPooling):
            known = ", ".join(get_args(VisionPooling))
            result.add_error(f"`pooling` must be one of {known}, but is '{self.pooling}' instead.")
        if not 0.0 <= self.patch_dropout_p < 1.0:
            result.add_error(f"`patch_dropout_p` must be in [0, 1), but is {self.patch_dropout_p} instead.")
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
    """The configuration of a CLIP model. The defaults are those of ViT-B/32."""

    text: ClipTextConfig = field(default_factory=ClipTextConfig)
    """The text Transformer."""

    vision: ClipVisionConfig = field(default_factory=ClipVisionConfig)
    """The image Transformer."""

    projection_dim: int = 512
    """The dimensionality of embeddings."""

    logit_scale_init: float = 2.6592
    """The initial log inverse temperature."""

    train_logit_scale: bool = True
    """If ``False``, the temperature keeps its value in training."""

    def validate(self) -> ValidationResult:
        result = ValidationResult()
        if self.projection_dim < 1:
            result.add_error(f"`projection_dim` must be at least 1, but is {self.projection_dim} instead.")
        return result


def create_clip_model(config: ClipConfig) -> ClipModel:
    """Create a CLIP model with initial weights as transformers draws them."""
    return ClipFactory(config).create_model()


class ClipFactory:
    """Creates the modules of a CLIP model."""

    def __init__(self, config: ClipConfig) -> None:
        self._config = config

    def create_model(self) -> ClipModel:
        config = self._config
        model = ClipModel(
            self.create_text_tower(), self.create_vision_tower(), config.logit_scale_init, config.train_logit_scale
        )
        model.tokens_per_image = config.vision.num_patches + 1
        return model

    def create_text_tower(self) -> ClipTextTower:
        config = self._config.text
        std = 0.02 * config.init_factor
        frontend = ClipTextFrontend(
            self.create_embedding(config.vocab_size, config.model_dim, std),
            self.create_embedding(config.max_seq_len, config.model_dim, std),
        )
        encoder = self.create_encoder(config, self.create_layer_norm(config), causal=config.causal)
        return ClipTextTower(
            frontend,
            encoder,
            self.create_projection(config.model_dim, bias=config.proj_bias),
            config.eos_idx,
            pooling=config.pooling,
            pad_id=config.pad_idx if config.sees_padding else None,
        )

    def create_vision_tower(self) -> ClipVisionTower:
        config = self._config.vision
        encoder = self.create_encoder(config, None, causal=False)
        return ClipVisionTower(
            self.create_vision_frontend(),
            encoder,
            self.create_layer_norm(config),
            self.create_projection(config.model_dim),
            pooling=config.pooling,
            norm_after_pooling=config.norm_after_pooling,
        )

    def create_vision_frontend(self) -> ClipVisionFrontend:
        config = self._config.vision
        std = config.init_range * config.init_factor
        # fairseq2's patch extractor always has a bias, and CLIP's has none.
        patch_proj = PatchProjection(
            config.num_channels, config.model_dim, config.patch_size, bias=False, init_fn=_normal(std)
        )
        pos_embed = self.create_embedding(config.num_patches + 1, config.model_dim, std)
        class_std = config.model_dim**-0.5 * config.init_factor
        return ClipVisionFrontend(
            patch_proj,
            pos_embed,
            self.create_layer_norm(config) if config.pre_norm else None,
            class_std,
            grid=config.grid,
            patch_dropout_p=config.patch_dropout_p,
        )

    def create_encoder(
        self, config: ClipTowerConfig, layer_norm: StandardLayerNorm | None, *, causal: bool
    ) -> StandardTransformerEncoder:
        layers = [self.create_layer(config, causal) for _ in range(config.num_layers)]
        return StandardTransformerEncoder(layers, layer_norm)

    def create_layer(self, config: ClipTowerConfig, causal: bool) -> StandardTransformerEncoderLayer:
        return StandardTransformerEncoderLayer(
            self.create_self_attention(config, causal),
            self.create_layer_norm(config),
            self.create_ffn(config),
            self.create_layer_norm(config),
            norm_order=TransformerNormOrder.PRE,
            self_attn_residual=self.create_residual(config),
            ffn_residual=self.create_residual(config),
        )

    def create_residual(self, config: ClipTowerConfig) -> ResidualConnect | None:
        if config.layer_scale_init is None:
            return None
        return BranchResidual(LayerScale(config.model_dim, config.layer_scale_init))

    def create_self_attention(self, config: ClipTowerConfig, causal: bool) -> StandardMultiheadAttention:
        std = config.model_dim**-0.5 * config.init_factor
        return StandardMultiheadAttention(
            config.model_dim,
            config.num_attn_heads,
            create_sdpa(dropout_p=config.attn_dropout_p, causal=causal),
            qkv_proj_init_fn=_normal(std * _depth_scale(config)),
            output_proj_init_fn=_normal(std),
        )

    def create_ffn(self, config: ClipTowerConfig) -> FusedFeedForwardNetwork:
        inner_std = (2 * config.model_dim) ** -0.5 * config.init_factor
        output_std = config.model_dim**-0.5 * config.init_factor * _depth_scale(config)

        def init_projection(proj: Linear) -> None:
            # One function initialises both; the input size tells them apart.
            _normal(inner_std if proj.input_dim == config.model_dim else output_std)(proj)

        activation = create_activation(config.activation, field="activation")
        return FusedFeedForwardNetwork(
            config.model_dim,
            config.ffn_inner_dim,
            bias=True,
            inner_activation=activation,
            proj_init_fn=init_projection,
        )

    def create_projection(self, model_dim: int, *, bias: bool = False) -> Linear:
        return Linear(model_dim, self._config.projection_dim, bias=bias, init_fn=_normal(model_dim**-0.5))

    def create_layer_norm(self, config: ClipTowerConfig) -> StandardLayerNorm:
        return StandardLayerNorm(config.model_dim, bias=True, eps=config.layer_norm_eps)

    def create_embedding(self, num_embeddings: int, embed_dim: int, std: float) -> StandardEmbedding:
        def init_embed(embed: StandardEmbedding) -> None:
            nn.init.normal_(embed.weight, std=std)

        return StandardEmbedding(num_embeddings, embed_dim, init_fn=init_embed)


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return height and width."""
    return (size, size) if isinstance(size, int) else size


def _depth_scale(config: ClipTowerConfig) -> float:
    scale: float = (2 * config.num_layers) ** -0.5
    return scale


def _normal(std: float) -> Callable[[Linear | Conv2d], None]:
    def init_projection(proj: Linear | Conv2d) -> None:
        nn.init.normal_(proj.weight, std=std)
        if proj.bias is not None:
            nn.init.zeros_(proj.bias)

    return init_projection
