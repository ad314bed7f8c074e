from __future__ import annotations

from dataclasses import replace

from vembed_fs2.models.eva import EvaConfig, EvaVisionConfig

from ..families import Case
from ..steps import CLIP, images, texts

VISION = EvaVisionConfig(
    model_dim=16, image_size=8, patch_size=4, num_layers=2, num_attn_heads=2, ffn_inner_dim=24, rope_ref_size=2,
    attn_dropout_p=0.1, drop_path_p=0.2, head_dropout_p=0.1,
)  # fmt: skip

EVA02 = EvaConfig(text=CLIP.text, vision=VISION, projection_dim=12)

PLAIN = replace(
    VISION, gated_ffn=False, attn_norm=False, ffn_norm=False, rope=False, post_norm=True, pooling="mean",
    norm_after_pooling=True,
)  # fmt: skip

SCALED = replace(
    VISION, ffn_norm=False, layer_scale_init=0.5, qkv_bias=False, learned_positions=False, input_norm=True,
    pooling="mean_max", projection="mlp",
)  # fmt: skip

CASES = {
    "norms inside layers": Case("vembed_eva", EVA02, texts, images),
    "plain layers, norms after": Case("vembed_eva", replace(EVA02, vision=PLAIN), images, texts),
    "scaled layers": Case("vembed_eva", replace(EVA02, vision=SCALED), texts, images),
}
