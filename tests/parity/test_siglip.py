"""SigLIP equals transformers' ``SiglipModel`` and ``Siglip2Model`` on the same weights, whatever the options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vembed_fs2.embedding.model import EncoderBatch
from vembed_fs2.errors import DataError
from vembed_fs2.models.siglip import SiglipConfig
from vembed_fs2.models.siglip import SiglipModel as Model

from .dropout_masks import assert_same_dropout
from .siglip import (
    FORMAT,
    GENERATIONS,
    assert_round_trip,
    create_images,
    create_pair,
    create_patches,
    create_texts,
    difference,
    hf_configs,
    image_features,
    padded_patches,
    small_config,
    text_configs,
    vision_configs,
)


def assert_texts_equal(reference: Any, model: Model, config: SiglipConfig) -> None:
    ids, mask = create_texts(config.text)
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask)
        assert difference(model(EncoderBatch.of_text(ids, mask)).values, expected) <= 1e-5
        # Padding of another kind counts where the width is fixed.
        other = EncoderBatch.of_text(torch.where(mask, ids, 7), mask)
        other.text.fixed_width = True
        expected = reference(other.text.input_ids, attention_mask=mask)
        assert difference(model(other).values, expected) <= 1e-5
        for width in (ids.size(1), 3):
            expected = reference(ids[:, :width])
            assert difference(model(EncoderBatch.of_text(ids[:, :width])).values, expected) <= 1e-5


@settings(max_examples=40)
@given(hf_configs("siglip"), st.integers(0, 1000))
def test_embeddings_equal_transformers(hf_config: dict[str, Any], seed: int) -> None:
    reference, model, config = create_pair(hf_config, seed)
    assert_texts_equal(reference.get_text_features, model, config)
    pixels = create_images(config.vision)
    with torch.no_grad():
        images = model(EncoderBatch.of_images(pixels))
        assert difference(images.values, reference.get_image_features(pixels)) <= 1e-5
    assert images.logit_scale is not None
    assert images.logit_bias is not None
    assert torch.equal(images.logit_scale, reference.logit_scale)
    assert torch.equal(images.logit_bias, reference.logit_bias)


@settings(max_examples=40)
@given(hf_configs("siglip"), st.integers(1, 30), st.integers(1, 30))
def test_other_image_sizes_equal_transformers(hf_config: dict[str, Any], extra_height: int, extra_width: int) -> None:
    reference, model, config = create_pair(hf_config)
    assert config.vision is not None
    patch = config.vision.patch_size
    pixels = torch.randn(2, config.vision.num_channels, patch + extra_height, patch + extra_width)
    with torch.no_grad():
        expected = reference.get_image_features(pixels, interpolate_pos_encoding=True)
        assert difference(model.encode_image(EncoderBatch.of_images(pixels)), expected) <= 1e-5


@settings(max_examples=40)
@given(
    hf_configs("siglip2"),
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5),
    st.integers(0, 3),
    st.integers(0, 1000),
)
def test_naflex_equals_transformers(
    hf_config: dict[str, Any], shapes: list[tuple[int, int]], extra: int, seed: int
) -> None:
    reference, model, config = create_pair(hf_config, seed)
    assert config.naflex
    assert_texts_equal(reference.get_text_features, model, config)
    batch = create_patches(config.vision, shapes, extra)
    with torch.no_grad():
        images = model(batch)
        assert difference(images.values, image_features(reference, batch)) <= 1e-5
    assert images.logit_bias is not None
    assert torch.equal(images.logit_bias, reference.logit_bias)


@settings(max_examples=30)
@given(st.sampled_from(GENERATIONS), st.data())
def test_text_models_equal_transformers(generation: str, data: st.DataObject) -> None:
    hf_config = {"model_type": f"{generation}_text_model", **data.draw(text_configs(None))}
    reference, model, config = create_pair(hf_config)
    assert model.modalities == {"text"}
    assert model.embedding_dim == reference.config.projection_size
    assert_texts_equal(lambda *args, **kwargs: reference(*args, **kwargs).pooler_output, model, config)
    assert_round_trip(reference, config, torch.float32)
    with pytest.raises(TypeError, match="no image encoder"):
        model(EncoderBatch.of_images(torch.zeros(1, 3, 8, 8)))


@settings(max_examples=30)
@given(st.sampled_from(GENERATIONS), st.data())
def test_vision_models_equal_transformers(generation: str, data: st.DataObject) -> None:
    hf_config = {"model_type": f"{generation}_vision_model", **data.draw(vision_configs(generation))}
    reference, model, config = create_pair(hf_config)
    assert model.modalities == {"image"}
    with torch.no_grad():
        if config.naflex:
            batch = create_patches(config.vision, [(2, 3), (1, 1)])
            expected = reference(**padded_patches(batch))
        else:
            batch = EncoderBatch.of_images(create_images(config.vision))
            expected = reference(batch.images.values)
        assert difference(model(batch).values, expected.pooler_output) <= 1e-5
    assert_round_trip(reference, config, torch.float32)


@pytest.mark.parametrize("pad", [0, 1, 9])
def test_padding_that_is_masked_does_not_change_the_embedding(pad: int) -> None:
    _, model, _ = create_pair(small_config())
    text = torch.tensor([[7, 8, 50, 1]])
    with torch.no_grad():
        alone = model.encode_text(EncoderBatch.of_text(text, torch.ones_like(text)))
        for width in (5, 9, 12):
            right = torch.nn.functional.pad(text, (0, width - 4), value=pad)
            left = torch.nn.functional.pad(text, (width - 4, 0), value=pad)
            mask = torch.arange(width)[None] < 4
            for ids, own in ((right, mask), (left, mask.flip(1))):
                torch.testing.assert_close(
                    model.encode_text(EncoderBatch.of_text(ids, own)), alone, rtol=1e-6, atol=1e-6
                )


@torch.no_grad()
def test_embedding_is_independent_of_the_batch() -> None:
    _, model, config = create_pair(small_config())
    ids, mask = create_texts(config.text, 6)
    fixed = EncoderBatch.of_text(torch.where(mask, ids, 9), mask)
    fixed.text.fixed_width = True
    images = EncoderBatch.of_images(create_images(config.vision, 6))
    for batch in (EncoderBatch.of_text(ids, mask), EncoderBatch.of_text(ids), fixed, images):
        together = model(batch).values
        for row in range(6):
            torch.testing.assert_close(model(batch.select([row])).values[0], together[row], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_naflex_image_is_independent_of_the_batch_and_of_padding() -> None:
    _, model, config = create_pair(small_config("siglip2"))
    batch = create_patches(config.vision, [(2, 3), (4, 4), (1, 5), (3, 2), (1, 1)], extra=4)
    together = model(batch).values
    for row, length in enumerate((6, 16, 5, 6, 1)):
        alone = batch.select([row])
        assert alone.profile().patches == [length]
        assert alone.images is not None
        assert alone.images.values.shape == (length, 48)
        torch.testing.assert_close(model(alone).values[0], together[row], rtol=1e-6, atol=1e-6)
    order = [3, 0, 4]
    torch.testing.assert_close(model(batch.select(order)).values, together[order], rtol=1e-6, atol=1e-6)
    parts = EncoderBatch.concat([batch.select([2, 4]), batch.select([1])])
    assert parts.profile().patches == [5, 1, 16]
    torch.testing.assert_close(model(parts).values, together[[2, 4, 1]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_gradients_equal_transformers(generation: str) -> None:
    reference, model, config = create_pair(small_config(generation))
    ids, mask = create_texts(config.text)
    reference.get_text_features(ids, attention_mask=mask).square().sum().backward()
    model.encode_text(EncoderBatch.of_text(ids, mask)).square().sum().backward()
    if config.naflex:
        batch = create_patches(config.vision, [(2, 3), (4, 4), (1, 1)])
        image_features(reference, batch).square().sum().backward()
    else:
        batch = EncoderBatch.of_images(torch.randn(3, 3, 12, 8))
        reference.get_image_features(batch.images.values, interpolate_pos_encoding=True).square().sum().backward()
    model.encode_image(batch).square().sum().backward()
    expected = {k: p.grad for k, p in reference.named_parameters() if p.grad is not None}
    ours = FORMAT.to_hg_state_dict({k: p.grad for k, p in model.named_parameters() if p.grad is not None}, config)
    assert ours.keys() == expected.keys()
    for key, grad in expected.items():
        value = ours[key]
        assert isinstance(value, Tensor)
        assert difference(value, grad) <= 1e-5 * max(1.0, float(grad.abs().max())), key


@pytest.mark.parametrize("modality", ["text", "image"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_dropout_is_where_transformers_has_it(generation: str, modality: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, model, config = create_pair(small_config(generation, attention_dropout=0.4))
    for tower in (reference.text_model, reference.vision_model):
        tower.config._attn_implementation = "eager"
    if modality == "text":
        batch = EncoderBatch.of_text(create_texts(config.text)[0])
    elif config.naflex:
        batch = create_patches(config.vision, [(2, 3)] * 4)
    else:
        batch = EncoderBatch.of_images(create_images(config.vision, 4))

    def theirs() -> Tensor:
        if modality == "text":
            return reference.get_text_features(batch.text.input_ids)  # type: ignore[no-any-return]
        if config.naflex:
            return image_features(reference, batch)
        return reference.get_image_features(batch.images.values)  # type: ignore[no-any-return]

    assert_same_dropout(monkeypatch, reference, model, theirs, lambda: model(batch).values)


def test_what_does_not_fit_is_an_error() -> None:
    _, model, _ = create_pair(small_config())
    with pytest.raises(DataError, match="13 tokens, but the model takes at most 12"):
        model.encode_text(EncoderBatch.of_text(torch.full((1, 13), 5)))
    with pytest.raises(DataError, match="must be of shape"):
        model.encode_image(EncoderBatch.of_images(torch.zeros(1, 4, 48)))
    _, naflex, config = create_pair(small_config("siglip2"))
    with pytest.raises(DataError, match="cut into patches of 48 values"):
        naflex.encode_image(EncoderBatch.of_images(torch.zeros(1, 3, 8, 8)))
    batch = create_patches(config.vision, [(1, 2)])
    assert batch.images is not None
    batch.images.values = torch.zeros(2, 12)
    with pytest.raises(DataError, match="`patch_size` of the image processor"):
        naflex.encode_image(batch)
