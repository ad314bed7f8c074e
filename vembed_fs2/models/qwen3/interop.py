"""Checkpoints of transformers' Qwen3, Qwen2, Mistral and Llama, read and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, final

from fairseq2.models import ModelHubAccessor
from fairseq2.models.hg import HuggingFaceConfig
from fairseq2.utils.config import cast_config_type
from typing_extensions import override

from vembed_fs2.embedding.model import HeadConfig
from vembed_fs2.errors import ModelLoadError, VembedError
from vembed_fs2.formats.hf_config import read_field, refuse_other_values, resolve_hf_config, validate_hf_config
from vembed_fs2.formats.key_map import Drop, KeyMap, Rename, Rule
from vembed_fs2.models.common.interop import TEXT_FIELDS, BackboneCheckpointFormat
from vembed_fs2.models.family import drop_learned
from vembed_fs2.models.qwen3.config import QWEN3_FAMILY, Qwen3Config, RopeScaling, Variant
from vembed_fs2.models.qwen3.model import Qwen3Model


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """What one of transformers' models computes, and how its ``config.json`` says it."""

    name: str
    """What the names of transformers' classes begin with."""

    fixed: Mapping[str, bool]
    """The fields of our configuration that its own has no place for, and their values."""

    flags: Mapping[str, tuple[str, ...]]
    """The fields of its configuration that stand for fields of ours."""

    has_layer_types: bool = False
    """Whether it says for each layer if it is windowed; else all layers are, if there is a window."""

    has_window: bool = True


_LAYOUTS: Final[Mapping[Variant, _Layout]] = {
    "qwen3": _Layout(
        name="Qwen3",
        fixed={"qk_norm": True, "ffn_bias": False},
        flags={"attention_bias": ("qkv_bias", "output_bias")},
        has_layer_types=True,
    ),
    "qwen2": _Layout(
        name="Qwen2",
        fixed={"qk_norm": False, "qkv_bias": True, "output_bias": False, "ffn_bias": False},
        flags={},
        has_layer_types=True,
    ),
    "mistral": _Layout(
        name="Mistral",
        fixed={"qk_norm": False, "qkv_bias": False, "output_bias": False, "ffn_bias": False},
        flags={},
    ),
    "llama": _Layout(
        name="Llama",
        fixed={"qk_norm": False},
        flags={"attention_bias": ("qkv_bias", "output_bias"), "mlp_bias": ("ffn_bias",)},
        has_window=False,
    ),
}

# Embedders that are one of these, with attention in both directions.
_BIDIRECTIONAL_TYPES: Final[Mapping[str, Variant]] = {"llama_bidirec": "llama"}

# The fields of config.json, what they are called here, and their types.
_FIELDS: Final[dict[str, tuple[str, type]]] = {
    **TEXT_FIELDS,
    "num_key_value_heads": ("num_key_value_heads", int),
    "hidden_act": ("activation", str),
    "rms_norm_eps": ("norm_eps", float),
    "rope_theta": ("rope_theta", float),
    "attention_dropout": ("attn_dropout_p", float),
    "initializer_range": ("init_std", float),
}

# Fields that change what transformers' model computes, and the values at which they do not.
_FIXED: Final[dict[str, tuple[object, ...]]] = {
    "partial_rotary_factor": (None, 1.0, 1),
    "pretraining_tp": (1,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
}

_LAYER: Final = "decoder.layers.*"

_RULES: Final[Sequence[Rule]] = (
    # Language-model and score heads, and a table of old versions.
    Drop(theirs=r"(lm_head|score)\..*|(.*\.)?rotary_emb\.inv_freq"),
    Rename("embed_tokens.", "frontend.embed."),
    Rename("layers.*.input_layernorm.", f"{_LAYER}.self_attn_layer_norm."),
    *(Rename(f"layers.*.self_attn.{x}_proj.", f"{_LAYER}.self_attn.{x}_proj.") for x in "qkv"),
    *(Rename(f"layers.*.self_attn.{x}_norm.", f"{_LAYER}.self_attn.{x}_norm.") for x in "qk"),
    Rename("layers.*.self_attn.o_proj.", f"{_LAYER}.self_attn.output_proj."),
    Rename("layers.*.post_attention_layernorm.", f"{_LAYER}.ffn_layer_norm."),
    Rename("layers.*.mlp.gate_proj.", f"{_LAYER}.ffn.gate_proj."),
    Rename("layers.*.mlp.up_proj.", f"{_LAYER}.ffn.inner_proj."),
    Rename("layers.*.mlp.down_proj.", f"{_LAYER}.ffn.output_proj."),
    Rename("norm.", "decoder.layer_norm."),
)


@final
class Qwen3CheckpointFormat(BackboneCheckpointFormat):
    """Reads and writes checkpoints of the four decoders."""

    model_types = (*_LAYOUTS, *_BIDIRECTIONAL_TYPES)

    @override
    def from_hf_config(
        self, hf_config: Mapping[str, Any], *, head: HeadConfig | None = None, keys: frozenset[str] = frozenset()
    ) -> Qwen3Config:
        variant = _read_variant(hf_config)
        layout = _LAYOUTS[variant]
        resolved = resolve_hf_config(_with_old_names(hf_config), f"{layout.name}Config")
        refuse_other_values(resolved, _FIXED)

        values: dict[str, Any] = {"variant": variant, **layout.fixed}
        for name, (ours, kls) in _FIELDS.items():
            values[ours] = read_field(resolved, name, kls, optional=name == "pad_token_id")
        for name, flags in layout.flags.items():
            values |= dict.fromkeys(flags, read_field(resolved, name, bool))

        values["head_dim"] = read_field({"head_dim": None, **resolved}, "head_dim", int, optional=True)
        values["rope_scaling"] = _read_scaling(resolved.get("rope_scaling"))
        values["is_causal"] = _is_causal(hf_config)
        values |= _read_windows(resolved, layout)

        head = head or HeadConfig(pooling=_read_pooling(hf_config, values["is_causal"]))
        config = Qwen3Config(**values, head=head)
        validate_hf_config(config, {ours: name for name, (ours, _) in _FIELDS.items()})

        return config

    @override
    def key_map(self, config: object) -> KeyMap:
        # transformers' decoders have no place for what only objectives need.
        return KeyMap(*_RULES, drop_learned(config), prefixes=["model."])

    @override
    def to_hg_config(self, config: object) -> HuggingFaceConfig:
        config = cast_config_type(config, Qwen3Config)
        layout = _LAYOUTS[config.variant]

        data: dict[str, object] = {name: getattr(config, ours) for name, (ours, _) in _FIELDS.items()}
        data["head_dim"] = config.head_dim
        if config.variant == "qwen3":
            data["head_dim"] = config.attn_head_dim
        if config.variant == "qwen2" and config.head_dim is None:
            del data["head_dim"]

        data |= _write_flags(config, layout)
        data |= _write_windows(config, layout)
        if config.rope_scaling is not None or config.variant != "mistral":
            data["rope_scaling"] = _write_scaling(config.rope_scaling)
        if not config.is_causal:
            data["is_causal"] = False  # Version 5 of transformers obeys it.

        return HuggingFaceConfig(data, kls_name=f"{layout.name}Config", arch=f"{layout.name}Model")


def _read_variant(hf_config: Mapping[str, Any]) -> Variant:
    """
    :raises ModelLoadError: the type is none of the four.
    """
    model_type = hf_config.get("model_type", "qwen3")
    for variant in _LAYOUTS:
        if variant in (model_type, _BIDIRECTIONAL_TYPES.get(model_type)):
            return variant
    raise ModelLoadError(f"config.json: `model_type` is {model_type!r}, which is not supported.")


def _with_old_names(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Replace what version 5 of transformers writes in another way."""
    values = dict(hf_config)
    parameters = values.pop("rope_parameters", None)
    if isinstance(parameters, Mapping):
        scaling = {
            key: value for key, value in parameters.items() if key not in ("rope_theta", "partial_rotary_factor")
        }
        values["rope_scaling"] = scaling
        values |= {key: value for key, value in parameters.items() if key not in scaling}

    # Positions that are not stretched.
    stretch = values.get("rope_scaling")
    if isinstance(stretch, Mapping) and stretch.get("rope_type", stretch.get("type")) == "default":
        values["rope_scaling"] = None

    # The class of this name would be another one.
    values.pop("model_type", None)
    return values


def _is_causal(hf_config: Mapping[str, Any]) -> bool:
    """Whether tokens see only those before them, in every spelling that embedders use."""
    if hf_config.get("is_causal") is not None:
        return bool(hf_config["is_causal"])
    if hf_config.get("use_bidirectional_attention") or hf_config.get("model_type") in _BIDIRECTIONAL_TYPES:
        return False
    return not any("bidirec" in name.lower() for name in hf_config.get("architectures") or ())


def _read_pooling(hf_config: Mapping[str, Any], is_causal: bool) -> Any:
    """The pooling of a folder that has no modules: some embedders name it in ``config.json``."""
    names = {"avg": "mean", "mean": "mean", "last": "last", "cls": "cls", "weighted_avg": "weightedmean"}
    return names.get(str(hf_config.get("pooling")), "last" if is_causal else "mean")


def _read_scaling(values: Any) -> RopeScaling | None:
    """
    :raises ModelLoadError: there is a field that is not known.
    """
    if values is None:
        return None

    scaling = {key: value for key, value in values.items() if key != "type"}
    known = {field.name for field in fields(RopeScaling)}
    if unknown := scaling.keys() - known:
        raise ModelLoadError(f"config.json: `rope_scaling.{min(unknown)}` is not supported.")

    return RopeScaling(**scaling)


def _write_scaling(scaling: RopeScaling | None) -> dict[str, object] | None:
    return None if scaling is None else {key: value for key, value in asdict(scaling).items() if value is not None}


def _read_windows(resolved: Mapping[str, Any], layout: _Layout) -> dict[str, Any]:
    window = resolved.get("sliding_window") if layout.has_window else None
    if layout.has_layer_types:
        layers = [idx for idx, kind in enumerate(resolved["layer_types"]) if kind == "sliding_attention"]
    else:
        layers = list(range(resolved["num_hidden_layers"])) if window is not None else []

    # A window that no layer has does not count.
    return {"attn_window": window if layers else None, "windowed_layers": layers}


def _write_windows(config: Qwen3Config, layout: _Layout) -> dict[str, object]:
    layers = list(config.windowed_layers)
    if not layout.has_layer_types:
        if layers and (not layout.has_window or len(layers) < config.num_layers):
            raise VembedError(f"transformers' {layout.name} cannot express `windowed_layers`.")
        return {"sliding_window": config.attn_window} if layout.has_window else {}

    kinds = ["sliding_attention" if idx in layers else "full_attention" for idx in range(config.num_layers)]
    if not layers:
        return {"layer_types": kinds, "use_sliding_window": False, "sliding_window": None}
    return {
        "layer_types": kinds,
        "use_sliding_window": True,
        "sliding_window": config.attn_window,
        "max_window_layers": min(layers),
    }


def _write_flags(config: Qwen3Config, layout: _Layout) -> dict[str, object]:
    """
    :raises VembedError: transformers' model cannot express a field; the message names it.
    """
    for name, value in layout.fixed.items():
        if getattr(config, name) != value:
            raise VembedError(f"transformers' {layout.name} cannot express `{name}` being {not value}.")

    data: dict[str, object] = {}
    for theirs, names in layout.flags.items():
        values = {getattr(config, name) for name in names}
        if len(values) > 1:
            raise VembedError(f"transformers' {layout.name} cannot express {' and '.join(names)} being different.")
        data[theirs] = values.pop()

    return data


get_qwen3_model_hub = ModelHubAccessor(QWEN3_FAMILY, kls=Qwen3Model, config_kls=Qwen3Config)
