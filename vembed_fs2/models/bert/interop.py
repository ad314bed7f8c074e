"""Checkpoints of transformers' BERT and of its relatives, read and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, final

from fairseq2.models import ModelHubAccessor
from fairseq2.models.hg import HuggingFaceConfig
from fairseq2.utils.config import cast_config_type
from typing_extensions import override

from vembed_fs2.embedding.model import HeadConfig
from vembed_fs2.errors import ModelLoadError
from vembed_fs2.formats.extra_fields import with_extra_fields
from vembed_fs2.formats.hf_config import read_field, refuse_other_values, resolve_hf_config, validate_hf_config
from vembed_fs2.formats.key_map import Drop, KeyMap, Rename, Rule
from vembed_fs2.models.bert.config import BERT_FAMILY, BertConfig
from vembed_fs2.models.bert.model import BertModel
from vembed_fs2.models.bert.variants import VARIANTS
from vembed_fs2.models.common.interop import BackboneCheckpointFormat
from vembed_fs2.models.family import drop_learned

# Fields that change what transformers' models compute, and the values at which they do not.
_FIXED: Final[dict[str, tuple[object, ...]]] = {
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
}

# Buffers that old versions of transformers saved.
_BUFFERS: Final = r"embeddings\.(position|token_type)_ids"

_OLD_NAMES: Final = {r"\.gamma$": ".weight", r"\.beta$": ".bias"}


@final
class BertCheckpointFormat(BackboneCheckpointFormat):
    """Reads and writes checkpoints of ``transformers.BertModel`` and of its relatives."""

    model_types = tuple(VARIANTS)

    @override
    def from_hf_config(
        self, hf_config: Mapping[str, Any], *, head: HeadConfig | None = None, keys: frozenset[str] = frozenset()
    ) -> BertConfig:
        model_type = hf_config.get("model_type", "bert")
        if model_type not in VARIANTS:
            raise ModelLoadError(f"config.json: `model_type` '{model_type}' is not supported.")

        variant = VARIANTS[model_type]
        resolved = resolve_hf_config(hf_config, f"{variant.name}Config")
        refuse_other_values(resolved, _FIXED)

        values = {
            ours: read_field(resolved, name, kls, optional=ours == "pad_idx")
            for name, (ours, kls) in variant.fields.items()
        }
        if not variant.has_segments:
            values["type_vocab_size"] = 0

        has_pooler = not keys or any(key.removeprefix(f"{variant.prefix}.").startswith("pooler.") for key in keys)
        config = BertConfig(
            **values, model_type=model_type, pooler=has_pooler and variant.has_pooler, head=head or HeadConfig()
        )
        validate_hf_config(config, {ours: name for name, (ours, _) in variant.fields.items()})

        return config

    @override
    def key_map(self, config: BertConfig) -> KeyMap:
        variant = VARIANTS[config.model_type]

        rules: list[Rule] = [Drop(theirs=rf"({variant.heads}).*|{_BUFFERS}"), drop_learned(config)]
        if not config.pooler:
            # An architecture can leave out what the checkpoint has.
            rules.append(Drop(theirs=r"pooler\..*"))

        rules += [Rename(theirs, ours) for theirs, ours in variant.names.items()]
        return KeyMap(*rules, prefixes=[f"{variant.prefix}."], old_names=_OLD_NAMES)

    @override
    def to_hg_config(self, config: object) -> HuggingFaceConfig:
        config = cast_config_type(config, BertConfig)
        variant = VARIANTS[config.model_type]
        data: dict[str, object] = {name: getattr(config, ours) for name, (ours, _) in variant.fields.items()}
        exported = HuggingFaceConfig(data, kls_name=f"{variant.name}Config", arch=f"{variant.name}Model")
        return with_extra_fields(exported, config)


get_bert_model_hub = ModelHubAccessor(BERT_FAMILY, kls=BertModel, config_kls=BertConfig)
