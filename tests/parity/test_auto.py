"""Wrapped models give what transformers' own give, are written as they were, and say what does not fit."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import transformers
from fairseq2.models import ModelFamily
from fairseq2.nn.utils.module import reset_non_persistent_buffers, to_empty
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.nn.functional import normalize

from vembed_fs2.embedding.head import ImageHeadConfig, pool
from vembed_fs2.embedding.model import DenseConfig, EncoderBatch, HeadConfig, Pooling
from vembed_fs2.errors import ConfigError, ModelLoadError
from vembed_fs2.models.auto import AutoCheckpointFormat, AutoEmbeddingModel, AutoModelConfig, create_auto_model
from vembed_fs2.models.family import config_errors
from vembed_fs2.resolver import get_resolver

from .auto_models import BOTH, IMAGE, TEXT, VOCAB, create_reference, create_texts, hf_configs

FORMAT = AutoCheckpointFormat()

POOLINGS: tuple[Pooling, ...] = ("cls", "mean", "last", "max")

# The class token of XLNet is its last one.
LAST = {"gemma", "gpt2", "llama", "qwen2", "xlnet"}


def create_pair(
    hf_config: dict[str, Any], seed: int = 0, head: HeadConfig | None = None
) -> tuple[Any, AutoEmbeddingModel, AutoModelConfig]:
    """transformers' model, and ours with the same weights."""
    reference = create_reference(hf_config, seed)
    config = FORMAT.from_hf_config(hf_config, head=head, keys=frozenset(reference.state_dict()))
    assert config_errors(config) == []
    model = create_auto_model(config).eval()
    model.load_state_dict(FORMAT.from_hf_state_dict(dict(reference.state_dict()), config))
    return reference, model, config


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())


def embed(model: AutoEmbeddingModel, batch: EncoderBatch) -> Tensor:
    with torch.no_grad():
        return model(batch).values


@settings(max_examples=48)
@given(hf_configs(TEXT), st.sampled_from(POOLINGS), st.integers(0, 1000))
def test_texts_equal_transformers(hf_config: dict[str, Any], pooling: Pooling, seed: int) -> None:
    reference, model, _ = create_pair(hf_config, seed, HeadConfig(pooling=pooling))
    ids, mask = create_texts(reference.config.pad_token_id or 0)
    with torch.no_grad():
        states = reference(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    values = embed(model, EncoderBatch.of_text(ids, mask))
    assert difference(values, pool(states, mask, pooling)) <= 1e-6
    assert model.embedding_dim == values.size(1)
    for row in range(len(ids)):
        alone = embed(model, EncoderBatch.of_text(ids, mask).select([row]))[0]
        assert difference(normalize(alone, dim=0), normalize(values[row], dim=0)) <= 2e-6


@settings(max_examples=30)
@given(hf_configs(IMAGE), st.integers(0, 1000))
def test_images_equal_transformers(hf_config: dict[str, Any], seed: int) -> None:
    reference, model, config = create_pair(hf_config, seed)
    pixels = torch.randn(3, reference.config.num_channels, hf_config["image_size"], hf_config["image_size"])
    with torch.no_grad():
        output = reference(pixel_values=pixels)
    expected = getattr(output, "pooler_output", None)
    assert config.image_head is not None
    if expected is None:
        has_class_token = config.image_head.pooling == "cls"
        assert has_class_token == any("cls_token" in name for name, _ in reference.named_parameters())
        expected = output.last_hidden_state[:, 0] if has_class_token else output.last_hidden_state.mean(1)
    else:
        assert config.image_head.pooling == "pooler"
    values = embed(model, EncoderBatch.of_images(pixels))
    assert difference(values, expected.flatten(1)) <= 1e-6
    assert model.embedding_dim == values.size(1)
    alone = embed(model, EncoderBatch.of_images(pixels[:1]))
    assert difference(normalize(alone), normalize(values[:1])) <= 2e-6


def text_features(reference: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """What the whole model makes of texts: a function for texts alone is broken in ChineseCLIP of transformers 4.57."""
    size = reference.config.vision_config.image_size
    output = reference(input_ids=ids, attention_mask=mask.long(), pixel_values=torch.zeros(1, 3, size, size))
    return output.text_embeds  # type: ignore[no-any-return]


@settings(max_examples=30)
@given(hf_configs(BOTH), st.integers(0, 1000))
def test_dual_encoders_equal_transformers(hf_config: dict[str, Any], seed: int) -> None:
    reference, model, config = create_pair(hf_config, seed)
    size = hf_config["vision_config"]["image_size"]
    pixels = torch.randn(3, 3, size, size)
    ids, mask = create_texts(reference.config.text_config.pad_token_id)
    with torch.no_grad():
        text = text_features(reference, ids, mask)
        image = reference.get_image_features(pixel_values=pixels)
    assert difference(normalize(embed(model, EncoderBatch.of_text(ids, mask))), text) <= 1e-6
    assert difference(embed(model, EncoderBatch.of_images(pixels)), image) <= 1e-6
    for batch, expected in ((EncoderBatch.of_text(ids, mask), text), (EncoderBatch.of_images(pixels), image)):
        for row in range(batch.num_rows):
            alone = embed(model, batch.select([row]))[0]
            assert difference(normalize(alone, dim=0), normalize(expected[row], dim=0)) <= 2e-6
    assert model.embedding_dim == text.size(1)
    assert (config.head, config.image_head) == (None, None)
    if hf_config["model_type"] == "align":  # It divides by a temperature, which is no logarithm.
        assert model.logit_scale is None
        return
    assert model.logit_scale is not None
    assert model.logit_scale.shape == (1,)
    assert model.logit_scale.item() == reference.logit_scale.item()


@settings(max_examples=36)
@given(hf_configs({**TEXT, **IMAGE, **BOTH}), st.sampled_from((torch.float32, torch.bfloat16)))
def test_round_trip_is_exact(hf_config: dict[str, Any], dtype: torch.dtype) -> None:
    reference, model, config = create_pair(hf_config)
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in reference.state_dict().items()}
    ours = FORMAT.from_hf_state_dict(dict(state), config)
    assert ours.keys() == model.state_dict().keys()
    assert FORMAT.from_hf_state_dict(dict(ours), config).keys() == ours.keys()
    back = FORMAT.to_hg_state_dict(dict(ours), config)
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        value = back[key]
        assert isinstance(value, Tensor)
        assert (value.dtype, value.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(value, tensor), key
    exported = FORMAT.to_hg_config(config)
    assert exported.arch == type(reference).__name__
    again = getattr(sys.modules["transformers"], exported.kls_name)()
    for name, value in exported.data.items():
        setattr(again, name, value)
    loading = {"architectures", "dtype", "torch_dtype", "transformers_version"}
    # Some models change their own configuration.
    before, after = config.backbone().config.to_dict(), again.to_dict()
    keys = (before.keys() | after.keys()) - loading
    assert {k: after.get(k) for k in keys} == {k: before.get(k) for k in keys}


@pytest.mark.parametrize("model_type", TEXT)
def test_decoders_pool_the_last_token_where_nothing_says_otherwise(model_type: str) -> None:
    config = FORMAT.from_hf_config({"model_type": model_type})
    assert config.head == HeadConfig(pooling="last" if model_type in LAST else "mean")


ELECTRA = {
    "model_type": "electra", "vocab_size": VOCAB, "embedding_size": 8, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 24,
}  # fmt: skip

DEIT = {
    "model_type": "deit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "image_size": 8, "patch_size": 4,
}  # fmt: skip


def test_a_vector_per_token() -> None:
    reference, model, _ = create_pair(ELECTRA, head=HeadConfig(pooling="none"))
    ids, mask = create_texts(0)
    with torch.no_grad():
        output = model(EncoderBatch.of_text(ids, mask))
        states = reference(ids, attention_mask=mask.long()).last_hidden_state
    assert model.similarity == "maxsim"
    assert output.mask is not None
    assert torch.equal(output.mask, mask)
    assert difference(output.values, states) <= 1e-6


def test_dense_layers_follow_the_pooling() -> None:
    dense = [DenseConfig(input_dim=16, output_dim=6, activation="tanh")]
    config = AutoModelConfig(hf_config=dict(ELECTRA), head=HeadConfig(dense=dense))
    model = create_auto_model(config)
    assert model.embedding_dim == 6
    assert "head.dense.0.weight" in dict(model.named_parameters())
    config.head = HeadConfig(dense=[DenseConfig(input_dim=7, output_dim=6)])
    with pytest.raises(ConfigError, match=r"`head.dense\[0\].input_dim` must be 16"):
        create_auto_model(config)


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls_mean", "gem", "none"])
def test_image_poolings_leave_out_what_is_no_patch(pooling: Any) -> None:
    """DeiT has a class token and one for distillation."""
    reference, model, config = create_pair(DEIT)
    config.image_head = ImageHeadConfig(pooling=pooling)
    other = create_auto_model(config).eval()
    other.load_state_dict(model.state_dict())
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        states = reference(pixels).last_hidden_state
    patches = states[:, 2:]
    expected = {
        "cls": states[:, 0],
        "mean": patches.mean(1),
        "cls_mean": torch.cat([states[:, 0], patches.mean(1)], dim=1),
        "gem": patches.clamp(min=1e-6).pow(3).mean(1).pow(1 / 3),
        "none": patches,
    }[pooling]
    assert difference(embed(other, EncoderBatch.of_images(pixels)), expected) <= 1e-5
    assert other.embedding_dim == expected.size(-1)


def test_a_pooler_that_the_checkpoint_lacks_is_left_out() -> None:
    state = {k: v for k, v in create_reference(DEIT).state_dict().items() if not k.startswith("pooler.")}
    config = FORMAT.from_hf_config(DEIT, keys=frozenset(state))
    assert (config.pooler, config.image_head) == (False, ImageHeadConfig(pooling="cls"))
    ours = FORMAT.from_hf_state_dict(dict(state), config)
    assert FORMAT.to_hg_state_dict(ours, config).keys() == state.keys()


def test_what_no_embedding_depends_on_is_frozen() -> None:
    values = {"model_type": "albert", "vocab_size": VOCAB, "hidden_size": 16, "num_attention_heads": 2}
    model = create_auto_model(FORMAT.from_hf_config({**values, "intermediate_size": 16, "num_hidden_layers": 2}))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"wrapped.pooler.weight", "wrapped.pooler.bias"}
    model(EncoderBatch.of_text(torch.randint(5, VOCAB, (2, 6)))).values.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == frozen


@pytest.mark.parametrize(
    ("hf_config", "stacks"),
    [
        (ELECTRA, ["encoder.layer"]),
        (DEIT, ["encoder.layer"]),
        ({"model_type": "chinese_clip"}, ["text_model.encoder.layer", "vision_model.encoder.layers"]),
        ({"model_type": "albert"}, ["encoder.albert_layer_groups"]),
        ({"model_type": "swin"}, ["encoder.layers"]),
        ({"model_type": "convnext"}, [f"encoder.stages.{i}.layers" for i in range(4)]),
    ],
)
def test_layers_are_found(hf_config: dict[str, Any], stacks: list[str]) -> None:
    small = {"vocab_size": VOCAB, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    sizes = {
        "embed_dim": 6,
        "num_heads": [1, 1, 1, 1],
        "hidden_sizes": [4, 4, 4, 4],
        "image_size": 32,
        "patch_size": 1,
        "window_size": 2,
        "depths": [1] * 4,
    }
    if hf_config["model_type"] == "chinese_clip":
        hf_config = {**hf_config, "text_config": small, "vision_config": {**small, "image_size": 64}}
    elif len(hf_config) == 1:
        hf_config = {**small, **sizes, **hf_config}
    model = create_auto_model(FORMAT.from_hf_config(hf_config))
    names = {id(module): name for name, module in model.wrapped.named_modules()}
    assert [names[id(stack)] for stack in model.layer_stacks()] == stacks


def test_batch_normalisation_does_not_look_at_the_batch() -> None:
    values = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
    _, model, _ = create_pair({**values, "layer_type": "basic"})
    pixels = torch.randn(3, 3, 32, 32)
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    together = model(EncoderBatch.of_images(pixels)).values
    alone = model(EncoderBatch.of_images(pixels[:1])).values
    assert difference(normalize(alone), normalize(together[:1])) <= 2e-6
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_adapters_are_injected_into_wrapped_layers() -> None:
    _, model, _ = create_pair(ELECTRA)
    ids, mask = create_texts(0)
    before = embed(model, EncoderBatch.of_text(ids, mask))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["query", "value"]), model)
    assert difference(embed(model, EncoderBatch.of_text(ids, mask)), before) == 0.0
    model(EncoderBatch.of_text(ids, mask)).values.square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(trained) == 8
    assert all("lora_" in name for name in trained)


def test_layers_are_compiled() -> None:
    _, model, _ = create_pair(ELECTRA)
    batch = EncoderBatch.of_text(*create_texts(0))
    before = embed(model, batch)
    get_resolver().resolve(ModelFamily, key="vembed_auto").compile(model, backend="eager")
    assert difference(embed(model, batch), before) <= 1e-6


@pytest.mark.parametrize(
    ("hf_config", "reason"),
    [
        ({"model_type": "bart"}, "BartModel: it is an encoder-decoder"),
        ({"model_type": "whisper"}, "encoder-decoder"),
        ({"model_type": "wav2vec2"}, "its inputs are `input_values`"),
        ({"model_type": "clap"}, "its inputs are `input_features`, which are sound"),
        ({"model_type": "vilt"}, "it reads texts and images in one sequence"),
        ({"model_type": "llava"}, "it reads texts and images in one sequence"),
        ({"model_type": "big_bird"}, "`attention_type` is 'block_sparse'"),
        ({"model_type": "electra", "quantization_config": {"quant_method": "gptq"}}, "`quantization_config`"),
        ({"model_type": "electra", "hidden_size": "big"}, "ElectraModel cannot be made of this config.json"),
        ({"model_type": "t5", "feed_forward_proj": "gated-gelu-gelu"}, "not a valid T5Config"),
        ({"model_type": "elektra"}, "'elektra' is not known to transformers"),
        ({"model_type": "vit_gpt"}, "is not known to transformers"),
        ({}, "`model_type`"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(hf_config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelLoadError, match=reason):
        create_auto_model(FORMAT.from_hf_config(hf_config))


SMALL = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("hf_config", "reason"),
    [
        ({**SMALL, "model_type": "fnet"}, "depends on the padding"),
        ({**SMALL, "model_type": "dpr"}, r"gives no states of tokens .* set another `head.pooling`"),
        ({"model_type": "funnel", "vocab_size": VOCAB, "architectures": ["FunnelBaseModel"]}, "states for 8 tokens"),
    ],
)
def test_what_cannot_give_one_embedding_per_text_is_refused(hf_config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelLoadError, match=reason):
        create_auto_model(FORMAT.from_hf_config(hf_config))


def test_towers_of_different_sizes_are_refused() -> None:
    vision = {"image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 16}
    align = {"model_type": "align", "text_config": SMALL, "vision_config": {**vision, "num_hidden_layers": 4}}
    with pytest.raises(ModelLoadError, match="16 values per text and 32 per image"):
        create_auto_model(FORMAT.from_hf_config({**align, "projection_dim": 16}))


def test_validation_names_what_is_wrong() -> None:
    wrong = AutoModelConfig(hf_config=dict(ELECTRA), image_head=ImageHeadConfig())
    assert "`image_head` must be null" in config_errors(wrong)[0]
    wrong = AutoModelConfig(hf_config=dict(DEIT), head=HeadConfig())
    assert "`head` must be null" in config_errors(wrong)[0]
    assert "`hf_config`" in config_errors(AutoModelConfig())[0]


def change(state: dict[str, Any], **tensors: Tensor | None) -> dict[str, Any]:
    state = {k: v for k, v in state.items() if k not in tensors}
    return state | {k: v for k, v in tensors.items() if v is not None}


def test_heads_of_pretraining_are_left_out_and_other_tensors_are_not() -> None:
    config = FORMAT.from_hf_config({**ELECTRA, "architectures": ["ElectraForPreTraining"]})
    state = dict(transformers.ElectraForPreTraining(transformers.ElectraConfig(**ELECTRA)).state_dict())
    assert any(key.startswith("discriminator_predictions.") for key in state)
    ours = FORMAT.from_hf_state_dict(state, config)
    assert torch.equal(
        ours["wrapped.embeddings.word_embeddings.weight"], state["electra.embeddings.word_embeddings.weight"]
    )  # type: ignore[arg-type]
    with pytest.raises(ModelLoadError, match="does not know: strange"):
        FORMAT.from_hf_state_dict({**state, "strange": torch.zeros(1)}, config)
    plain = FORMAT.from_hf_config(ELECTRA)
    with pytest.raises(ModelLoadError, match="does not know: discriminator_predictions"):
        FORMAT.from_hf_state_dict(state, plain)


def test_missing_and_misshapen_tensors_are_errors() -> None:
    reference, _, config = create_pair(ELECTRA)
    state = dict(reference.state_dict())
    name = "encoder.layer.1.output.dense.weight"
    with pytest.raises(ModelLoadError, match=f"lacks tensors of transformers' ElectraModel: {name}"):
        FORMAT.from_hf_state_dict(change(state, **{name: None}), config)
    with pytest.raises(ModelLoadError, match="does not fit transformers' ElectraModel"):
        FORMAT.from_hf_state_dict(change(state, **{name: torch.zeros(3, 4)}), config)
    other = {f"other.{key}": value for key, value in state.items()}
    with pytest.raises(ModelLoadError, match=r"electra|ElectraModel"):
        FORMAT.from_hf_state_dict(other, config)


@settings(max_examples=36)
@given(hf_configs({**TEXT, **IMAGE, **BOTH}))
def test_a_model_on_the_meta_device_is_wrapped_as_one_with_weights(hf_config: dict[str, Any]) -> None:
    """Checkpoints are loaded into the former."""
    config = FORMAT.from_hf_config(hf_config)
    model = create_auto_model(config)
    with torch.device("meta"):
        empty = create_auto_model(config)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = dict(empty.named_parameters(remove_duplicate=False))[name]
        assert (other.is_meta, other.shape, other.requires_grad) == (True, parameter.shape, parameter.requires_grad)
    # What is shared is shared there, too.
    assert dict(empty.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert (empty.embedding_dim, empty.similarity) == (model.embedding_dim, model.similarity)
    assert len(empty.layer_stacks()) == len(model.layer_stacks())

    to_empty(empty, torch.device("cpu"))
    empty.load_state_dict(model.state_dict())
    reset_non_persistent_buffers(empty)
    for name, buffer in model.named_buffers():
        assert torch.equal(dict(empty.named_buffers())[name], buffer), name
