from __future__ import annotations

from typing import Any, Final

from vembed_fs2.embedding.head import ImageHeadConfig
from vembed_fs2.models.vit import VitConfig

from ..families import Case
from ..steps import images

_SIZES: Final[dict[str, Any]] = {
    "model_dim": 16,
    "num_layers": 2,
    "num_attn_heads": 2,
    "ffn_inner_dim": 24,
    "image_size": 8,
    "patch_size": 4,
    "attn_dropout_p": 0.1,
}

_DINO: Final[dict[str, Any]] = {**_SIZES, "layer_scale_init": 1.0, "drop_path_p": 0.2, "mask_token": True}


def case(**options: Any) -> Case:
    return Case("vembed_vit", VitConfig(**options), images, images)


CASES = {
    "pooler": case(**_SIZES, dropout_p=0.1, pooler=True, head=ImageHeadConfig(pooling="pooler")),
    "fixed positions": case(**_SIZES, model_type="vit_mae", dropout_p=0.1, head=ImageHeadConfig(pooling="mean")),
    "layer scale": case(**_DINO, model_type="dinov2", mlp_ratio=2.0, dropout_p=0.1, logit_scale_init=2.0),
    "gated, registers": case(
        **_DINO, model_type="dinov2_with_registers", mlp_ratio=3.0, gated_ffn=True, num_registers=2,
        head=ImageHeadConfig(pooling="none"),
    ),
    "rotary": case(
        **_DINO, model_type="dinov3_vit", rope_theta=100.0, rope_shift=0.2, rope_jitter=1.2, rope_rescale=2.0,
        key_bias=False, gated_ffn=True, num_registers=1, head=ImageHeadConfig(pooling="topk", top_k=2),
    ),
}  # fmt: skip
