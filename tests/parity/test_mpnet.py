"""MPNet against transformers: the same weights, the same outputs, the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vembed_fs2.embedding.model import EncoderBatch, HeadConfig, Pooling
from vembed_fs2.errors import DataError, ModelLoadError
from vembed_fs2.models.bert import BertCheckpointFormat, create_bert_model
from vembed_fs2.models.bert.relative import RelativeSDPA
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
    write_mpnet_wordpiece,
)

FORMAT = BertCheckpointFormat()

TINY = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 26,
}


@st.composite
def hf_configs(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.integers(1, 4))
    return {
        "vocab_size": draw(st.integers(20, 80)),
        "hidden_size": heads * draw(st.integers(1, 9)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "intermediate_size": draw(st.integers(1, 40)),
        "hidden_act": draw(st.sampled_from(ACTIVATIONS)),
        "hidden_dropout_prob": draw(st.sampled_from([0.0, 0.1])),
        "attention_probs_dropout_prob": draw(st.sampled_from([0.0, 0.2])),
        "max_position_embeddings": 2 + draw(st.integers(200, 220)),
        "initializer_range": draw(st.sampled_from([0.02, 0.1, 0.3])),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-7, 1e-5, 1e-2])),
        "relative_attention_num_buckets": draw(st.sampled_from([32, 32, 40])),
    }


def make(config: dict[str, Any], *, seed: int = 0, **kwargs: Any) -> Any:
    """With biases of a size that counts."""
    hf = make_hf("MPNet", config, seed=seed, **kwargs)
    with torch.no_grad():
        hf.encoder.relative_attention_bias.weight.normal_()
    return hf


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(
    config=hf_configs(),
    pooler=st.booleans(),
    pooling=st.sampled_from(["cls", "mean", "max", "last", "pooler"]),
    lengths=st.lists(st.sampled_from([1, 2, 5, 8, 9, 12, 150]), min_size=1, max_size=4),
    seed=st.integers(0, 100),
)
@example(config=TINY, pooler=True, pooling="pooler", lengths=[24, 1], seed=0)
@example(config={**TINY, "max_position_embeddings": 202}, pooler=False, pooling="mean", lengths=[200, 40], seed=0)
def test_equals_transformers(
    config: dict[str, Any], pooler: bool, pooling: Pooling, lengths: list[int], seed: int
) -> None:
    hf = make(config, seed=seed, add_pooling_layer=pooler or pooling == "pooler")
    model = load(FORMAT, create_bert_model, hf, HeadConfig(pooling=pooling))
    ids, mask = make_inputs(config["vocab_size"], lengths, 1)
    with torch.no_grad():
        expected = hf(ids, mask.long())
        batch = EncoderBatch.of_text(ids, mask, torch.ones_like(ids))  # segments are of no use to it
        states, embeds = model.encode_tokens(batch), model(batch).values
    pooled = expected.pooler_output if pooling == "pooler" else reference_pool(expected[0], mask, pooling)
    assert max_diff(states[mask], expected[0][mask]) <= 1e-5
    assert max_diff(embeds, pooled) <= 1e-5


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(config=hf_configs(), pooler=st.booleans())
def test_round_trip_is_bitwise(config: dict[str, Any], pooler: bool) -> None:
    assert_round_trip(FORMAT, create_bert_model, make(config, add_pooling_layer=pooler))


def test_biases_of_all_distances_equal_transformers() -> None:
    hf = make({**TINY, "max_position_embeddings": 702})
    model = load(FORMAT, create_bert_model, hf)
    for length in (1, 2, 17, 700):
        expected = hf.encoder.compute_position_bias(torch.zeros(1, length, 16))[0]
        assert torch.equal(model.relative_positions(length), expected)


@pytest.mark.parametrize("lengths", [[20, 5, 1], [20, 20]])
def test_gradients_equal_transformers(lengths: list[int]) -> None:
    hf = make({**TINY, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    assert_gradients_equal(FORMAT, create_bert_model, hf, *make_inputs(60, lengths, 1))


def test_dropout_is_where_transformers_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = make({**TINY, "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.4})
    assert_dropout_equal(monkeypatch, hf, load(FORMAT, create_bert_model, hf), make_inputs(60, [20] * 4, 1)[0])


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "last", "pooler"])
def test_row_does_not_depend_on_the_batch(pooling: Pooling) -> None:
    hf = make({**TINY, "hidden_size": 32, "max_position_embeddings": 202}, seed=3)
    model = load(FORMAT, create_bert_model, hf, HeadConfig(pooling=pooling))
    wide = EncoderBatch.of_text(torch.randint(60, (1, 200)), torch.ones(1, 200))
    assert_independent_of_batch(model, *make_inputs(60, [20, 5, 1, 13], 1), wide)


def test_half_precision_is_close() -> None:
    model = load(FORMAT, create_bert_model, make(TINY))
    batch = EncoderBatch.of_text(*make_inputs(60, [20, 5, 1], 1))
    expected = model(batch).values
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(batch).values
    assert torch.nn.functional.cosine_similarity(actual.float(), expected).min() > 0.999


def test_defaults_are_those_of_transformers() -> None:
    defaults = transformers.MPNetConfig().to_dict()
    config = FORMAT.from_hf_config({"model_type": "mpnet"})
    assert config == FORMAT.from_hf_config(defaults)
    assert find_family("mpnet") == "vembed_bert"
    model = create_bert_model(config)
    assert model.max_text_length == 510
    assert all(isinstance(layer.self_attn.sdpa, RelativeSDPA) for layer in model.encoder.layers)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("relative_attention_num_buckets", 31),
        ("pad_token_id", 0),
        ("pad_token_id", None),
        ("position_embedding_type", "relative_key"),
        ("pruned_heads", {"0": [1]}),
        ("hidden_act", "no_such"),
        ("hidden_size", 18),
        ("layer_norm_eps", "1e-5"),
    ],
)
def test_unsupported_options_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ModelLoadError, match=f"`{field}`"):
        FORMAT.from_hf_config({**TINY, "model_type": "mpnet", field: value})


def test_text_longer_than_the_position_table() -> None:
    model = load(FORMAT, create_bert_model, make(TINY))
    with pytest.raises(DataError, match="25 tokens, but the model takes at most 24"):
        model(EncoderBatch.of_text(torch.full((1, 25), 7)))


@pytest.mark.parametrize("head", ["MPNetForMaskedLM", "MPNetForSequenceClassification", "MPNetForQuestionAnswering"])
def test_heads_are_left_out(head: str) -> None:
    hf = getattr(transformers, head)(transformers.MPNetConfig(**TINY))
    old = {**hf.state_dict(), "mpnet.embeddings.position_ids": torch.arange(26).unsqueeze(0)}
    config = FORMAT.from_hf_config({**TINY, "model_type": "mpnet"}, keys=frozenset(old))
    state = FORMAT.from_hf_state_dict(old, config)
    create_bert_model(config).load_state_dict(state)
    assert FORMAT.to_hg_state_dict(state, config).keys() == hf.mpnet.state_dict().keys()


@pytest.mark.parametrize(("max_seq_length", "expected"), [(20, 20), (None, 24)])
def test_sentence_transformers_folder(tmp_path: Path, max_seq_length: int | None, expected: int) -> None:
    backbone = write_folder(tmp_path / "backbone", "MPNet", TINY, write_mpnet_wordpiece, 24)
    folder = build(backbone, tmp_path / "m", "mean", max_seq_length=max_seq_length)
    embedder = assert_embedder_equals(folder, [*TEXTS, LONG_TEXT])
    assert embedder.processor.settings.max_length == expected


def test_is_created_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = create_bert_model(FORMAT.from_hf_config({**TINY, "model_type": "mpnet"}))
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    assert not list(model.named_buffers())
