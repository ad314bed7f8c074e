"""Checkpoints of transformers' CLIP, read and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, final

from fairseq2.models import ModelHubAccessor
from fairseq2.models.hg import HuggingFaceConfig
from fairseq2.utils.config import cast_config_type
from typing_extensions import override

from vembed_fs2.embedding.learned import LOGIT_SCALE
from vembed_fs2.embedding.model import HeadConfig
from vembed_fs2.errors import VembedError
from vembed_fs2.formats.extra_fields import with_extra_fields
from vembed_fs2.formats.hf_config import (
    create_dual_rules,
    read_fields,
    refuse_dual_options,
    resolve_hf_config,
    validate_hf_config,
    write_fields,
)
from vembed_fs2.formats.key_map import SCALAR, Drop, KeyMap, Reshape, Rule
from vembed_fs2.models.clip.config import CLIP_FAMILY, ClipConfig, ClipTextConfig, ClipVisionConfig
from vembed_fs2.models.clip.model import LEGACY_EOS_ID, ClipModel
from vembed_fs2.models.common.interop import (
    PIXEL_FIELDS,
    TOKEN_FIELDS,
    TOWER_FIELDS,
    DualCheckpointFormat,
    refuse_dense_layers,
)
from vembed_fs2.models.common.vision import as_pair
from vembed_fs2.models.family import drop_learned

_TOWER_FIELDS: Final = TOWER_FIELDS | {
    "initializer_range": "init_range",
    "initializer_factor": "init_factor",
    "projection_dim": "single_tower_dim",
}

_TEXT_FIELDS: Final = _TOWER_FIELDS | TOKEN_FIELDS

_VISION_FIELDS: Final = _TOWER_FIELDS | PIXEL_FIELDS

_OPTIONAL: Final = ("pad_token_id", "bos_token_id")

_FIELDS: Final = {"projection_dim": "projection_dim", "logit_scale_init_value": "logit_scale_init"}

_OUR_NAMES: Final = {
    **{ours: name for name, ours in (_TEXT_FIELDS | _VISION_FIELDS).items()},
    "text": "text_config",
    "vision": "vision_config",
}
"""What config.json calls our fields."""

_KEYS: Final = {
    "text_model.embeddings.token_embedding.": "text.frontend.embed.",
    "text_model.embeddings.position_embedding.": "text.frontend.pos_embed.",
    "text_model.final_layer_norm.": "text.encoder.layer_norm.",
    "text_projection.": "text.proj.",
    "vision_model.embeddings.class_embedding": "vision.frontend.class_embed",
    "vision_model.embeddings.patch_embedding.": "vision.frontend.patch_proj.",
    "vision_model.embeddings.position_embedding.": "vision.frontend.pos_embed.",
    # The misspelling is transformers' own.
    "vision_model.pre_layrnorm.": "vision.frontend.layer_norm.",
    "vision_model.post_layernorm.": "vision.layer_norm.",
    "visual_projection.": "vision.proj.",
}


_RULES: Final[Sequence[Rule]] = (
    # Buffers that old versions of transformers saved: 0, 1, 2, ...
    Drop(theirs=r"(text|vision)_model\.embeddings\.position_ids"),
    Reshape(LOGIT_SCALE, LOGIT_SCALE, SCALAR),
    *create_dual_rules(_KEYS),
)


@final
class ClipCheckpointFormat(DualCheckpointFormat):
    """Reads and writes ``CLIPModel``."""

    model_types = ("clip",)

    sentence_module = "CLIPModel"

    text_fields = _TEXT_FIELDS

    vision_fields = _VISION_FIELDS

    @override
    def from_hf_config(
        self, hf_config: Mapping[str, Any], *, head: HeadConfig | None = None, keys: frozenset[str] = frozenset()
    ) -> ClipConfig:
        refuse_dense_layers(head, "CLIP")

        # transformers knows how the older `*_config_dict` fields override.
        resolved = resolve_hf_config(hf_config, "CLIPConfig")
        text, vision = resolved["text_config"], resolved["vision_config"]
        for where, values in (("", resolved), ("text_config.", text), ("vision_config.", vision)):
            refuse_dual_options(where, values, "CLIP")

        config = ClipConfig(
            text=ClipTextConfig(
                **read_fields(text, _TEXT_FIELDS, ClipTextConfig(), "text_config.", optional=_OPTIONAL)
            ),
            vision=ClipVisionConfig(**read_fields(vision, _VISION_FIELDS, ClipVisionConfig(), "vision_config.")),
            **read_fields(resolved, _FIELDS, ClipConfig(), ""),
        )
        validate_hf_config(config, _OUR_NAMES)

        return config

    @override
    def key_map(self, config: object) -> KeyMap:
        # transformers' CLIP has a temperature, but no place for what else objectives need.
        return KeyMap(*_RULES, drop_learned(config, kept=[LOGIT_SCALE]))

    @override
    def to_hg_config(self, config: object) -> HuggingFaceConfig:
        from transformers import CLIPTextConfig, CLIPVisionConfig

        config = cast_config_type(config, ClipConfig)
        if names := _find_inexpressible(config):
            fields = ", ".join(f"`{name}`" for name in names)
            raise VembedError(
                f"transformers' CLIP cannot express {fields} of the model. Write it for open_clip instead."
            )

        vision = write_fields(config.vision, _VISION_FIELDS)
        for name in ("image_size", "patch_size"):
            vision[name] = as_pair(getattr(config.vision, name))[0]

        data: dict[str, object] = {
            **write_fields(config, _FIELDS),
            "text_config": CLIPTextConfig(**write_fields(config.text, _TEXT_FIELDS)),
            "vision_config": CLIPVisionConfig(**vision),
        }
        return with_extra_fields(HuggingFaceConfig(data, kls_name="CLIPConfig", arch="CLIPModel"), config)


def _find_inexpressible(config: ClipConfig) -> list[str]:
    """The fields whose values no configuration of transformers stands for."""
    text, vision = config.text, config.vision

    # There, 2 stands for another pooling.
    is_first_end = text.pooling == "eos" and text.eos_idx != LEGACY_EOS_ID
    expressible = {
        "text.pooling": text.pooling == "clip" or is_first_end,
        "text.causal": text.causal,
        "text.proj_bias": not text.proj_bias,
        "text.layer_scale_init": text.layer_scale_init is None,
        "vision.layer_scale_init": vision.layer_scale_init is None,
        "vision.image_size": len(set(as_pair(vision.image_size))) == 1,
        "vision.patch_size": len(set(as_pair(vision.patch_size))) == 1,
        "vision.pre_norm": vision.pre_norm,
        "vision.pooling": vision.pooling == "cls",
    }

    return [name for name, is_expressible in expressible.items() if not is_expressible]


get_clip_model_hub = ModelHubAccessor(CLIP_FAMILY, kls=ClipModel, config_kls=ClipConfig)
