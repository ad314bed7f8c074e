"""Checkpoints of transformers' Qwen3, Qwen2, Mistral and Llama, read and written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, final

from fairseq2.models import ModelHubAccessor
from fairseq2.models.hg import HuggingFaceConfig
from fairseq2.utils.config import cast_config_type
from typing_extensions import override

from vembed_fs2.embedding.model import HeadConfig
from vembed_fs2.errors import ModelLoadError, VembedError
from vembed_fs2.formats.checkpoint import CONFIG_FILE
from vembed_fs2.formats.extra_fields import with_extra_fields
from vembed_fs2.formats.hf_config import read_field, refuse_other_values, validate_hf_config
from vembed_fs2.formats.key_map import Drop, KeyMap
from vembed_fs2.formats.rope import LENGTH, ROPE_PARAMETERS, create_config
from vembed_fs2.models.common.interop import DECODER_RULES, TEXT_FIELDS, BackboneCheckpointFormat
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

_BIDIRECTIONAL_FLAG: Final = "use_bidirectional_attention"
"""What embedders of other types call it."""

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

# Language-model and score heads, and a table of old versions.
_DROPPED: Final = Drop(theirs=r"(lm_head|score)\..*|(.*\.)?rotary_emb\.inv_freq")


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
        resolved = _resolve(hf_config, layout)
        refuse_other_values(resolved, _FIXED)

        values: dict[str, Any] = {"variant": variant, **layout.fixed}
        for name, (ours, kls) in _FIELDS.items():
            values[ours] = read_field(resolved, name, kls, optional=name == "pad_token_id")
        for name, flags in layout.flags.items():
            values |= dict.fromkeys(flags, read_field(resolved, name, bool))

        values["head_dim"] = read_field({"head_dim": None, **resolved}, "head_dim", int, optional=True)
        values["rope_scaling"] = _read_scaling(resolved)
        values["is_causal"] = _is_causal(hf_config)
        values |= _read_windows(resolved, layout)

        head = head or HeadConfig(pooling=_read_pooling(hf_config, values["is_causal"]))
        config = Qwen3Config(**values, head=head)
        validate_hf_config(config, {ours: name for name, (ours, _) in _FIELDS.items()})

        return config

    @override
    def key_map(self, config: object) -> KeyMap:
        # transformers' decoders have no place for what only objectives need.
        return KeyMap(_DROPPED, *DECODER_RULES, drop_learned(config), prefixes=["model."])

    @override
    def to_hg_config(self, config: object) -> HuggingFaceConfig:
        config = cast_config_type(config, Qwen3Config)
        layout = _LAYOUTS[config.variant]
        extra = config.extra_fields.get(CONFIG_FILE, {})

        data: dict[str, object] = {name: getattr(config, ours) for name, (ours, _) in _FIELDS.items()}
        data["head_dim"] = config.head_dim
        if config.variant == "qwen3":
            data["head_dim"] = config.attn_head_dim
        if config.variant == "qwen2" and config.head_dim is None:
            del data["head_dim"]

        data |= _write_flags(config, layout)
        data |= _write_windows(config, layout)
        data |= _write_scaling(config)
        if not config.is_causal or _BIDIRECTIONAL_FLAG in extra:
            data["is_causal"] = config.is_causal  # Version 5 of transformers obeys it.

        exported = HuggingFaceConfig(data, kls_name=f"{layout.name}Config", arch=f"{layout.name}Model")
        return with_extra_fields(exported, config)

    @override
    def config_fields(self, config: object) -> Mapping[str, object]:
        return {**super().config_fields(config), ROPE_PARAMETERS: None}


def _read_variant(hf_config: Mapping[str, Any]) -> Variant:
    """
    :raises ModelLoadError: the type is none of the four.
    """
    model_type = hf_config.get("model_type", "qwen3")
    for variant in _LAYOUTS:
        if variant in (model_type, _BIDIRECTIONAL_TYPES.get(model_type)):
            return variant
    raise ModelLoadError(f"config.json: `model_type` is {model_type!r}, which is not supported.")


def _resolve(hf_config: Mapping[str, Any], layout: _Layout) -> dict[str, Any]:
    """Return the content of ``config.json`` as transformers' class sees it, with its defaults.

    :raises ModelLoadError: the class does not take the content.
    """
    import transformers

    # The class of this name may be another one.
    values = {name: value for name, value in hf_config.items() if name != "model_type"}
    resolved: dict[str, Any] = create_config(values, getattr(transformers, f"{layout.name}Config"))[0].to_dict()

    return resolved


def _is_causal(hf_config: Mapping[str, Any]) -> bool:
    """Whether tokens see only those before them, in every spelling that embedders use."""
    if hf_config.get("is_causal") is not None:
        return bool(hf_config["is_causal"])
    if hf_config.get(_BIDIRECTIONAL_FLAG) or hf_config.get("model_type") in _BIDIRECTIONAL_TYPES:
        return False
    return not any("bidirec" in name.lower() for name in hf_config.get("architectures") or ())


def _read_pooling(hf_config: Mapping[str, Any], is_causal: bool) -> Any:
    """The pooling of a folder that has no modules: some embedders name it in ``config.json``."""
    names = {"avg": "mean", "mean": "mean", "last": "last", "cls": "cls", "weighted_avg": "weightedmean"}
    return names.get(str(hf_config.get("pooling")), "last" if is_causal else "mean")


def _read_scaling(resolved: Mapping[str, Any]) -> RopeScaling | None:
    """
    :raises ModelLoadError: there is a field that is not known.
    """
    values = resolved.get("rope_scaling")
    # Positions that are not stretched are of a kind of their own.
    if values is None or values.get("rope_type", values.get("type")) == "default":
        return None

    scaling = {key: value for key, value in values.items() if key != "type"}
    known = {field.name for field in fields(RopeScaling)}
    if unknown := scaling.keys() - known:
        raise ModelLoadError(f"config.json: `rope_scaling.{min(unknown)}` is not supported.")

    kind = scaling.setdefault("rope_type", values.get("type"))
    if kind == "longrope" and resolved.get(LENGTH) is not None:
        scaling[LENGTH] = resolved[LENGTH]

    return RopeScaling(**scaling)


def _write_scaling(config: Qwen3Config) -> dict[str, object]:
    if config.rope_scaling is None:
        return {} if config.variant == "mistral" else {"rope_scaling": None}

    scaling = {key: value for key, value in asdict(config.rope_scaling).items() if value is not None}
    # transformers looks for this length outside.
    outside = {LENGTH: scaling.pop(LENGTH)} if scaling["rope_type"] == "longrope" and LENGTH in scaling else {}
    return {"rope_scaling": scaling, **outside}


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
        return {"layer_types": kinds}
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
