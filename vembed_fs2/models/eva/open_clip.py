"""EVA-CLIP checkpoints of open_clip, whose image Transformers are timm's, read and written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from vembed_fs2.errors import ModelLoadError, VembedError, did_you_mean
from vembed_fs2.formats.key_map import KeyMap, Rename, Reshape, Rule, Split, leading_dims
from vembed_fs2.formats.open_clip import (
    BLOCK_OPTIONS,
    OpenClipFormat,
    read_model_options,
    read_options,
    read_pair,
    timm_name,
)
from vembed_fs2.models.clip.open_clip import (
    check_config,
    list_learned_rules,
    list_text_rules,
    text_config_from_open_clip,
    text_config_to_open_clip,
)
from vembed_fs2.models.eva.config import EvaConfig, EvaVisionConfig
from vembed_fs2.models.eva.model import EvaPooling

_BASE: Final = EvaVisionConfig()

_LARGE: Final = replace(_BASE, model_dim=1024, num_layers=24, num_attn_heads=16, ffn_inner_dim=2730, patch_size=14)

_GIANT: Final = EvaVisionConfig(
    model_dim=1408,
    num_layers=40,
    num_attn_heads=16,
    ffn_inner_dim=6144,
    patch_size=14,
    fused_qkv=True,
    gated_ffn=False,
    attn_norm=False,
    ffn_norm=False,
    rope=False,
    rope_ref_size=None,
)

_ENORMOUS: Final = replace(_GIANT, model_dim=1792, num_layers=64, ffn_inner_dim=15360, post_norm=True)

# Those that were pretrained without texts have no norm inside attention, and the smaller ones none inside
# feed-forward networks.
_BASE_14: Final = replace(_BASE, patch_size=14, attn_norm=False)

_LARGE_14: Final = replace(_LARGE, attn_norm=False)

_SMALL_14: Final = replace(
    _BASE_14, model_dim=384, num_attn_heads=6, ffn_inner_dim=1024, fused_qkv=True, ffn_norm=False
)

_TINY_14: Final = replace(_SMALL_14, model_dim=192, num_attn_heads=3, ffn_inner_dim=512)


def _with_mean(config: EvaVisionConfig, image_size: int) -> EvaVisionConfig:
    return replace(config, image_size=image_size, pooling="mean", norm_after_pooling=True)


TIMM_MODELS: Final[dict[str, EvaVisionConfig]] = {
    "eva02_base_patch16_clip_224": _BASE,
    "eva02_large_patch14_clip_224": _LARGE,
    "eva02_large_patch14_clip_336": replace(_LARGE, image_size=336),
    "eva02_enormous_patch14_clip_224": _ENORMOUS,
    "eva_giant_patch14_224": _with_mean(_GIANT, 224),
    "eva_giant_patch14_336": _with_mean(_GIANT, 336),
    "eva_giant_patch14_560": _with_mean(_GIANT, 560),
    "eva_giant_patch14_clip_224": _GIANT,
    "eva02_tiny_patch14_224": _with_mean(_TINY_14, 224),
    "eva02_tiny_patch14_336": _with_mean(_TINY_14, 336),
    "eva02_small_patch14_224": _with_mean(_SMALL_14, 224),
    "eva02_small_patch14_336": _with_mean(_SMALL_14, 336),
    "eva02_base_patch14_224": _with_mean(_BASE_14, 224),
    "eva02_base_patch14_448": _with_mean(_BASE_14, 448),
    "eva02_large_patch14_224": _with_mean(_LARGE_14, 224),
    "eva02_large_patch14_448": _with_mean(_LARGE_14, 448),
}
"""The image Transformers by the names of timm, with the pooling that timm gives them."""

_POOLINGS: Final[dict[str, EvaPooling]] = {"token": "cls", "avg": "mean", "max": "max", "avgmax": "mean_max"}

_VISION_DEFAULTS: Final = {
    "timm_model_name": "",
    "timm_pool": "avg",
    "timm_proj": None,
    "timm_proj_bias": False,
    "timm_drop": 0.0,
    "timm_drop_path": None,
    "image_size": None,
}

_VISION_FIXED: Final = {"patch_dropout": 0.0}

# The name says it all: open_clip looks at none of these.
_VISION_IGNORED: Final = (
    *BLOCK_OPTIONS,
    "act_kwargs",
    "attentional_pool",
    "attn_pooler_heads",
    "attn_pooler_queries",
    "block_type",
    "final_ln_after_pool",
    "head_width",
    "layers",
    "ls_init_value",
    "mlp_ratio",
    "no_ln_pre",
    "norm_kwargs",
    "patch_size",
    "pool_type",
    "pos_embed_type",
    "timm_model_pretrained",
    "width",
)

_KEYS: Final = {
    "patch_embed.proj.": "frontend.patch_proj.",
    "norm_pre.": "frontend.layer_norm.",
}

_LAYER_KEYS: Final = {
    "norm1.": "self_attn_layer_norm.",
    "attn.q_proj.": "self_attn.q_proj.",
    "attn.k_proj.": "self_attn.k_proj.",
    "attn.v_proj.": "self_attn.v_proj.",
    "gamma_1": "self_attn_residual.scale.gamma",
    "norm2.": "ffn_layer_norm.",
    "gamma_2": "ffn_residual.scale.gamma",
}

_PROJECTION_KEYS: Final = {
    "classifier": {"visual.trunk.head.": "vision.head.proj."},
    "linear": {"visual.head.proj.": "vision.head.proj."},
    "mlp": {
        "visual.head.mlp.fc1.": "vision.head.proj.inner_proj.",
        "visual.head.mlp.fc2.": "vision.head.proj.output_proj.",
    },
    "none": {},
}

_TRUNK: Final = "visual.trunk."

_BLOCK: Final = f"{_TRUNK}blocks.*."

_LAYER: Final = "vision.encoder.layers.*."


def config_from_open_clip(model_cfg: Mapping[str, Any]) -> EvaConfig:
    """Convert ``model_cfg``.

    :raises ModelLoadError: an option is not supported; the message names it.
    """
    options = read_model_options(model_cfg)
    config = EvaConfig(
        text=text_config_from_open_clip(model_cfg),
        vision=_read_vision(options["vision_cfg"]),
        projection_dim=options["embed_dim"],
        logit_scale_init=options["init_logit_scale"],
        logit_bias_init=None if options["init_logit_bias"] is None else float(options["init_logit_bias"]),
    )
    check_config(config)

    return config


def _read_vision(vision_cfg: Mapping[str, Any]) -> EvaVisionConfig:
    values = read_options(
        {"timm_proj": "linear", **vision_cfg},
        "vision_cfg.",
        _VISION_DEFAULTS,
        fixed=_VISION_FIXED,
        ignored=_VISION_IGNORED,
    )
    config = _find_timm_model(values["timm_model_name"])
    image_size = read_pair(values["image_size"] or 224, "vision_cfg.image_size")
    if image_size != config.image_size:
        raise ModelLoadError(
            f"`vision_cfg.image_size` is {image_size}, which is not supported: "
            f"the images of {values['timm_model_name']} are of {config.image_size} pixels."
        )

    projection: Any = values["timm_proj"] or "classifier"
    if projection not in ("classifier", "linear", "mlp", "none"):
        raise ModelLoadError(f"`vision_cfg.timm_proj` is '{projection}', which is not supported.")

    if values["timm_pool"] or projection in ("classifier", "none"):
        pooling = _POOLINGS.get(values["timm_pool"])
        if pooling is None:
            raise ModelLoadError(f"`vision_cfg.timm_pool` is '{values['timm_pool']}', which is not supported.")

        # timm chooses the norm when it makes the Transformer, and open_clip sets the pooling of some only later.
        norm_after_pooling = config.norm_after_pooling if projection in ("linear", "mlp") else pooling == "mean"
        config = replace(config, pooling=pooling, norm_after_pooling=norm_after_pooling)

    return replace(
        config,
        projection=projection,
        projection_bias=projection == "classifier" or values["timm_proj_bias"],
        drop_path_p=float(values["timm_drop_path"] or 0.0),
        head_dropout_p=values["timm_drop"],
    )


def _find_timm_model(name: str) -> EvaVisionConfig:
    config = TIMM_MODELS.get(name)
    if config is None:
        raise ModelLoadError(
            f"`vision_cfg.timm_model_name` is '{name}', which is not supported.{did_you_mean(name, TIMM_MODELS)} "
            f"Supported are: {', '.join(TIMM_MODELS)}."
        )

    return config


def config_to_open_clip(config: EvaConfig) -> dict[str, Any]:
    """Convert to ``model_cfg``.

    :raises VembedError: open_clip cannot express an option; the message names it.
    """
    model_cfg = {
        "embed_dim": config.projection_dim,
        "quick_gelu": config.text.activation == "quick_gelu",
        "init_logit_scale": config.logit_scale_init,
        "vision_cfg": _write_vision(config.vision),
        "text_cfg": text_config_to_open_clip(config.text),
        "custom_text": True,
    }
    if config.logit_bias_init is not None:
        model_cfg["init_logit_bias"] = config.logit_bias_init

    return model_cfg


def _write_vision(config: EvaVisionConfig) -> dict[str, Any]:
    values: dict[str, Any] = {
        "image_size": config.image_size,
        "timm_pool": next(name for name, pooling in _POOLINGS.items() if pooling == config.pooling),
        "timm_proj": None if config.projection == "classifier" else config.projection,
        "timm_proj_bias": config.projection_bias and config.projection != "classifier",
        "timm_drop": config.head_dropout_p,
        "timm_drop_path": config.drop_path_p or None,
    }
    differences = []
    for name, model in TIMM_MODELS.items():
        if model.image_size == config.image_size:
            vision_cfg = {"timm_model_name": name, **values}
            differences.append(_list_differences(_read_vision(vision_cfg), config))
            if not differences[-1]:
                return vision_cfg

    if not differences:
        raise VembedError(f"timm has no EVA of the `image_size` {config.image_size} of `vision`.")

    fields = ", ".join(f"`{name}`" for name in min(differences, key=len))
    raise VembedError(f"open_clip cannot express {fields} of `vision`: it has only what timm has a name for.")


def _list_differences(a: EvaVisionConfig, b: EvaVisionConfig) -> list[str]:
    return [name for name, value in vars(a).items() if value != getattr(b, name)]


def key_map_of_open_clip(config: EvaConfig) -> KeyMap:
    """Return how the tensors of open_clip become ours. Those that are not known stay as they are.

    They are written with the text tower in a module of its own (``custom_text``).
    """
    vision = config.vision
    norm = "fc_norm" if vision.norm_after_pooling else "norm"

    return KeyMap(
        *list_learned_rules(config),
        # timm's have the dimensions of a batch of one.
        Reshape(f"{_TRUNK}cls_token", "vision.frontend.class_embed", leading_dims(2)),
        Reshape(f"{_TRUNK}pos_embed", "vision.frontend.pos_embed.weight", leading_dims(1)),
        Rename(f"{_TRUNK}{norm}.", "vision.head.layer_norm."),
        *(Rename(_TRUNK + theirs, f"vision.{ours}") for theirs, ours in _KEYS.items()),
        *(Rename(theirs, ours) for theirs, ours in _PROJECTION_KEYS[vision.projection].items()),
        *_list_fused(vision),
        *(Rename(_BLOCK + theirs, _LAYER + ours) for theirs, ours in _list_layer_keys(vision).items()),
        *list_text_rules("text.", has_bias=config.text.proj_bias),
        # Read only, from models without `custom_text`.
        *list_text_rules("", has_bias=config.text.proj_bias),
    )


def _list_layer_keys(config: EvaVisionConfig) -> dict[str, str]:
    keys = dict(_LAYER_KEYS)
    for has_norm, module, proj, name in (
        (config.attn_norm, "attn", "proj", "self_attn.output_proj"),
        (config.ffn_norm, "mlp", "fc2", "ffn.output_proj"),
    ):
        keys[f"{module}.{proj}."] = f"{name}.proj." if has_norm else f"{name}."
        if has_norm:
            keys[f"{module}.norm."] = f"{name}.layer_norm."

    if config.gated_ffn:
        return keys | {"mlp.fc1_g.": "ffn.gate_proj.", "mlp.fc1_x.": "ffn.inner_proj."}

    return keys | {"mlp.fc1.": "ffn.inner_proj."}


def _list_fused(config: EvaVisionConfig) -> list[Rule]:
    """The rules of tensors that timm makes of several."""
    rules: list[Rule] = []
    if config.fused_qkv:
        rules += [
            Split(f"{_BLOCK}attn.qkv.weight", [f"{_LAYER}self_attn.{name}_proj.weight" for name in "qkv"]),
            Rename(f"{_BLOCK}attn.q_bias", f"{_LAYER}self_attn.q_proj.bias"),
            Rename(f"{_BLOCK}attn.v_bias", f"{_LAYER}self_attn.v_proj.bias"),
        ]

    if config.gated_ffn and not config.ffn_norm:
        rules.append(Split(f"{_BLOCK}mlp.fc1.", [f"{_LAYER}ffn.gate_proj.", f"{_LAYER}ffn.inner_proj."]))

    return rules


OPEN_CLIP: Final = OpenClipFormat(
    reads=lambda model_cfg: timm_name(model_cfg).startswith(("eva_", "eva02_")),
    config_from_open_clip=config_from_open_clip,
    config_to_open_clip=config_to_open_clip,
    create_key_map=key_map_of_open_clip,
)
