"""Poolings of Vision Transformers, checkpoints of models for other tasks, and options that cannot be."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig

from tests.parity.test_vit import FORMAT, MODELS, create_pair, images, small
from vembed_fs2.embedding.head import ImageHeadConfig
from vembed_fs2.embedding.learned import LearnedPart
from vembed_fs2.embedding.model import DenseConfig, EncoderBatch, HeadConfig
from vembed_fs2.errors import DataError, ModelLoadError
from vembed_fs2.models.family import config_errors
from vembed_fs2.models.vit import VitConfig, create_vit_model


@pytest.mark.parametrize(
    ("model_type", "head", "dim"),
    [
        ("dinov2", ImageHeadConfig(pooling="mean"), 16),
        ("dinov2_with_registers", ImageHeadConfig(pooling="mean"), 16),
        ("dinov2_with_registers", ImageHeadConfig(pooling="cls_mean"), 32),
        ("dinov3_vit", ImageHeadConfig(pooling="gem", gem_p=2.0), 16),
        ("dinov3_vit", ImageHeadConfig(pooling="topk", top_k=3), 16),
        ("vit", ImageHeadConfig(pooling="topk", top_k=99), 16),
        ("dinov3_vit", ImageHeadConfig(pooling="none"), 16),
        ("dinov2", ImageHeadConfig(pooling="none", top_k=2), 16),
    ],
)
def test_poolings(model_type: str, head: ImageHeadConfig, dim: int) -> None:
    _, plain, config = create_pair(small(model_type))
    config.head = head
    model = create_vit_model(config).eval()
    model.load_state_dict(plain.state_dict())
    batch = EncoderBatch.of_images(images(config, 4, 16, 12))
    with torch.no_grad():
        states = plain.encode_patches(batch)
        output = model(batch)
    expected = _pool_by_hand(states, 1 + config.num_registers, head)
    assert model.embedding_dim == dim == output.values.size(-1)
    torch.testing.assert_close(output.values, expected, rtol=1e-5, atol=1e-6)
    if head.pooling == "none":
        assert model.similarity == "maxsim"
        assert output.mask is not None
        assert output.mask.all()
        assert output.mask.shape == output.values.shape[:2]
    else:
        assert (model.similarity, output.mask) == ("cosine", None)


def _pool_by_hand(states: Tensor, prefix: int, head: ImageHeadConfig) -> Tensor:
    rows = []
    for image in states:
        first, patches = image[0], image[prefix:]
        if head.top_k is not None:
            scores = [float(torch.dot(p, first) / (p.norm() * first.norm())) for p in patches]
            best = sorted(range(len(scores)), key=lambda i: -scores[i])[: head.top_k]
            patches = patches[sorted(best)]
        mean = patches.sum(0) / len(patches)
        gem = (patches.clamp(min=1e-6) ** head.gem_p).mean(0) ** (1 / head.gem_p)
        by_name = {"mean": mean, "topk": mean, "gem": gem, "cls_mean": torch.cat([first, mean]), "none": patches}
        rows.append(by_name[head.pooling])
    return torch.stack(rows)


def test_all_poolings_can_be_trained() -> None:
    for pooling in ("cls", "mean", "cls_mean", "gem", "topk", "pooler", "none"):
        head = ImageHeadConfig(pooling=pooling, top_k=2 if pooling == "topk" else None)
        config = VitConfig(
            model_dim=16, num_layers=1, num_attn_heads=2, ffn_inner_dim=24, image_size=8, patch_size=4, head=head,
            pooler=True, pooler_dim=5,
        )  # fmt: skip
        assert not config_errors(config)
        model = create_vit_model(config)
        model(EncoderBatch.of_images(images(config))).values.square().sum().backward()
        unused = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
        assert not unused, pooling


def test_rows_of_vectors_are_single_images() -> None:
    _, _, config = create_pair(small("dinov2"))
    config.head = ImageHeadConfig(pooling="none")
    model = create_vit_model(config)
    batch = EncoderBatch.of_images(images(config, 2))
    batch.num_rows, batch.images.rows = 1, torch.tensor([0, 0])
    with pytest.raises(DataError, match="one image"):
        model(batch)


def test_images_smaller_than_a_patch_are_an_error() -> None:
    _, model, config = create_pair(small("dinov3_vit"))
    with pytest.raises(DataError, match="at least 4 x 4 pixels, but have 8 x 3"):
        model(EncoderBatch.of_images(images(config, 1, 8, 3)))


PREFIXES = {
    "vit": ("vit.", {"classifier.weight": torch.zeros(2, 16), "vit.embeddings.mask_token": torch.zeros(1, 1, 16)}),
    "vit_mae": ("vit.", {"decoder.decoder_embed.weight": torch.zeros(2), "decoder.mask_token": torch.zeros(1)}),
    "dinov2": ("dinov2.", {"classifier.bias": torch.zeros(2)}),
    "dinov2_with_registers": ("dinov2_with_registers.", {"classifier.bias": torch.zeros(2)}),
}


@pytest.mark.parametrize("model_type", PREFIXES)
def test_models_for_other_tasks_are_read_and_unknown_tensors_stay(model_type: str) -> None:
    reference, model, config = create_pair(small(model_type))
    prefix, others = PREFIXES[model_type]
    state = {prefix + key: value for key, value in reference.state_dict().items()} | others
    assert FORMAT.from_hf_config(reference.config.to_dict(), keys=frozenset(state)) == config
    model.load_state_dict(FORMAT.from_hf_state_dict(dict(state), config))
    state["embeddings.extra"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"embeddings\.extra"):
        model.load_state_dict(FORMAT.from_hf_state_dict(dict(state), config))


def test_pretraining_models_of_transformers_are_read() -> None:
    torch.manual_seed(0)
    values = small("vit_mae") | {"decoder_hidden_size": 8, "decoder_num_attention_heads": 2}
    values |= {"decoder_num_hidden_layers": 1, "decoder_intermediate_size": 8}
    hf = AutoConfig.for_model(**values)
    reference = transformers.ViTMAEForPreTraining(hf)
    config = FORMAT.from_hf_config(hf.to_dict(), keys=frozenset(reference.state_dict()))
    model = create_vit_model(config)
    model.load_state_dict(FORMAT.from_hf_state_dict(dict(reference.state_dict()), config))
    assert model.frontend.positions is not None
    assert torch.equal(model.frontend.positions.weight, reference.vit.embeddings.position_embeddings[0])
    assert config.kept["mask_ratio"] == 0.75


def test_vit_without_pooler() -> None:
    reference = transformers.ViTModel(transformers.ViTConfig(**small("vit")), add_pooling_layer=False)
    state = dict(reference.state_dict())
    config = FORMAT.from_hf_config(reference.config.to_dict(), keys=frozenset(state))
    assert not config.pooler
    create_vit_model(config).load_state_dict(FORMAT.from_hf_state_dict(state, config))
    assert FORMAT.from_hf_config(reference.config.to_dict()).pooler


def test_state_dict_with_our_names_is_left_alone() -> None:
    _, model, config = create_pair(small("dinov2"))
    model.add_learned_parts([LearnedPart(name="logit_scale", mean=2.0)])
    state = dict(model.state_dict())
    assert FORMAT.from_hf_state_dict(state, config) is state
    assert "logit_scale" not in FORMAT.to_hg_state_dict(state, config)


@pytest.mark.parametrize(
    ("model_type", "field", "value"),
    [
        ("vit", "hidden_act", "prelu"),
        ("vit", "pooler_act", "no_such"),
        ("vit", "image_size", [8, 8, 8]),
        ("vit", "image_size", "8"),
        ("vit", "patch_size", 9),
        ("vit", "num_attention_heads", 7),
        ("vit", "qkv_bias", 1),
        ("vit", "pruned_heads", {"0": [1]}),
        ("vit_mae", "quantization_config", {"quant_method": "bitsandbytes"}),
        ("vit_mae", "layer_norm_eps", None),
        ("vit_mae", "hidden_size", 18),
        ("dinov2", "image_size", [8, 16]),
        ("dinov2", "patch_size", [4, 2]),
        ("dinov2", "mlp_ratio", "4"),
        ("dinov2", "drop_path_rate", 1.0),
        ("dinov2_with_registers", "num_register_tokens", -1),
        ("dinov3_vit", "rope_theta", 0.0),
        ("dinov3_vit", "pos_embed_jitter", 0.5),
        ("dinov3_vit", "hidden_size", 12),
        ("dinov3_vit", "image_size", [8, 16]),
    ],
)
def test_unsupported_options_are_refused_by_name(model_type: str, field: str, value: object) -> None:
    with pytest.raises(ModelLoadError, match=f"`{field}`"):
        FORMAT.from_hf_config(small(model_type, **{field: value}))


def test_modules_of_sentence_transformers_are_refused() -> None:
    head = HeadConfig(dense=[DenseConfig(input_dim=8, output_dim=8)])
    with pytest.raises(ModelLoadError, match="sentence-transformers"):
        FORMAT.from_hf_config({"model_type": "vit"}, head=head)


def test_absent_fields_take_the_defaults_of_transformers() -> None:
    assert FORMAT.from_hf_config({"model_type": "vit", "encoder_stride": 16}) == VitConfig(
        pooler=True, pooler_dim=768, kept={"encoder_stride": 16}
    )
    config = FORMAT.from_hf_config({"model_type": "dinov3_vit"})
    assert (config.rope_rescale, config.key_bias, config.num_registers) == (2.0, False, 0)
    assert FORMAT.from_hf_config({"model_type": "vit_mae"}).head == ImageHeadConfig(pooling="mean")


def test_every_error_of_a_config_is_listed() -> None:
    config = VitConfig(
        model_dim=30, num_attn_heads=4, dropout_p=2.0, activation="no_such", num_layers=0, patch_size=500,
        drop_path_p=0.1, key_bias=False, pooler_dim=0,
    )  # fmt: skip
    config.head = ImageHeadConfig(pooling="pooler", top_k=3)
    errors = config_errors(config)
    words = (
        "num_layers", "`model_dim` must be a multiple", "dropout_p", "no_such", "head.pooling", "top_k",
        "drop_path_p", "key_bias", "image_size", "pooler_dim",
    )  # fmt: skip
    for word in words:
        assert any(word in error for error in errors), word


@pytest.mark.parametrize(
    ("head", "word"),
    [
        (ImageHeadConfig(pooling="topk"), "top_k"),
        (ImageHeadConfig(pooling="none", top_k=0), "top_k"),
        (ImageHeadConfig(pooling="gem", gem_p=0.0), "gem_p"),
        (ImageHeadConfig(pooling="most"), "pooling"),  # type: ignore[arg-type]
    ],
)
def test_heads_that_cannot_be_are_errors(head: ImageHeadConfig, word: str) -> None:
    assert any(f"`head.{word}`" in error for error in config_errors(VitConfig(head=head)))


@pytest.mark.parametrize("model_type", MODELS)
def test_model_says_what_it_is(model_type: str) -> None:
    _, model, config = create_pair(small(model_type))
    assert (model.embedding_dim, model.max_text_length, model.normalize) == (16, None, True)
    assert model.tokens_per_image == 4 + 1 + config.num_registers
    assert model.modalities == {"image"}
    assert [len(stack) for stack in model.layer_stacks()] == [2]
    assert not list(model.named_buffers())  # FSDP2 would not shard them.
