"""ModernBERT against transformers: the same weights, the same outputs, the same files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fairseq2.models.transformer import NaiveSDPA, TorchSDPA, set_default_sdpa_factory
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vembed_fs2.embedding.model import EncoderBatch, HeadConfig, Pooling
from vembed_fs2.errors import ConfigError, ModelLoadError
from vembed_fs2.models.family import find_family
from vembed_fs2.models.modernbert import ModernBertCheckpointFormat, ModernBertConfig, create_modernbert_model

from .text_backbones import (
    ACTIVATIONS,
    LONG_TEXT,
    TEXTS,
    assert_dropout_equal,
    assert_embedder_equals,
    assert_gradients_equal,
    assert_independent_of_batch,
    assert_round_trip,
    build,
    load,
    make_hf,
    make_inputs,
    max_diff,
    reference_pool,
    write_bpe,
    write_folder,
)

FORMAT = ModernBertCheckpointFormat()

TINY = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "global_attn_every_n_layers": 2,
    "local_attention": 6,
    "pad_token_id": 0,
}


@st.composite
def hf_configs(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.integers(1, 4))
    vocab_size = draw(st.integers(20, 80))
    dropout = st.sampled_from([0.0, 0.2])
    return {
        "vocab_size": vocab_size,
        "hidden_size": heads * 2 * draw(st.integers(1, 5)),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_attention_heads": heads,
        "intermediate_size": draw(st.integers(1, 40)),
        "hidden_activation": draw(st.sampled_from(ACTIVATIONS)),
        "max_position_embeddings": draw(st.integers(12, 40)),
        "initializer_range": draw(st.sampled_from([0.02, 0.1])),
        "initializer_cutoff_factor": draw(st.sampled_from([None, 1.0, 2.0])),
        "norm_eps": draw(st.sampled_from([1e-7, 1e-5, 1e-2])),
        "norm_bias": draw(st.booleans()),
        "pad_token_id": draw(st.one_of(st.none(), st.integers(0, vocab_size - 1))),
        "global_rope_theta": draw(st.sampled_from([160000.0, 1000.0, 50.0])),
        "local_rope_theta": draw(st.sampled_from([None, 10000.0, 30.0])),
        "attention_bias": draw(st.booleans()),
        "global_attn_every_n_layers": draw(st.integers(1, 4)),
        "local_attention": draw(st.sampled_from([0, 1, 2, 5, 8, 128])),
        "embedding_dropout": draw(dropout),
        "attention_dropout": draw(dropout),
        "mlp_dropout": draw(dropout),
        "mlp_bias": draw(st.booleans()),
        "classifier_pooling": draw(st.sampled_from(["cls", "mean"])),
    }


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(
    config=hf_configs(),
    pooling=st.sampled_from(["cls", "mean", "max", "last"]),
    lengths=st.lists(st.sampled_from([1, 2, 3, 7, 12, 30, 150]), min_size=1, max_size=4),
    attention=st.sampled_from(["sdpa", "eager"]),
    seed=st.integers(0, 100),
)
@example(config=TINY, pooling="cls", lengths=[40, 1], attention="sdpa", seed=0)
@example(config=TINY, pooling="mean", lengths=[200, 129, 30], attention="sdpa", seed=0)
def test_equals_transformers(
    config: dict[str, Any], pooling: Pooling, lengths: list[int], attention: str, seed: int
) -> None:
    hf = make_hf("ModernBert", {**config, "attn_implementation": attention}, seed=seed)
    model = load(FORMAT, create_modernbert_model, hf, HeadConfig(pooling=pooling))
    ids, mask = make_inputs(config["vocab_size"], lengths, config.get("pad_token_id"))
    with torch.no_grad():
        expected = hf(ids, mask.long())[0]
        batch = EncoderBatch.of_text(ids, mask)
        states, embeds = model.encode_tokens(batch), model(batch).values
    assert max_diff(states[mask], expected[mask]) <= 1e-5
    assert max_diff(embeds, reference_pool(expected, mask, pooling)) <= 1e-5
    assert torch.isfinite(states).all()


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(config=hf_configs())
def test_round_trip_is_bitwise(config: dict[str, Any]) -> None:
    assert_round_trip(FORMAT, create_modernbert_model, make_hf("ModernBert", config))


@pytest.mark.parametrize("lengths", [[20, 5, 1], [40, 40], [150, 30], [150, 150]])
def test_gradients_equal_transformers(lengths: list[int]) -> None:
    hf = make_hf("ModernBert", {**TINY, "attention_bias": True, "mlp_bias": True, "norm_bias": True})
    assert_gradients_equal(FORMAT, create_modernbert_model, hf, *make_inputs(60, lengths, 0))


def test_dropout_is_where_transformers_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities = {"embedding_dropout": 0.2, "attention_dropout": 0.3, "mlp_dropout": 0.4}
    hf = make_hf("ModernBert", {**TINY, **probabilities, "attn_implementation": "eager"})
    assert_dropout_equal(monkeypatch, hf, load(FORMAT, create_modernbert_model, hf), make_inputs(60, [20] * 4, 0)[0])


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "last"])
@pytest.mark.parametrize("width", [60, 200])
def test_row_does_not_depend_on_the_batch(pooling: Pooling, width: int) -> None:
    model = load(FORMAT, create_modernbert_model, make_hf("ModernBert", TINY, seed=3), HeadConfig(pooling=pooling))
    wide = EncoderBatch.of_text(torch.randint(60, (1, width)), torch.ones(1, width))
    assert_independent_of_batch(model, *make_inputs(60, [20, 5, 1, 13], 0), wide)


@pytest.mark.parametrize("length", [40, 150])
def test_users_choice_of_attention_is_respected(length: int) -> None:
    hf = make_hf("ModernBert", TINY)
    ids, mask = make_inputs(60, [length, 5, 1], 0)
    batch = EncoderBatch.of_text(ids, mask)
    set_default_sdpa_factory(NaiveSDPA)
    try:
        model = load(FORMAT, create_modernbert_model, hf)
    finally:
        set_default_sdpa_factory(TorchSDPA)
    assert all(isinstance(layer.self_attn.sdpa, NaiveSDPA) for layer in model.encoder.layers)
    with torch.no_grad():
        assert max_diff(model(batch).values, load(FORMAT, create_modernbert_model, hf)(batch).values) <= 1e-5


def test_head_of_a_checkpoint_without_one_is_what_its_classifier_pools() -> None:
    for pooling in ("cls", "mean"):
        config = FORMAT.from_hf_config({**TINY, "classifier_pooling": pooling})
        assert config.head == HeadConfig(pooling=pooling)
    assert FORMAT.from_hf_config(TINY, head=HeadConfig(pooling="last")).head.pooling == "last"


def test_defaults_are_those_of_transformers() -> None:
    defaults = transformers.ModernBertConfig().to_dict()
    assert FORMAT.from_hf_config({}) == FORMAT.from_hf_config(defaults) == ModernBertConfig()
    assert find_family("modernbert") == "vembed_modernbert"


def test_config_of_version_5() -> None:
    expected = FORMAT.from_hf_config({**TINY, "global_rope_theta": 500.0, "local_rope_theta": 20.0})
    new = {key: value for key, value in TINY.items() if key != "global_attn_every_n_layers"}
    new["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
    new["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
    }
    assert FORMAT.from_hf_config(new) == expected
    new["layer_types"] = ["full_attention"] * 3
    assert FORMAT.from_hf_config(new).global_attn_interval == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("position_embedding_type", "relative_key"),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("partial_rotary_factor", 0.5),
        ("head_dim", 8),
        ("rope_theta", 20.0),
        ("layer_types", ["sliding_attention", "full_attention", "full_attention"]),
        ("rope_parameters", {"full_attention": {"rope_type": "yarn", "rope_theta": 500.0}}),
        ("pruned_heads", {"0": [1]}),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("hidden_activation", "no_such"),
        ("hidden_size", 20),
        ("hidden_size", "16"),
        ("global_attn_every_n_layers", 0),
        ("local_attention", -2),
        ("global_rope_theta", 0.0),
        ("attention_bias", 1),
        ("mlp_dropout", 1.5),
        ("classifier_pooling", "max"),
    ],
)
def test_unsupported_options_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ModelLoadError, match=f"`{field}`"):
        FORMAT.from_hf_config({**TINY, field: value})


def test_harmless_options_are_accepted() -> None:
    harmless = {
        "position_embedding_type": "absolute", "rope_scaling": None, "reference_compile": True, "head_dim": 4,
        "deterministic_flash_attn": True, "sparse_prediction": True, "classifier_dropout": 0.3, "layer_norm_eps": 0.5,
        "rope_theta": 160000.0, "repad_logits_with_grad": True, "decoder_bias": False,
    }  # fmt: skip
    assert FORMAT.from_hf_config({**TINY, **harmless}) == FORMAT.from_hf_config(TINY)


def test_every_error_of_a_config_is_listed() -> None:
    config = ModernBertConfig(model_dim=36, activation="no_such", ffn_dropout_p=-1.0, num_layers=-1, init_cutoff=0.0)
    config.head = HeadConfig(pooling="pooler")
    with pytest.raises(ConfigError) as info:
        create_modernbert_model(config)
    for field in ("model_dim", "activation", "ffn_dropout_p", "num_layers", "init_cutoff", "head.pooling"):
        assert any(field in error for error in info.value.errors), field


@pytest.mark.parametrize("head", ["MaskedLM", "SequenceClassification"])
def test_heads_are_left_out(head: str) -> None:
    hf = getattr(transformers, f"ModernBertFor{head}")(transformers.ModernBertConfig(**TINY))
    config = FORMAT.from_hf_config(TINY)
    state = FORMAT.from_hf_state_dict(hf.state_dict(), config)
    create_modernbert_model(config).load_state_dict(state)
    assert FORMAT.to_hg_state_dict(state, config).keys() == hf.model.state_dict().keys()
    kept = {"other.weight": torch.zeros(1), "head.dense.0.weight": torch.zeros(1)}
    assert kept.keys() <= FORMAT.from_hf_state_dict({**hf.state_dict(), **kept}, config).keys()


def test_text_longer_than_the_model_was_made_for() -> None:
    hf = make_hf("ModernBert", {**TINY, "max_position_embeddings": 16})
    model = load(FORMAT, create_modernbert_model, hf, HeadConfig(pooling="mean"))
    assert model.max_text_length == 16
    ids = torch.randint(60, (1, 40))
    with torch.no_grad():
        assert max_diff(model(EncoderBatch.of_text(ids)).values, hf(ids)[0].mean(1)) <= 1e-5


@pytest.mark.parametrize(("max_seq_length", "expected"), [(20, 20), (None, 64)])
def test_sentence_transformers_folder(tmp_path: Path, max_seq_length: int | None, expected: int) -> None:
    special = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")
    tokenizer = partial(write_bpe, kls_name="PreTrainedTokenizerFast", special=special)
    backbone = write_folder(tmp_path / "backbone", "ModernBert", {**TINY, "pad_token_id": 1}, tokenizer, 8192)
    folder = build(backbone, tmp_path / "m", "cls", max_seq_length=max_seq_length)
    embedder = assert_embedder_equals(folder, [*TEXTS, LONG_TEXT])
    assert embedder.processor.settings.max_length == expected


def test_is_created_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = create_modernbert_model(FORMAT.from_hf_config(TINY))
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    assert not list(model.named_buffers())


def test_initial_weights_are_drawn_as_transformers_draws_them() -> None:
    config = transformers.ModernBertConfig(**{**TINY, "hidden_size": 128, "intermediate_size": 200})
    hf = transformers.ModernBertModel(config).state_dict()
    ours_config = FORMAT.from_hf_config(config.to_dict())
    ours = FORMAT.to_hg_state_dict(dict(create_modernbert_model(ours_config).state_dict()), ours_config)
    for name, tensor in hf.items():
        other = ours[name]
        assert isinstance(other, torch.Tensor)
        assert abs(float(other.std()) - float(tensor.std())) <= 0.1 * float(tensor.std()), name
        assert float(other.abs().max()) <= float(tensor.abs().max()) * 1.05
