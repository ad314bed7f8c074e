"""SigLIP models of open_clip, whose image towers are timm's, give the same embeddings here and go back as they came."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from torch.nn import Module

from vembed_fs2.embedding.model import EmbeddingModel
from vembed_fs2.errors import ModelLoadError
from vembed_fs2.models.siglip import SiglipConfig, create_siglip_model
from vembed_fs2.models.siglip import open_clip as siglip_format

from . import open_clip_models as models
from .open_clip_models import (
    assert_equal_tensors,
    assert_same_embeddings,
    create_reference,
    siglip_cfgs,
    small_cfg,
    with_text,
    with_vision,
)


def create_siglip(
    example: tuple[dict[str, Any], dict[str, Any], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> tuple[Module, EmbeddingModel, SiglipConfig]:
    model_cfg, options, fields = example
    monkeypatch.setattr(models, "timm_options", options)
    monkeypatch.setitem(siglip_format.TIMM_TOWERS, models.TINY_TIMM, fields)
    reference = create_reference(model_cfg)
    config = siglip_format.config_from_open_clip(model_cfg)
    model = create_siglip_model(config).eval()
    model.load_state_dict(siglip_format.OPEN_CLIP.state_dict_from_open_clip(dict(reference.state_dict()), config))
    return reference, model, config


@settings(max_examples=40)
@given(siglip_cfgs())
def test_embeddings_of_siglip_equal_open_clip(example: tuple[dict[str, Any], dict[str, Any], dict[str, Any]]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        reference, model, _ = create_siglip(example, monkeypatch)
        # With a mask, SigLIP does what transformers does.
        assert_same_embeddings(reference, model, example[0], masked=False)


@settings(max_examples=30)
@given(siglip_cfgs())
def test_round_trip_of_siglip_is_exact(example: tuple[dict[str, Any], dict[str, Any], dict[str, Any]]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        reference, model, config = create_siglip(example, monkeypatch)
        ours = siglip_format.OPEN_CLIP.state_dict_from_open_clip(dict(reference.state_dict()), config)
        assert ours.keys() == model.state_dict().keys()
        assert_equal_tensors(
            siglip_format.OPEN_CLIP.state_dict_to_open_clip(ours, config), dict(reference.state_dict())
        )
        exported = siglip_format.config_to_open_clip(config)
        assert siglip_format.config_from_open_clip(exported) == config
        again = create_reference(exported)
        assert again.state_dict().keys() == reference.state_dict().keys()


SIGLIP_REFUSED = [
    (with_text(no_causal_mask=False), "`text_cfg.no_causal_mask`"),
    (with_text(pool_type="eos"), "`text_cfg.pool_type`"),
    (with_text(proj_bias=False), "`text_cfg.proj_bias`"),
    (with_text(ls_init_value=0.1), "`text_cfg.ls_init_value`"),
    ({"init_logit_bias": None}, "`init_logit_bias`"),
    ({"embed_dim": 100}, "projection_dim"),
    (with_vision(timm_pool="avg"), "`vision_cfg.timm_pool`"),
    (with_vision(timm_proj="linear"), "`vision_cfg.timm_proj`"),
    (with_vision(image_size=256), "`vision_cfg.image_size` is 256"),
    (with_vision(patch_dropout=0.5), "`vision_cfg.patch_dropout`"),
    (with_vision(timm_drop_path=0.1), "`vision_cfg.timm_drop_path`"),
]


@pytest.mark.parametrize(("change", "message"), SIGLIP_REFUSED)
def test_unsupported_options_of_siglip_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    text = {"width": 16, "heads": 2, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    vision = {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none"}
    model_cfg = {"embed_dim": 768, "init_logit_bias": -10, "vision_cfg": vision, "text_cfg": text}
    assert siglip_format.config_from_open_clip(model_cfg).vision is not None
    for name, value in change.items():
        if isinstance(value, dict):
            base = small_cfg()[name]
            model_cfg[name] = model_cfg[name] | {k: v for k, v in value.items() if base.get(k) != v}
        else:
            model_cfg[name] = value
    with pytest.raises(ModelLoadError, match=message):
        siglip_format.config_from_open_clip(model_cfg)
