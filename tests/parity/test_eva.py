"""EVA-CLIP equals open_clip's models with timm's ``Eva`` on the same weights, whatever the options."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fairseq2.models.utils.ac import apply_layerwise_ac
from fairseq2.nn.utils.module import reset_parameters, to_empty
from fairseq2.utils.validation import StandardObjectValidator, ValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.model import CustomTextCLIP
from torch import Tensor

from vembed_fs2.embedding.model import EncoderBatch
from vembed_fs2.models.eva import EvaConfig, EvaVisionConfig, create_eva_model
from vembed_fs2.models.eva.open_clip import OPEN_CLIP, config_from_open_clip

from .eva_models import (
    PLAIN,
    Example,
    create_images,
    create_pair,
    create_texts,
    difference,
    models,
    small_cfg,
    small_options,
    timm_model,
)


@settings(max_examples=40)
@given(models(), st.integers(0, 1000))
def test_embeddings_equal_open_clip(example: Example, seed: int) -> None:
    reference, model, config = create_pair(*example, seed)
    ids, mask = create_texts(config)
    pixels = create_images(config)
    with torch.no_grad():
        expected = reference.encode_text(ids)
        assert difference(model(EncoderBatch.of_text(ids, mask)).values, expected) <= 1e-5
        assert difference(model(EncoderBatch.of_text(ids)).values, expected) <= 1e-5
        images = model(EncoderBatch.of_images(pixels))
        assert difference(images.values, reference.encode_image(pixels)) <= 1e-5
    assert images.logit_scale is not None
    assert images.logit_scale.shape == (1,)
    assert images.logit_scale.item() == reference.logit_scale.item()
    assert model.embedding_dim == images.values.size(1)


@settings(max_examples=30)
@given(models(), st.integers(1, 5), st.integers(1, 5))
def test_other_image_sizes_equal_timm(example: Example, height: int, width: int) -> None:
    reference, model, config = create_pair(*example, dynamic_img_size=True)
    patch = config.vision.patch_size
    pixels = torch.randn(2, config.vision.num_channels, height * patch, width * patch)
    with torch.no_grad():
        expected = reference.encode_image(pixels)
        assert difference(model.encode_image(EncoderBatch.of_images(pixels)), expected) <= 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_fused": True, "scale_mlp": False, "init_values": 0.5},
        PLAIN | {"use_post_norm": True, "qkv_fused": True},
    ],
)
def test_gradients_equal_open_clip(changes: dict[str, Any]) -> None:
    reference, model, config = create_pair(small_options(**changes), small_cfg())
    ids, mask = create_texts(config)
    pixels = create_images(config)
    reference.encode_text(ids).square().sum().backward()
    reference.encode_image(pixels).square().sum().backward()
    model.encode_text(EncoderBatch.of_text(ids, mask)).square().sum().backward()
    model.encode_image(EncoderBatch.of_images(pixels)).square().sum().backward()
    expected = {k: p.grad for k, p in reference.named_parameters() if p.grad is not None}
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == {k for k, _ in model.named_parameters() if k != "logit_scale"}
    ours = OPEN_CLIP.state_dict_to_open_clip(dict(grads), config)
    assert ours.keys() == expected.keys()
    for key, grad in expected.items():
        value = ours[key]
        assert isinstance(value, Tensor)
        torch.testing.assert_close(value, grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()), msg=key)


@pytest.mark.parametrize("changes", [{}, PLAIN])
def test_embedding_is_independent_of_batch_and_padding(changes: dict[str, Any]) -> None:
    _, model, config = create_pair(small_options(**changes), small_cfg(timm_pool="avg"))
    ids, mask = create_texts(config, 6)
    images = EncoderBatch.of_images(create_images(config, 6))
    with torch.no_grad():
        for batch in (EncoderBatch.of_text(ids, mask), images):
            together = model(batch).values
            for row in range(6):
                torch.testing.assert_close(model(batch.select([row])).values[0], together[row], rtol=1e-6, atol=1e-6)


def test_checkpointed_layers_keep_the_rotations_of_their_image() -> None:
    """An image of another size passes between the forward and the backward pass."""
    _, model, _ = create_pair(small_options(), small_cfg())
    square, wide = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 16)
    model.encode_image(EncoderBatch.of_images(square)).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for stack in model.layer_stacks():
        apply_layerwise_ac(stack, 1)
    first = model.encode_image(EncoderBatch.of_images(square))
    model.encode_image(EncoderBatch.of_images(wide))
    first.square().sum().backward()
    grads = {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}
    for name, grad in expected.items():
        assert torch.equal(grads[name], grad), name  # type: ignore[arg-type]


def test_validation_lists_every_error() -> None:
    config = EvaConfig(projection_dim=0)
    config.vision = EvaVisionConfig(
        model_dim=30, num_layers=0, image_size=8, drop_path_p=1.0, layer_norm_eps=-1.0, rope_ref_size=0,
        pooling="first", projection="conv", post_norm=True, layer_scale_init=0.1,  # type: ignore[arg-type]
    )  # fmt: skip
    with pytest.raises(ValidationError) as caught:
        StandardObjectValidator().validate(config)
    for word in (
        "projection_dim", "model_dim", "num_layers", "image_size", "drop_path_p", "layer_norm_eps", "rope_ref_size",
        "pooling", "`projection`", "layer_scale_init",
    ):  # fmt: skip
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["attn_dropout_p", "drop_path_p", "head_dropout_p"])
def test_dropout_is_for_training_only(name: str) -> None:
    _, model, config = create_pair(small_options(), small_cfg(timm_proj="mlp"))
    config.vision = replace(config.vision, **{name: 0.9})
    other = create_eva_model(config)
    other.load_state_dict(model.state_dict())
    batch = EncoderBatch.of_images(create_images(config))
    with torch.no_grad():
        assert torch.equal(other.eval().encode_image(batch), model.encode_image(batch))
        assert not torch.equal(other.train().encode_image(batch), model.encode_image(batch))


@pytest.mark.parametrize(
    ("changes", "proj"),
    [
        ({}, None),
        ({"qkv_fused": True, "scale_mlp": False, "init_values": 0.5}, "linear"),
        (PLAIN | {"use_post_norm": True}, "mlp"),
    ],
)
def test_meta_model_initialises_like_timm(changes: dict[str, Any], proj: str | None) -> None:
    options = small_options(embed_dim=64, depth=3, **changes)
    model_cfg = small_cfg(timm_proj=proj) | {"embed_dim": 48}
    with timm_model(options):
        config = config_from_open_clip(model_cfg)
        reference = CustomTextCLIP(**{k: v for k, v in model_cfg.items() if k != "custom_text"})
    with torch.device("meta"):
        model = create_eva_model(config)
    to_empty(model, torch.device("cpu"))
    reset_parameters(model)
    state = OPEN_CLIP.state_dict_to_open_clip(dict(model.state_dict()), config)
    for key, tensor in reference.visual.state_dict().items():
        value = state[f"visual.{key}"]
        assert isinstance(value, Tensor)
        spread = float(tensor.std())
        if spread == 0.0:
            assert torch.equal(value, tensor), key
        else:
            close = 0.15 if tensor.numel() >= 512 else 0.6
            assert float(value.std()) == pytest.approx(spread, rel=close), key
