"""The configuration of decoders of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from fairseq2.utils.validation import ValidationResult

from vembed_fs2.models.common.checks import check_choice, check_positive, to_result
from vembed_fs2.models.common.decoder_config import DecoderConfig

QWEN3_FAMILY: Final = "vembed_qwen3"

Variant: TypeAlias = Literal["qwen3", "qwen2", "mistral", "llama"]

VARIANTS: Final[tuple[Variant, ...]] = ("qwen3", "qwen2", "mistral", "llama")

ROPE_TYPES: Final = ("linear", "dynamic", "yarn", "longrope", "llama3")


@dataclass(kw_only=True)
class RopeScaling:
    """How rotary positions are stretched for texts that are longer than those of the pretraining."""

    rope_type: str = "linear"
    """
    The way: ``linear``, ``dynamic``, ``yarn`` (https://arxiv.org/abs/2309.00071), ``longrope``
    (https://arxiv.org/abs/2402.13753) or ``llama3``.
    """

    factor: float | None = None
    """How many times longer texts may be; ``longrope`` works it out of the other lengths, if ``None``."""

    original_max_position_embeddings: int | None = None
    """``yarn``, ``longrope``, ``llama3``: the longest text of the pretraining, in tokens."""

    attention_factor: float | None = None
    """``yarn``, ``longrope``: what cosines and sines are multiplied by; worked out of ``factor``, if ``None``."""

    beta_fast: float | None = None
    """``yarn``: the number of turns from which on frequencies are kept; 32, if ``None``."""

    beta_slow: float | None = None
    """``yarn``: the number of turns up to which frequencies are divided by ``factor``; 1, if ``None``."""

    mscale: float | None = None
    """``yarn``: with ``mscale_all_dim`` another way to work ``attention_factor`` out."""

    mscale_all_dim: float | None = None
    """``yarn``: see ``mscale``."""

    truncate: bool | None = None
    """``yarn``: whether the bounds between the frequencies are whole numbers; they are, if ``None``."""

    short_factor: Sequence[float] | None = None
    """``longrope``: what frequencies are divided by in texts that are not longer than those of the pretraining."""

    long_factor: Sequence[float] | None = None
    """``longrope``: what frequencies are divided by in longer texts."""

    low_freq_factor: float | None = None
    """``llama3``: wavelengths longer than the pretraining's texts by this factor are divided by ``factor``."""

    high_freq_factor: float | None = None
    """``llama3``: wavelengths shorter than the pretraining's texts by this factor are kept."""


@dataclass(kw_only=True)
class Qwen3Config(DecoderConfig):
    """The configuration of a decoder of texts. The defaults describe Qwen3-Embedding-0.6B."""

    variant: Variant = "qwen3"
    """The model of transformers that checkpoints are written for; the other fields say what is computed."""

    attn_window: int | None = None
    """The tokens that a token attends to in ``windowed_layers``, itself included."""

    windowed_layers: Sequence[int] = ()
    """The layers in which a token attends to the last ``attn_window`` tokens only."""

    rope_scaling: RopeScaling | None = None
    """How positions are stretched, if they are."""

    def validate(self) -> ValidationResult:
        return to_result(self._decoder_errors(), self._value_errors(), self._scaling_errors(), self._window_errors())

    def _value_errors(self) -> Iterator[str]:
        yield from check_choice(self, "variant", VARIANTS)
        yield from check_positive(self, "attn_window")

    def _scaling_errors(self) -> Iterator[str]:
        scaling = self.rope_scaling
        if scaling is None:
            return
        has_other = scaling.attention_factor is not None or scaling.original_max_position_embeddings is not None
        if scaling.rope_type not in ROPE_TYPES:
            yield f"`rope_scaling.rope_type` must be one of {', '.join(ROPE_TYPES)}, but is '{scaling.rope_type}'."
        if scaling.factor is None and not (scaling.rope_type == "longrope" and has_other):
            yield "`rope_scaling.factor` is missing."
        for name in ("short_factor", "long_factor") if scaling.rope_type == "longrope" else ():
            if len(getattr(scaling, name) or ()) != self.attn_head_dim // 2:
                yield f"`rope_scaling.{name}` must be {self.attn_head_dim // 2} numbers, half the size of a head."

    def _window_errors(self) -> Iterator[str]:
        if self.windowed_layers and self.attn_window is None:
            yield "`windowed_layers` needs `attn_window`."
        if self.windowed_layers and not self.is_causal:
            yield "`windowed_layers` is supported for causal decoders only."
        if any(not 0 <= idx < self.num_layers for idx in self.windowed_layers):
            yield f"`windowed_layers` must be between 0 and {self.num_layers - 1}, but is {list(self.windowed_layers)}."
