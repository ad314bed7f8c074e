"""CLIP equals transformers' ``CLIPModel`` on the same weights, whatever the options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq2.models.hg import save_hugging_face_model
from fairseq2.nn.utils.module import reset_parameters, to_empty
from fairseq2.utils.validation import StandardObjectValidator, ValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from tests.parity.dropout_masks import assert_same_dropout
from vembed_fs2.embedding.inputs import ImageInputs, TextInputs
from vembed_fs2.embedding.model import DenseConfig, EncoderBatch, HeadConfig
from vembed_fs2.errors import ModelLoadError
from vembed_fs2.models.clip import ClipCheckpointFormat, ClipConfig, ClipModel, create_clip_model
from vembed_fs2.models.clip.config import ClipTextConfig, ClipVisionConfig

FORMAT = ClipCheckpointFormat()

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "silu", "mish", "tanh")

VOCAB = 60


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@st.composite
def towers(draw: st.DrawFn) -> dict[str, Any]:
    num_heads = draw(st.sampled_from((1, 2, 4)))
    return {
        "hidden_size": num_heads * draw(st.sampled_from((4, 8, 12))),
        "intermediate_size": draw(st.integers(4, 40)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": num_heads,
        "hidden_act": draw(st.sampled_from(ACTIVATIONS)),
        "layer_norm_eps": draw(st.sampled_from((1e-5, 1e-6, 1e-3))),
        "attention_dropout": draw(st.sampled_from((0.0, 0.3))),
        "initializer_range": draw(st.sampled_from((0.02, 0.1))),
        "initializer_factor": draw(st.sampled_from((1.0, 0.5))),
        "projection_dim": draw(st.sampled_from((512, 24))),
    }


@st.composite
def hf_configs(draw: st.DrawFn) -> dict[str, Any]:
    eos = draw(st.sampled_from((2, 50)))  # 2 pools the highest id; 51 and above are added tokens
    text = draw(towers()) | {
        "vocab_size": VOCAB,
        "max_position_embeddings": draw(st.integers(10, 16)),
        "eos_token_id": eos,
        "bos_token_id": draw(st.sampled_from((0, 49))),
        "pad_token_id": draw(st.sampled_from((1, eos))),
    }
    patch = draw(st.integers(2, 6))
    vision = draw(towers()) | {
        "num_channels": draw(st.integers(1, 4)),
        "patch_size": patch,
        "image_size": draw(st.integers(patch, 4 * patch + 1)),
    }
    return {
        "model_type": "clip",
        "text_config": text,
        "vision_config": vision,
        "projection_dim": draw(st.integers(3, 24)),
        "logit_scale_init_value": draw(st.sampled_from((2.6592, 1.0))),
    }


def create_pair(hf_config: dict[str, Any], seed: int = 0) -> tuple[CLIPModel, ClipModel, ClipConfig]:
    """transformers' model with random weights everywhere, and ours with the same."""
    torch.manual_seed(seed)
    reference = CLIPModel(CLIPConfig(**hf_config)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(std=0.2)
    config = FORMAT.from_hf_config(reference.config.to_dict())
    model = create_clip_model(config).eval()
    model.load_state_dict(FORMAT.from_hf_state_dict(dict(reference.state_dict()), config))
    return reference, model, config


def export_config(config: ClipConfig) -> CLIPConfig:
    hf_config = CLIPConfig()
    for name, value in FORMAT.to_hg_config(config).data.items():
        setattr(hf_config, name, value)
    return hf_config


def create_texts(config: ClipTextConfig, num: int = 5) -> tuple[Tensor, Tensor]:
    """Ids and mask: texts of several lengths with an end token, padded on the right."""
    pad = config.eos_idx if config.pad_idx == config.eos_idx else 1
    ids = torch.full((num, config.max_seq_len), 50 if pad == 2 else pad)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row in range(num):
        length = int(torch.randint(3, config.max_seq_len, ()))
        high = 50 if row % 2 else VOCAB  # every other text has added tokens above the end token
        ids[row, :length] = torch.randint(3, high, (length,))
        ids[row, length] = 50
        mask[row, : length + 1] = True
    return ids, mask


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@settings(max_examples=40)
@given(hf_configs(), st.integers(0, 1000))
def test_embeddings_equal_transformers(hf_config: dict[str, Any], seed: int) -> None:
    reference, model, config = create_pair(hf_config, seed)
    ids, mask = create_texts(config.text)
    size = config.vision.image_size
    pixels = torch.randn(3, config.vision.num_channels, size, size)
    with torch.no_grad():
        expected = reference.get_text_features(ids, attention_mask=mask)
        unmasked = reference.get_text_features(ids)
        assert difference(model(EncoderBatch.of_text(ids, mask)).values, expected) <= 1e-5
        assert difference(model(EncoderBatch.of_text(ids)).values, unmasked) <= 1e-5
        images = model(EncoderBatch.of_images(pixels))
        assert difference(images.values, reference.get_image_features(pixels)) <= 1e-5
    assert images.logit_scale is not None
    assert images.logit_scale.shape == (1,)
    assert images.logit_scale.item() == reference.logit_scale.item()


@settings(max_examples=40)
@given(hf_configs(), st.integers(1, 30), st.integers(1, 30))
def test_other_image_sizes_equal_transformers(hf_config: dict[str, Any], extra_height: int, extra_width: int) -> None:
    reference, model, config = create_pair(hf_config)
    patch = config.vision.patch_size
    pixels = torch.randn(2, config.vision.num_channels, patch + extra_height, patch + extra_width)
    with torch.no_grad():
        expected = reference.get_image_features(pixels, interpolate_pos_encoding=True)
        assert difference(model.encode_image(EncoderBatch.of_images(pixels)), expected) <= 1e-5


@settings(max_examples=40)
@given(hf_configs(), st.sampled_from((torch.float32, torch.float16, torch.bfloat16)))
def test_round_trip_is_exact(hf_config: dict[str, Any], dtype: torch.dtype) -> None:
    reference, model, config = create_pair(hf_config)
    state = dict(reference.to(dtype).state_dict())
    ours = FORMAT.from_hf_state_dict(dict(state), config)
    assert ours.keys() == model.state_dict().keys()
    back = FORMAT.to_hg_state_dict(dict(ours), config)
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        value = back[key]
        assert isinstance(value, Tensor)
        assert value.dtype == tensor.dtype
        assert value.shape == tensor.shape
        assert torch.equal(value, tensor)
    exported = FORMAT.to_hg_config(config)
    assert (exported.kls_name, exported.arch) == ("CLIPConfig", "CLIPModel")
    _assert_same_values(export_config(config).to_dict(), reference.config.to_dict())


def _assert_same_values(a: dict[str, Any], b: dict[str, Any]) -> None:
    loading = {"architectures", "dtype", "torch_dtype", "transformers_version"}
    for key in (a.keys() | b.keys()) - loading:
        if isinstance(b[key], dict) and key.endswith("_config"):
            _assert_same_values(a[key], b[key])
        else:
            assert a[key] == b[key], key


def small_config(**text: Any) -> dict[str, Any]:
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": VOCAB, "eos_token_id": 50, "max_position_embeddings": 12} | text
    vision = tower | {"image_size": 8, "patch_size": 4}
    return {"model_type": "clip", "text_config": text, "vision_config": vision, "projection_dim": 8}


def test_transformers_loads_what_fairseq2_saves(tmp_path: Path) -> None:
    _, model, config = create_pair(small_config(eos_token_id=2, hidden_act="gelu"))
    state = FORMAT.to_hg_state_dict(dict(model.state_dict()), config)
    save_hugging_face_model(tmp_path, state, FORMAT.to_hg_config(config))
    loaded, info = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    ids, mask = create_texts(config.text)
    with torch.no_grad():
        expected = loaded.get_text_features(ids, attention_mask=mask)
        assert difference(model.encode_text(EncoderBatch.of_text(ids, mask)), expected) <= 1e-5
    saved = json.loads(tmp_path.joinpath("config.json").read_text())
    assert saved["architectures"] == ["CLIPModel"]
    assert FORMAT.from_hf_config(saved) == config


def test_state_dict_with_our_names_is_unchanged() -> None:
    _, model, config = create_pair(small_config())
    state = dict(model.state_dict())
    assert FORMAT.from_hf_state_dict(state, config) is state


def test_stale_position_ids_are_dropped_and_unknown_tensors_are_not() -> None:
    reference, model, config = create_pair(small_config())
    state = dict(reference.state_dict())
    state["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    state["text_model.embeddings.extra"] = torch.zeros(1)
    ours = FORMAT.from_hf_state_dict(state, config)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"text_model.embeddings.extra\""):
        model.load_state_dict(ours)


def test_absent_fields_take_the_defaults_of_transformers() -> None:
    config = FORMAT.from_hf_config({"model_type": "clip", "text_config": {"hidden_size": 256}, "vision_config": None})
    assert config == ClipConfig(text=ClipTextConfig(model_dim=256))


def test_legacy_config_dicts_override() -> None:
    hf_config = {
        "model_type": "clip",
        "text_config": {"hidden_size": 256, "num_hidden_layers": 3},
        "text_config_dict": {"hidden_size": 128},
        "vision_config_dict": {"patch_size": 16},
    }
    config = FORMAT.from_hf_config(hf_config)
    assert config.text == ClipTextConfig(model_dim=128)
    assert config.vision == ClipVisionConfig(patch_size=16)
    assert hf_config["text_config"] == {"hidden_size": 256, "num_hidden_layers": 3}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"text_config": {"hidden_act": "prelu"}}, "text_config.hidden_act"),
        ({"vision_config": {"hidden_act": "gelu_typo"}}, "vision_config.hidden_act"),
        ({"vision_config": {"image_size": [224, 224]}}, "vision_config.image_size"),
        ({"vision_config": {"patch_size": [16, 16]}}, "vision_config.patch_size"),
        ({"text_config": {"eos_token_id": [2, 3]}}, "text_config.eos_token_id"),
        ({"text_config": {"eos_token_id": None}}, "text_config.eos_token_id"),
        ({"text_config": {"pruned_heads": {"0": [1]}}}, "text_config.pruned_heads"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
        ({"text_config": {"num_attention_heads": 7}}, "num_attention_heads"),
        ({"text_config": "big"}, "CLIP configuration"),
    ],
)
def test_unsupported_options_are_refused_by_name(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ModelLoadError, match=field):
        FORMAT.from_hf_config({"model_type": "clip", **change})


def test_dense_modules_are_refused() -> None:
    head = HeadConfig(dense=[DenseConfig(input_dim=8, output_dim=8)])
    with pytest.raises(ModelLoadError, match="Dense"):
        FORMAT.from_hf_config({"model_type": "clip"}, head=head)


def test_validation_lists_every_error() -> None:
    config = ClipConfig(projection_dim=0)
    config.text.num_attn_heads = 7
    config.text.attn_dropout_p = 1.5
    config.vision.image_size = 16
    with pytest.raises(ValidationError) as caught:
        StandardObjectValidator().validate(config)
    for word in ("projection_dim", "num_attn_heads", "attn_dropout_p", "image_size"):
        assert word in str(caught.value)


@pytest.mark.parametrize("eos", [2, 50])
@pytest.mark.parametrize("pad", [1, 50, 59])
def test_padding_does_not_change_the_embedding(eos: int, pad: int) -> None:
    _, model, _ = create_pair(small_config(eos_token_id=eos, pad_token_id=pad))
    text = torch.tensor([[49, 7, 8, 50]])
    with torch.no_grad():
        alone = model.encode_text(EncoderBatch.of_text(text))
        for width in (5, 9, 12):
            right = torch.nn.functional.pad(text, (0, width - 4), value=pad)
            left = torch.nn.functional.pad(text, (width - 4, 0), value=pad)
            mask = torch.arange(width)[None] < 4
            torch.testing.assert_close(
                model.encode_text(EncoderBatch.of_text(right, mask)), alone, rtol=1e-6, atol=1e-6
            )
            torch.testing.assert_close(
                model.encode_text(EncoderBatch.of_text(left, mask.flip(1))), alone, rtol=1e-6, atol=1e-6
            )


def test_embedding_is_independent_of_the_batch() -> None:
    _, model, config = create_pair(small_config())
    ids, mask = create_texts(config.text, 6)
    texts = EncoderBatch.of_text(ids, mask)
    images = EncoderBatch.of_images(torch.randn(6, 3, 8, 8))
    with torch.no_grad():
        for batch in (texts, images):
            together = model(batch).values
            for row in range(6):
                torch.testing.assert_close(model(batch.select([row])).values[0], together[row], rtol=1e-6, atol=1e-6)


def test_row_of_text_and_image_is_the_sum_of_unit_embeddings() -> None:
    _, model, config = create_pair(small_config())
    ids, mask = create_texts(config.text, 2)
    pixels = torch.randn(2, 3, 8, 8)
    # Row 0 is a text, row 1 a text and an image, row 2 an image.
    batch = EncoderBatch(3, TextInputs(ids, torch.tensor([0, 1]), mask), ImageInputs(pixels, torch.tensor([1, 2])))
    with torch.no_grad():
        values = model(batch).values
        text, image = model.encode_text(batch), model.encode_image(batch)
        both = torch.nn.functional.normalize(text[1], dim=0) + torch.nn.functional.normalize(image[0], dim=0)
    torch.testing.assert_close(values, torch.stack([text[0], both, image[1]]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_gradients_equal_transformers(act: str) -> None:
    reference, model, config = create_pair(small_config(hidden_act=act))
    ids, mask = create_texts(config.text)
    pixels = torch.randn(3, 3, 12, 8)
    reference.get_text_features(ids, attention_mask=mask).square().sum().backward()
    reference.get_image_features(pixels, interpolate_pos_encoding=True).square().sum().backward()
    model.encode_text(EncoderBatch.of_text(ids, mask)).square().sum().backward()
    model.encode_image(EncoderBatch.of_images(pixels)).square().sum().backward()
    expected = {k: p.grad for k, p in reference.named_parameters() if p.grad is not None}
    ours = FORMAT.to_hg_state_dict({k: p.grad for k, p in model.named_parameters() if p.grad is not None}, config)
    assert ours.keys() == expected.keys()
    for key, grad in expected.items():
        value = ours[key]
        assert isinstance(value, Tensor)
        assert difference(value, grad) <= 1e-5 * max(1.0, float(grad.abs().max())), key


@pytest.mark.parametrize("modality", ["text", "image"])
def test_dropout_is_where_transformers_has_it(modality: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_config = small_config(attention_dropout=0.4)
    hf_config["vision_config"]["attention_dropout"] = 0.4
    reference, model, config = create_pair(hf_config)
    for tower in (reference.text_model, reference.vision_model):
        tower.config._attn_implementation = "eager"
    ids, pixels = create_texts(config.text)[0], torch.randn(4, 3, 8, 8)
    theirs, ours = {
        "text": (lambda: reference.get_text_features(ids), lambda: model.encode_text(EncoderBatch.of_text(ids))),
        "image": (
            lambda: reference.get_image_features(pixels),
            lambda: model.encode_image(EncoderBatch.of_images(pixels)),
        ),
    }[modality]
    assert_same_dropout(monkeypatch, reference, model, theirs, ours)


def test_fixed_temperature_is_not_a_parameter() -> None:
    reference, trained, config = create_pair(small_config())
    config.train_logit_scale = False
    model = create_clip_model(config)
    model.load_state_dict(FORMAT.from_hf_state_dict(dict(reference.state_dict()), config))
    assert "logit_scale" not in dict(model.named_parameters())
    assert model.state_dict().keys() == trained.state_dict().keys()
    output = model(EncoderBatch.of_images(torch.randn(1, 3, 8, 8)))
    assert output.logit_scale is not None
    assert output.logit_scale.item() == reference.logit_scale.item()
    assert not output.logit_scale.requires_grad


@pytest.mark.parametrize("train_logit_scale", [True, False])
def test_meta_model_initialises_like_transformers(train_logit_scale: bool) -> None:
    config = FORMAT.from_hf_config(small_config(hidden_size=64, intermediate_size=128))
    config.vision.num_channels = 5
    config.train_logit_scale = train_logit_scale
    with torch.device("meta"):
        model = create_clip_model(config)
    to_empty(model, torch.device("cpu"))
    reset_parameters(model)
    assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {"cpu"}
    reference = CLIPModel(export_config(config)).requires_grad_(False)
    state = FORMAT.to_hg_state_dict(dict(model.state_dict()), config)
    for key, tensor in reference.state_dict().items():
        value = state[key]
        assert isinstance(value, Tensor)
        if key.endswith(("bias", "norm.weight", "norm1.weight", "norm2.weight", "logit_scale")):
            assert torch.equal(value, tensor), key
        else:
            close = 0.15 if tensor.numel() >= 512 else 0.6
            assert float(value.std()) == pytest.approx(float(tensor.std()), rel=close), key


def test_too_long_text_is_an_error() -> None:
    _, model, _ = create_pair(small_config())
    with pytest.raises(ValueError, match="at most 12 tokens, but one has 13"):
        model.encode_text(EncoderBatch.of_text(torch.full((1, 13), 5)))
