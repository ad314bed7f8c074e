"""SigLIP checkpoints of transformers, read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fairseq2.models.hg import save_hugging_face_model
from fairseq2.nn.utils.module import reset_parameters, to_empty
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import SiglipConfig as HFSiglipConfig
from transformers import SiglipForImageClassification

from vembed_fs2.embedding.model import DenseConfig, EncoderBatch, HeadConfig
from vembed_fs2.errors import ModelLoadError
from vembed_fs2.models.family import config_errors
from vembed_fs2.models.siglip import SiglipConfig, SiglipTextConfig, create_siglip_model

from .siglip import (
    FORMAT,
    GENERATIONS,
    assert_round_trip,
    class_of,
    create_images,
    create_pair,
    create_texts,
    difference,
    export_config,
    hf_configs,
    small_config,
)


@pytest.mark.parametrize("generation", GENERATIONS)
@settings(max_examples=40)
@given(data=st.data(), dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)))
def test_round_trip_is_exact(generation: str, data: st.DataObject, dtype: torch.dtype) -> None:
    reference, _, config = create_pair(data.draw(hf_configs(generation)))
    assert_round_trip(reference, config, dtype)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_transformers_loads_what_fairseq2_saves(generation: str, tmp_path: Path) -> None:
    _, model, config = create_pair(small_config(generation, hidden_act="gelu"))
    state = FORMAT.to_hg_state_dict(dict(model.state_dict()), config)
    save_hugging_face_model(tmp_path, state, FORMAT.to_hg_config(config))
    loaded, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    ids, mask = create_texts(config.text)
    with torch.no_grad():
        expected = loaded.get_text_features(ids, attention_mask=mask)
        assert difference(model.encode_text(EncoderBatch.of_text(ids, mask)), expected) <= 1e-5
    saved = json.loads(tmp_path.joinpath("config.json").read_text())
    assert saved["architectures"] == [type(loaded).__name__]
    assert FORMAT.from_hf_config(saved) == config


def test_state_dict_with_our_names_is_unchanged() -> None:
    _, model, config = create_pair(small_config())
    state = dict(model.state_dict())
    assert FORMAT.from_hf_state_dict(state, config) is state


def test_stale_position_ids_are_dropped_and_unknown_tensors_are_not() -> None:
    reference, model, config = create_pair(small_config())
    state = dict(reference.state_dict())
    state["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(4)[None]
    state["vision_model.head.extra"] = torch.zeros(1)
    ours = FORMAT.from_hf_state_dict(state, config)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"vision_model.head.extra\""):
        model.load_state_dict(ours)


def test_an_image_classifier_is_an_image_model() -> None:
    torch.manual_seed(0)
    reference = SiglipForImageClassification(HFSiglipConfig(**small_config(), num_labels=3)).eval()
    state = dict(reference.state_dict())
    config = FORMAT.from_hf_config(reference.config.to_dict(), keys=frozenset(state))
    assert config.text is None
    model = create_siglip_model(config).eval()
    model.load_state_dict(FORMAT.from_hf_state_dict(state, config))
    pixels = create_images(config.vision)
    with torch.no_grad():
        expected = reference.vision_model(pixels).pooler_output
        assert difference(model(EncoderBatch.of_images(pixels)).values, expected) <= 1e-5


def test_absent_fields_take_the_defaults_of_transformers() -> None:
    config = FORMAT.from_hf_config({"model_type": "siglip", "text_config": {"num_hidden_layers": 3}})
    assert config == SiglipConfig(text=SiglipTextConfig(num_layers=3))
    config = FORMAT.from_hf_config({"model_type": "siglip2", "vision_config": None})
    assert config == SiglipConfig(naflex=True)
    config = FORMAT.from_hf_config({"model_type": "siglip_text_model", "hidden_size": 96})
    assert config.text == SiglipTextConfig(model_dim=96, projection_dim=96)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"text_config": {"hidden_act": "prelu"}}, "text_config.hidden_act"),
        ({"vision_config": {"hidden_act": "gelu_typo"}}, "vision_config.hidden_act"),
        ({"vision_config": {"image_size": [224, 224]}}, "vision_config.image_size"),
        ({"vision_config": {"patch_size": [16, 16]}}, "vision_config.patch_size"),
        ({"vision_config": {"vision_use_head": False}}, "vision_config.vision_use_head"),
        ({"text_config": {"pruned_heads": {"0": [1]}}}, "text_config.pruned_heads"),
        ({"text_config": {"projection_size": 512}}, "text_config.projection_size"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
        ({"text_config": {"num_attention_heads": 7}}, "`text_config`: `hidden_size`.*`num_attention_heads`"),
        ({"model_type": "siglip2", "vision_config": {"num_patches": 200}}, "`vision_config`: `num_patches`"),
        ({"text_config": "big"}, "SigLIP configuration"),
        ({"model_type": "siglip_vision_model", "vision_use_head": False}, "`vision_use_head`"),
        ({"model_type": "siglip_vision_model", "attention_dropout": "0"}, "`attention_dropout`"),
    ],
)
def test_unsupported_options_are_refused_by_name(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ModelLoadError, match=field):
        FORMAT.from_hf_config({"model_type": "siglip", **change})


def test_dense_modules_are_refused() -> None:
    head = HeadConfig(dense=[DenseConfig(input_dim=8, output_dim=8)])
    with pytest.raises(ModelLoadError, match="Dense"):
        FORMAT.from_hf_config({"model_type": "siglip"}, head=head)


def test_validation_lists_every_error() -> None:
    config = SiglipConfig(logit_bias_init=None)
    assert config.text is not None
    assert config.vision is not None
    config.text.num_attn_heads = 7
    config.text.attn_dropout_p = 1.5
    config.text.projection_dim = 5
    config.vision.image_size = 8
    errors = " ".join(config_errors(config))
    for word in ("num_attn_heads", "attn_dropout_p", "text.projection_dim", "image_size", "logit_bias_init"):
        assert word in errors
    assert "both" in " ".join(config_errors(SiglipConfig(text=None, vision=None)))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_meta_model_initialises_like_transformers(generation: str) -> None:
    torch.manual_seed(0)
    config = FORMAT.from_hf_config(small_config(generation, hidden_size=64, intermediate_size=128))
    config.logit_scale_init = config.logit_bias_init = 0.0  # transformers' own
    with torch.device("meta"):
        model = create_siglip_model(config)
    to_empty(model, torch.device("cpu"))
    reset_parameters(model)
    assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {"cpu"}
    reference = class_of({"model_type": generation}, "Model")(export_config(config)).requires_grad_(False)
    state = FORMAT.to_hg_state_dict(dict(model.state_dict()), config)
    for key, tensor in reference.state_dict().items():
        value = state[key]
        assert isinstance(value, Tensor)
        if key.endswith(("norm.weight", "norm.bias", "norm1.weight", "norm2.weight", "logit_scale", "logit_bias")):
            assert torch.equal(value, tensor), key
        elif not tensor.any():
            assert not value.any(), key
        else:
            close = 0.15 if tensor.numel() >= 512 else 0.6
            assert float(value.std()) == pytest.approx(float(tensor.std()), rel=close), key
            assert float(value.abs().max()) == pytest.approx(float(tensor.abs().max()), rel=0.8), key


def test_a_new_model_starts_from_the_temperature_and_bias_of_the_paper() -> None:
    model = create_siglip_model(FORMAT.from_hf_config(small_config()))
    assert isinstance(model.logit_scale, Tensor)
    assert isinstance(model.logit_bias, Tensor)
    assert model.logit_scale.exp().item() == pytest.approx(10.0)
    assert model.logit_bias.item() == -10.0
