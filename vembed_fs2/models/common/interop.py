"""What transformers' checkpoints of several families have in common."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from typing_extensions import override

from vembed_fs2.embedding.model import HeadConfig
from vembed_fs2.errors import ModelLoadError
from vembed_fs2.formats.checkpoint import CheckpointFormat
from vembed_fs2.formats.key_map import Rename

TOWER_FIELDS: Final = {
    "hidden_size": "model_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attn_heads",
    "intermediate_size": "ffn_inner_dim",
    "hidden_act": "activation",
    "layer_norm_eps": "layer_norm_eps",
    "attention_dropout": "attn_dropout_p",
}
"""The fields of either Transformer of a dual encoder, and what they are called here."""

TOKEN_FIELDS: Final = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
    "pad_token_id": "pad_idx",
    "bos_token_id": "bos_idx",
    "eos_token_id": "eos_idx",
}
"""The fields of the text Transformer of a dual encoder."""

PIXEL_FIELDS: Final = {"num_channels": "num_channels", "image_size": "image_size", "patch_size": "patch_size"}
"""The fields of an image Transformer."""

TEXT_FIELDS: Final[Mapping[str, tuple[str, type]]] = {
    "hidden_size": ("model_dim", int),
    "max_position_embeddings": ("max_seq_len", int),
    "vocab_size": ("vocab_size", int),
    "pad_token_id": ("pad_idx", int),
    "num_hidden_layers": ("num_layers", int),
    "num_attention_heads": ("num_attn_heads", int),
    "intermediate_size": ("ffn_inner_dim", int),
}
"""The fields of a text Transformer, what they are called here, and their types."""

_DECODER_LAYER: Final = "decoder.layers.*"

DECODER_RULES: Final[Sequence[Rename]] = (
    Rename("embed_tokens.", "frontend.embed."),
    Rename("layers.*.input_layernorm.", f"{_DECODER_LAYER}.self_attn_layer_norm."),
    *(Rename(f"layers.*.self_attn.{x}_proj.", f"{_DECODER_LAYER}.self_attn.{x}_proj.") for x in "qkv"),
    *(Rename(f"layers.*.self_attn.{x}_norm.", f"{_DECODER_LAYER}.self_attn.{x}_norm.") for x in "qk"),
    Rename("layers.*.self_attn.o_proj.", f"{_DECODER_LAYER}.self_attn.output_proj."),
    Rename("layers.*.post_attention_layernorm.", f"{_DECODER_LAYER}.ffn_layer_norm."),
    Rename("layers.*.mlp.gate_proj.", f"{_DECODER_LAYER}.ffn.gate_proj."),
    Rename("layers.*.mlp.up_proj.", f"{_DECODER_LAYER}.ffn.inner_proj."),
    Rename("layers.*.mlp.down_proj.", f"{_DECODER_LAYER}.ffn.output_proj."),
    Rename("norm.", "decoder.layer_norm."),
)
"""The names of a decoder's tensors there and here."""


class BackboneCheckpointFormat(CheckpointFormat):
    """Base of the formats of models of one Transformer, all of which have a ``frontend`` here."""

    @override
    def has_our_names(self, keys: Collection[str], config: object) -> bool:
        return any(key.startswith("frontend.") for key in keys)


class DualCheckpointFormat(CheckpointFormat):
    """Base of the formats of dual encoders, which transformers makes of a ``text_model`` and a ``vision_model``."""

    text_fields: Mapping[str, str]
    """The fields of ``text_config`` that have a counterpart here."""

    vision_fields: Mapping[str, str]
    """The fields of ``vision_config`` that have a counterpart here."""

    @override
    def config_fields(self, config: object) -> Mapping[str, object]:
        fields = dict(super().config_fields(config))
        if "text_config" in fields:
            fields |= {"text_config": self.text_fields, "vision_config": self.vision_fields}
            # Older folders have a second copy of both, which would come before the first one.
            fields |= dict.fromkeys(("text_config_dict", "vision_config_dict"))
        return fields

    @override
    def find_extra_fields(self, hf_config: Mapping[str, Any], config: Any) -> dict[str, object]:
        content = dict(hf_config)
        for name in ("text_config", "vision_config"):
            content[name] = {**(content.get(name) or {}), **(content.get(f"{name}_dict") or {})}

        written = self.describe_config(config)
        for name in ("text_config", "vision_config"):
            if name not in written:
                # One Transformer alone, whose fields stand in no configuration of their own.
                part = content.pop(name)
                content |= part if written["model_type"] == f"{content['model_type']}_{name[:-7]}_model" else {}

        return super().find_extra_fields(content, config)

    @override
    def has_our_names(self, keys: Collection[str], config: object) -> bool:
        return any(key.startswith(("text.", "vision.")) for key in keys)


def refuse_dense_layers(head: HeadConfig | None, kind: str) -> None:
    """Refuse dense layers after a dual encoder, whose towers end with projections of their own.

    :param kind: the kind of model, for the error.
    :raises ModelLoadError: there are some.
    """
    if head is not None and head.dense:
        raise ModelLoadError(f"Dense modules after a {kind} model are not supported.")
