"""Calls models of transformers.

Shapes: T texts, P images, N texts or images, L tokens, S states, M model size,
C x H x W pixels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from vembed_fs2.models.auto.backbone import Backbone


class Outputs(NamedTuple):
    """What a model of transformers makes of texts or images."""

    states: Tensor | None
    """The state of each token or patch; ``None`` of dual encoders. *Shape:* ``[N, S, M]``."""

    pooled: Tensor | None
    """What its own pooler or projection gives. *Shape:* ``[N, M]``."""

    is_map: bool = False
    """Whether the states come from convolutions, so that all of them belong to patches."""


def run_text(
    wrapped: Module, backbone: Backbone, ids_TL: Tensor, mask_TL: Tensor | None, types_TL: Tensor | None
) -> Outputs:
    """Run the model on texts. *Shape:* all ``[T, L]``; the mask is True for tokens."""
    mask = torch.ones_like(ids_TL) if mask_TL is None else mask_TL.to(ids_TL.dtype)

    inputs: dict[str, Any] = {"input_ids": ids_TL, "attention_mask": mask, "return_dict": True}
    if types_TL is not None:
        inputs["token_type_ids"] = types_TL

    # Past states would grow a second time where activation checkpointing runs a layer again.
    inputs["use_cache"] = False
    inputs = {name: value for name, value in inputs.items() if name in backbone.text_arguments}
    if type(wrapped).__name__ == "ChineseCLIPModel":
        return Outputs(None, _chinese_text_features(wrapped, inputs))
    if backbone.is_dual:
        return Outputs(None, _features(wrapped.get_text_features(**inputs)))  # type: ignore[operator]

    return _read(wrapped(**inputs))


def _chinese_text_features(wrapped: Any, inputs: dict[str, Any]) -> Tensor:
    """What ``forward`` does. ``get_text_features`` of transformers 4.57 asks for a pooler that the model has not."""
    features: Tensor = wrapped.text_projection(wrapped.text_model(**inputs).last_hidden_state[:, 0])
    return features


def run_image(wrapped: Module, backbone: Backbone, x_PCHW: Tensor) -> Outputs:
    """Run the model on images."""
    inputs: dict[str, Any] = {"pixel_values": x_PCHW, "return_dict": True}
    if tuple(x_PCHW.shape[2:]) != backbone.image_size:
        inputs["interpolate_pos_encoding"] = True

    inputs = {name: value for name, value in inputs.items() if name in backbone.image_arguments}
    if backbone.is_dual:
        return Outputs(None, _features(wrapped.get_image_features(**inputs)))  # type: ignore[operator]

    return _read(wrapped(**inputs))


def _read(output: Any) -> Outputs:
    if isinstance(output, tuple):
        states, pooled = output[0], None
    else:
        states, pooled = getattr(output, "last_hidden_state", None), getattr(output, "pooler_output", None)

    is_map = isinstance(states, Tensor) and states.ndim == 4
    if isinstance(states, Tensor):
        states = states.flatten(2).transpose(1, 2) if is_map else states if states.ndim == 3 else None
    if isinstance(pooled, Tensor):
        pooled = pooled.flatten(1)

    return Outputs(states, pooled, is_map)


def _features(output: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim != 2:
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"its features must be one vector per input, but are {shape}")
    return output
