"""CLIP as only open_clip has it: CLIPA's pooling and padding, scaled layers, patches that are dropped."""

from __future__ import annotations

from dataclasses import replace

from ..families import Case
from ..steps import CLIP, images, texts

CLIPA = replace(
    CLIP,
    text=replace(
        CLIP.text, activation="gelu", pooling="last", causal=False, pad_idx=0, proj_bias=True, layer_scale_init=0.5
    ),
    vision=replace(
        CLIP.vision,
        activation="gelu",
        pre_norm=False,
        pooling="mean",
        norm_after_pooling=False,
        patch_dropout_p=0.5,
        layer_scale_init=0.5,
    ),
)

CASES = {"texts to images": Case("vembed_clip", CLIPA, texts, images)}
