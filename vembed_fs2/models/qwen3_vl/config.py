"""The configuration of Qwen3-VL models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import isqrt
from typing import Final

from fairseq2.utils.validation import ValidationResult

from vembed_fs2.models.common.checks import check_activation, check_heads, check_not_negative, check_positive, to_result
from vembed_fs2.models.common.config import TransformerSizes
from vembed_fs2.models.common.decoder_config import DecoderConfig

QWEN3_VL_FAMILY: Final = "vembed_qwen3_vl"


@dataclass(kw_only=True)
class VisionConfig(TransformerSizes):
    """The configuration of the vision tower. The defaults describe Qwen3-VL-Embedding-2B's."""

    model_dim: int = 1024
    """The dimensionality of the tower."""

    num_layers: int = 24
    """The number of layers."""

    num_attn_heads: int = 16
    """The number of attention heads."""

    ffn_inner_dim: int = 4096
    """The dimensionality of inner projection layers in feed-forward networks."""

    activation: str = "gelu_pytorch_tanh"
    """The activation function of feed-forward networks, by transformers' name."""

    num_channels: int = 3
    """The channels of an image."""

    patch_size: int = 16
    """The height and width of a patch, in pixels."""

    temporal_patch_size: int = 2
    """The frames of a patch; an image is repeated to have as many."""

    merge_size: int = 2
    """The height and width of the square of patches that become one token of the decoder."""

    num_positions: int = 2304
    """The entries of the position table, a square that is stretched to the image's patches."""

    deepstack_layers: Sequence[int] = (5, 11, 17)
    """The layers whose states are added to the decoder's, those of the first one after its first layer."""

    init_std: float = 0.02
    """The standard deviation of the initial weights."""

    @property
    def patch_dim(self) -> int:
        """The number of values of a patch."""
        return self.num_channels * self.temporal_patch_size * self.patch_size**2

    def validate(self) -> ValidationResult:
        return to_result(self._errors())

    def _errors(self) -> Iterator[str]:
        yield from check_positive(self, *self._positive_fields(), "num_channels", "patch_size", "temporal_patch_size")
        yield from check_positive(self, "merge_size", "num_positions")
        yield from check_not_negative(self, "init_std")
        yield from check_activation(self)

        # Half of a head is rotated by the row of a patch, and half by its column.
        yield from check_heads(self, multiple=4)
        if self.num_positions > 0 and isqrt(self.num_positions) ** 2 != self.num_positions:
            yield f"`num_positions` must be a square, but is {self.num_positions} instead."
        if any(not 0 <= idx < self.num_layers for idx in self.deepstack_layers):
            yield f"`deepstack_layers` must be less than `num_layers`, but are {list(self.deepstack_layers)} instead."


@dataclass(kw_only=True)
class Qwen3VLConfig(DecoderConfig):
    """The configuration of a Qwen3-VL model. The defaults describe Qwen3-VL-Embedding-2B."""

    model_dim: int = 2048
    """The dimensionality of the decoder."""

    ffn_inner_dim: int = 6144
    """The dimensionality of the two inner projections of the decoder's feed-forward networks."""

    max_seq_len: int = 262_144
    """The longest row in tokens, images included; there is no position table that ends there."""

    vocab_size: int = 151_936
    """The size of the vocabulary."""

    rope_theta: float = 5_000_000.0
    """The base of rotary positions."""

    mrope_section: Sequence[int] = (24, 20, 20)
    """How many pairs of a head's dimensions are rotated by time, by row and by column."""

    vision: VisionConfig = field(default_factory=lambda: VisionConfig())
    """The vision tower."""

    image_idx: int = 151_655
    """The token that stands for a part of an image."""

    video_idx: int = 151_656
    """The token that stands for a part of a frame of a video."""

    vision_start_idx: int = 151_652
    """The token before an image or frame."""

    vision_end_idx: int = 151_653
    """The token after an image or frame."""

    def validate(self) -> ValidationResult:
        return to_result(self._decoder_errors(), self._vision_errors())

    def _vision_errors(self) -> Iterator[str]:
        if len(self.mrope_section) != 3 or any(size < 0 for size in self.mrope_section):
            yield f"`mrope_section` must be three sizes, but is {list(self.mrope_section)} instead."
        elif 3 * max(self.mrope_section[1:]) > self.attn_head_dim // 2:
            yield f"`mrope_section` needs larger heads than {self.attn_head_dim}: it is {list(self.mrope_section)}."
        if len(self.vision.deepstack_layers) > self.num_layers:
            yield "`vision.deepstack_layers` are more than the decoder has layers."
        for name in ("image_idx", "video_idx"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                yield f"`{name}` must be less than `vocab_size` ({self.vocab_size}), but is {getattr(self, name)}."
