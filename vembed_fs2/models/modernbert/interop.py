"""Checkpoints of transformers' ModernBERT, read and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, final

from fairseq2.models import ModelHubAccessor
from fairseq2.models.hg import HuggingFaceConfig
from fairseq2.utils.config import cast_config_type
from typing_extensions import override

from vembed_fs2.embedding.model import HeadConfig
from vembed_fs2.errors import ModelLoadError
from vembed_fs2.formats.extra_fields import with_extra_fields
from vembed_fs2.formats.hf_config import read_field, refuse_other_values, resolve_hf_config, validate_hf_config
from vembed_fs2.formats.key_map import Drop, KeyMap, Rename, Rule, Split
from vembed_fs2.models.common.interop import TEXT_FIELDS, BackboneCheckpointFormat
from vembed_fs2.models.family import drop_learned
from vembed_fs2.models.modernbert.config import MODERNBERT_FAMILY, ModernBertConfig
from vembed_fs2.models.modernbert.model import ModernBertModel

_LAYER: Final = "encoder.layers.*"

_RULES: Final[Sequence[Rule]] = (
    # The heads for pretraining and classification. `head.dense.0.weight` is a dense layer of our own head.
    Drop(theirs=r"(head\.(dense|norm)|decoder|classifier)\.(weight|bias)"),
    Rename("embeddings.tok_embeddings.", "frontend.embed."),
    Rename("embeddings.norm.", "frontend.layer_norm."),
    Rename("layers.*.attn_norm.", f"{_LAYER}.self_attn_layer_norm."),
    # transformers has these projections in one. Tensor parallelism can split the parts.
    Split("layers.*.attn.Wqkv.", [f"{_LAYER}.self_attn.{name}_proj." for name in "qkv"]),
    Rename("layers.*.attn.Wo.", f"{_LAYER}.self_attn.output_proj."),
    Rename("layers.*.mlp_norm.", f"{_LAYER}.ffn_layer_norm."),
    Split("layers.*.mlp.Wi.", [f"{_LAYER}.ffn.{name}_proj." for name in ("gate", "inner")]),
    Rename("layers.*.mlp.Wo.", f"{_LAYER}.ffn.output_proj."),
    Rename("final_norm.", "encoder.layer_norm."),
)

# The fields of config.json, what they are called here, and their types.
_FIELDS: Final[dict[str, tuple[str, type]]] = {
    **TEXT_FIELDS,
    "hidden_activation": ("activation", str),
    "global_attn_every_n_layers": ("global_attn_interval", int),
    "local_attention": ("local_attn_window", int),
    "global_rope_theta": ("global_rope_theta", float),
    "local_rope_theta": ("local_rope_theta", float),
    "attention_bias": ("attn_bias", bool),
    "mlp_bias": ("ffn_bias", bool),
    "norm_bias": ("norm_bias", bool),
    "norm_eps": ("norm_eps", float),
    "embedding_dropout": ("embed_dropout_p", float),
    "attention_dropout": ("attn_dropout_p", float),
    "mlp_dropout": ("ffn_dropout_p", float),
    "initializer_range": ("init_std", float),
    "initializer_cutoff_factor": ("init_cutoff", float),
    "classifier_pooling": ("classifier_pooling", str),
}

_OPTIONAL: Final = ("pad_token_id", "local_rope_theta", "initializer_cutoff_factor")

# What version 5 of transformers writes in place of some of them.
_OTHER_SPELLINGS: Final = ("head_dim", "layer_types", "rope_parameters", "rope_theta")

# Fields that change what transformers' model computes, and the values at which they do not.
_FIXED: Final[dict[str, tuple[object, ...]]] = {
    "position_embedding_type": ("absolute",),
    "rope_scaling": (None, {"rope_type": "default"}, {"type": "default"}),
    "partial_rotary_factor": (1.0,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
}


@final
class ModernBertCheckpointFormat(BackboneCheckpointFormat):
    """Reads and writes checkpoints of ``transformers.ModernBertModel``."""

    model_types = ("modernbert",)

    @override
    def from_hf_config(
        self, hf_config: Mapping[str, Any], *, head: HeadConfig | None = None, keys: frozenset[str] = frozenset()
    ) -> ModernBertConfig:
        resolved = resolve_hf_config(_with_old_names(hf_config), "ModernBertConfig")
        refuse_other_values(resolved, _FIXED)
        values = {
            ours: read_field(resolved, name, kls, optional=name in _OPTIONAL) for name, (ours, kls) in _FIELDS.items()
        }
        config = ModernBertConfig(**values, head=head or HeadConfig(pooling=values["classifier_pooling"]))
        validate_hf_config(config, {ours: name for name, (ours, _) in _FIELDS.items()})
        head_dim = config.model_dim // config.num_attn_heads
        refuse_other_values(hf_config, {"head_dim": (None, head_dim), "rope_theta": (config.global_rope_theta,)})

        return config

    @override
    def key_map(self, config: object) -> KeyMap:
        # transformers' ModernBERT has no place for what only objectives need.
        return KeyMap(*_RULES, drop_learned(config), prefixes=["model."])

    @override
    def to_hg_config(self, config: object) -> HuggingFaceConfig:
        config = cast_config_type(config, ModernBertConfig)
        data: dict[str, object] = {name: getattr(config, ours) for name, (ours, _) in _FIELDS.items()}
        exported = HuggingFaceConfig(data, kls_name="ModernBertConfig", arch="ModernBertModel")
        return with_extra_fields(exported, config)

    @override
    def config_fields(self, config: object) -> Mapping[str, object]:
        return {**super().config_fields(config), **dict.fromkeys(_OTHER_SPELLINGS)}


def _with_old_names(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Add the fields that version 5 of transformers writes in another way.

    :raises ModelLoadError: what it writes has no counterpart in version 4.
    """
    values = dict(hf_config)
    kinds = values.pop("layer_types", None)
    if kinds is not None:
        interval = next((idx for idx, kind in enumerate(kinds) if idx > 0 and kind == "full_attention"), len(kinds))
        interval = values.setdefault("global_attn_every_n_layers", max(interval, 1))

        known = ["sliding_attention" if idx % interval else "full_attention" for idx in range(len(kinds))]
        if list(kinds) != known:
            raise ModelLoadError(f"config.json: `layer_types` is {kinds!r}, which is not supported.")

    parameters = values.pop("rope_parameters", None)
    for kind, name in (("full_attention", "global_rope_theta"), ("sliding_attention", "local_rope_theta")):
        if parameters is None:
            continue

        rope = parameters.get(kind) or {}
        if rope.keys() - {"rope_type", "rope_theta"} or rope.get("rope_type", "default") != "default":
            raise ModelLoadError(f"config.json: `rope_parameters` is {parameters!r}, which is not supported.")
        if "rope_theta" in rope:
            values[name] = rope["rope_theta"]

    return values


get_modernbert_model_hub = ModelHubAccessor(MODERNBERT_FAMILY, kls=ModernBertModel, config_kls=ModernBertConfig)
