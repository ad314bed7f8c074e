"""Models of open_clip give the same embeddings here, whatever their options, and go back as they came."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import open_clip
import pytest
import torch
from fairseq2.utils.structured import StandardValueConverter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Module
from transformers import CLIPConfig, CLIPModel

from vembed_fs2.embedding.model import EmbeddingModel, EncoderBatch
from vembed_fs2.errors import ModelLoadError, VembedError
from vembed_fs2.formats.open_clip import find_mlp_ratio
from vembed_fs2.models.clip import ClipCheckpointFormat, ClipConfig, ClipModel, create_clip_model
from vembed_fs2.models.clip import open_clip as clip_format
from vembed_fs2.models.family import find_open_clip_family, get_open_clip_format
from vembed_fs2.models.siglip import create_siglip_model

from .open_clip_models import (
    assert_equal_tensors,
    assert_same_embeddings,
    create_reference,
    create_texts,
    difference,
    model_cfgs,
    small_cfg,
    with_text,
    with_vision,
)


def create_clip(model_cfg: dict[str, Any], seed: int = 0) -> tuple[Module, ClipModel, ClipConfig]:
    """open_clip's model with random weights everywhere, and ours with the same."""
    reference = create_reference(model_cfg, seed)
    config = clip_format.config_from_open_clip(model_cfg)
    model = create_clip_model(config).eval()
    model.add_learned_parts(config.learned_parts(config.projection_dim))
    model.load_state_dict(clip_format.OPEN_CLIP.state_dict_from_open_clip(dict(reference.state_dict()), config))
    return reference, model, config


@settings(max_examples=40)
@given(model_cfgs(), st.integers(0, 1000))
def test_embeddings_equal_open_clip(model_cfg: dict[str, Any], seed: int) -> None:
    reference, model, _ = create_clip(model_cfg, seed)
    assert_same_embeddings(reference, model, model_cfg)


def plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as of a model without ``custom_text`` and ``nonscalar_logit_scale``, which change nothing."""
    state = {key.removeprefix("text."): value for key, value in state.items()}
    return {key: value.reshape(()) if key.startswith("logit_") else value for key, value in state.items()}


@settings(max_examples=40)
@given(model_cfgs(), st.sampled_from((torch.float32, torch.float16, torch.bfloat16)))
def test_round_trip_is_exact(model_cfg: dict[str, Any], dtype: torch.dtype) -> None:
    reference, model, config = create_clip(model_cfg)
    state = dict(reference.to(dtype).state_dict())
    ours = clip_format.OPEN_CLIP.state_dict_from_open_clip(dict(state), config)
    assert ours.keys() == model.state_dict().keys()
    assert_equal_tensors(clip_format.OPEN_CLIP.state_dict_to_open_clip(ours, config), plain_names(state))
    exported = clip_format.config_to_open_clip(config)
    assert clip_format.config_from_open_clip(exported) == config
    # As a run writes it.
    converter = StandardValueConverter()
    assert converter.structure(converter.unstructure(config), ClipConfig) == config
    # open_clip makes the same model of it.
    again = create_reference(exported)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in plain_names(state).items()}
    again.load_state_dict({k: v.float() for k, v in plain_names(state).items()})
    assert_same_embeddings(again, load(model, ours), model_cfg)


def load(model: EmbeddingModel, state: dict[str, Any]) -> EmbeddingModel:
    model.load_state_dict({key: value.float() for key, value in state.items()})
    return model


@settings(max_examples=30)
@given(st.sampled_from(("argmax", "eos")), st.booleans(), st.sampled_from((None, {"approximate": "tanh"})))
def test_transformers_loads_what_came_from_open_clip(
    pooling: str, quick_gelu: bool, act: dict[str, str] | None
) -> None:
    model_cfg = small_cfg(pool_type=pooling, eos_id=50) | {"quick_gelu": quick_gelu}
    for tower in ("text_cfg", "vision_cfg"):
        model_cfg[tower]["act_kwargs"] = None if quick_gelu else act
    reference, _, config = create_clip(model_cfg)
    hf_format = ClipCheckpointFormat()
    hf_config = CLIPConfig()
    for name, value in hf_format.to_hg_config(config).data.items():
        setattr(hf_config, name, value)
    model = CLIPModel(hf_config).eval()
    ours = clip_format.OPEN_CLIP.state_dict_from_open_clip(dict(reference.state_dict()), config)
    model.load_state_dict(hf_format.to_hg_state_dict(ours, config))
    ids, mask = create_texts(model_cfg["text_cfg"])
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert difference(model.get_text_features(ids, attention_mask=mask), reference.encode_text(ids)) <= 1e-5
        assert difference(model.get_image_features(pixels), reference.encode_image(pixels)) <= 1e-5


INEXPRESSIBLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text.pooling": ({"pool_type": "eos", "eos_id": 2}, {}),
    "text.causal": ({"no_causal_mask": True}, {}),
    "text.proj_bias": ({"proj_bias": True}, {}),
    "text.layer_scale_init": ({"ls_init_value": 0.1}, {}),
    "vision.layer_scale_init": ({}, {"ls_init_value": 0.1}),
    "vision.image_size": ({}, {"image_size": [8, 12]}),
    "vision.patch_size": ({}, {"patch_size": [4, 2]}),
    "vision.pre_norm": ({}, {"no_ln_pre": True}),
    "vision.pooling": ({}, {"pool_type": "avg"}),
}


@pytest.mark.parametrize("field", INEXPRESSIBLE)
def test_what_transformers_cannot_express_is_refused_by_name(field: str) -> None:
    text, vision = INEXPRESSIBLE[field]
    model_cfg = small_cfg(**text)
    model_cfg["vision_cfg"] |= vision
    config = clip_format.config_from_open_clip(model_cfg)
    with pytest.raises(VembedError, match=f"`{field}`"):
        ClipCheckpointFormat().to_hg_config(config)


REFUSED = [
    ({"multimodal_cfg": {}}, "`multimodal_cfg`: CoCa"),
    ({"embed_dim": 0}, "`embed_dim`"),
    ({"embed_dim": "8"}, "`embed_dim`"),
    ({"vision_cfg": {}}, "`vision_cfg`"),
    ({"new_option": 1}, "`new_option` is not an option"),
    ({"init_logit_bias": "x"}, "`init_logit_bias`"),
    (with_text(hf_model_name="roberta-base"), r"`text_cfg.hf_model_name` is 'roberta-base'"),
    (with_text(embed_cls=True), "`text_cfg.embed_cls`"),
    (with_text(proj_type="none"), "`text_cfg.proj_type`"),
    (with_text(pool_type="none"), "`text_cfg.pool_type`"),
    (with_text(heads=3), "`num_attn_heads`"),
    (with_text(norm_kwargs={"bias": False}), "`text_cfg.norm_kwargs.bias`"),
    (with_text(act_kwargs={"inplace": True}), "`text_cfg.act_kwargs.inplace`"),
    (with_text(act_kwargs={"approximate": "fast"}), "`text_cfg.act_kwargs.approximate`"),
    (with_text(new_option=1), "`text_cfg.new_option` is not an option"),
    (with_vision(layers=[3, 4, 6, 3]), "`vision_cfg.layers` is a list: ResNet"),
    (with_vision(timm_model_name="convnext_base"), "`vision_cfg.timm_model_name` is 'convnext_base'"),
    (with_vision(attentional_pool=True), "`vision_cfg.attentional_pool`"),
    (with_vision(pos_embed_type="sin_cos_2d"), "`vision_cfg.pos_embed_type`"),
    (with_vision(pool_type="none"), "`vision_cfg.pool_type`"),
    (with_vision(image_size=[8, 8, 8]), "`vision_cfg.image_size`"),
    (with_vision(image_size=2), "`image_size`"),
    (with_vision(head_width=0), "`vision_cfg.head_width`"),
    (with_vision(ls_init_value="a"), "`vision_cfg.ls_init_value`"),
    *[(with_vision(**{name: True}), f"`vision_cfg.{name}`") for name in ("qk_norm", "scale_heads", "scale_fc")],
    *[(with_text(**{name: True}), f"`text_cfg.{name}`") for name in ("scaled_cosine_attn", "scale_attn_inner")],
    ({"quick_gelu": True, **with_text(act_kwargs={"approximate": "tanh"})}, "`text_cfg.act_kwargs.approximate`"),
    (with_vision(timm_model_name="vit_base_patch16_siglip_gap_224"), "`vision_cfg.timm_model_name`"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_unsupported_options_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    model_cfg = deepcopy(small_cfg() | change)
    with pytest.raises(ModelLoadError, match=message):
        get_open_clip_format(find_open_clip_family(model_cfg)).config_from_open_clip(model_cfg)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.vision, "num_channels", 1), "`vision.num_channels`"),
        (lambda c: setattr(c.text, "activation", "quick_gelu"), "`quick_gelu`"),
        (lambda c: setattr(c.vision, "activation", "relu"), "'relu'"),
    ],
)
def test_what_open_clip_cannot_express_is_refused_by_name(change: Any, message: str) -> None:
    config = clip_format.config_from_open_clip(small_cfg())
    change(config)
    with pytest.raises(VembedError, match=message):
        clip_format.config_to_open_clip(config)


def test_families_without_a_format_say_so() -> None:
    with pytest.raises(VembedError, match="vembed_bert models have no open_clip format"):
        get_open_clip_format("vembed_bert")


def test_all_public_configurations_of_clip_and_siglip_are_read_and_written() -> None:
    counts = {"vembed_clip": 0, "vembed_siglip": 0}
    for name in open_clip.list_models():
        model_cfg = open_clip.get_model_config(name)
        try:
            family = find_open_clip_family(model_cfg)
        except ModelLoadError:
            continue
        if family not in counts or name == "ViT-SO400M-16-SigLIP-i18n-256":  # the only one without a projection
            continue
        counts[family] += 1
        own_format = get_open_clip_format(family)
        config = own_format.config_from_open_clip(model_cfg)
        assert own_format.config_from_open_clip(own_format.config_to_open_clip(config)) == config, name
    assert counts["vembed_clip"] >= 45
    assert counts["vembed_siglip"] >= 20


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14-CLIPA", "ViT-M-16-alt", "ViT-g-14", "ViT-B-16-SigLIP"])
def test_public_models_have_the_shapes_of_open_clip(name: str) -> None:
    model_cfg = open_clip.get_model_config(name)
    with torch.device("meta"):
        reference = create_meta(model_cfg)
        family = find_open_clip_family(model_cfg)
        config = get_open_clip_format(family).config_from_open_clip(model_cfg)
        create: Any = create_clip_model if family == "vembed_clip" else create_siglip_model
        model = create(config)
        expected = get_open_clip_format(family).state_dict_from_open_clip(dict(reference.state_dict()), config)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in expected.items() if isinstance(value, Tensor)}


def create_meta(model_cfg: dict[str, Any]) -> Module:
    cfg = deepcopy(model_cfg)
    kls = open_clip.CustomTextCLIP if cfg.pop("custom_text", False) else open_clip.CLIP
    model: Module = kls(**cfg)
    return model


@pytest.mark.parametrize("options", [{"no_causal_mask": True}, {"pool_type": "last"}, {"pool_type": "first"}, {}])
def test_padding_does_not_change_the_embedding(options: dict[str, Any]) -> None:
    _, model, _ = create_clip(small_cfg(**options))
    text = torch.tensor([[57, 7, 8, 59]])
    with torch.no_grad():
        alone = model.encode_text(EncoderBatch.of_text(text))
        for width in (5, 9, 12):
            for pad in (0, 1, 59):
                right = torch.nn.functional.pad(text, (0, width - 4), value=pad)
                mask = torch.arange(width)[None] < 4
                batch = EncoderBatch.of_text(right, mask)
                torch.testing.assert_close(model.encode_text(batch), alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{"no_causal_mask": True}, {"pool_type": "last"}])
def test_embedding_is_independent_of_the_batch(options: dict[str, Any]) -> None:
    model_cfg = small_cfg(**options) | with_vision(pool_type="avg", image_size=[8, 12], no_ln_pre=True)
    _, model, _ = create_clip(model_cfg)
    ids, mask = create_texts(model_cfg["text_cfg"], 6)
    images = EncoderBatch.of_images(torch.randn(6, 3, 8, 12))
    with torch.no_grad():
        for batch in (EncoderBatch.of_text(ids, mask), images):
            together = model(batch).values
            for row in range(6):
                torch.testing.assert_close(model(batch.select([row])).values[0], together[row], rtol=1e-6, atol=1e-6)


def test_patch_dropout_keeps_a_part_of_the_patches_in_training() -> None:
    model_cfg = small_cfg() | with_vision(patch_size=1, patch_dropout=0.75)
    _, model, _ = create_clip(model_cfg)
    frontend = model.vision.frontend
    pixels = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        whole = frontend(pixels)
        assert whole.shape == (4, 65, 16)
        kept = frontend.train()(pixels)
        assert kept.shape == (4, 17, 16)
        torch.testing.assert_close(kept[:, 0], whole[:, 0])
        # Every state that was kept is one of the whole, and no two are the same.
        distances, nearest = torch.cdist(kept, whole).min(2)
        assert float(distances.max()) < 1e-3
        assert all(len(set(row.tolist())) == 17 for row in nearest)
        assert not torch.equal(nearest[0], nearest[1])


@settings(max_examples=60)
@given(st.integers(1, 2000), st.integers(1, 9000))
def test_mlp_ratio_makes_the_same_size(model_dim: int, inner_dim: int) -> None:
    assert int(model_dim * find_mlp_ratio(model_dim, inner_dim)) == inner_dim


def test_unknown_tensors_are_not_dropped() -> None:
    reference, model, config = create_clip(small_cfg())
    state = dict(reference.state_dict()) | {"visual.extra": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"visual.extra\""):
        model.load_state_dict(clip_format.OPEN_CLIP.state_dict_from_open_clip(state, config))


def test_gradients_equal_open_clip() -> None:
    model_cfg = small_cfg(ls_init_value=0.1, proj_bias=True, no_causal_mask=True)
    model_cfg |= with_vision(ls_init_value=0.1, pool_type="avg")
    reference, model, config = create_clip(model_cfg)
    ids, _ = create_texts(model_cfg["text_cfg"])
    pixels = torch.randn(3, 3, 8, 8)
    encoder: Any = reference
    encoder.encode_text(ids).square().sum().backward()
    encoder.encode_image(pixels).square().sum().backward()
    model.encode_text(EncoderBatch.of_text(ids)).square().sum().backward()
    model.encode_image(EncoderBatch.of_images(pixels)).square().sum().backward()
    expected = {k: p.grad for k, p in reference.named_parameters() if p.grad is not None}
    grads: dict[str, object] = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    ours = clip_format.OPEN_CLIP.state_dict_to_open_clip(grads, config)
    assert ours.keys() == expected.keys()
    for key, grad in expected.items():
        value = ours[key]
        assert isinstance(value, Tensor)
        assert difference(value, grad) <= 1e-5 * max(1.0, float(grad.abs().max())), key
