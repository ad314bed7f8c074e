"""Checkpoints of transformers' Vision Transformers, read and written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, cast, final

from fairseq2.models import ModelHubAccessor
from fairseq2.models.hg import HuggingFaceConfig
from fairseq2.utils.config import cast_config_type
from torch import Tensor
from typing_extensions import override

from vembed_fs2.embedding.head import ImageHeadConfig
from vembed_fs2.embedding.model import HeadConfig
from vembed_fs2.errors import ModelLoadError
from vembed_fs2.formats.extra_fields import with_extra_fields
from vembed_fs2.formats.hf_config import read_field, resolve_hf_config, validate_hf_config
from vembed_fs2.formats.key_map import Drop, KeyMap, Rename, Reshape, Rule, Split, leading_dims
from vembed_fs2.models.common.interop import PIXEL_FIELDS, BackboneCheckpointFormat
from vembed_fs2.models.family import drop_learned
from vembed_fs2.models.vit.config import VIT_FAMILY, VitConfig, VitType
from vembed_fs2.models.vit.model import VitModel

_COMMON: Final = {
    "hidden_size": "model_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attn_heads",
    "hidden_act": "activation",
    "layer_norm_eps": "layer_norm_eps",
    "initializer_range": "init_std",
    **PIXEL_FIELDS,
}

_DROPOUT: Final = {
    "hidden_dropout_prob": "dropout_p",
    "attention_probs_dropout_prob": "attn_dropout_p",
    # And the keys' and values'.
    "qkv_bias": "query_bias",
}

_VIT: Final = _COMMON | _DROPOUT | {"intermediate_size": "ffn_inner_dim"}

_DINO: Final = _COMMON | {"layerscale_value": "layer_scale_init", "drop_path_rate": "drop_path_p"}

_DINOV2: Final = _DINO | _DROPOUT | {"mlp_ratio": "mlp_ratio", "use_swiglu_ffn": "gated_ffn"}

_DINOV3: Final = _DINO | {
    "intermediate_size": "ffn_inner_dim",
    "use_gated_mlp": "gated_ffn",
    "attention_dropout": "attn_dropout_p",
    "query_bias": "query_bias",
    "key_bias": "key_bias",
    "value_bias": "value_bias",
    "proj_bias": "proj_bias",
    "mlp_bias": "ffn_bias",
    "num_register_tokens": "num_registers",
    "rope_theta": "rope_theta",
    "pos_embed_shift": "rope_shift",
    "pos_embed_jitter": "rope_jitter",
    "pos_embed_rescale": "rope_rescale",
}

_DECODER: Final = ("num_attention_heads", "hidden_size", "num_hidden_layers", "intermediate_size")

_BACKBONE: Final = ("apply_layernorm", "reshape_hidden_states", "out_features")

_REGISTERS: Final = "embeddings.register_tokens"

_PATCHES: Final = {"embeddings.patch_embeddings.projection.": "frontend.patch_proj."}

_ATTENTION: Final = {
    "attention.attention.query.": "self_attn.q_proj.",
    "attention.attention.key.": "self_attn.k_proj.",
    "attention.attention.value.": "self_attn.v_proj.",
    "attention.output.dense.": "self_attn.output_proj.",
}

_VIT_LAYER: Final = _ATTENTION | {
    "layernorm_before.": "self_attn_layer_norm.",
    "layernorm_after.": "ffn_layer_norm.",
    "intermediate.dense.": "ffn.inner_proj.",
    "output.dense.": "ffn.output_proj.",
}

_DINO_LAYER: Final = {
    "norm1.": "self_attn_layer_norm.",
    "norm2.": "ffn_layer_norm.",
    "layer_scale1.lambda1": "self_attn_residual.scale.gamma",
    "layer_scale2.lambda1": "ffn_residual.scale.gamma",
}

_DINOV2_FFN: Final = {"mlp.fc1.": "ffn.inner_proj.", "mlp.fc2.": "ffn.output_proj."}

_DINOV2_GATED_FFN: Final = {"mlp.weights_out.": "ffn.output_proj."}

_DINOV3_LAYER: Final = _DINO_LAYER | {
    "attention.q_proj.": "self_attn.q_proj.",
    "attention.k_proj.": "self_attn.k_proj.",
    "attention.v_proj.": "self_attn.v_proj.",
    "attention.o_proj.": "self_attn.output_proj.",
    "mlp.gate_proj.": "ffn.gate_proj.",
    "mlp.up_proj.": "ffn.inner_proj.",
    "mlp.down_proj.": "ffn.output_proj.",
}


class _Format(NamedTuple):
    """How transformers writes one of the models."""

    name: str
    """What the names of its classes start with."""

    fields: Mapping[str, str]
    """The fields of config.json, and what they are called here."""

    kept: Sequence[str]
    """The fields that only other tasks use."""

    dropped: str
    """Tensors of other tasks, by regular expression."""


_FORMATS: Final[dict[str, _Format]] = {
    "vit": _Format(
        "ViT",
        _VIT | {"pooler_output_size": "pooler_dim", "pooler_act": "pooler_activation"},
        ("encoder_stride",),
        r"classifier\.(weight|bias)|decoder\.0\.(weight|bias)|embeddings\.mask_token",
    ),
    "vit_mae": _Format(
        "ViTMAE", _VIT, ("mask_ratio", "norm_pix_loss", *(f"decoder_{n}" for n in _DECODER)), r"decoder\..*"
    ),
    "dinov2": _Format("Dinov2", _DINOV2 | {"use_mask_token": "mask_token"}, _BACKBONE, r"classifier\.(weight|bias)"),
    "dinov2_with_registers": _Format(
        "Dinov2WithRegisters",
        _DINOV2 | {"num_register_tokens": "num_registers"},
        _BACKBONE,
        r"classifier\.(weight|bias)",
    ),
    "dinov3_vit": _Format("DINOv3ViT", _DINOV3, (), r"rope_embeddings\.inv_freq"),
}

_REFUSED: Final = ("pruned_heads", "quantization_config")
"""Fields that transformers would obey and that have no counterpart here."""

_OPTIONAL: Final = ("rope_shift", "rope_jitter", "rope_rescale")

_KINDS: Final[dict[str, type]] = {
    "mlp_ratio": float,
    "layer_scale_init": float,
    "pooler_dim": int,
    "rope_theta": float,
    **dict.fromkeys(_OPTIONAL, float),
}
"""The types of fields whose default is `None`."""

_SIZES: Final = ("image_size", "patch_size")


@final
class VitCheckpointFormat(BackboneCheckpointFormat):
    """Reads and writes transformers' models of five types: ViT, MAE, DINOv2 without and with registers, DINOv3."""

    model_types = tuple(_FORMATS)

    @override
    def from_hf_config(
        self, hf_config: Mapping[str, Any], *, head: HeadConfig | None = None, keys: frozenset[str] = frozenset()
    ) -> VitConfig:
        if head is not None:
            raise ModelLoadError("Modules of sentence-transformers after a Vision Transformer are not supported.")

        model_type: VitType = hf_config.get("model_type", "vit")
        fmt = _FORMATS[model_type]

        resolved = resolve_hf_config(hf_config, f"{fmt.name}Config")
        for name in _REFUSED:
            if resolved.get(name):
                raise ModelLoadError(f"config.json: `{name}` is not supported for {model_type} models.")

        values = {name: _read(resolved, hf_name, name) for hf_name, name in fmt.fields.items()}
        if "qkv_bias" in fmt.fields:
            values["key_bias"] = values["value_bias"] = values["query_bias"]
        if model_type in ("dinov2_with_registers", "dinov3_vit"):
            values["mask_token"] = True
        if model_type == "vit":
            values["pooler"] = not keys or any(key.removeprefix("vit.").startswith("pooler.") for key in keys)

        kept = {name: resolved[name] for name in fmt.kept}
        config = VitConfig(model_type=model_type, head=default_head(model_type), kept=kept, **values)
        validate_hf_config(config, {name: hf_name for hf_name, name in fmt.fields.items()})

        return config

    @override
    def key_map(self, config: VitConfig) -> KeyMap:
        rules: list[Rule] = [
            Drop(theirs=_FORMATS[config.model_type].dropped),
            # transformers has no place for what only objectives need.
            drop_learned(config),
            *_list_embeddings(config),
            *_list_layers(config),
        ]
        return KeyMap(*rules, prefixes=[_prefix_of(config.model_type)])

    @override
    def to_hg_config(self, config: object) -> HuggingFaceConfig:
        config = cast_config_type(config, VitConfig)
        fmt = _FORMATS[config.model_type]

        data: dict[str, object] = {}
        if config.model_type.startswith("dinov2"):
            # As a backbone for other tasks it may return the states of some layers; the default is the last one.
            stages = ["stem", *(f"stage{idx + 1}" for idx in range(config.num_layers))]
            data |= {"stage_names": stages, "out_features": stages[-1:]}

        data |= {hf_name: getattr(config, name) for hf_name, name in fmt.fields.items()}
        if config.model_type == "vit":
            data["pooler_output_size"] = config.pooler_dim or config.model_dim
        if config.mlp_ratio is not None and config.mlp_ratio.is_integer():
            data["mlp_ratio"] = int(config.mlp_ratio)  # Version 5 of transformers takes nothing else.

        data |= config.kept
        exported = HuggingFaceConfig(data, kls_name=f"{fmt.name}Config", arch=f"{fmt.name}Model")
        return with_extra_fields(exported, config)

    @override
    def to_hg_state_dict(self, state_dict: dict[str, object], config: object) -> dict[str, object]:
        config = cast_config_type(config, VitConfig)
        converted = super().to_hg_state_dict(state_dict, config)
        if _has_registers(config) and config.num_registers == 0:
            class_embed = cast(Tensor, state_dict["frontend.class_embed"])
            converted[_REGISTERS] = class_embed.new_empty(1, 0, config.model_dim)
        return converted


def default_head(model_type: VitType) -> ImageHeadConfig:
    """Return the pooling of a folder or an architecture that does not say it.

    The class token's state is what DINO trains, and what transformers' pooler
    output is made of. MAE trains no class token, but patches.
    """
    return ImageHeadConfig(pooling="mean" if model_type == "vit_mae" else "cls")


def _read(values: Mapping[str, Any], hf_name: str, name: str) -> Any:
    """Return the value of a field, if it is of the type of our own."""
    value = values[hf_name]
    if name in _SIZES and isinstance(value, (list, tuple)) and all(type(size) is int for size in value):
        return list(value)

    # `None` stands for what other models do not have.
    kind = _KINDS.get(name) or type(getattr(VitConfig(), name))
    return read_field(values, hf_name, kind, optional=name in _OPTIONAL)


def _prefix_of(model_type: VitType) -> str:
    """What the names of tensors start with in models for other tasks."""
    return "vit." if model_type in ("vit", "vit_mae") else f"{model_type}."


def _has_registers(config: VitConfig) -> bool:
    """Whether transformers' model has a tensor of registers, even if there are none."""
    return config.model_type in ("dinov2_with_registers", "dinov3_vit")


def _list_embeddings(config: VitConfig) -> list[Rule]:
    # Theirs have dimensions for the batch; DINOv2's mask token has one less than the others.
    mask_dims = 2 if config.model_type == "dinov3_vit" else 1

    rules: list[Rule] = [
        Reshape("embeddings.cls_token", "frontend.class_embed", leading_dims(2)),
        Reshape("embeddings.mask_token", "frontend.mask_embed", leading_dims(mask_dims)),
        Reshape("embeddings.position_embeddings", "frontend.positions.weight", leading_dims(1)),
    ]
    if config.num_registers == 0:
        return [*rules, Drop(theirs=re.escape(_REGISTERS))]

    return [*rules, Reshape(_REGISTERS, "frontend.registers", leading_dims(1))]


def _list_layers(config: VitConfig) -> list[Rule]:
    rules: list[Rule] = []

    match config.model_type:
        case "vit" | "vit_mae":
            names = _PATCHES | {"layernorm.": "encoder.layer_norm.", "pooler.dense.": "pooler."}
            stack, layer = "encoder.layer", _VIT_LAYER
        case "dinov3_vit":
            names = {"embeddings.patch_embeddings.": "frontend.patch_proj.", "norm.": "encoder.layer_norm."}
            stack, layer = "layer", _DINOV3_LAYER
        case _:
            names = _PATCHES | {"layernorm.": "encoder.layer_norm."}
            ffn = _DINOV2_GATED_FFN if config.has_fused_gates else _DINOV2_FFN
            stack, layer = "encoder.layer", _ATTENTION | _DINO_LAYER | ffn

    if config.has_fused_gates:
        # The first projection of transformers' is gate and inner projection in one.
        parts = [f"encoder.layers.*.ffn.{name}_proj." for name in ("gate", "inner")]
        rules.append(Split(f"{stack}.*.mlp.weights_in.", parts))

    rules += [Rename(theirs, ours) for theirs, ours in names.items()]
    rules += [Rename(f"{stack}.*.{theirs}", f"encoder.layers.*.{ours}") for theirs, ours in layer.items()]
    return rules


get_vit_model_hub = ModelHubAccessor(VIT_FAMILY, kls=VitModel, config_kls=VitConfig)
