from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, final

from fairseq2.models import ModelHubAccessor
from fairseq2.models.hg import HuggingFaceConfig
from fairseq2.models.utils.checkpoint import convert_state_dict, create_reverse_key_map
from fairseq2.utils.config import cast_config_type
from typing_extensions import override

from vembed_fs2.errors import ModelLoadError
from vembed_fs2.models.bert.factory import BERT_FAMILY, BertConfig
from vembed_fs2.models.bert.model import BertModel
from vembed_fs2.models.embedding import HeadConfig
from vembed_fs2.models.family import LEARNED_PARTS, CheckpointFormat

_KEY_MAP: Final = {
    r"^embeddings\.word_embeddings\.": r"frontend.embed.",
    r"^embeddings\.token_type_embeddings\.": r"frontend.type_embed.",
    r"^embeddings\.position_embeddings\.": r"frontend.pos_embed.",
    r"^embeddings\.LayerNorm\.": r"frontend.layer_norm.",
    r"^encoder\.layer\.([0-9]+)\.attention\.self\.query\.": r"encoder.layers.\1.self_attn.q_proj.",
    r"^encoder\.layer\.([0-9]+)\.attention\.self\.key\.": r"encoder.layers.\1.self_attn.k_proj.",
    r"^encoder\.layer\.([0-9]+)\.attention\.self\.value\.": r"encoder.layers.\1.self_attn.v_proj.",
    r"^encoder\.layer\.([0-9]+)\.attention\.output\.dense\.": r"encoder.layers.\1.self_attn.output_proj.",
    r"^encoder\.layer\.([0-9]+)\.attention\.output\.LayerNorm\.": r"encoder.layers.\1.self_attn_layer_norm.",
    r"^encoder\.layer\.([0-9]+)\.intermediate\.dense\.": r"encoder.layers.\1.ffn.inner_proj.",
    r"^encoder\.layer\.([0-9]+)\.output\.dense\.": r"encoder.layers.\1.ffn.output_proj.",
    r"^encoder\.layer\.([0-9]+)\.output\.LayerNorm\.": r"encoder.layers.\1.ffn_layer_norm.",
    r"^pooler\.dense\.": r"pooler.",
}

# Of the pretraining heads, and buffers that old versions of transformers saved.
_DROPPED: Final = re.compile(r"^cls\.(predictions|seq_relationship)\.|^(bert\.)?embeddings\.(position|token_type)_ids$")

_OLD_NAMES: Final = {r"^bert\.": "", r"\.gamma$": ".weight", r"\.beta$": ".bias"}

# The fields of config.json, what they are called here, and their types.
_FIELDS: Final[dict[str, tuple[str, type]]] = {
    "hidden_size": ("model_dim", int),
    "max_position_embeddings": ("max_seq_len", int),
    "vocab_size": ("vocab_size", int),
    "pad_token_id": ("pad_idx", int),
    "type_vocab_size": ("type_vocab_size", int),
    "num_hidden_layers": ("num_layers", int),
    "num_attention_heads": ("num_attn_heads", int),
    "intermediate_size": ("ffn_inner_dim", int),
    "hidden_act": ("activation", str),
    "hidden_dropout_prob": ("dropout_p", float),
    "attention_probs_dropout_prob": ("attn_dropout_p", float),
    "layer_norm_eps": ("layer_norm_eps", float),
    "initializer_range": ("init_std", float),
}

# Fields that change what transformers' model computes, and the values at which they do not.
_FIXED: Final[dict[str, tuple[object, ...]]] = {
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
}


@final
class BertCheckpointFormat(CheckpointFormat):
    """Reads and writes checkpoints of ``transformers.BertModel``."""

    model_types = ("bert",)

    @override
    def from_hf_config(
        self, hf_config: Mapping[str, Any], *, head: HeadConfig | None = None, keys: frozenset[str] = frozenset()
    ) -> BertConfig:
        for name, supported in _FIXED.items():
            if name in hf_config and hf_config[name] not in supported:
                raise ModelLoadError(f"config.json: `{name}` is {hf_config[name]!r}, which is not supported.")
        values = {ours: _read(hf_config, name, kls) for name, (ours, kls) in _FIELDS.items() if name in hf_config}
        pooler = not keys or any(key.removeprefix("bert.").startswith("pooler.") for key in keys)
        config = BertConfig(**values, pooler=pooler, head=head or HeadConfig())
        result = config.validate()
        if result.has_error():
            raise ModelLoadError(f"config.json is not valid. {result}")
        return config

    @override
    def from_hf_state_dict(self, state_dict: dict[str, object], config: BertConfig) -> dict[str, object]:
        if any(key.startswith("frontend.") for key in state_dict):
            return state_dict
        state_dict = {key: value for key, value in state_dict.items() if not _DROPPED.match(key)}
        for pattern, replacement in _OLD_NAMES.items():
            state_dict = convert_state_dict(state_dict, {pattern: replacement})
        return convert_state_dict(state_dict, _KEY_MAP)

    @override
    def to_hg_config(self, config: object) -> HuggingFaceConfig:
        config = cast_config_type(config, BertConfig)
        data: dict[str, object] = {name: getattr(config, ours) for name, (ours, _) in _FIELDS.items()}
        return HuggingFaceConfig(data, kls_name="BertConfig", arch="BertModel")

    @override
    def to_hg_state_dict(self, state_dict: dict[str, object], config: object) -> dict[str, object]:
        # transformers' BERT has no place for what only objectives need.
        state_dict = {key: value for key, value in state_dict.items() if key not in LEARNED_PARTS}
        return convert_state_dict(state_dict, create_reverse_key_map(_KEY_MAP))


def _read(hf_config: Mapping[str, Any], name: str, kls: type) -> Any:
    value = hf_config[name]
    if value is None and name == "pad_token_id":
        return None
    if kls is float and type(value) is int:
        return float(value)
    if type(value) is not kls:
        raise ModelLoadError(f"config.json: `{name}` must be of type {kls.__name__}, but is {value!r} instead.")
    return value


get_bert_model_hub = ModelHubAccessor(BERT_FAMILY, kls=BertModel, config_kls=BertConfig)
