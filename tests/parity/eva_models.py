"""Random small EVA-CLIP models of open_clip and timm, and ours with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias
from unittest import mock

import torch
from hypothesis import strategies as st
from open_clip.model import CustomTextCLIP
from timm.layers import LayerNorm
from timm.models.eva import Eva
from torch import Tensor, nn

from vembed_fs2.models.eva import EvaConfig, EvaModel, EvaVisionConfig, create_eva_model
from vembed_fs2.models.eva.open_clip import OPEN_CLIP, TIMM_MODELS, config_from_open_clip

Example: TypeAlias = tuple[dict[str, Any], dict[str, Any]]
"""Arguments of timm's ``Eva``, and ``model_cfg`` of open_clip."""

NAME = "eva_random"

VOCAB = 40

POOLINGS = {"token": "cls", "avg": "mean", "max": "max", "avgmax": "mean_max"}


@st.composite
def eva_options(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of timm's ``Eva``."""
    num_heads = draw(st.integers(1, 4))
    patch_size = draw(st.integers(2, 5))
    rope = draw(st.booleans())
    head_dim = draw(st.sampled_from((4, 8, 12) if rope else (3, 4, 10)))
    post_norm = draw(st.booleans())
    return {
        "img_size": draw(st.integers(patch_size, 4 * patch_size + 1)),
        "patch_size": patch_size,
        "in_chans": draw(st.integers(1, 4)),
        "embed_dim": num_heads * head_dim,
        "depth": draw(st.integers(1, 3)),
        "num_heads": num_heads,
        "mlp_ratio": draw(st.sampled_from((4 * 2 / 3, 4.0, 1.5))),
        "qkv_bias": draw(st.booleans()),
        "qkv_fused": draw(st.booleans()),
        "swiglu_mlp": draw(st.booleans()),
        "scale_mlp": draw(st.booleans()),
        "scale_attn_inner": draw(st.booleans()),
        "use_post_norm": post_norm,
        "init_values": None if post_norm else draw(st.sampled_from((None, 0.1))),
        "use_abs_pos_emb": draw(st.booleans()),
        "use_rot_pos_emb": rope,
        "ref_feat_shape": draw(st.sampled_from((None, 2, 5))) if rope else None,
        "use_pre_transformer_norm": draw(st.booleans()),
        "attn_drop_rate": draw(st.sampled_from((0.0, 0.2))),
        "global_pool": draw(st.sampled_from(("token", "avg"))),
        "norm_layer": partial(LayerNorm, eps=draw(st.sampled_from((1e-6, 1e-5, 1e-3)))),
    }


@st.composite
def model_cfgs(draw: st.DrawFn, options: dict[str, Any]) -> dict[str, Any]:
    """What ``open_clip_config.json`` holds."""
    proj = draw(st.sampled_from((None, "linear", "mlp", "none")))
    pools = ["token", "avg", "max", "avgmax"] + ([""] if proj in ("linear", "mlp") else [])
    heads = draw(st.sampled_from((1, 2)))
    return {
        "embed_dim": options["embed_dim"] if proj == "none" else draw(st.integers(3, 20)),
        "vision_cfg": {
            "timm_model_name": NAME,
            "timm_model_pretrained": False,
            "image_size": options["img_size"],
            "timm_pool": draw(st.sampled_from(pools)),
            "timm_proj": proj,
            "timm_proj_bias": draw(st.booleans()),
            "timm_drop": draw(st.sampled_from((0.0, 0.1))),
            "timm_drop_path": draw(st.sampled_from((None, 0.1))),
        },
        "text_cfg": {
            "context_length": draw(st.integers(6, 10)),
            "vocab_size": VOCAB,
            "width": heads * draw(st.sampled_from((4, 8))),
            "heads": heads,
            "layers": draw(st.integers(1, 2)),
        },
        "quick_gelu": draw(st.booleans()),
        "custom_text": True,
    }


@st.composite
def models(draw: st.DrawFn) -> Example:
    options = draw(eva_options())
    return options, draw(model_cfgs(options))


def vision_config(options: dict[str, Any]) -> EvaVisionConfig:
    """Ours, for arguments of timm's ``Eva``; those that it does not know are an error."""
    values = dict(options)
    model_dim = values.pop("embed_dim")
    pool = values.pop("global_pool", "avg")
    rope = values.pop("use_rot_pos_emb", False)
    ref_feat_shape = values.pop("ref_feat_shape", None)
    if isinstance(ref_feat_shape, tuple):
        (ref_feat_shape,) = set(ref_feat_shape)
    norm_layer = values.pop("norm_layer", LayerNorm)
    config = EvaVisionConfig(
        model_dim=model_dim,
        num_layers=values.pop("depth"),
        num_attn_heads=values.pop("num_heads"),
        ffn_inner_dim=int(model_dim * values.pop("mlp_ratio")),
        num_channels=values.pop("in_chans", 3),
        image_size=values.pop("img_size"),
        patch_size=values.pop("patch_size"),
        qkv_bias=values.pop("qkv_bias", True),
        fused_qkv=values.pop("qkv_fused", True),
        gated_ffn=values.pop("swiglu_mlp", False),
        attn_norm=values.pop("scale_attn_inner", False),
        ffn_norm=values.pop("scale_mlp", False),
        post_norm=values.pop("use_post_norm", False),
        layer_scale_init=values.pop("init_values", None),
        learned_positions=values.pop("use_abs_pos_emb", True),
        rope=rope,
        rope_ref_size=ref_feat_shape,
        input_norm=values.pop("use_pre_transformer_norm", False),
        pooling=POOLINGS[pool],  # type: ignore[arg-type]
        norm_after_pooling=pool == "avg",
        layer_norm_eps=norm_layer(4).eps,
        attn_dropout_p=values.pop("attn_drop_rate", 0.0),
    )
    assert not values
    return config


@contextmanager
def timm_model(options: dict[str, Any], **more: Any) -> Iterator[None]:
    """Give timm, and us, a model of the name ``NAME``."""

    def create(name: str, pretrained: bool, **kwargs: Any) -> Eva:
        assert name == NAME
        assert not pretrained
        model = Eva(**options | more | kwargs)
        model.default_cfg = {}
        return model

    with (
        mock.patch("open_clip.timm_model.timm.create_model", create),
        mock.patch.dict(TIMM_MODELS, {NAME: vision_config(options)}),
    ):
        yield


def create_pair(
    options: dict[str, Any], model_cfg: dict[str, Any], seed: int = 0, **more: Any
) -> tuple[CustomTextCLIP, EvaModel, EvaConfig]:
    """open_clip's model with random weights everywhere, and ours with the same."""
    torch.manual_seed(seed)
    with timm_model(options, **more):
        config = config_from_open_clip(model_cfg)
        reference = CustomTextCLIP(**{k: v for k, v in model_cfg.items() if k != "custom_text"}).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(std=0.3)
        for module in reference.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.add_(1.0)
    model = create_eva_model(config).eval()
    model.load_state_dict(OPEN_CLIP.state_dict_from_open_clip(dict(reference.state_dict()), config))
    return reference, model, config


def create_texts(config: EvaConfig, num: int = 4) -> tuple[Tensor, Tensor]:
    """Ids and mask: texts of several lengths that end with the highest id, padded with 0 to the full length."""
    length = config.text.max_seq_len
    ids = torch.zeros((num, length), dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row in range(num):
        end = int(torch.randint(2, length, ()))
        ids[row, :end] = torch.randint(1, VOCAB - 1, (end,))
        ids[row, end] = VOCAB - 1
        mask[row, : end + 1] = True
    return ids, mask


def create_images(config: EvaConfig, num: int = 3) -> Tensor:
    size = config.vision.image_size
    return torch.randn(num, config.vision.num_channels, size, size)


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


def small_options(**changes: Any) -> dict[str, Any]:
    """A small EVA02-CLIP."""
    options = {
        "img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 4 * 2 / 3,
        "qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True, "use_rot_pos_emb": True,
        "ref_feat_shape": (2, 2), "global_pool": "token",
    }  # fmt: skip
    return options | changes


def small_cfg(**vision: Any) -> dict[str, Any]:
    vision_cfg = {"timm_model_name": NAME, "image_size": 8, "timm_pool": "token", "timm_proj": None}
    text_cfg = {"context_length": 8, "vocab_size": VOCAB, "width": 16, "heads": 2, "layers": 2}
    return {"embed_dim": 12, "vision_cfg": vision_cfg | vision, "text_cfg": text_cfg, "custom_text": True}


PLAIN = {"swiglu_mlp": False, "scale_mlp": False, "scale_attn_inner": False, "use_rot_pos_emb": False}
