"""The configuration of Vision Transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias, get_args

from fairseq2.utils.validation import ValidationResult
from typing_extensions import override

from vembed_fs2.embedding.head import ImageHeadConfig, validate_head
from vembed_fs2.embedding.model import EmbeddingModelConfig
from vembed_fs2.models.common.checks import (
    check_activation,
    check_choice,
    check_heads,
    check_not_negative,
    check_positive,
    check_probabilities,
    to_result,
)
from vembed_fs2.models.common.config import TransformerSizes
from vembed_fs2.models.common.vision import as_pair
from vembed_fs2.models.vit.model import PatchGrid

VIT_FAMILY: Final = "vembed_vit"

VitType: TypeAlias = Literal["vit", "vit_mae", "dinov2", "dinov2_with_registers", "dinov3_vit"]

_NO_ROPE: Final[dict[str, object]] = {
    "rope_theta": None,
    "rope_shift": None,
    "rope_jitter": None,
    "rope_rescale": None,
}

_VIT: Final[dict[str, object]] = {
    "mlp_ratio": None,
    "gated_ffn": False,
    "layer_scale_init": None,
    "drop_path_p": 0.0,
    "num_registers": 0,
    "mask_token": False,
    "proj_bias": True,
    "ffn_bias": True,
    **_NO_ROPE,
}

_NO_POOLER: Final[dict[str, object]] = {"pooler": False, "pooler_dim": None, "pooler_activation": "tanh"}

_DINOV2: Final[dict[str, object]] = {"proj_bias": True, "ffn_bias": True, **_NO_ROPE, **_NO_POOLER}

_FIXED: Final[dict[str, dict[str, object]]] = {
    "vit": _VIT,
    "vit_mae": _VIT | _NO_POOLER,
    "dinov2": _DINOV2 | {"num_registers": 0},
    "dinov2_with_registers": _DINOV2 | {"mask_token": True},
    "dinov3_vit": _NO_POOLER | {"mlp_ratio": None, "dropout_p": 0.0, "mask_token": True},
}
"""The options that each model does not have, and the values that stand for that."""

_REQUIRED: Final[dict[str, tuple[str, ...]]] = {
    "vit": (),
    "vit_mae": (),
    "dinov2": ("mlp_ratio", "layer_scale_init"),
    "dinov2_with_registers": ("mlp_ratio", "layer_scale_init"),
    "dinov3_vit": ("rope_theta", "layer_scale_init"),
}


@dataclass(kw_only=True)
class VitConfig(TransformerSizes, EmbeddingModelConfig):
    """The configuration of a Vision Transformer. The defaults describe ViT-B/16, without pooler."""

    model_type: VitType = "vit"
    """
    Which of transformers' models it is. The options below are what the models
    can differ in; not each of them has each option.
    """

    ffn_inner_dim: int = 3072
    """The dimensionality of inner projection layers in feed-forward networks; not used if ``mlp_ratio`` is set."""

    mlp_ratio: float | None = None
    """
    The inner dimensionality as a multiple of ``model_dim``, of which gated
    networks take two thirds, rounded up to a multiple of 8. DINOv2's.
    """

    gated_ffn: bool = False
    """If ``True``, feed-forward networks are gated: by ``activation`` in DINOv3, always by SiLU in DINOv2."""

    activation: str = "gelu"
    """The activation function of feed-forward networks, by transformers' name."""

    query_bias: bool = True
    """If ``True``, query projections have a bias."""

    key_bias: bool = True
    """If ``True``, key projections have a bias."""

    value_bias: bool = True
    """If ``True``, value projections have a bias."""

    proj_bias: bool = True
    """If ``True``, output projections of attention have a bias."""

    ffn_bias: bool = True
    """If ``True``, projections of feed-forward networks have a bias."""

    layer_scale_init: float | None = None
    """The initial factors of LayerScale; there is none if ``None``."""

    dropout_p: float = 0.0
    """The dropout probability on embeddings (not MAE's) and on outputs of attention and (not DINO's) feed-forward."""

    attn_dropout_p: float = 0.0
    """The dropout probability on attention weights."""

    drop_path_p: float = 0.0
    """The probability that an image does without a branch of a layer in training (stochastic depth)."""

    layer_norm_eps: float = 1e-12
    """The value added to the denominator of Layer Normalization."""

    init_std: float = 0.02
    """The standard deviation of the initial weights."""

    num_channels: int = 3
    """The number of image channels."""

    image_size: int | Sequence[int] = 224
    """Height and width of images in pixels, or both in one; other sizes interpolate the positions."""

    patch_size: int | Sequence[int] = 16
    """Height and width of patches in pixels, or both in one."""

    num_registers: int = 0
    """The number of register tokens."""

    mask_token: bool = False
    """If ``True``, the checkpoint has a token for the masked patches of pretraining. Kept for export."""

    rope_theta: float | None = None
    """The base of the wavelengths of rotary positions; if ``None``, positions are a table. DINOv3's, as below."""

    rope_shift: float | None = None
    """In training, shifts the coordinates of patches by a random amount of up to this."""

    rope_jitter: float | None = None
    """In training, stretches rows and columns by random factors of up to this."""

    rope_rescale: float | None = None
    """In training, scales the coordinates by a random factor of up to this."""

    pooler: bool = False
    """If ``True``, the checkpoint has ViT's pooler; used by ``head.pooling`` 'pooler', else kept for export."""

    pooler_dim: int | None = None
    """The dimensionality of the pooler's output; ``model_dim`` if ``None``."""

    pooler_activation: str = "tanh"
    """The activation function of the pooler, by transformers' name."""

    head: ImageHeadConfig = field(default_factory=ImageHeadConfig)
    """What follows the encoder."""

    kept: Mapping[str, object] = field(default_factory=dict)
    """Fields of ``config.json`` that only pretraining or other tasks use, such as ``mask_ratio``. Kept for export."""

    @property
    def inner_dim(self) -> int:
        """The true inner dimensionality of feed-forward networks."""
        if self.mlp_ratio is None:
            return self.ffn_inner_dim
        inner_dim = int(self.model_dim * self.mlp_ratio)
        return (int(inner_dim * 2 / 3) + 7) // 8 * 8 if self.gated_ffn else inner_dim

    @property
    def has_fused_gates(self) -> bool:
        """Whether transformers keeps the gate and the inner projection of a layer in one tensor."""
        return self.gated_ffn and self.model_type != "dinov3_vit"

    @property
    def grid(self) -> PatchGrid:
        """The number of patches of an image of ``image_size``."""
        (height, width), patch = as_pair(self.image_size), as_pair(self.patch_size)
        return PatchGrid(height // patch[0], width // patch[1])

    def validate(self) -> ValidationResult:
        has_pooler = self.model_type == "vit" and self.pooler
        head_errors = validate_head(
            self.head, self.model_dim, multi_vector=True, has_pooler=has_pooler, pooler_dim=self.pooler_dim
        )

        return to_result(
            self._type_errors(), self._dim_errors(), self._size_errors(), self._value_errors(), head_errors
        )

    @override
    def _positive_fields(self) -> tuple[str, ...]:
        return (*super()._positive_fields(), "num_channels", "pooler_dim", "rope_theta")

    def _type_errors(self) -> Iterator[str]:
        """What the model of ``model_type`` does not have in transformers, and so could not be written."""
        errors = list(check_choice(self, "model_type", get_args(VitType)))
        if errors:
            yield from errors
            return

        for name, fixed in _FIXED[self.model_type].items():
            value = getattr(self, name)
            if value != fixed:
                yield f"`{name}` of a {self.model_type} model must be {fixed}, but is {value} instead."

        for name in _REQUIRED[self.model_type]:
            if getattr(self, name) is None:
                yield f"`{name}` of a {self.model_type} model must be set."

        if self.model_type != "dinov3_vit" and not self.query_bias == self.key_bias == self.value_bias:
            yield f"`query_bias`, `key_bias` and `value_bias` of a {self.model_type} model must be the same."

    def _dim_errors(self) -> Iterator[str]:
        yield from check_positive(self, *self._positive_fields())
        yield from check_not_negative(self, "num_registers")

        if self.mlp_ratio is not None and self.model_dim * self.mlp_ratio < 1.0:
            yield f"`mlp_ratio` must be at least 1 / `model_dim`, but is {self.mlp_ratio} instead."

        # A head is rotated in pairs of elements, half of them by rows and half by columns.
        yield from check_heads(self, multiple=4 if self.rope_theta is not None else 1)

        if self.model_type == "vit_mae" and self.model_dim % 4:
            yield f"`model_dim` of a vit_mae model must be a multiple of 4, but is {self.model_dim} instead."

    def _size_errors(self) -> Iterator[str]:
        errors = []
        for name in ("image_size", "patch_size"):
            size = getattr(self, name)
            if not isinstance(size, int) and len(size) != 2:
                errors.append(f"`{name}` must be one number or two, but is {size} instead.")
            elif min(as_pair(size)) < 1:
                errors.append(f"`{name}` must be positive, but is {size} instead.")
            elif self.model_type.startswith("dino") and len(set(as_pair(size))) > 1:
                # transformers takes its table of positions for a square one.
                errors.append(f"`{name}` of a {self.model_type} model must be square, but is {size} instead.")

        yield from errors

        if not errors and min(self.grid) < 1:
            yield f"`image_size` must be at least `patch_size` ({self.patch_size}), but is {self.image_size} instead."

    def _value_errors(self) -> Iterator[str]:
        yield from check_probabilities(self, "dropout_p", "attn_dropout_p", "drop_path_p")
        yield from check_not_negative(self, "layer_norm_eps", "init_std", "rope_shift")

        for name in ("rope_jitter", "rope_rescale"):
            value = getattr(self, name)
            if value is not None and value < 1.0:
                yield f"`{name}` must be at least 1, but is {value} instead."

        yield from check_activation(self)
        yield from check_activation(self, "pooler_activation")
