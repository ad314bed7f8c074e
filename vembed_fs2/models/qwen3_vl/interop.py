"""Checkpoints of transformers' Qwen3-VL, read and written."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, final

from fairseq2.models import ModelHubAccessor
from fairseq2.models.hg import HuggingFaceConfig
from fairseq2.utils.config import cast_config_type
from typing_extensions import override

from vembed_fs2.embedding.model import HeadConfig
from vembed_fs2.errors import ModelLoadError
from vembed_fs2.formats.checkpoint import CheckpointFormat
from vembed_fs2.formats.extra_fields import with_extra_fields
from vembed_fs2.formats.hf_config import (
    read_fields,
    refuse_other_values,
    resolve_hf_config,
    validate_hf_config,
    write_fields,
)
from vembed_fs2.formats.key_map import Drop, KeyMap, Rename, Reshape, Rule, Shape, Split
from vembed_fs2.formats.rope import ROPE_PARAMETERS, create_config
from vembed_fs2.models.common.interop import DECODER_RULES
from vembed_fs2.models.family import drop_learned
from vembed_fs2.models.qwen3_vl.config import QWEN3_VL_FAMILY, Qwen3VLConfig, VisionConfig
from vembed_fs2.models.qwen3_vl.model import Qwen3VLModel

_TEXT_FIELDS: Final = {
    "vocab_size": "vocab_size",
    "hidden_size": "model_dim",
    "intermediate_size": "ffn_inner_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attn_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_act": "activation",
    "max_position_embeddings": "max_seq_len",
    "initializer_range": "init_std",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "attention_bias": "qkv_bias",
    "attention_dropout": "attn_dropout_p",
}

_VISION_FIELDS: Final = {
    "depth": "num_layers",
    "hidden_size": "model_dim",
    "hidden_act": "activation",
    "intermediate_size": "ffn_inner_dim",
    "num_heads": "num_attn_heads",
    "in_channels": "num_channels",
    "patch_size": "patch_size",
    "spatial_merge_size": "merge_size",
    "temporal_patch_size": "temporal_patch_size",
    "num_position_embeddings": "num_positions",
    "initializer_range": "init_std",
}

_TOKEN_FIELDS: Final = {
    "image_token_id": "image_idx",
    "video_token_id": "video_idx",
    "vision_start_token_id": "vision_start_idx",
    "vision_end_token_id": "vision_end_idx",
}

_FIXED: Final[dict[str, tuple[object, ...]]] = {"pruned_heads": (None, {}), "quantization_config": (None,)}

_LAYER: Final = "vision.layers.*"

_VISION_RULES: Final[Sequence[Rule]] = (
    Rename("visual.patch_embed.proj.bias", "vision.patch_proj.bias"),
    Rename("visual.pos_embed.", "vision.pos_embed."),
    Rename("visual.blocks.*.norm1.", f"{_LAYER}.self_attn_layer_norm."),
    Split("visual.blocks.*.attn.qkv.", [f"{_LAYER}.self_attn.{name}_proj." for name in "qkv"]),
    Rename("visual.blocks.*.attn.proj.", f"{_LAYER}.self_attn.output_proj."),
    Rename("visual.blocks.*.norm2.", f"{_LAYER}.ffn_layer_norm."),
    Rename("visual.blocks.*.mlp.linear_fc1.", f"{_LAYER}.ffn.inner_proj."),
    Rename("visual.blocks.*.mlp.linear_fc2.", f"{_LAYER}.ffn.output_proj."),
    *(
        Rename(f"visual.{theirs}.{part}.", f"vision.{ours}.{name}.")
        for theirs, ours in (("merger", "merger"), ("deepstack_merger_list.*", "deepstack_mergers.*"))
        for part, name in (("norm", "norm"), ("linear_fc1", "inner_proj"), ("linear_fc2", "output_proj"))
    ),
)


@final
class Qwen3VLCheckpointFormat(CheckpointFormat):
    """Reads and writes checkpoints of ``transformers.Qwen3VLModel``."""

    model_types = ("qwen3_vl",)

    @override
    def has_our_names(self, keys: Collection[str], config: object) -> bool:
        return any(key.startswith("frontend.") for key in keys)

    @override
    def config_fields(self, config: object) -> Mapping[str, object]:
        text = dict.fromkeys((*_TEXT_FIELDS, "pad_token_id", "rope_scaling", ROPE_PARAMETERS))
        vision = dict.fromkeys((*_VISION_FIELDS, "out_hidden_size", "deepstack_visual_indexes"))
        return {**super().config_fields(config), "text_config": text, "vision_config": vision}

    @override
    def from_hf_config(
        self, hf_config: Mapping[str, Any], *, head: HeadConfig | None = None, keys: frozenset[str] = frozenset()
    ) -> Qwen3VLConfig:
        resolved = resolve_hf_config(_with_old_names(hf_config), "Qwen3VLConfig", "Qwen3-VL")
        text, vision = resolved["text_config"], resolved["vision_config"]
        for values in (resolved, text, vision):
            refuse_other_values(values, _FIXED)

        default = Qwen3VLConfig()
        fields = read_fields(text, _TEXT_FIELDS, default, "text_config.")
        fields |= read_fields(resolved, _TOKEN_FIELDS, default, "")
        tower = VisionConfig(
            **read_fields(vision, _VISION_FIELDS, VisionConfig(), "vision_config."),
            deepstack_layers=list(vision["deepstack_visual_indexes"]),
        )
        validate_hf_config(tower, {ours: f"vision_config.{name}" for name, ours in _VISION_FIELDS.items()})
        if vision["out_hidden_size"] != fields["model_dim"]:
            raise ModelLoadError("config.json: `vision_config.out_hidden_size` must be `text_config.hidden_size`.")

        config = Qwen3VLConfig(
            **fields,
            output_bias=fields["qkv_bias"],
            pad_idx=text.get("pad_token_id"),
            is_causal=hf_config.get("is_causal") is not False,
            mrope_section=_read_sections(text.get("rope_scaling")),
            vision=tower,
            head=head or HeadConfig(pooling="last"),
        )
        validate_hf_config(config, {ours: f"text_config.{name}" for name, ours in _TEXT_FIELDS.items()})
        return config

    @override
    def key_map(self, config: Any) -> KeyMap:
        tower: VisionConfig = config.vision
        size = (tower.num_channels, tower.temporal_patch_size, tower.patch_size, tower.patch_size)
        kernel = Shape(lambda tensor: tensor.flatten(1), lambda tensor: tensor.reshape(-1, *size))

        return KeyMap(
            Drop(theirs=r"lm_head\..*"),
            Reshape("visual.patch_embed.proj.weight", "vision.patch_proj.weight", kernel),
            *_VISION_RULES,
            *(Rename(f"language_model.{rule.theirs}", rule.ours) for rule in DECODER_RULES),
            drop_learned(config),
            prefixes=["model."],
        )

    @override
    def to_hg_config(self, config: object) -> HuggingFaceConfig:
        from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig, Qwen3VLVisionConfig

        config = cast_config_type(config, Qwen3VLConfig)
        text = write_fields(config, _TEXT_FIELDS)
        text |= {
            "pad_token_id": config.pad_idx,
            "rope_scaling": {
                "rope_type": "default",
                "mrope_section": list(config.mrope_section),
                "mrope_interleaved": True,
            },
        }
        vision = write_fields(config.vision, _VISION_FIELDS)
        vision |= {
            "out_hidden_size": config.model_dim,
            "deepstack_visual_indexes": list(config.vision.deepstack_layers),
        }

        data: dict[str, object] = write_fields(config, _TOKEN_FIELDS)
        data |= {"text_config": Qwen3VLTextConfig(**text), "vision_config": Qwen3VLVisionConfig(**vision)}
        if not config.is_causal:
            data["is_causal"] = False

        exported = HuggingFaceConfig(data, kls_name="Qwen3VLConfig", arch="Qwen3VLModel")
        return with_extra_fields(exported, config)


def _with_old_names(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Replace what version 5 of transformers writes in another way."""
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig

    values = dict(hf_config)
    text = values.get("text_config")
    if isinstance(text, Mapping) and ROPE_PARAMETERS in text:
        fields = create_config(text, Qwen3VLTextConfig)[1]
        values["text_config"] = {name: value for name, value in text.items() if name != ROPE_PARAMETERS} | fields

    return values


def _read_sections(scaling: Mapping[str, Any] | None) -> list[int]:
    """
    :raises ModelLoadError: positions are stretched in a way that is not supported.
    """
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "mrope") or scaling.get("mrope_interleaved") is False:
        raise ModelLoadError(f"config.json: `text_config.rope_scaling` is {dict(scaling)!r}, which is not supported.")
    return list(scaling.get("mrope_section", [24, 20, 20]))


get_qwen3_vl_model_hub = ModelHubAccessor(QWEN3_VL_FAMILY, kls=Qwen3VLModel, config_kls=Qwen3VLConfig)
