"""CLIP checkpoints of open_clip, read and written; its text tower also for families with another image tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from vembed_fs2.embedding.learned import LOGIT_BIAS, LOGIT_SCALE
from vembed_fs2.errors import ModelLoadError, VembedError
from vembed_fs2.formats.checkpoint import config_errors, drop_learned
from vembed_fs2.formats.key_map import SCALAR, TRANSPOSED, KeyMap, Rename, Reshape, Rule, Split
from vembed_fs2.formats.open_clip import (
    BLOCK_OPTIONS,
    OpenClipFormat,
    find_mlp_ratio,
    read_activation,
    read_layer_norm_eps,
    read_model_options,
    read_number,
    read_options,
    read_pair,
    timm_name,
)
from vembed_fs2.models.clip.config import ClipConfig, ClipTextConfig, ClipTowerConfig, ClipVisionConfig
from vembed_fs2.models.clip.model import LEGACY_EOS_ID

_TOWER_DEFAULTS: Final = {
    "width": 512,
    "layers": 12,
    "mlp_ratio": 4.0,
    "ls_init_value": None,
    "pool_type": "",
    "act_kwargs": None,
    "norm_kwargs": None,
    # The blocks of both types compute the same, if no other option of theirs is set.
    "block_type": None,
}

_TEXT_DEFAULTS: Final = _TOWER_DEFAULTS | {
    "context_length": 77,
    "vocab_size": 49408,
    "heads": 8,
    "pad_id": 0,
    "eos_id": LEGACY_EOS_ID,
    "no_causal_mask": False,
    "pool_type": "argmax",
    "proj_bias": False,
    # The tokenizer's.
    "hf_tokenizer_name": None,
    "tokenizer_mode": None,
    "tokenizer_kwargs": None,
}

_TEXT_FIXED: Final = BLOCK_OPTIONS | {"embed_cls": False, "proj_type": "linear"}

_TEXT_IGNORED: Final = (
    "final_ln_after_pool",
    "hf_model_name",
    "hf_model_pretrained",
    "hf_pooler_type",
    "hf_proj_type",
)

_VISION_DEFAULTS: Final = _TOWER_DEFAULTS | {
    "width": 768,
    "head_width": 64,
    "patch_size": None,
    "image_size": None,
    "patch_dropout": 0.0,
    "no_ln_pre": False,
    "final_ln_after_pool": False,
    "pool_type": "tok",
}

_VISION_FIXED: Final = BLOCK_OPTIONS | {"attentional_pool": False, "pos_embed_type": "learnable"}

_VISION_IGNORED: Final = (
    "attn_pooler_heads",
    "attn_pooler_queries",
    "timm_drop",
    "timm_drop_path",
    "timm_model_name",
    "timm_model_pretrained",
    "timm_pool",
    "timm_proj",
    "timm_proj_bias",
)

_LAYER_KEYS: Final = {
    "ln_1": "self_attn_layer_norm",
    "attn.out_proj": "self_attn.output_proj",
    "ls_1": "self_attn_residual.scale",
    "ln_2": "ffn_layer_norm",
    "mlp.c_fc": "ffn.inner_proj",
    "mlp.c_proj": "ffn.output_proj",
    "ls_2": "ffn_residual.scale",
}

_VISION_KEYS: Final = {
    "visual.class_embedding": "vision.frontend.class_embed",
    "visual.conv1.": "vision.frontend.patch_proj.",
    "visual.positional_embedding": "vision.frontend.pos_embed.weight",
    "visual.ln_pre.": "vision.frontend.layer_norm.",
    "visual.ln_post.": "vision.layer_norm.",
}

_TEXT_KEYS: Final = {
    "token_embedding.": "text.frontend.embed.",
    "positional_embedding": "text.frontend.pos_embed.weight",
    "ln_final.": "text.encoder.layer_norm.",
}


def config_from_open_clip(model_cfg: Mapping[str, Any]) -> ClipConfig:
    """Convert ``model_cfg``.

    :raises ModelLoadError: an option is not supported; the message names it.
    """
    options = read_model_options(model_cfg)
    config = ClipConfig(
        text=text_config_from_open_clip(model_cfg),
        vision=_read_vision(options),
        projection_dim=options["embed_dim"],
        logit_scale_init=options["init_logit_scale"],
        logit_bias_init=read_number(options["init_logit_bias"], "init_logit_bias"),
    )
    check_config(config)

    return config


def check_config(config: object) -> None:
    """Check a configuration that was made of ``model_cfg``.

    :raises ModelLoadError: it is not valid; the message has our names of the fields.
    """
    if errors := config_errors(config):
        raise ModelLoadError(f"`model_cfg` is not valid. {' '.join(errors)}")


def text_config_from_open_clip(model_cfg: Mapping[str, Any]) -> ClipTextConfig:
    """Convert ``text_cfg`` of ``model_cfg``. See :func:`config_from_open_clip`."""
    options = read_model_options(model_cfg)
    values = read_options(options["text_cfg"], "text_cfg.", _TEXT_DEFAULTS, fixed=_TEXT_FIXED, ignored=_TEXT_IGNORED)

    pooling = values["pool_type"]
    if pooling not in ("argmax", "eos", "first", "last"):
        raise ModelLoadError(f"`text_cfg.pool_type` is '{pooling}', which is not supported.")

    return ClipTextConfig(
        **_read_tower(values, "text_cfg.", options),
        num_attn_heads=values["heads"],
        vocab_size=values["vocab_size"],
        max_seq_len=values["context_length"],
        pad_idx=values["pad_id"],
        bos_idx=None,
        eos_idx=LEGACY_EOS_ID if pooling == "argmax" else values["eos_id"],
        pooling="clip" if pooling == "argmax" else pooling,
        causal=not values["no_causal_mask"],
        proj_bias=values["proj_bias"],
    )


def _read_vision(options: Mapping[str, Any]) -> ClipVisionConfig:
    values = read_options(
        options["vision_cfg"], "vision_cfg.", _VISION_DEFAULTS, fixed=_VISION_FIXED, ignored=_VISION_IGNORED
    )

    pooling = values["pool_type"]
    if pooling not in ("tok", "avg"):
        raise ModelLoadError(f"`vision_cfg.pool_type` is '{pooling}', which is not supported.")
    if values["head_width"] < 1:
        raise ModelLoadError("`vision_cfg.head_width` must be at least 1.")

    return ClipVisionConfig(
        **_read_tower(values, "vision_cfg.", options),
        num_attn_heads=values["width"] // values["head_width"],
        image_size=read_pair(values["image_size"] or 224, "vision_cfg.image_size"),
        patch_size=read_pair(values["patch_size"] or 16, "vision_cfg.patch_size"),
        pre_norm=not values["no_ln_pre"],
        pooling="cls" if pooling == "tok" else "mean",
        norm_after_pooling=pooling == "tok" or values["final_ln_after_pool"],
        patch_dropout_p=values["patch_dropout"],
    )


def _read_tower(values: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What both Transformers have in common."""
    return {
        "model_dim": values["width"],
        "num_layers": values["layers"],
        "ffn_inner_dim": int(values["width"] * values["mlp_ratio"]),
        "activation": read_activation(values["act_kwargs"], f"{where}act_kwargs", quick_gelu=options["quick_gelu"]),
        "layer_norm_eps": read_layer_norm_eps(values["norm_kwargs"], f"{where}norm_kwargs"),
        "layer_scale_init": read_number(values["ls_init_value"], f"{where}ls_init_value"),
        "single_tower_dim": options["embed_dim"],
    }


def config_to_open_clip(config: ClipConfig) -> dict[str, Any]:
    """Convert to ``model_cfg``.

    :raises VembedError: open_clip cannot express an option; the message names it.
    """
    vision = config.vision
    if vision.num_channels != 3:
        raise VembedError(f"open_clip has no models of {vision.num_channels} image channels (`vision.num_channels`).")
    if (config.text.activation == "quick_gelu") != (vision.activation == "quick_gelu"):
        raise VembedError("open_clip has no models with `quick_gelu` as the `activation` of one Transformer only.")

    vision_cfg = _write_tower(vision) | {
        "head_width": vision.model_dim // vision.num_attn_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "patch_dropout": vision.patch_dropout_p,
        "no_ln_pre": not vision.pre_norm,
        "pool_type": "tok" if vision.pooling == "cls" else "avg",
        "final_ln_after_pool": vision.pooling == "mean" and vision.norm_after_pooling,
    }

    model_cfg = {
        "embed_dim": config.projection_dim,
        "quick_gelu": vision.activation == "quick_gelu",
        "init_logit_scale": config.logit_scale_init,
        "vision_cfg": vision_cfg,
        "text_cfg": text_config_to_open_clip(config.text),
    }
    if config.logit_bias_init is not None:
        model_cfg["init_logit_bias"] = config.logit_bias_init

    return model_cfg


def text_config_to_open_clip(config: ClipTextConfig) -> dict[str, Any]:
    """Convert to ``text_cfg``. See :func:`config_to_open_clip`."""
    is_highest = config.pooling == "clip" and config.eos_idx == LEGACY_EOS_ID
    pooling = "eos" if config.pooling == "clip" else config.pooling

    return _write_tower(config) | {
        "context_length": config.max_seq_len,
        "vocab_size": config.vocab_size,
        "heads": config.num_attn_heads,
        "pad_id": config.pad_idx or 0,
        "eos_id": config.eos_idx,
        "pool_type": "argmax" if is_highest else pooling,
        "no_causal_mask": not config.causal,
        "proj_bias": config.proj_bias,
    }


def _write_tower(config: ClipTowerConfig) -> dict[str, Any]:
    values: dict[str, Any] = {
        "width": config.model_dim,
        "layers": config.num_layers,
        "mlp_ratio": find_mlp_ratio(config.model_dim, config.ffn_inner_dim),
    }
    if config.layer_scale_init is not None:
        values["ls_init_value"] = config.layer_scale_init
    if config.layer_norm_eps != 1e-5:
        values["norm_kwargs"] = {"eps": config.layer_norm_eps}

    if config.activation == "gelu_pytorch_tanh":
        values["act_kwargs"] = {"approximate": "tanh"}
    elif config.activation not in ("gelu", "quick_gelu"):
        raise VembedError(f"open_clip has no models whose `activation` is '{config.activation}'.")

    return values


def key_map_of_open_clip(config: ClipConfig) -> KeyMap:
    """Return how the tensors of open_clip become ours. Those that are not known stay as they are."""
    return KeyMap(
        *list_learned_rules(config),
        *list_text_rules("", has_bias=config.text.proj_bias),
        *(Rename(theirs, ours) for theirs, ours in _VISION_KEYS.items()),
        *_list_layer_rules("visual.", "vision"),
        *_list_projection_rules("visual.proj", "vision.proj", has_bias=False),
        # Models with `custom_text` have the text tower in a module of its own.
        prefixes=["text."],
    )


def list_learned_rules(config: object) -> list[Rule]:
    """Return the rules of what objectives learn."""
    kept = (LOGIT_SCALE, LOGIT_BIAS)
    return [*(Reshape(name, name, SCALAR) for name in kept), drop_learned(config, kept=kept)]


def list_text_rules(prefix: str, *, has_bias: bool) -> list[Rule]:
    """Return the rules of the text tower.

    :param prefix: what the names begin with: ``text.`` in models with ``custom_text``.
    :param has_bias: whether the projection is a linear layer with a bias.
    """
    return [
        *(Rename(prefix + theirs, ours) for theirs, ours in _TEXT_KEYS.items()),
        *_list_layer_rules(prefix, "text"),
        *_list_projection_rules(f"{prefix}text_projection", "text.proj", has_bias=has_bias),
    ]


def _list_layer_rules(prefix: str, tower: str) -> list[Rule]:
    theirs, ours = f"{prefix}transformer.resblocks.*", f"{tower}.encoder.layers.*"

    return [
        *(
            # torch's own attention holds the three projections in one tensor.
            Split(f"{theirs}.attn.in_proj_{kind}", [f"{ours}.self_attn.{name}_proj.{kind}" for name in "qkv"])
            for kind in ("weight", "bias")
        ),
        *(Rename(f"{theirs}.{name}.", f"{ours}.{own}.") for name, own in _LAYER_KEYS.items()),
    ]


def _list_projection_rules(theirs: str, ours: str, *, has_bias: bool) -> list[Rule]:
    """Both forms are read. Without a bias it is a matrix that open_clip multiplies states with from the right."""
    matrix, layer = Reshape(theirs, f"{ours}.weight", TRANSPOSED), Rename(f"{theirs}.", f"{ours}.")
    return [layer, matrix] if has_bias else [matrix, layer]


OPEN_CLIP: Final = OpenClipFormat(
    reads=lambda model_cfg: not timm_name(model_cfg),
    config_from_open_clip=config_from_open_clip,
    config_to_open_clip=config_to_open_clip,
    create_key_map=key_map_of_open_clip,
)
