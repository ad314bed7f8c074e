"""SigLIP checkpoints of open_clip, whose image tower is timm's, read and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from vembed_fs2.errors import ModelLoadError, VembedError
from vembed_fs2.formats.key_map import KeyMap, Rename, Reshape, Rule, Split, leading_dims
from vembed_fs2.formats.open_clip import (
    OpenClipFormat,
    read_model_options,
    read_number,
    read_options,
    read_pair,
    timm_name,
)
from vembed_fs2.models.clip.config import ClipTextConfig
from vembed_fs2.models.clip.open_clip import (
    check_config,
    list_learned_rules,
    list_text_rules,
    text_config_from_open_clip,
    text_config_to_open_clip,
)
from vembed_fs2.models.siglip.config import SiglipConfig, SiglipTextConfig, SiglipVisionConfig

_SIZES: Final = {
    "base": {"model_dim": 768, "num_layers": 12, "num_attn_heads": 12, "ffn_inner_dim": 3072},
    "large": {"model_dim": 1024, "num_layers": 24, "num_attn_heads": 16, "ffn_inner_dim": 4096},
    "so400m": {"model_dim": 1152, "num_layers": 27, "num_attn_heads": 16, "ffn_inner_dim": 4304},
    "giantopt": {"model_dim": 1536, "num_layers": 40, "num_attn_heads": 16, "ffn_inner_dim": 6144},
}

_TANH: Final = "gelu_pytorch_tanh"


def _tower(size: str, patch_size: int, image_size: int, activation: str = "gelu") -> dict[str, Any]:
    sizes = _SIZES[size]
    return {**sizes, "patch_size": patch_size, "image_size": image_size, "activation": activation}


TIMM_TOWERS: Final = {
    "vit_base_patch32_siglip_256": _tower("base", 32, 256, _TANH),
    "vit_base_patch16_siglip_224": _tower("base", 16, 224),
    "vit_base_patch16_siglip_256": _tower("base", 16, 256),
    "vit_base_patch16_siglip_384": _tower("base", 16, 384),
    "vit_base_patch16_siglip_512": _tower("base", 16, 512),
    "vit_large_patch16_siglip_256": _tower("large", 16, 256),
    "vit_large_patch16_siglip_384": _tower("large", 16, 384),
    "vit_large_patch16_siglip_512": _tower("large", 16, 512, _TANH),
    "vit_so400m_patch14_siglip_224": _tower("so400m", 14, 224),
    "vit_so400m_patch14_siglip_378": _tower("so400m", 14, 378),
    "vit_so400m_patch14_siglip_384": _tower("so400m", 14, 384),
    "vit_so400m_patch16_siglip_256": _tower("so400m", 16, 256, _TANH),
    "vit_so400m_patch16_siglip_384": _tower("so400m", 16, 384, _TANH),
    "vit_so400m_patch16_siglip_512": _tower("so400m", 16, 512, _TANH),
    "vit_giantopt_patch16_siglip_256": _tower("giantopt", 16, 256, _TANH),
    "vit_giantopt_patch16_siglip_384": _tower("giantopt", 16, 384, _TANH),
}
"""What timm's names of image towers stand for: fields of :class:`SiglipVisionConfig`."""

_VISION_DEFAULTS: Final = {"timm_model_name": "", "image_size": None, "timm_pool": "avg", "timm_proj": "linear"}

_VISION_FIXED: Final = {"patch_dropout": 0.0, "timm_drop_path": 0.0}

# open_clip obeys these without a tower of timm, or with a projection after it.
_VISION_IGNORED: Final = (
    "head_width",
    "layers",
    "mlp_ratio",
    "patch_size",
    "timm_drop",
    "timm_model_pretrained",
    "timm_proj_bias",
    "width",
)

_LAYER_KEYS: Final = {
    "norm1": "self_attn_layer_norm",
    "attn.proj": "self_attn.output_proj",
    "norm2": "ffn_layer_norm",
    "mlp.fc1": "ffn.inner_proj",
    "mlp.fc2": "ffn.output_proj",
}

_KEYS: Final = {
    "patch_embed.proj.": "vision.frontend.patch_proj.",
    "norm.": "vision.encoder.layer_norm.",
    "attn_pool.latent": "vision.head.probe",
    "attn_pool.q.": "vision.head.attention.q_proj.",
    "attn_pool.proj.": "vision.head.attention.output_proj.",
    "attn_pool.norm.": "vision.head.layer_norm.",
    "attn_pool.mlp.fc1.": "vision.head.ffn.inner_proj.",
    "attn_pool.mlp.fc2.": "vision.head.ffn.output_proj.",
}

_TEXT_FIELDS: Final = (
    "model_dim",
    "num_layers",
    "num_attn_heads",
    "ffn_inner_dim",
    "activation",
    "layer_norm_eps",
    "vocab_size",
    "max_seq_len",
    "pad_idx",
)

_TRUNK: Final = "visual.trunk."

_LAYER: Final = "vision.encoder.layers.*"

_RULES: Final[Sequence[Rule]] = (
    # timm's positions have the dimension of a batch of one.
    Reshape(f"{_TRUNK}pos_embed", "vision.frontend.pos_embed.weight", leading_dims(1)),
    # timm holds these together; apart they can be sharded.
    Split(f"{_TRUNK}blocks.*.attn.qkv.", [f"{_LAYER}.self_attn.{name}_proj." for name in "qkv"]),
    Split(f"{_TRUNK}attn_pool.kv.", [f"vision.head.attention.{name}_proj." for name in "kv"]),
    *(Rename(_TRUNK + theirs, ours) for theirs, ours in _KEYS.items()),
    *(Rename(f"{_TRUNK}blocks.*.{theirs}.", f"{_LAYER}.{ours}.") for theirs, ours in _LAYER_KEYS.items()),
    *list_text_rules("text.", has_bias=True),
    # Read only, from models without `custom_text`.
    *list_text_rules("", has_bias=True),
)


def config_from_open_clip(model_cfg: Mapping[str, Any]) -> SiglipConfig:
    """Convert ``model_cfg``.

    :raises ModelLoadError: an option is not supported; the message names it.
    """
    options = read_model_options(model_cfg)

    config = SiglipConfig(
        vision=_read_vision(options["vision_cfg"]),
        text=_read_text(model_cfg),
        logit_scale_init=options["init_logit_scale"],
        logit_bias_init=read_number(options["init_logit_bias"], "init_logit_bias"),
    )
    if config.logit_bias_init is None:
        raise ModelLoadError("`init_logit_bias` must be set for a SigLIP model.")

    check_config(config)

    return config


def _read_text(model_cfg: Mapping[str, Any]) -> SiglipTextConfig:
    text = text_config_from_open_clip(model_cfg)
    for name, is_supported in {
        "no_causal_mask": not text.causal,
        "pool_type": text.pooling == "last",
        "proj_bias": text.proj_bias,
        "ls_init_value": text.layer_scale_init is None,
    }.items():
        if not is_supported:
            value = model_cfg["text_cfg"].get(name)
            raise ModelLoadError(f"`text_cfg.{name}` is {value!r}, which is not supported for SigLIP models.")

    return SiglipTextConfig(**_text_values(text), projection_dim=text.single_tower_dim)


def _text_values(text: ClipTextConfig | SiglipTextConfig) -> dict[str, Any]:
    """The values of the fields that the text Transformers of CLIP and SigLIP share."""
    return {name: getattr(text, name) for name in _TEXT_FIELDS}


def _read_vision(vision_cfg: Mapping[str, Any]) -> SiglipVisionConfig:
    values = read_options(vision_cfg, "vision_cfg.", _VISION_DEFAULTS, fixed=_VISION_FIXED, ignored=_VISION_IGNORED)
    tower = TIMM_TOWERS.get(values["timm_model_name"])
    if tower is None:
        raise ModelLoadError(f"`vision_cfg.timm_model_name` is '{values['timm_model_name']}', which is not supported.")

    values["image_size"] = read_pair(values["image_size"] or 224, "vision_cfg.image_size")
    for name, expected in {"timm_pool": "map", "timm_proj": "none", "image_size": tower["image_size"]}.items():
        if values[name] != expected:
            raise ModelLoadError(
                f"`vision_cfg.{name}` is {values[name]!r}, which is not supported; it must be {expected!r}."
            )

    return SiglipVisionConfig(**tower)


def config_to_open_clip(config: SiglipConfig) -> dict[str, Any]:
    """Convert to ``model_cfg``.

    :raises VembedError: open_clip cannot express an option; the message names it.
    """
    text, vision = config.text, config.vision
    if text is None or vision is None or config.naflex:
        raise VembedError("open_clip has no SigLIP models with `naflex`, nor with one Transformer only.")

    text_cfg = text_config_to_open_clip(
        ClipTextConfig(**_text_values(text), pooling="last", causal=False, proj_bias=True)
    )

    return {
        "embed_dim": vision.model_dim,
        "quick_gelu": text.activation == "quick_gelu",
        "init_logit_scale": config.logit_scale_init,
        "init_logit_bias": config.logit_bias_init,
        "custom_text": True,
        "vision_cfg": {
            "timm_model_name": _find_timm_name(vision),
            "timm_model_pretrained": False,
            "image_size": vision.image_size,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": text_cfg,
    }


def _find_timm_name(vision: SiglipVisionConfig) -> str:
    """timm's name of the model of these sizes; it has none of others."""
    for name, tower in TIMM_TOWERS.items():
        if SiglipVisionConfig(**tower, attn_dropout_p=vision.attn_dropout_p) == vision:
            return name

    raise VembedError(
        "timm, which open_clip's SigLIP models are made of, has no image Transformer of this `vision`: its sizes, "
        f"`activation` ('{vision.activation}') or another of its options have no name there."
    )


def key_map_of_open_clip(config: SiglipConfig) -> KeyMap:
    """Return how the tensors of open_clip become ours. Those that are not known stay as they are."""
    return KeyMap(*_RULES, *list_learned_rules(config))


OPEN_CLIP: Final = OpenClipFormat(
    reads=lambda model_cfg: "_siglip_" in timm_name(model_cfg),
    config_from_open_clip=config_from_open_clip,
    config_to_open_clip=config_to_open_clip,
    create_key_map=key_map_of_open_clip,
)
