"""RoBERTa, XLM-RoBERTa and CamemBERT against transformers: the same weights, the same outputs, the same files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vembed_fs2 import Embedder
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
    write_bpe,
    write_folder,
    write_unigram,
)

FORMAT = BertCheckpointFormat()

TYPES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}

TINY = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 26,
    "type_vocab_size": 1,
    "pad_token_id": 1,
}

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


@st.composite
def hf_configs(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.integers(1, 4))
    pad = draw(st.integers(0, 5))
    return {
        "vocab_size": draw(st.integers(20, 80)),
        "hidden_size": heads * draw(st.integers(1, 9)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "intermediate_size": draw(st.integers(1, 40)),
        "hidden_act": draw(st.sampled_from(ACTIVATIONS)),
        "hidden_dropout_prob": draw(st.sampled_from([0.0, 0.1])),
        "attention_probs_dropout_prob": draw(st.sampled_from([0.0, 0.2])),
        "max_position_embeddings": pad + 1 + draw(st.integers(12, 40)),
        "type_vocab_size": draw(st.integers(1, 3)),
        "initializer_range": draw(st.sampled_from([0.02, 0.1, 0.3])),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-7, 1e-5, 1e-2])),
        "pad_token_id": pad,
    }


@pytest.mark.parametrize("model_type", TYPES)
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    config=hf_configs(),
    pooler=st.booleans(),
    pooling=st.sampled_from(["cls", "mean", "max", "last", "pooler"]),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    types=st.booleans(),
    attention=st.sampled_from(["sdpa", "eager"]),
    chunk=st.integers(0, 1),
    seed=st.integers(0, 100),
)
@example(config=TINY, pooler=True, pooling="pooler", lengths=[24, 1], types=False, attention="sdpa", chunk=0, seed=0)
def test_equals_transformers(
    model_type: str,
    config: dict[str, Any],
    pooler: bool,
    pooling: Pooling,
    lengths: list[int],
    types: bool,
    attention: str,
    chunk: int,
    seed: int,
) -> None:
    options = {**config, "attn_implementation": attention, "chunk_size_feed_forward": chunk}
    hf = make_hf(TYPES[model_type], options, seed=seed, add_pooling_layer=pooler or pooling == "pooler")
    model = load(FORMAT, create_bert_model, hf, HeadConfig(pooling=pooling))
    ids, mask = make_inputs(config["vocab_size"], lengths, config["pad_token_id"])
    type_ids = torch.randint(config["type_vocab_size"], ids.shape) if types else None
    with torch.no_grad():
        expected = hf(ids, mask.long(), type_ids)
        batch = EncoderBatch.of_text(ids, mask, type_ids)
        states, embeds = model.encode_tokens(batch), model(batch).values
    pooled = expected.pooler_output if pooling == "pooler" else reference_pool(expected[0], mask, pooling)
    assert max_diff(states[mask], expected[0][mask]) <= 1e-5
    assert max_diff(embeds, pooled) <= 1e-5


@pytest.mark.parametrize("model_type", TYPES)
@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(config=hf_configs(), pooler=st.booleans())
def test_round_trip_is_bitwise(model_type: str, config: dict[str, Any], pooler: bool) -> None:
    assert_round_trip(FORMAT, create_bert_model, make_hf(TYPES[model_type], config, add_pooling_layer=pooler))


def test_padding_may_have_any_id() -> None:
    hf = make_hf("Roberta", TINY)
    model = load(FORMAT, create_bert_model, hf)
    ids, mask = make_inputs(60, [24, 5, 1], 1)
    with torch.no_grad():
        expected = model(EncoderBatch.of_text(ids, mask)).values
        for other in (0, 7):
            assert torch.equal(model(EncoderBatch.of_text(ids.masked_fill(~mask, other), mask)).values, expected)
        unmasked = hf(ids)[0].mean(1)
        assert max_diff(model(EncoderBatch.of_text(ids)).values, unmasked) <= 1e-5


def test_positions_are_never_beyond_the_table() -> None:
    model = load(FORMAT, create_bert_model, make_hf("Roberta", TINY))
    assert model.max_text_length == 24
    full = torch.full((1, 24), 7)
    assert torch.isfinite(model(EncoderBatch.of_text(full)).values).all()
    with pytest.raises(DataError, match="25 tokens, but the model takes at most 24"):
        model(EncoderBatch.of_text(torch.full((1, 25), 7)))


def test_gradients_equal_transformers() -> None:
    hf = make_hf("XLMRoberta", {**TINY, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    assert_gradients_equal(FORMAT, create_bert_model, hf, *make_inputs(60, [20, 5, 1], 1))


def test_dropout_is_where_transformers_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.4}
    hf = make_hf("Roberta", {**TINY, **probabilities, "attn_implementation": "eager"})
    assert_dropout_equal(monkeypatch, hf, load(FORMAT, create_bert_model, hf), make_inputs(60, [20] * 4, 1)[0])


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "last", "pooler"])
def test_row_does_not_depend_on_the_batch(pooling: Pooling) -> None:
    hf = make_hf("XLMRoberta", {**TINY, "hidden_size": 32, "max_position_embeddings": 202}, seed=3)
    model = load(FORMAT, create_bert_model, hf, HeadConfig(pooling=pooling))
    wide = EncoderBatch.of_text(torch.randint(60, (1, 200)), torch.ones(1, 200))
    assert_independent_of_batch(model, *make_inputs(60, [20, 5, 1, 13], 1), wide)


@pytest.mark.parametrize("model_type", TYPES)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    defaults = getattr(transformers, f"{TYPES[model_type]}Config")().to_dict()
    assert FORMAT.from_hf_config({"model_type": model_type}) == FORMAT.from_hf_config(defaults)
    assert find_family(model_type) == "vembed_bert"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("pruned_heads", {"0": [1]}),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("hidden_act", "no_such"),
        ("hidden_size", 18),
        ("hidden_size", "16"),
        ("pad_token_id", None),
        ("pad_token_id", -1),
        ("pad_token_id", 25),
        ("type_vocab_size", 0),
    ],
)
def test_unsupported_options_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ModelLoadError, match=f"`{field}`"):
        FORMAT.from_hf_config({**TINY, "model_type": "xlm-roberta", field: value})


def test_every_error_of_a_config_is_listed() -> None:
    config = BertConfig(model_type="roberta", pad_idx=None, type_vocab_size=0, num_relative_buckets=3)
    config.sinusoidal_positions = True
    with pytest.raises(ConfigError) as info:
        create_bert_model(config)
    for field in ("pad_idx", "type_vocab_size", "num_relative_buckets", "sinusoidal_positions"):
        assert any(field in error for error in info.value.errors), field
    with pytest.raises(ConfigError, match="`model_type` must be one of bert, roberta"):
        create_bert_model(BertConfig(model_type="no_such"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "head", ["RobertaForMaskedLM", "RobertaForSequenceClassification", "RobertaForQuestionAnswering"]
)
def test_heads_are_left_out(head: str) -> None:
    hf = getattr(transformers, head)(transformers.RobertaConfig(**TINY))
    old = {**hf.state_dict(), "roberta.embeddings.position_ids": torch.arange(26).unsqueeze(0)}
    config = FORMAT.from_hf_config({**TINY, "model_type": "roberta"}, keys=frozenset(old))
    state = FORMAT.from_hf_state_dict(old, config)
    create_bert_model(config).load_state_dict(state)
    assert FORMAT.to_hg_state_dict(state, config).keys() == hf.roberta.state_dict().keys()
    assert "other.weight" in FORMAT.from_hf_state_dict({**old, "other.weight": torch.zeros(1)}, config)


def test_architecture_without_pooler_leaves_it_out() -> None:
    hf = make_hf("Roberta", TINY)
    config = FORMAT.from_hf_config({**TINY, "model_type": "roberta"})
    config.pooler = False
    create_bert_model(config).load_state_dict(FORMAT.from_hf_state_dict(hf.state_dict(), config))


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_sentence_transformers_folder(tmp_path: Path, model_type: str, pooling: str) -> None:
    bpe = partial(write_bpe, kls_name="RobertaTokenizerFast", special=SPECIAL)
    tokenizer = write_unigram if model_type == "xlm-roberta" else bpe
    backbone = write_folder(tmp_path / "backbone", TYPES[model_type], TINY, tokenizer, 512)
    folder = build(backbone, tmp_path / "m", pooling, max_seq_length=20)
    embedder = assert_embedder_equals(folder, [*TEXTS, LONG_TEXT])
    assert embedder.processor.settings.max_length == 20
    plain = Embedder.load(backbone, device="cpu")
    assert plain.encode([LONG_TEXT]).shape == (1, 16)


@pytest.mark.parametrize(("tokenizer_limit", "expected"), [(24, 24), (512, 24), (10**30, 24), (18, 18)])
def test_no_max_seq_length(tmp_path: Path, tokenizer_limit: int, expected: int) -> None:
    backbone = write_folder(tmp_path / "backbone", "XLMRoberta", TINY, write_unigram, tokenizer_limit)
    folder = build(backbone, tmp_path / "m", "mean", max_seq_length=None)
    # sentence-transformers goes two tokens beyond the table, unless the tokenizer stops it.
    embedder = assert_embedder_equals(folder, ["x", *([LONG_TEXT] if tokenizer_limit <= 24 else [])])
    assert embedder.processor.settings.max_length == expected
    assert embedder.encode([LONG_TEXT]).shape == (1, 16)


def test_is_created_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = create_bert_model(FORMAT.from_hf_config({**TINY, "model_type": "roberta"}))
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    assert not list(model.named_buffers())


def test_initial_weights_are_drawn_as_transformers_draws_them() -> None:
    hf = transformers.RobertaModel(transformers.RobertaConfig(**{**TINY, "vocab_size": 4000}))
    model = create_bert_model(FORMAT.from_hf_config(hf.config.to_dict()))
    for embed in (model.frontend.embed, model.frontend.pos_embed):
        assert not embed.weight[1].any()
    expected = hf.embeddings.word_embeddings.weight.std()
    assert abs(model.frontend.embed.weight.std() / expected - 1) < 0.05
