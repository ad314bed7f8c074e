"""Vision Transformers equal transformers' models on the same weights, whatever the options."""

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
from transformers import AutoConfig

from tests.parity.dropout_masks import assert_same_dropout
from vembed_fs2.embedding.head import ImageHeadConfig
from vembed_fs2.embedding.model import EncoderBatch
from vembed_fs2.models.vit import VitCheckpointFormat, VitConfig, VitModel, create_vit_model

FORMAT = VitCheckpointFormat()

MODELS = {
    "vit": "ViTModel",
    "vit_mae": "ViTMAEModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
}

ACTIVATIONS = ("gelu", "quick_gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "silu", "mish", "tanh")


@st.composite
def hf_configs(draw: st.DrawFn, model_type: str) -> dict[str, Any]:
    num_heads = draw(st.sampled_from((1, 2, 4)))
    # Rotary positions, and the fixed ones of MAE, need multiples of 4.
    head_dim = draw(st.sampled_from((4, 8, 12) if model_type in ("vit_mae", "dinov3_vit") else (4, 5, 9, 12)))
    patch = draw(st.integers(1, 6))
    config: dict[str, Any] = {
        "model_type": model_type,
        "hidden_size": num_heads * head_dim,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": num_heads,
        "hidden_act": draw(st.sampled_from(ACTIVATIONS)),
        "layer_norm_eps": draw(st.sampled_from((1e-12, 1e-6, 1e-5, 1e-2))),
        "initializer_range": draw(st.sampled_from((0.02, 0.1))),
        "num_channels": draw(st.integers(1, 4)),
        "patch_size": patch,
        "image_size": draw(st.integers(patch, 5 * patch + 1)),
    }
    return config | draw(_own_options(model_type, config))


@st.composite
def _own_options(draw: st.DrawFn, model_type: str, config: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    bools, rates = st.booleans(), st.sampled_from((0.0, 0.3))
    if model_type == "dinov3_vit":
        options |= {name: draw(bools) for name in ("query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias")}
        options |= {"attention_dropout": draw(rates), "use_gated_mlp": draw(bools)}
        options |= {"rope_theta": draw(st.sampled_from((100.0, 10.0, 10000.0)))}
        options |= {"pos_embed_shift": draw(st.sampled_from((None, 0.5)))}
        options |= {"pos_embed_jitter": draw(st.sampled_from((None, 1.5)))}
        options |= {"pos_embed_rescale": draw(st.sampled_from((None, 2.0)))}
    else:
        options |= {"qkv_bias": draw(bools), "hidden_dropout_prob": draw(rates)}
        options |= {"attention_probs_dropout_prob": draw(rates)}
    if model_type.startswith("dino"):
        options |= {"layerscale_value": draw(st.sampled_from((1.0, 1e-5, 2))), "drop_path_rate": draw(rates)}
    if model_type.startswith("dinov2"):
        options |= {"mlp_ratio": draw(st.sampled_from((4, 1, 2.5, 0.7))), "use_swiglu_ffn": draw(bools)}
        options |= {"apply_layernorm": draw(bools), "out_features": draw(st.sampled_from((None, ["stem"])))}
    else:
        options |= {"intermediate_size": draw(st.integers(1, 40))}
    if model_type == "dinov2":
        options |= {"use_mask_token": draw(bools)}
    if model_type in ("dinov2_with_registers", "dinov3_vit"):
        options |= {"num_register_tokens": draw(st.integers(0, 4))}
    if model_type == "vit":
        options |= {"pooler_output_size": draw(st.sampled_from((None, 7, 48))), "encoder_stride": 8}
        options |= {"pooler_act": draw(st.sampled_from(("tanh", "relu", "gelu")))}
    if model_type == "vit_mae":
        options |= {"mask_ratio": draw(st.sampled_from((0.75, 0.5))), "decoder_hidden_size": 24, "norm_pix_loss": True}
    if model_type in ("vit", "vit_mae") and draw(bools):
        patch = config["patch_size"]
        options |= {"patch_size": [patch, patch + 1]}
        # MAE's own initial positions want a square number of patches.
        rows, columns = draw(st.sampled_from(((2, 2), (1, 1), (1, 4)) if model_type == "vit_mae" else ((2, 3), (3, 1))))
        options |= {"image_size": [rows * patch, columns * (patch + 1)]}
    return options


def create_pair(hf_config: dict[str, Any], seed: int = 0) -> tuple[Any, VitModel, VitConfig]:
    """transformers' model with random weights everywhere, and ours with the same."""
    torch.manual_seed(seed)
    values = {k: v for k, v in hf_config.items() if k != "model_type"}
    hf = AutoConfig.for_model(hf_config["model_type"], **values)
    reference = getattr(transformers, MODELS[hf_config["model_type"]])(hf).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.normal_(std=0.2)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    config = FORMAT.from_hf_config(hf.to_dict(), keys=frozenset(reference.state_dict()))
    model = create_vit_model(config).eval()
    model.load_state_dict(FORMAT.from_hf_state_dict(dict(reference.state_dict()), config))
    return reference, model, config


def their_output(reference: Any, pixels: Tensor) -> Any:
    """What transformers' model returns, with interpolated positions, and without a mask."""
    config = reference.config
    if config.model_type.startswith("dino"):
        return reference(pixels)
    size = config.image_size if isinstance(config.image_size, list) else [config.image_size] * 2
    interpolated = list(pixels.shape[2:]) != size
    if config.model_type == "vit":
        return reference(pixels, interpolate_pos_encoding=interpolated)
    mask_ratio, config.mask_ratio = config.mask_ratio, 0.0
    patch = config.patch_size if isinstance(config.patch_size, list) else [config.patch_size] * 2
    # Ordered noise, as transformers shuffles patches even without a mask.
    num_patches = (pixels.size(2) // patch[0]) * (pixels.size(3) // patch[1])
    noise = torch.arange(num_patches).float().expand(pixels.size(0), -1)
    try:
        return reference(pixels, noise=noise, interpolate_pos_encoding=interpolated)
    finally:
        config.mask_ratio = mask_ratio


def images(config: VitConfig, num: int = 3, height: int | None = None, width: int | None = None) -> Tensor:
    size = config.image_size if isinstance(config.image_size, list) else [config.image_size] * 2
    return torch.randn(num, config.num_channels, height or size[0], width or size[1])


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())


def check_output(hf_config: dict[str, Any], seed: int, height: int | None = None, width: int | None = None) -> None:
    reference, model, config = create_pair(hf_config, seed)
    pixels = images(config, 3, height, width)
    batch = EncoderBatch.of_images(pixels)
    with torch.no_grad():
        expected = their_output(reference, pixels)
        states = expected.last_hidden_state
        assert difference(model.encode_patches(batch), states) <= 1e-5
        pooled = states[:, 1:].mean(1) if config.model_type == "vit_mae" else states[:, 0]
        assert difference(model(batch).values, pooled) <= 1e-5
        if config.model_type == "vit":
            config.head = ImageHeadConfig(pooling="pooler")
            pooling = create_vit_model(config).eval()
            pooling.load_state_dict(model.state_dict())
            assert pooling.embedding_dim == expected.pooler_output.size(1)
            assert difference(pooling(batch).values, expected.pooler_output) <= 1e-5


@pytest.mark.parametrize("model_type", MODELS)
def test_states_and_embeddings_equal_transformers(model_type: str) -> None:
    @settings(max_examples=30)
    @given(hf_configs(model_type), st.integers(0, 1000))
    def check(hf_config: dict[str, Any], seed: int) -> None:
        check_output(hf_config, seed)

    check()


@pytest.mark.parametrize("model_type", MODELS)
def test_other_image_sizes_equal_transformers(model_type: str) -> None:
    @settings(max_examples=30)
    @given(hf_configs(model_type), st.integers(0, 30), st.integers(0, 30))
    def check(hf_config: dict[str, Any], more_height: int, more_width: int) -> None:
        # transformers interpolates square tables only, and no patches of two sizes.
        if isinstance(hf_config["patch_size"], list):
            hf_config |= {"patch_size": hf_config["patch_size"][0], "image_size": 9}
        patch = hf_config["patch_size"]
        check_output(hf_config, 0, patch + more_height, patch + more_width)

    check()


@pytest.mark.parametrize("model_type", MODELS)
def test_round_trip_is_exact(model_type: str) -> None:
    @settings(max_examples=30)
    @given(hf_configs(model_type), st.sampled_from((torch.float32, torch.float16, torch.bfloat16)))
    def check(hf_config: dict[str, Any], dtype: torch.dtype) -> None:
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
        assert exported.arch == MODELS[model_type]
        _assert_same_values(_export_config(config), reference.config.to_dict())

    check()


def _export_config(config: VitConfig) -> dict[str, Any]:
    """As fairseq2 writes it."""
    exported = FORMAT.to_hg_config(config)
    hf_config = getattr(transformers, exported.kls_name)()
    for name, value in exported.data.items():
        setattr(hf_config, name, value)
    values: dict[str, Any] = hf_config.to_dict()
    return values


def _assert_same_values(a: dict[str, Any], b: dict[str, Any]) -> None:
    for key in (a.keys() | b.keys()) - {"architectures", "dtype", "torch_dtype", "transformers_version"}:
        assert a[key] == b[key], key


def small(model_type: str, **options: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model_type": model_type,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        **({"mlp_ratio": 2} if model_type.startswith("dinov2") else {"intermediate_size": 24}),
        **({"num_register_tokens": 2} if model_type in ("dinov2_with_registers", "dinov3_vit") else {}),
    }
    return values | options


@pytest.mark.parametrize("model_type", MODELS)
def test_transformers_loads_what_fairseq2_saves(model_type: str, tmp_path: Path) -> None:
    _, model, config = create_pair(small(model_type))
    state = FORMAT.to_hg_state_dict(dict(model.state_dict()), config)
    save_hugging_face_model(tmp_path, state, FORMAT.to_hg_config(config))
    kls = getattr(transformers, MODELS[model_type])
    loaded, info = kls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    pixels = images(config)
    with torch.no_grad():
        states = their_output(loaded.eval(), pixels).last_hidden_state
        assert difference(model.encode_patches(EncoderBatch.of_images(pixels)), states) <= 1e-5
    saved = json.loads(tmp_path.joinpath("config.json").read_text())
    assert saved["architectures"] == [MODELS[model_type]]
    assert FORMAT.from_hf_config(saved) == config


@pytest.mark.parametrize("model_type", MODELS)
def test_training_equals_transformers(model_type: str) -> None:
    """Outputs and gradients, with the same random numbers for stochastic depth and for positions."""
    options: dict[str, Any] = {"drop_path_rate": 0.4} if model_type.startswith("dino") else {}
    if model_type == "dinov3_vit":
        options |= {"pos_embed_shift": 0.3, "pos_embed_jitter": 1.5}
    reference, model, config = create_pair(small(model_type, **options))
    reference.train()
    model.train()
    pixels = images(config, 5, 12, 8)
    outputs = []
    for compute in (
        lambda: their_output(reference, pixels).last_hidden_state,
        lambda: model.encode_patches(EncoderBatch.of_images(pixels)),
    ):
        torch.manual_seed(7)
        outputs.append(compute())
        outputs[-1].square().sum().backward()
    assert difference(*outputs) <= 1e-5
    if options:
        with torch.no_grad():
            assert difference(outputs[1], model.encode_patches(EncoderBatch.of_images(pixels))) > 0.1
    expected = {k: p.grad for k, p in reference.named_parameters() if p.grad is not None}
    ours: dict[str, object] = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    found = FORMAT.to_hg_state_dict(ours, config)
    assert found.keys() == expected.keys()
    for key, grad in expected.items():
        value = found[key]
        assert isinstance(value, Tensor)
        torch.testing.assert_close(value, grad, rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("model_type", MODELS)
def test_dropout_is_where_transformers_has_it(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.4}
    if model_type == "dinov3_vit":
        options = {"attention_dropout": 0.4}
    if model_type.startswith("dino"):
        options |= {"drop_path_rate": 0.2}
    reference, model, config = create_pair(small(model_type, **options))
    reference.config._attn_implementation = "eager"
    batch = EncoderBatch.of_images(images(config, 5))
    assert_same_dropout(
        monkeypatch,
        reference,
        model,
        lambda: their_output(reference, batch.images.values).last_hidden_state,  # type: ignore[arg-type]
        lambda: model.encode_patches(batch),
    )


def test_positions_of_mae_are_not_trained_whatever_the_recipe_says() -> None:
    _, model, config = create_pair(small("vit_mae"))
    model.requires_grad_(True)
    model.train().encode_image(EncoderBatch.of_images(images(config))).sum().backward()
    assert model.frontend.positions is not None
    assert model.frontend.positions.weight.grad is None


@pytest.mark.parametrize("model_type", MODELS)
def test_meta_model_initialises_like_transformers(model_type: str) -> None:
    options: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "layerscale_value": 0.5}
    if not model_type.startswith("dino"):
        del options["layerscale_value"]
    _, _, config = create_pair(small(model_type, initializer_range=0.1, **options))
    with torch.device("meta"):
        model = create_vit_model(config)
    to_empty(model, torch.device("cpu"))
    reset_parameters(model)
    assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {"cpu"}
    hf = AutoConfig.for_model(**_export_config(config))
    reference = getattr(transformers, MODELS[model_type])(hf).requires_grad_(False)
    state = FORMAT.to_hg_state_dict(dict(model.state_dict()), config)
    for key, tensor in reference.state_dict().items():
        value = state[key]
        assert isinstance(value, Tensor)
        is_fixed = key.endswith(("bias", "lambda1")) or "norm" in key or (tensor == 0).all()
        if is_fixed or (model_type == "vit_mae" and key == "embeddings.position_embeddings"):
            torch.testing.assert_close(value, tensor, rtol=0, atol=1e-6, msg=key)
        else:
            close = 0.15 if tensor.numel() >= 512 else 0.6
            assert float(value.std()) == pytest.approx(float(tensor.std()), rel=close), key


@pytest.mark.parametrize("model_type", MODELS)
def test_embedding_is_independent_of_the_batch(model_type: str) -> None:
    _, model, config = create_pair(small(model_type))
    batch = EncoderBatch.of_images(images(config, 6))
    with torch.no_grad():
        together = model(batch).values
        for row in range(6):
            torch.testing.assert_close(model(batch.select([row])).values[0], together[row], rtol=1e-6, atol=1e-6)
