"""EVA-CLIP: its configuration, and how its modules are put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import log
from typing import Final, Literal, TypeAlias, get_args

import torch.nn as nn
from fairseq2.models.transformer import (
    FeedForwardNetwork,
    GLUFeedForwardNetwork,
    StandardMultiheadAttention,
    StandardTransformerEncoder,
    StandardTransformerEncoderLayer,
    TransformerEncoderLayer,
    TransformerNormOrder,
)
from fairseq2.nn import (
    ColumnShardedLinear,
    LayerNorm,
    Linear,
    Projection,
    RowShardedLinear,
    StandardEmbedding,
    StandardLayerNorm,
)
from fairseq2.utils.validation import ValidationResult
from torch.nn import Conv2d

from vembed_fs2.models.activations import create_activation
from vembed_fs2.models.attention import create_sdpa
from vembed_fs2.models.clip.factory import ClipConfig, ClipFactory, ClipTextConfig
from vembed_fs2.models.embedding import EmbeddingModelConfig
from vembed_fs2.models.eva.model import (
    INIT_STD,
    EvaFrontend,
    EvaHead,
    EvaModel,
    EvaPooling,
    EvaVisionTower,
    GridRotaryEncoder,
    GridRotations,
    MlpProjection,
    NormalizedProjection,
    PostNormLayer,
)
from vembed_fs2.models.feed_forward import FusedFeedForwardNetwork
from vembed_fs2.models.vision import BranchResidual, LayerScale, PatchProjection

EVA_FAMILY: Final = "vembed_eva"

EvaProjection: TypeAlias = Literal["classifier", "linear", "mlp", "none"]


@dataclass(kw_only=True)
class EvaVisionConfig:
    """The image Transformer. The defaults are those of EVA02-CLIP-B/16."""

    model_dim: int = 768
    """The dimensionality of the Transformer."""

    num_layers: int = 12
    """The number of Transformer layers."""

    num_attn_heads: int = 12
    """The number of attention heads in Transformer layers."""

    ffn_inner_dim: int = 2048
    """The dimensionality of inner projection layers in feed-forward networks."""

    num_channels: int = 3
    """The number of image channels."""

    image_size: int = 224
    """The height and width of images in pixels; other sizes interpolate the positions."""

    patch_size: int = 16
    """The height and width of patches in pixels."""

    qkv_bias: bool = True
    """If ``True``, the projections of queries and values have a bias. That of keys has none."""

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
    timm's own; ``linear``, that of open_clip), by two (``mlp``) or as it is (``none``).
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
    """The dropout probability on the inputs of the projection; of ``mlp``, on those of its last layer."""

    @property
    def num_patches(self) -> int:
        """The number of patches of an image of ``image_size``."""
        return (self.image_size // self.patch_size) ** 2

    def validate(self) -> ValidationResult:
        result = ValidationResult()
        for error in (*self._size_errors(), *self._value_errors(), *self._layout_errors()):
            result.add_error(error)
        return result

    def _size_errors(self) -> list[str]:
        names = ("model_dim", "num_layers", "num_attn_heads", "ffn_inner_dim", "num_channels", "patch_size")
        errors = [
            f"`{name}` must be at least 1, but is {getattr(self, name)} instead."
            for name in names
            if getattr(self, name) < 1
        ]
        if self.image_size < self.patch_size:
            errors.append(
                f"`image_size` must be at least `patch_size` ({self.patch_size}), but is {self.image_size} instead."
            )
        # A head is rotated in pairs of elements, half of them by rows and half by columns.
        multiple = 4 if self.rope else 1
        if self.num_attn_heads >= 1 and self.model_dim % (multiple * self.num_attn_heads):
            times = f"{multiple} times " if self.rope else ""
            errors.append(
                f"`model_dim` must be a multiple of {times}`num_attn_heads` ({self.num_attn_heads}), "
                f"but is {self.model_dim} instead."
            )
        return errors

    def _value_errors(self) -> list[str]:
        errors = [
            f"`{name}` must be in [0, 1), but is {getattr(self, name)} instead."
            for name in ("attn_dropout_p", "drop_path_p", "head_dropout_p")
            if not 0.0 <= getattr(self, name) < 1.0
        ]
        if self.layer_norm_eps < 0.0:
            errors.append(f"`layer_norm_eps` must not be negative, but is {self.layer_norm_eps} instead.")
        if self.rope_ref_size is not None and self.rope_ref_size < 1:
            errors.append(f"`rope_ref_size` must be at least 1, but is {self.rope_ref_size} instead.")
        return errors

    def _layout_errors(self) -> list[str]:
        errors = [
            f"`{name}` must be one of {', '.join(get_args(kind))}, but is '{getattr(self, name)}' instead."
            for name, kind in (("pooling", EvaPooling), ("projection", EvaProjection))
            if getattr(self, name) not in get_args(kind)
        ]
        if self.post_norm and self.layer_scale_init is not None:
            errors.append("`layer_scale_init` must not be set with `post_norm`: the norms scale already.")
        if self.projection == "classifier" and not self.projection_bias:
            errors.append("`projection_bias` must be set for the projection 'classifier'.")
        return errors


def _default_text() -> ClipTextConfig:
    # open_clip takes the highest index of a text for its end (2), and pads with 0.
    return ClipTextConfig(activation="gelu", eos_idx=2, pad_idx=0, bos_idx=None)


@dataclass(kw_only=True)
class EvaConfig(EmbeddingModelConfig):
    """The configuration of an EVA-CLIP model. The defaults are those of EVA02-CLIP-B/16."""

    text: ClipTextConfig = field(default_factory=_default_text)
    """The text Transformer."""

    vision: EvaVisionConfig = field(default_factory=EvaVisionConfig)
    """The image Transformer."""

    projection_dim: int = 512
    """The dimensionality of embeddings."""

    logit_scale_init: float = log(1 / 0.07)
    """The initial log inverse temperature."""

    train_logit_scale: bool = True
    """If ``False``, the temperature keeps its value in training."""

    def validate(self) -> ValidationResult:
        result = ValidationResult()
        if self.projection_dim < 1:
            result.add_error(f"`projection_dim` must be at least 1, but is {self.projection_dim} instead.")
        if self.vision.projection == "none" and self.projection_dim != self.vision.model_dim:
            result.add_error(
                f"`projection_dim` must be `vision.model_dim` ({self.vision.model_dim}) where `vision.projection` is "
                f"'none', but is {self.projection_dim} instead."
            )
        return result


def create_eva_model(config: EvaConfig) -> EvaModel:
    """Create an EVA-CLIP model with initial weights as timm draws them, and CLIP's for texts."""
    return EvaFactory(config).create_model()


class EvaFactory:
    """Creates the modules of an EVA-CLIP model."""

    def __init__(self, config: EvaConfig) -> None:
        self._config = config

    def create_model(self) -> EvaModel:
        config = self._config
        # The text Transformer is CLIP's.
        text = ClipFactory(ClipConfig(text=config.text, projection_dim=config.projection_dim)).create_text_tower()
        vision = EvaVisionFactory(config.vision, config.projection_dim).create_tower()
        model = EvaModel(text, vision, config.logit_scale_init, config.train_logit_scale)
        model.tokens_per_image = config.vision.num_patches + 1
        return model


class EvaVisionFactory:
    """Creates the modules of the image Transformer."""

    def __init__(self, config: EvaVisionConfig, projection_dim: int) -> None:
        self._config = config
        self._projection_dim = projection_dim
        self._head_dim = config.model_dim // config.num_attn_heads

    def create_tower(self) -> EvaVisionTower:
        encoder = StandardTransformerEncoder([self.create_layer(i) for i in range(self._config.num_layers)])
        return EvaVisionTower(self.create_frontend(), encoder, self.create_head())

    def create_frontend(self) -> EvaFrontend:
        config = self._config
        patch_proj = PatchProjection(
            config.num_channels,
            config.model_dim,
            config.patch_size,
            bias=not config.input_norm,
            init_fn=Conv2d.reset_parameters,
        )
        pos_embed = rotations = None
        if config.learned_positions:
            pos_embed = StandardEmbedding(config.num_patches + 1, config.model_dim, init_fn=_init_positions)
        if config.rope:
            rotations = GridRotations(self._head_dim, config.rope_ref_size)
        layer_norm = self.create_layer_norm(config.model_dim) if config.input_norm else None
        return EvaFrontend(patch_proj, pos_embed, layer_norm, rotations)

    def create_layer(self, idx: int) -> TransformerEncoderLayer:
        config = self._config
        norms = [self.create_layer_norm(config.model_dim) for _ in range(2)]
        drop_p = config.drop_path_p * idx / max(config.num_layers - 1, 1)
        residuals = [BranchResidual(self.create_scale(), drop_p) for _ in range(2)]
        self_attn, ffn = self.create_self_attention(idx), self.create_ffn(idx)
        if config.post_norm:
            return PostNormLayer(
                self_attn, norms[0], ffn, norms[1], self_attn_residual=residuals[0], ffn_residual=residuals[1]
            )
        return StandardTransformerEncoderLayer(
            self_attn,
            norms[0],
            ffn,
            norms[1],
            norm_order=TransformerNormOrder.PRE,
            self_attn_residual=residuals[0],
            ffn_residual=residuals[1],
        )

    def create_scale(self) -> LayerScale | None:
        init = self._config.layer_scale_init
        return None if init is None else LayerScale(self._config.model_dim, init)

    def create_self_attention(self, idx: int) -> StandardMultiheadAttention:
        config = self._config
        attn = StandardMultiheadAttention(
            config.model_dim,
            config.num_attn_heads,
            create_sdpa(dropout_p=config.attn_dropout_p),
            qkv_proj_init_fn=_init_linear(INIT_STD),
            pos_encoder=GridRotaryEncoder(self._head_dim) if config.rope else None,
            bias=config.qkv_bias,
            output_proj_bias=True,
        )
        attn.k_proj = ColumnShardedLinear(
            config.model_dim, config.model_dim, bias=False, gather_output=False, init_fn=_init_linear(INIT_STD)
        )
        attn.output_proj = self.create_output_proj(config.model_dim, idx, normalized=config.attn_norm)
        return attn

    def create_ffn(self, idx: int) -> FeedForwardNetwork:
        config = self._config
        init_fn = _init_linear(INIT_STD)
        ffn: FeedForwardNetwork
        if config.gated_ffn:
            ffn = GLUFeedForwardNetwork(
                config.model_dim, config.ffn_inner_dim, bias=True, inner_dim_scale=1.0, proj_init_fn=init_fn
            )
        else:
            ffn = FusedFeedForwardNetwork(
                config.model_dim,
                config.ffn_inner_dim,
                bias=True,
                inner_activation=create_activation("gelu"),
                proj_init_fn=init_fn,
            )
        ffn.register_module(
            "output_proj", self.create_output_proj(config.ffn_inner_dim, idx, normalized=config.ffn_norm)
        )
        return ffn

    def create_output_proj(self, input_dim: int, idx: int, *, normalized: bool) -> Projection:
        # Smaller the more layers precede, so that states do not grow with them.
        std = INIT_STD / (2 * (idx + 1)) ** 0.5
        proj = RowShardedLinear(
            input_dim, self._config.model_dim, bias=True, scatter_input=normalized, init_fn=_init_linear(std)
        )
        return NormalizedProjection(self.create_layer_norm(input_dim), proj) if normalized else proj

    def create_head(self) -> EvaHead:
        config = self._config
        return EvaHead(
            self.create_layer_norm(config.model_dim),
            config.pooling,
            self.create_projection(),
            norm_after_pooling=config.norm_after_pooling,
            dropout_p=0.0 if config.projection == "mlp" else config.head_dropout_p,
        )

    def create_projection(self) -> Projection | None:
        config = self._config
        input_dim, output_dim, bias = config.model_dim, self._projection_dim, config.projection_bias
        match config.projection:
            case "none":
                return None
            case "classifier":
                # timm's classifiers start from almost nothing.
                return Linear(input_dim, output_dim, bias=True, init_fn=_init_linear(INIT_STD * 0.001))
            case "linear":
                return Linear(input_dim, output_dim, bias=bias)
            case "mlp":
                return MlpProjection(input_dim, output_dim, bias, config.head_dropout_p)

    def create_layer_norm(self, dim: int) -> LayerNorm:
        return StandardLayerNorm(dim, bias=True, eps=self._config.layer_norm_eps)


def _init_positions(embed: StandardEmbedding) -> None:
    nn.init.trunc_normal_(embed.weight, std=INIT_STD)


def _init_linear(std: float) -> Callable[[Linear], None]:
    def init_projection(proj: Linear) -> None:
        nn.init.trunc_normal_(proj.weight, std=std)
        if proj.bias is not None:
            nn.init.zeros_(proj.bias)

    return init_projection
