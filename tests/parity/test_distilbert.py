"""DistilBERT against transformers: the same weights, the same outputs, the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vembed_fs2.embedding.model import EncoderBatch, HeadConfig, Pooling
from vembed_fs2.errors import ConfigError, DataError, ModelLoadError
from vembed_fs2.models.bert import BertCheckpointFormat, BertConfig, create_bert_model
from vembed_fs2.models.family import find_family

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
    write_folder,
    write_wordpiece,
)

FORMAT = BertCheckpointFormat()

TINY = {
    "vocab_size": 60,
    "dim": 16,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 24,
    "max_position_embeddings": 24,
}


@st.composite
def hf_configs(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.integers(1, 4))
    vocab_size = draw(st.integers(20, 80))
    return {
        "vocab_size": vocab_size,
        "dim": heads * draw(st.integers(1, 9)),
        "n_layers": draw(st.integers(1, 3)),
        "n_heads": heads,
        "hidden_dim": draw(st.integers(1, 40)),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "dropout": draw(st.sampled_from([0.0, 0.1])),
        "attention_dropout": draw(st.sampled_from([0.0, 0.2])),
        "max_position_embeddings": draw(st.integers(12, 40)),
        "sinusoidal_pos_embds": draw(st.booleans()),
        "initializer_range": draw(st.sampled_from([0.02, 0.1, 0.3])),
        "pad_token_id": draw(st.one_of(st.none(), st.integers(0, vocab_size - 1))),
    }


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(
    config=hf_configs(),
    pooling=st.sampled_from(["cls", "mean", "max", "last"]),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    attention=st.sampled_from(["sdpa", "eager"]),
    chunk=st.integers(0, 1),
    seed=st.integers(0, 100),
)
@example(config=TINY, pooling="cls", lengths=[24, 1], attention="sdpa", chunk=0, seed=0)
def test_equals_transformers(
    config: dict[str, Any], pooling: Pooling, lengths: list[int], attention: str, chunk: int, seed: int
) -> None:
    options = {**config, "attn_implementation": attention, "chunk_size_feed_forward": chunk}
    hf = make_hf("DistilBert", options, seed=seed)
    model = load(FORMAT, create_bert_model, hf, HeadConfig(pooling=pooling))
    ids, mask = make_inputs(config["vocab_size"], lengths, config.get("pad_token_id"))
    with torch.no_grad():
        expected = hf(ids, mask.long())[0]
        batch = EncoderBatch.of_text(ids, mask, torch.ones_like(ids))  # segments are of no use to it
        states, embeds = model.encode_tokens(batch), model(batch).values
    assert max_diff(states[mask], expected[mask]) <= 1e-5
    assert max_diff(embeds, reference_pool(expected, mask, pooling)) <= 1e-5


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(config=hf_configs())
def test_round_trip_is_bitwise(config: dict[str, Any]) -> None:
    assert_round_trip(FORMAT, create_bert_model, make_hf("DistilBert", config))


@pytest.mark.parametrize("dim", [15, 16])
def test_sinusoidal_positions_start_as_those_of_transformers(dim: int) -> None:
    config = transformers.DistilBertConfig(**{**TINY, "dim": dim, "n_heads": 1, "sinusoidal_pos_embds": True})
    hf = transformers.DistilBertModel(config)
    model = create_bert_model(FORMAT.from_hf_config(config.to_dict()))
    expected = hf.embeddings.position_embeddings.weight
    assert not expected.requires_grad
    assert not model.frontend.pos_embed.weight.requires_grad
    assert max_diff(model.frontend.pos_embed.weight, expected) <= 1e-6


@pytest.mark.parametrize("sinusoidal", [False, True])
def test_gradients_equal_transformers(sinusoidal: bool) -> None:
    config = {**TINY, "dropout": 0.0, "attention_dropout": 0.0, "sinusoidal_pos_embds": sinusoidal}
    assert_gradients_equal(FORMAT, create_bert_model, make_hf("DistilBert", config), *make_inputs(60, [20, 5, 1], 0))


def test_dropout_is_where_transformers_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = make_hf("DistilBert", {**TINY, "dropout": 0.3, "attention_dropout": 0.4, "attn_implementation": "eager"})
    assert_dropout_equal(monkeypatch, hf, load(FORMAT, create_bert_model, hf), make_inputs(60, [20] * 4, 0)[0])


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "last"])
def test_row_does_not_depend_on_the_batch(pooling: Pooling) -> None:
    hf = make_hf("DistilBert", {**TINY, "dim": 32, "max_position_embeddings": 200}, seed=3)
    model = load(FORMAT, create_bert_model, hf, HeadConfig(pooling=pooling))
    wide = EncoderBatch.of_text(torch.randint(60, (1, 200)), torch.ones(1, 200))
    assert_independent_of_batch(model, *make_inputs(60, [20, 5, 1, 13], 0), wide)


def test_defaults_are_those_of_transformers() -> None:
    defaults = transformers.DistilBertConfig().to_dict()
    assert FORMAT.from_hf_config({"model_type": "distilbert"}) == FORMAT.from_hf_config(defaults)
    assert find_family("distilbert") == "vembed_bert"


def test_fields_by_their_other_names() -> None:
    other = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {key: value for key, value in TINY.items() if key not in ("dim", "n_layers", "n_heads")}
    expected = FORMAT.from_hf_config({**TINY, "model_type": "distilbert"})
    assert FORMAT.from_hf_config({**config, **other, "model_type": "distilbert"}) == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dim", 18),
        ("dim", "16"),
        ("n_layers", 2.0),
        ("activation", "no_such"),
        ("sinusoidal_pos_embds", 1),
        ("dropout", 1.5),
        ("pruned_heads", {"0": [1]}),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
    ],
)
def test_unsupported_options_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ModelLoadError, match=f"`{field}`"):
        FORMAT.from_hf_config({**TINY, "model_type": "distilbert", field: value})


def test_every_error_of_a_config_is_listed() -> None:
    with pytest.raises(ConfigError) as info:
        create_bert_model(BertConfig(model_type="distilbert", layer_norm_eps=1e-5))
    for field in ("type_vocab_size", "pooler", "layer_norm_eps"):
        assert any(field in error for error in info.value.errors), field


def test_text_longer_than_the_position_table() -> None:
    model = load(FORMAT, create_bert_model, make_hf("DistilBert", TINY))
    with pytest.raises(DataError, match="25 tokens, but the model takes at most 24"):
        model(EncoderBatch.of_text(torch.zeros(1, 25, dtype=torch.int64)))


@pytest.mark.parametrize("head", ["MaskedLM", "SequenceClassification", "QuestionAnswering"])
def test_heads_are_left_out(head: str) -> None:
    hf = getattr(transformers, f"DistilBertFor{head}")(transformers.DistilBertConfig(**TINY))
    old = {**hf.state_dict(), "distilbert.embeddings.position_ids": torch.arange(24).unsqueeze(0)}
    config = FORMAT.from_hf_config({**TINY, "model_type": "distilbert"}, keys=frozenset(old))
    state = FORMAT.from_hf_state_dict(old, config)
    create_bert_model(config).load_state_dict(state)
    assert FORMAT.to_hg_state_dict(state, config).keys() == hf.distilbert.state_dict().keys()


@pytest.mark.parametrize(("max_seq_length", "expected"), [(20, 20), (None, 24)])
def test_sentence_transformers_folder(tmp_path: Path, max_seq_length: int | None, expected: int) -> None:
    backbone = write_folder(tmp_path / "backbone", "DistilBert", TINY, write_wordpiece, 512)
    folder = build(backbone, tmp_path / "m", "mean", max_seq_length=max_seq_length)
    embedder = assert_embedder_equals(folder, [*TEXTS, LONG_TEXT])
    assert embedder.processor.settings.max_length == expected


def test_is_created_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = create_bert_model(FORMAT.from_hf_config({**TINY, "model_type": "distilbert"}))
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    assert not list(model.named_buffers())
