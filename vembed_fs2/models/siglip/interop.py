"""Checkpoints of transformers' SigLIP and SigLIP 2, read and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, final

from fairseq2.models import ModelHubAccessor
from fairseq2.models.hg import HuggingFaceConfig
from fairseq2.utils.config import cast_config_type
from typing_extensions import override

from vembed_fs2.embedding.learned import LOGIT_BIAS, LOGIT_SCALE
from vembed_fs2.embedding.model import HeadConfig
from vembed_fs2.errors import ModelLoadError
from vembed_fs2.formats.extra_fields import with_extra_fields
from vembed_fs2.formats.hf_config import (
    create_dual_rules,
    read_fields,
    refuse_dual_options,
    resolve_hf_config,
    validate_hf_config,
    write_fields,
)
from vembed_fs2.formats.key_map import Drop, KeyMap, Split
from vembed_fs2.models.common.interop import (
    PIXEL_FIELDS,
    TOKEN_FIELDS,
    TOWER_FIELDS,
    DualCheckpointFormat,
    refuse_dense_layers,
)
from vembed_fs2.models.family import drop_learned
from vembed_fs2.models.siglip.config import SIGLIP_FAMILY, SiglipConfig, SiglipTextConfig, SiglipVisionConfig
from vembed_fs2.models.siglip.model import SiglipModel

_TEXT_FIELDS: Final = TOWER_FIELDS | TOKEN_FIELDS | {"projection_size": "projection_dim"}

_IMAGE_FIELDS: Final = TOWER_FIELDS | PIXEL_FIELDS

_PATCH_FIELDS: Final = TOWER_FIELDS | {
    "num_channels": "num_channels",
    "patch_size": "patch_size",
    "num_patches": "num_patches",
}

_OPTIONAL: Final = ("pad_token_id", "bos_token_id", "eos_token_id")

_OUR_NAMES: Final = {
    **{ours: name for name, ours in (_TEXT_FIELDS | _IMAGE_FIELDS | _PATCH_FIELDS).items()},
    "text": "text_config",
    "vision": "vision_config",
}
"""What config.json calls our fields."""

_KEYS: Final = {
    "text_model.embeddings.token_embedding.": "text.frontend.embed.",
    "text_model.embeddings.position_embedding.": "text.frontend.pos_embed.",
    "text_model.final_layer_norm.": "text.encoder.layer_norm.",
    "text_model.head.": "text.proj.",
    "vision_model.embeddings.patch_embedding.": "vision.frontend.patch_proj.",
    "vision_model.embeddings.position_embedding.": "vision.frontend.pos_embed.",
    "vision_model.post_layernorm.": "vision.encoder.layer_norm.",
    "vision_model.head.probe": "vision.head.probe",
    "vision_model.head.attention.out_proj.": "vision.head.attention.output_proj.",
    "vision_model.head.layernorm.": "vision.head.layer_norm.",
    "vision_model.head.mlp.fc1.": "vision.head.ffn.inner_proj.",
    "vision_model.head.mlp.fc2.": "vision.head.ffn.output_proj.",
}


_TOWER_PARTS: Final = "(embeddings|encoder|final_layer_norm|post_layernorm|head)"


def _create_key_map(dropped: Drop, tower: str | None = None) -> KeyMap:
    """
    :param dropped: what objectives learn and transformers' model has no place for.
    :param tower: ``text`` or ``vision``, if the model has only that one. Version 5 of transformers writes its tensors
        without the tower's name.
    """
    return KeyMap(
        # Buffers that old versions of transformers saved, and the head of `SiglipForImageClassification`.
        Drop(theirs=r"(text|vision)_model\.embeddings\.position_ids|classifier\..*"),
        dropped,
        # transformers holds the three projections of the pooling attention in one tensor; apart they can be sharded.
        *(
            Split(
                f"vision_model.head.attention.in_proj_{kind}", [f"vision.head.attention.{n}_proj.{kind}" for n in "qkv"]
            )
            for kind in ("weight", "bias")
        ),
        *create_dual_rules(_KEYS),
        old_names={rf"^(?={_TOWER_PARTS}\.)": f"{tower}_model."} if tower is not None else None,
    )


@final
class SiglipCheckpointFormat(DualCheckpointFormat):
    """Reads and writes ``SiglipModel``, ``Siglip2Model`` and their text and vision models."""

    model_types = (
        "siglip",
        "siglip_text_model",
        "siglip_vision_model",
        "siglip2",
        "siglip2_text_model",
        "siglip2_vision_model",
    )

    text_fields = _TEXT_FIELDS

    vision_fields = _IMAGE_FIELDS | _PATCH_FIELDS

    @override
    def from_hf_config(
        self, hf_config: Mapping[str, Any], *, head: HeadConfig | None = None, keys: frozenset[str] = frozenset()
    ) -> SiglipConfig:
        refuse_dense_layers(head, "SigLIP")

        generation, _, part = str(hf_config.get("model_type", "siglip")).partition("_")

        text, vision = _resolve(hf_config, generation, part.removesuffix("_model"))
        if not part and keys and not any(key.startswith("text_model.") for key in keys):
            text = None  # `SiglipForImageClassification` has the configuration of both and the images' weights only.

        config = SiglipConfig(text=None, vision=None, naflex=generation == "siglip2")
        where = "" if part else "text_config."
        if text is not None:
            config.text = SiglipTextConfig(
                **read_fields(text, _TEXT_FIELDS, SiglipTextConfig(), where, optional=_OPTIONAL)
            )

        where = "" if part else "vision_config."
        if vision is not None:
            if not vision.get("vision_use_head", True):
                raise ModelLoadError(f"`{where}vision_use_head` must be true: without it there is no embedding.")
            fields = _PATCH_FIELDS if config.naflex else _IMAGE_FIELDS
            config.vision = SiglipVisionConfig(**read_fields(vision, fields, SiglipVisionConfig(), where))

        if text is None or vision is None:
            config.logit_scale_init = config.logit_bias_init = None

        validate_hf_config(config, _OUR_NAMES)

        return config

    @override
    def key_map(self, config: object) -> KeyMap:
        config = cast_config_type(config, SiglipConfig)
        # transformers' SigLIP has a temperature and a bias, but only with both Transformers.
        is_whole = config.text is not None and config.vision is not None
        tower = None if is_whole else "vision" if config.text is None else "text"
        return _create_key_map(drop_learned(config, kept=(LOGIT_SCALE, LOGIT_BIAS) if is_whole else ()), tower)

    @override
    def to_hg_config(self, config: object) -> HuggingFaceConfig:
        import transformers

        config = cast_config_type(config, SiglipConfig)
        name = "Siglip2" if config.naflex else "Siglip"
        text = {} if config.text is None else write_fields(config.text, _TEXT_FIELDS)
        fields = _PATCH_FIELDS if config.naflex else _IMAGE_FIELDS

        vision = {} if config.vision is None else write_fields(config.vision, fields)
        if not text or not vision:
            name += "Text" if text else "Vision"
            exported = HuggingFaceConfig(text or vision, kls_name=f"{name}Config", arch=f"{name}Model")
            return with_extra_fields(exported, config)

        data: dict[str, object] = {
            "text_config": getattr(transformers, f"{name}TextConfig")(**text),
            "vision_config": getattr(transformers, f"{name}VisionConfig")(**vision),
        }
        return with_extra_fields(HuggingFaceConfig(data, kls_name=f"{name}Config", arch=f"{name}Model"), config)


def _resolve(
    hf_config: Mapping[str, Any], generation: str, part: str
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The configurations of the text and the image Transformer; transformers knows the defaults of absent fields.

    :param part: ``text``, ``vision``, or empty for both.
    """
    resolved = resolve_hf_config(hf_config, f"{generation.capitalize()}{part.capitalize()}Config", "SigLIP")
    refuse_dual_options("", resolved, "SigLIP")

    if part:
        return (resolved, None) if part == "text" else (None, resolved)

    for name in ("text_config", "vision_config"):
        refuse_dual_options(f"{name}.", resolved[name], "SigLIP")

    return resolved["text_config"], resolved["vision_config"]


get_siglip_model_hub = ModelHubAccessor(SIGLIP_FAMILY, kls=SiglipModel, config_kls=SiglipConfig)
